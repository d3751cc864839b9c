"""Steps of recorded calls against the steps that they were recorded of, to the bit."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import aefast
from aefast.errors import InputError
from aefast.models import MODELS, VAE, Autoencoder, SparseAutoencoder
from aefast.models.sparse import SPARSITIES
from aefast.ops import _registry
from aefast.train import CapturedStep, make_optimizer
from aefast.train.replay import WARM_UP_STEPS, _Recorder
from support import numerics
from support.training import SPARSE

DENSE = {"hidden": (16,), "latent": 4}
CASES = [
    *((MODELS[name], DENSE) for name in sorted(MODELS) if name != "sparse"),
    *(
        (SparseAutoencoder, {"latent": 24, "sparsity": name, "aux_weight": 0.0, **SPARSE[name]})
        for name in ("topk", "batchtopk")
    ),
    *(
        (SparseAutoencoder, {"latent": 24, "sparsity": name, **SPARSE[name]})
        for name in sorted(set(SPARSITIES) - {"batchtopk"})
    ),
    (Autoencoder, {**DENSE, "loss": "pyramid", "image_shape": (1, 6, 6), "pyramid_levels": 2}),
    (Autoencoder, {**DENSE, "loss": "bce", "output_activation": "sigmoid"}),
    (MODELS["denoising"], {**DENSE, "noise": "masking", "noise_p": 0.3}),
    (VAE, {**DENSE, "kl_warmup_steps": 30, "likelihood": "bernoulli"}),
    (VAE, {**DENSE, "beta": 2.0, "likelihood": "gaussian"}),
    (SparseAutoencoder, {"latent": 24, "sparsity": "l1", "sparsity_warmup_steps": 30}),
    (MODELS["infovae"], {**DENSE, "mmd_prior": "samples", "kl_weight": 0.0}),
]

pytestmark = pytest.mark.usefixtures("cpu_library")


@pytest.fixture
def cpu_library():
    numerics.require_backend("cpu", "mlp", "cpu", torch.float32)


def make(cls=Autoencoder, **options):
    torch.manual_seed(0)
    return cls(input_size=36, **(options or DENSE))


def batches(count, size=20):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size, 36, generator=generator) for _ in range(count)]


def step_of(model, **options):
    return CapturedStep(model, make_optimizer(model.parameters(), 1e-2), **options)


def recorded(model, **options):
    """A step that has been recorded."""
    step = step_of(model, **options)
    for batch in batches(WARM_UP_STEPS + 2):
        step(batch)
    assert step._replay._recorded is not None
    return step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_replays_are_the_steps(cls, options, precision, monkeypatch):
    """With a batch of another size and with a checkpoint's way through the state between them."""
    forwards, forward = [], cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: forwards.append(self) or forward(self, x))
    model = make(cls, **options)
    expected = copy.deepcopy(model)
    data = [*batches(WARM_UP_STEPS + 5), *batches(1, size=7), *batches(6)]
    found = []
    for one, count in ((model, 1), (expected, 0)):
        step = step_of(one, precision=precision, steps_per_replay=count, clip_norm=0.5, ema_decay=0.9)
        torch.manual_seed(5)
        terms = []
        for index, batch in enumerate(data):
            terms.append(step(batch))
            if index == WARM_UP_STEPS + 2:
                one.load_state_dict(copy.deepcopy(one.state_dict()))
        is_recorded = step._replay is not None and step._replay._recorded is not None
        assert is_recorded == (count > 0 and model.can_be_captured)
        found.append((terms, step, torch.get_rng_state()))
    (ours, step, random), (theirs, plain, expected_random) = found
    # Before it is recorded, then, and on the batch of another size.
    assert forwards.count(model) == (WARM_UP_STEPS + 2 if model.can_be_captured else len(data))
    for one, other in zip(ours, theirs, strict=True):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) and not one[name].requires_grad for name in other)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for one, other in zip(step.ema, plain.ema, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(random, expected_random)


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def add_hook(model):
    model.decoder.layers[0].register_forward_hook(lambda *arguments: None)


def add_hook_of_parameter(model):
    model.encoder.layers[0].weight.register_hook(lambda gradient: None)


def freeze(model):
    model.encoder.layers[0].weight.requires_grad_(False)


def replace(model):
    layer = model.encoder.layers[0]
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def evaluate_a_part(model):
    model.decoder.eval()


def give_a_forward(model):
    model.decoder.forward = model.decoder.forward


def change_an_option(model):
    model.decoder.layers[0].activation = "tanh"


def exchange_a_part(model):
    model.decoder = copy.deepcopy(model.decoder)


CHANGES = [
    *(add_hook, add_hook_of_parameter, freeze, replace),
    *(evaluate_a_part, give_a_forward, change_an_option, exchange_a_part),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_takes_its_own_steps(change, monkeypatch):
    forwards, forward = [], Autoencoder.forward
    # Before a step is recorded: another forward is a change by itself.
    monkeypatch.setattr(Autoencoder, "forward", lambda self, x: forwards.append(self) or forward(self, x))
    model = make()
    expected = copy.deepcopy(model)
    step, plain = recorded(model), step_of(expected, steps_per_replay=0)
    for batch in batches(WARM_UP_STEPS + 2):
        plain(batch)
    change(model)
    change(expected)
    forwards.clear()
    # Of a replaced parameter the optimizer knows nothing.
    for batch in batches(3):
        assert torch.equal(step(batch)["mse"], plain(batch)["mse"])
    assert forwards.count(model) == 3
    if change in (freeze, replace, change_an_option, exchange_a_part):
        # They are recorded as they are now.
        for batch in batches(2 * WARM_UP_STEPS):
            assert torch.equal(step(batch)["mse"], plain(batch)["mse"])
        assert step._replay._recorded is not None
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other) and (one.grad is None) == (other.grad is None)


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: aefast.backend("eager"),
        Watcher,
        torch.autograd.detect_anomaly,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda one: one.numpy().copy(), torch.from_numpy),
    ],
)
def test_surroundings_are_heeded(surroundings, monkeypatch):
    forwards, forward = [], Autoencoder.forward
    monkeypatch.setattr(Autoencoder, "forward", lambda self, x: forwards.append(self) or forward(self, x))
    model = make()
    step = recorded(model)
    forwards.clear()
    (batch,) = batches(1)
    step(batch)
    assert forwards == []
    with surroundings():
        step(batch)
    assert forwards == [model]
    step(batch)
    assert forwards == [model]
    with surroundings():
        another = step_of(make())
        for batch in batches(WARM_UP_STEPS + 2):
            another(batch)
    assert another._replay._recorded is None


@pytest.mark.parametrize(
    "name", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]
)
@pytest.mark.filterwarnings("ignore:.*[Bb]ackward hook")
def test_hooks_of_all_modules_run(name):
    register, calls = getattr(nn.modules.module, f"register_module_{name}"), []
    model, another = make(), make()
    step = recorded(model)
    with register(lambda module, *arguments: calls.append(module)):
        for batch in batches(2):
            step(batch)
        assert calls.count(model.decoder) == 2
        of_another = step_of(another)
        for batch in batches(WARM_UP_STEPS + 1):
            of_another(batch)
        assert calls.count(another.decoder) == WARM_UP_STEPS + 1
    # What a hook has made of a step is not replayed when the hook is gone.
    assert of_another._replay._recorded is None


def test_another_model_and_other_batches_are_heeded(monkeypatch):
    forwards, forward = [], Autoencoder.forward
    monkeypatch.setattr(Autoencoder, "forward", lambda self, x: forwards.append(self) or forward(self, x))
    model, other = make(), make()
    step = recorded(model)
    forwards.clear()
    (batch,) = batches(1)
    for one in (batch.t().contiguous().t(), batch.double()[:, ::2].float().repeat(1, 2).requires_grad_()):
        step(one)
    with torch.inference_mode():
        inference = torch.rand(20, 36)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        step(inference)
    assert forwards == [model] * 3
    step.model = other
    step(batch)
    assert forwards == [model] * 3 + [other]


def test_copies_record_steps_of_their_own():
    step = recorded(make())
    copies = [copy.deepcopy(step), pickle.loads(pickle.dumps(step))]
    data = batches(WARM_UP_STEPS + 3)
    expected = [step(batch)["mse"] for batch in data]
    for one in copies:
        assert one._replay._recorded is None
        assert [one(batch)["mse"] for batch in data] == expected
        assert one._replay._recorded is not None


class Own(Autoencoder):
    """Of a user, whose forward may do anything."""


def test_what_is_not_recorded():
    model = make(Own)
    step = step_of(model)
    for batch in batches(WARM_UP_STEPS + 2):
        step(batch)
    assert step._replay._recorded is None
    assert step_of(make(), accumulate=2)._replay is None
    assert step_of(make(), loss=lambda model, x: model(x).loss)._replay is None
    assert step_of(make(), precision="fp16")._replay is None
    parametrized = make()
    nn.utils.parametrizations.weight_norm(parametrized.encoder.layers[0])
    step = step_of(parametrized)
    for batch in batches(WARM_UP_STEPS + 2):
        step(batch)
    assert step._replay._recorded is None


@pytest.mark.parametrize("change", [add_hook, add_hook_of_parameter, evaluate_a_part, give_a_forward])
def test_a_model_with_something_on_it_is_not_recorded(change):
    model = make()
    change(model)
    step = step_of(model)
    for batch in batches(WARM_UP_STEPS + 2):
        step(batch)
    assert step._replay._recorded is None


def test_numbers_that_torch_has_not_made_are_made_anew(monkeypatch):
    """By a forward in the place of the class's, with noise of NumPy's."""
    forward = Autoencoder.forward

    def losses(count):
        generator = np.random.default_rng(0)

        def noisy(self, x):
            return forward(self, x + torch.from_numpy(generator.random(36, dtype=np.float32)))

        monkeypatch.setattr(Autoencoder, "forward", noisy)
        step = step_of(make(), steps_per_replay=count)
        return [step(batch)["mse"].item() for batch in batches(WARM_UP_STEPS + 3)]

    assert losses(1) == losses(0)


@pytest.mark.parametrize(
    ("cls", "options", "change"),
    [
        (MODELS["denoising"], DENSE, lambda model: model.noise.options.update(std=2.0)),
        (
            Autoencoder,
            {**DENSE, "loss": "huber"},
            lambda model: model.decoder_loss.options.update(delta=0.01),
        ),
        (
            VAE,
            DENSE,
            lambda model: setattr(model, "config", dataclasses.replace(model.config, beta=3.0)),
        ),
    ],
)
def test_options_that_change_are_heeded(cls, options, change):
    model = make(cls, **options)
    expected = copy.deepcopy(model)
    found = []
    for one, count in ((model, 1), (expected, 0)):
        step = step_of(one, steps_per_replay=count)
        torch.manual_seed(3)
        terms = [step(batch) for batch in batches(WARM_UP_STEPS + 3)]
        change(one)
        terms += [step(batch) for batch in batches(2)]
        found.append([one.item() for of_step in terms for one in of_step.values()])
    assert found[0] == found[1]


@pytest.mark.parametrize("after", [WARM_UP_STEPS, WARM_UP_STEPS + 1])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (MODELS["denoising"], {**DENSE, "loss": "bce", "output_activation": "sigmoid"}),
        (VAE, {**DENSE, "likelihood": "bernoulli", "kl_warmup_steps": 20}),
    ],
)
def test_a_batch_that_is_refused_leaves_nothing_behind(cls, options, after):
    (bad,) = batches(1)
    bad[3, 4] = 1.5
    found = []
    for count in (1, 0):
        step = step_of(make(cls, **options), steps_per_replay=count)
        torch.manual_seed(3)
        terms = []
        for index, batch in enumerate(batches(WARM_UP_STEPS + 5)):
            if index == after:
                with pytest.raises(InputError):
                    step(bad)
            terms.append(step(batch))
        found.append([one.item() for of_step in terms for one in of_step.values()])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "options",
    [
        {"cls": VAE, **DENSE, "likelihood": "bernoulli"},
        {"cls": Autoencoder, **DENSE, "loss": "bce", "output_activation": "sigmoid"},
        {"cls": Autoencoder, **DENSE, "loss": "bce_with_logits"},
    ],
)
@pytest.mark.parametrize("after", [WARM_UP_STEPS, WARM_UP_STEPS + 1])
def test_numbers_that_are_no_probabilities_are_named(options, after):
    """In a step that is recorded, and in one that is replayed."""
    step = step_of(make(**options))
    for batch in batches(after):
        step(batch)
    (batch,) = batches(1)
    batch[3, 4] = 1.5
    with pytest.raises(InputError, match=r"1\.5"):
        step(batch)


@pytest.mark.parametrize("after", [WARM_UP_STEPS, WARM_UP_STEPS + 1])
def test_samples_are_checked(after):
    """By the model, whose loss, of logits, takes a NaN."""
    step = step_of(make(VAE, **DENSE, likelihood="bernoulli"))
    for batch in batches(after):
        step(batch)
    (batch,) = batches(1)
    batch[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"expected values in \[0, 1\].*got values from nan"):
        step(batch)


@pytest.mark.parametrize("after", [WARM_UP_STEPS, WARM_UP_STEPS + 1])
def test_a_step_whose_kernel_fails_is_the_models(after, monkeypatch):
    """As where there is no memory. What the step has drawn and counted by then is drawn and counted once."""
    kernels, left = _registry.kernels, []

    def failing(name, op):
        if op == "mlp" and left and left.pop() == "fails":
            raise RuntimeError("no memory")
        return kernels(name, op)

    monkeypatch.setattr(_registry, "kernels", failing)
    found = []
    for count in (1, 0):
        step = step_of(make(VAE, **DENSE, kl_warmup_steps=30), steps_per_replay=count)
        torch.manual_seed(3)
        terms = []
        for index, batch in enumerate(batches(WARM_UP_STEPS + 5)):
            if index == after and count > 0:
                # Encoder and decoder are through when the decoder's backward fails.
                left[:] = ["fails", "works", "works"]
            terms.append(step(batch))
        assert left == []
        found.append([one.item() for of_step in terms for one in of_step.values()])
    assert found[0] == found[1]


def test_a_loss_that_is_no_number_is_none_of_a_replay_either():
    step = recorded(make())
    (batch,) = batches(1)
    batch[3, 4] = float("nan")
    assert step(batch)["mse"].isnan()


def test_gradients_that_are_there_are_added_to():
    model = make()
    step = recorded(model)
    (batch,) = batches(1)
    step._update.step = step._update.zero_grad = lambda *_: None
    model.zero_grad()
    step(batch)
    once = [one.grad.clone() for one in model.parameters()]
    step(batch)
    for one, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(one.grad, 2 * gradient, rtol=0, atol=0)


@pytest.mark.parametrize(("cls", "options"), [(VAE, DENSE), (MODELS["infovae"], DENSE), (Autoencoder, DENSE)])
def test_what_depends_on_shapes_alone_is_not_made_anew(cls, options):
    """The gradient of the loss by itself, of means, and slices that nobody reads."""
    step = recorded(make(cls, **options))
    (batch,) = batches(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(batch)
    made = {event.name for event in profile.events()}
    assert not made & {"aten::ones_like", "aten::zeros_like", "aten::expand", "aten::div", "aten::slice"}


def test_calls_that_write_to_any_argument_are_made_again():
    x, other = batches(2)
    module = nn.Module()
    module.register_buffer("number", torch.tensor(1.0))

    def compute(x):
        zeros = torch.zeros_like(x)
        torch.add(module.number, 1, out=zeros[0, 0])
        return x + 2 * zeros

    recorder = _Recorder(module, x)
    with recorder:
        result = compute(x)
    run = recorder.compiled([result])
    module.number.fill_(5)
    assert torch.equal(run(other, *recorder.constants)[0], compute(other))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: torch.ones_like(x),
        lambda x: torch.ones_like(x[:1]).expand(x.shape),
        lambda x: torch.zeros_like(x)[1:] * 2,
        lambda x: torch.zeros_like(x).add_(x) * 2,
        lambda x: torch.zeros_like(x) + torch.zeros_like(x).t().contiguous().t().copy_(x),
        lambda x: x * torch.full_like(x, 0.5) + torch.rand_like(x),
        lambda x: (torch.rand_like(x), x * 2)[1],
        lambda x: x + torch.zeros_like(x).to_sparse().to_dense(),
    ],
)
def test_calls_are_made_again_on_memory_of_their_own(compute):
    """Whoever gets a result may write to it."""
    x, other = batches(2)
    recorder = _Recorder(nn.Identity(), x)
    with recorder:
        result = compute(x)
    run = recorder.compiled([result])
    if result.stride(0):
        result.fill_(7)
    for _ in range(2):
        torch.manual_seed(3)
        expected, random = compute(other), torch.get_rng_state()
        torch.manual_seed(3)
        (found,) = run(other, *recorder.constants)
        assert torch.equal(found, expected)
        assert torch.equal(torch.get_rng_state(), random)
        if found.stride(0):
            found.fill_(7)
