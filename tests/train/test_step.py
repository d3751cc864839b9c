"""The training step against the loop it stands for, and on a GPU against itself without a graph."""

import contextlib
import copy
import math
import pickle
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import aefast
from aefast.errors import InputError
from aefast.models import MODELS, VAE, Autoencoder, InfoVAE, SparseAutoencoder
from aefast.models.sparse import SPARSITIES
from aefast.train import CapturedStep, Schedule, make_optimizer
from aefast.train.step import _is_on_device, without_replays
from aefast.train.update import Update
from support import graphs
from support.training import SPARSE


def make_model(seed=0, cls=Autoencoder, **options):
    torch.manual_seed(seed)
    return cls(input_size=16, hidden=(8,), latent=4, **options)


def batches(count, size=12, features=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size, features, generator=generator) for _ in range(count)]


def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def plain(model, data, *, lr=1e-2, before_update=lambda optimizer, step: None):
    """The loop that a step stands for, with the same update; the losses."""
    optimizer, losses = make_optimizer(model.parameters(), lr), []
    update = Update(optimizer)
    for step, batch in enumerate(data):
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        before_update(optimizer, step)
        update.step()
        losses.append(loss.item())
    return losses


def taken(model, data, lr=1e-2, **options):
    step = CapturedStep(model, make_optimizer(model.parameters(), lr), **options)
    return step, [step(batch)["mse"].item() for batch in data]


def test_steps_are_those_of_the_plain_loop():
    model, data = make_model(), batches(5)
    expected = copy.deepcopy(model)
    losses = plain(expected, data)
    step, ours = taken(model, data)
    assert ours == losses
    assert step.count == 5
    assert torch.equal(parameters(model), parameters(expected))


def test_several_steps_are_one_after_the_other():
    model, data = make_model(), [*batches(3), *batches(2, size=5)]
    expected = copy.deepcopy(model)
    _, losses = taken(expected, data)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), steps_per_replay=2)
    assert step.many(data)["mse"].tolist() == losses
    assert torch.equal(parameters(model), parameters(expected))


def test_gradients_are_clipped_as_torch_does():
    model, data = make_model(), batches(4)
    expected, norms = copy.deepcopy(model), []

    def clip(optimizer, step):
        norms.append(nn.utils.clip_grad_norm_(expected.parameters(), 0.05).item())

    plain(expected, data, before_update=clip)
    taken(model, data, clip_norm=0.05)
    assert max(norms) > 0.05
    # The norm is torch's to rounding, and each step may round parameters below 1 to the next number.
    atol = len(data) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(parameters(model), parameters(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("size", [12, 10, 3])
def test_parts_of_a_batch_sum_up_to_its_mean(size):
    """12 samples in 4 parts of 3, 10 in parts of 3, 3, 3 and 1, and 3 in as many parts as there are samples."""
    model, data = make_model().double(), [batch.double() for batch in batches(3, size)]
    whole = copy.deepcopy(model)
    _, losses = taken(whole, data)
    _, ours = taken(model, data, accumulate=4)
    assert ours == pytest.approx(losses, rel=1e-12)
    # Adam divides by the root of second moments, which makes much of a gradient's last digits where that is near 0.
    torch.testing.assert_close(parameters(model), parameters(whole), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("is_replayed", [False, True])
@pytest.mark.parametrize(("cls", "options"), [(VAE, {}), (InfoVAE, {"kl_weight": 1.0})])
def test_parts_of_a_batch_are_one_step_of_the_warm_up(as_on_cuda, cls, options, is_replayed):
    model = make_model(cls=cls, kl_warmup_steps=8, **options)
    # Which leaves the model, and so the divergence, as it is.
    step = CapturedStep(model, make_optimizer(model.parameters(), lr=0.0), accumulate=4)
    if is_replayed:
        step = as_on_cuda(step, 2)
    found = step.many(batches(1) * 12)["kl"]
    assert not is_replayed or step._recordings[2]._graph.replays > 0
    torch.testing.assert_close(found, found[-1] * (torch.arange(12) / 8).clamp(max=1.0))
    assert model.training_steps == 12


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1 / 3, 2 / 3, 1, 1, *(0.5 + 0.5 * math.cos(math.pi * k / 5) for k in range(1, 5))]),
    ],
)
def test_every_step_takes_its_share_of_the_rate(kind, shares):
    schedule = Schedule(kind, warmup_steps=3, total_steps=8)
    told = [schedule(torch.tensor(float(step), dtype=torch.float64)).item() for step in range(8)]
    assert told == pytest.approx(shares)

    model, data = make_model(), batches(8)
    expected = copy.deepcopy(model)

    def set_rate(optimizer, step):
        optimizer.param_groups[0]["lr"] = 1e-2 * told[step]

    plain(expected, data, before_update=set_rate)
    taken(model, data, schedule=schedule)
    assert torch.equal(parameters(model), parameters(expected))


def test_the_step_after_the_last_would_take_nothing():
    for kind in ("linear", "cosine"):
        schedule = Schedule(kind, total_steps=8)
        assert schedule(torch.tensor(8.0, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-15)
        assert schedule(torch.tensor(9.0, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-15)


def test_the_average_decays():
    model, data = make_model(), batches(4)
    average = parameters(model)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), ema_decay=0.75)
    for batch in data:
        step(batch)
        average = 0.75 * average + 0.25 * parameters(model)
    last = parameters(model)
    with step.averaged():
        # Four roundings.
        torch.testing.assert_close(parameters(model), average, rtol=1e-6, atol=1e-7)
        assert not torch.equal(parameters(model), last)
    assert torch.equal(parameters(model), last)


def test_running_statistics_are_averaged_with_the_weights():
    """Where they belong to weights, and not in what a model of aefast keeps by itself."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 16))
    steps = CapturedStep(
        net,
        make_optimizer(net.parameters(), 1e-2),
        loss=lambda net, x: (net(x) - x).square().mean(),
        ema_decay=0.75,
    )
    average = net[1].running_mean.clone()
    for batch in batches(4):
        steps(batch)
        average = 0.75 * average + 0.25 * net[1].running_mean
    last = net[1].running_mean.clone()
    with steps.averaged():
        torch.testing.assert_close(net[1].running_mean, average, rtol=1e-6, atol=1e-7)
        assert net[1].num_batches_tracked == 4
    assert torch.equal(net[1].running_mean, last)

    # A state of the weights alone goes on with the statistics of the moment.
    state = steps.state_dict()
    steps.load_state_dict({**state, "ema": [one.clone() for one in state["ema"][:-2]]})
    assert torch.equal(steps.ema[-2], last)

    sparse = SparseAutoencoder(input_size=16, latent=20, sparsity="batchtopk", k=3)
    masked = nn.Linear(16, 16)
    masked.register_buffer("mask", torch.full((16, 16), -math.inf).triu(1))
    for module in (sparse, masked):
        step = CapturedStep(
            module, make_optimizer(module.parameters(), 1e-2), loss=lambda *_: torch.zeros(()), ema_decay=0.75
        )
        assert len(step.ema) == len(list(module.parameters()))
    encoder = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    model = nn.Sequential(Autoencoder(input_size=16, latent=4, encoder=encoder), nn.BatchNorm1d(4))
    given = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), ema_decay=0.75)
    assert len(given.ema) == len(list(model.parameters())) + 4


def test_parameters_with_gaps_in_memory_are_trained_whole():
    """Torch's fused update of them goes through the memory between their elements instead of all of them."""
    whole = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    before = whole.clone()
    net = nn.Linear(16, 16, bias=False)
    net.weight = nn.Parameter(whole[:, :4])
    step = CapturedStep(
        net,
        make_optimizer(net.parameters(), 1e-2),
        loss=lambda net, x: (x[:, :4] @ net.weight.T - x).square().mean(),
    )
    step(*batches(1))
    assert (whole != before)[:, :4].all()
    assert torch.equal(whole[:, 4:], before[:, 4:])
    gaps = nn.Parameter(whole[:, :4])
    for given, lr in (
        ([("weight", gaps)], 1e-2),
        ([{"params": [gaps], "lr": 0.5}], 0.5),
        (iter([gaps]), 1e-2),
    ):
        (group,) = make_optimizer(given, 1e-2).param_groups
        assert not group["fused"] and group["lr"] == lr
    for layout in (torch.randn(4, 8).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)):
        assert make_optimizer([nn.Parameter(layout)], 1e-2).defaults["fused"]


def test_it_goes_on_as_it_was():
    options = {"ema_decay": 0.9, "schedule": Schedule("cosine", 2, 8), "clip_norm": 0.1}
    data = batches(8)
    model = make_model()
    whole, _ = taken(model, data, **options)

    other = make_model()
    first, _ = taken(other, data[:3], **options)
    state, of_optimizer = first.state_dict(), copy.deepcopy(first.optimizer.state_dict())
    second = CapturedStep(other, make_optimizer(other.parameters(), 1e-2), **options)
    second.optimizer.load_state_dict(of_optimizer)
    second.load_state_dict(state)
    for batch in data[3:]:
        second(batch)
    assert torch.equal(parameters(other), parameters(model))
    for ours, theirs in zip(second.ema, whole.ema, strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_is_of_the_products():
    """By autocast, or on the CPU in bf16 by torch's setting for products of float32."""
    for precision, latent, product in (("bf16", torch.float32, "bf16"), ("fp16", torch.float16, "none")):
        seen = []

        def loss(model, batch, seen=seen):
            output = model(batch)
            settings = [getattr(torch.backends.mkldnn, name).fp32_precision for name in ("matmul", "conv")]
            seen.append((output.latent.dtype, output.loss.dtype, *settings))
            return output.loss

        model, data = make_model(), batches(6)
        optimizer = make_optimizer(model.parameters(), 1e-2)
        step = CapturedStep(model, optimizer, loss=loss, precision=precision)
        losses = [step(batch)["loss"].item() for batch in data]
        assert set(seen) == {(latent, torch.float32, product, product)}
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        # bfloat16 has eight digits, of which some are lost on the way.
        assert losses == pytest.approx(plain(make_model(), data), rel=0.02)


def test_the_backward_forms_products_in_half_precision_too():
    seen = []
    model, (batch,) = make_model(), batches(1)
    weight = next(model.parameters())
    weight.register_hook(lambda grad: seen.append(torch.backends.mkldnn.matmul.fp32_precision))
    CapturedStep(model, make_optimizer(model.parameters(), 1e-2), precision="bf16")(batch)
    assert seen == ["bf16"]


def test_an_error_leaves_the_setting_of_products_as_it_was():
    def loss(model, batch):
        raise RuntimeError("of the loss")

    model, (batch,) = make_model(), batches(1)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), loss=loss, precision="bf16")
    with pytest.raises(RuntimeError, match="of the loss"):
        step(batch)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_the_last_of_several_threads_puts_the_setting_of_products_back():
    is_first_in, is_second_in, is_first_out = (threading.Event() for _ in range(3))

    def first(model, batch):
        is_first_in.set()
        assert is_second_in.wait(30)
        return model(batch).loss

    def second(model, batch):
        is_second_in.set()
        assert is_first_out.wait(30)
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return model(batch).loss

    def step(loss):
        model = make_model()
        CapturedStep(model, make_optimizer(model.parameters(), 1e-2), loss=loss, precision="bf16")(
            *batches(1)
        )

    seen = []
    with ThreadPoolExecutor() as pool:
        one = pool.submit(step, first)
        assert is_first_in.wait(30)
        other = pool.submit(step, second)
        one.result(60)
        is_first_out.set()
        other.result(60)
    assert seen == ["bf16"]
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_a_scaled_loss_that_overflows_makes_no_update():
    model, (batch,) = make_model(), batches(1)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), precision="fp16")
    step(batch)
    start, scale = parameters(model), step.state_dict()["scaler"]["scale"]
    step(batch * 3e4)
    assert torch.equal(parameters(model), start)
    assert step.state_dict()["scaler"]["scale"] == scale / 2
    step(batch)
    assert not torch.equal(parameters(model), start)
    assert parameters(model).isfinite().all()


def test_gradients_of_a_scaled_loss_are_clipped_without_the_scale():
    model, (batch,) = make_model(), batches(1)
    expected = copy.deepcopy(model)
    optimizer, scaler = torch.optim.SGD(expected.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        loss = expected(batch).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert nn.utils.clip_grad_norm_(expected.parameters(), 0.05) > 0.05
    scaler.step(optimizer)
    step = CapturedStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="fp16", clip_norm=0.05)
    step(batch)
    assert torch.equal(parameters(model), parameters(expected))


def test_any_module_and_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    expected = copy.deepcopy(model)

    def loss(model, x, y):
        error = (model(x) - y).square().mean()
        return error + 0.5, {"error": error, "offset": torch.tensor(0.5)}

    step = CapturedStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss)
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    terms = step(x, y)
    assert set(terms) == {"error", "offset"}
    assert not terms["error"].requires_grad
    loss(expected, x, y)[0].backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        # Where torch updates by one instruction, the product is not rounded before the sum.
        torch.testing.assert_close(
            ours.detach(), theirs.detach() - 0.1 * theirs.grad, rtol=2.0**-22, atol=2.0**-26
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8': expected one of fp32, bf16, fp16"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"steps_per_replay": -1}, "steps_per_replay=-1"),
        ({"clip_norm": 0.0}, r"clip_norm=0.0: expected a number above 0"),
        ({"clip_norm": float("nan")}, "clip_norm=nan"),
        ({"clip_norm": "1"}, "clip_norm='1': expected a number above 0, or None"),
        ({"ema_decay": 1.0}, "ema_decay=1.0: expected a number from 0 to below 1"),
    ],
)
def test_bad_options_are_named(options, message):
    model = make_model()
    with pytest.raises(InputError, match=message):
        CapturedStep(model, make_optimizer(model.parameters(), 1e-2), **options)


class Told(nn.Module):
    """What another library's model may give: a loss, and no terms."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        return types.SimpleNamespace(loss=self.layer(x).square().mean())


def test_a_loss_without_terms_is_its_one_term():
    model = Told()
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2))
    assert list(step(*batches(1))) == ["loss"]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "loss: expected loss.model, .batch., since what Linear gives, Tensor, has no .loss"),
        (lambda model, x: 1.0, "loss: expected a scalar tensor, or one and its terms by name, got float"),
        (lambda model, x: model(x), r"loss: expected a scalar tensor.*got shape \(12, 4\)"),
        (
            lambda model, x: (model(x).sum(), {"mse": 0.5}),
            "loss: expected scalar tensors as terms, got float as 'mse'",
        ),
        (
            lambda model, x: (model(x).sum(), {"mse": x}),
            r"loss: expected scalar tensors as terms, got shape \(12, 16\) as 'mse'",
        ),
        (lambda model, x: (model(x).sum(), x), "loss: expected a scalar tensor, .* got one and Tensor"),
    ],
)
def test_bad_losses_are_named(loss, message):
    model = nn.Linear(16, 4)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), loss=loss)
    with pytest.raises(InputError, match=message):
        step(*batches(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "one gradient a step, LBFGS asks"),
        (
            lambda model: torch.optim.Adam(make_model().parameters()),
            "over parameters of the model, Autoencoder",
        ),
    ],
)
def test_bad_optimizers_are_named(make, message):
    model = make_model()
    with pytest.raises(InputError, match=f"optimizer: expected one .*{message}"):
        CapturedStep(model, make(model))


def test_parameters_that_an_optimizer_gets_later_are_refused():
    """They would be trained without a limit of the gradients, a schedule and an average."""
    model, (batch,) = make_model(), batches(1)
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    step = CapturedStep(model, optimizer, clip_norm=1e-3, ema_decay=0.9)
    step(batch)
    optimizer.add_param_group({"params": list(model.decoder.parameters())})
    message = "optimizer: expected the 4 parameters that it had .*, got 8; make another CapturedStep"
    for call in (step, lambda batch: step.many([batch])):
        with pytest.raises(InputError, match=message):
            call(batch)
    CapturedStep(model, optimizer, clip_norm=1e-3, ema_decay=0.9)(batch)


def test_a_step_can_be_pickled():
    model, data = make_model(), batches(4)
    step = CapturedStep(
        model, make_optimizer(model.parameters(), 1e-2), ema_decay=0.9, clip_norm=1.0, precision="bf16"
    )
    step(data[0])
    other = pickle.loads(pickle.dumps(step))
    for batch in data:
        assert torch.equal(step(batch)["mse"], other(batch)["mse"])
    assert all(map(torch.equal, step.ema, other.ema))


def test_no_batches_and_no_samples_are_named():
    model = make_model()
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), accumulate=2)
    with pytest.raises(InputError, match="batches: expected at least one, got none"):
        step.many([])
    with pytest.raises(InputError, match="batch: expected samples to cut into 2 parts, got none"):
        step(torch.empty(0, 16))


@pytest.mark.parametrize("is_loaded_before", [True, False])
def test_the_rates_of_a_loaded_optimizer_are_shares_of_the_first(is_loaded_before):
    schedule = Schedule("cosine", warmup_steps=2, total_steps=10)
    data = batches(10)
    model = make_model()
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), schedule=schedule)
    for batch in data[:5]:
        step(batch)
    kept = copy.deepcopy((model.state_dict(), step.optimizer.state_dict(), step.state_dict()))
    for batch in data[5:]:
        step(batch)

    again = make_model()
    again.load_state_dict(kept[0])
    optimizer = make_optimizer(again.parameters(), 1e-2)
    if is_loaded_before:
        optimizer.load_state_dict(kept[1])
    resumed = CapturedStep(again, optimizer, schedule=schedule)
    if not is_loaded_before:
        optimizer.load_state_dict(kept[1])
    resumed.load_state_dict(kept[2])
    for batch in data[5:]:
        resumed(batch)
    assert torch.equal(parameters(again), parameters(model))


def test_bad_schedules_are_named():
    for kind, options, message in (
        ("cosine", {}, "total_steps=None: expected how many steps the run has, for schedule='cosine'"),
        ("linear", {"total_steps": 0}, "total_steps=0: expected a positive integer"),
        ("constant", {"warmup_steps": -1}, "warmup_steps=-1: expected a positive integer"),
        ("linear", {"warmup_steps": 1.5, "total_steps": 9}, "warmup_steps=1.5: expected a positive integer"),
    ):
        with pytest.raises(InputError, match=message):
            Schedule(kind, **options)
    with pytest.raises(InputError, match=r"schedule='cosin'.*did you mean 'cosine'"):
        Schedule("cosin")
    with pytest.raises(InputError, match="warmup_steps=8: expected fewer than the run has steps, 8"):
        Schedule("linear", warmup_steps=8, total_steps=8)


class Waits(TorchDispatchMode):
    """Within it, the ops are noted that would wait for a GPU: they give numbers, or shapes that depend on some, or
    assign a number to an index, which is copied there."""

    names = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"})

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_mask = name in ("index", "index_put_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        is_number = name == "index_put_" and args[2].dim() == 0
        if name in self.names or is_mask or is_number:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((MODELS[name], {"hidden": (8,), "latent": 4}) for name in sorted(MODELS) if name != "sparse"),
        *((SparseAutoencoder, {"latent": 24, "sparsity": name, **SPARSE[name]}) for name in SPARSITIES),
        *(
            (SparseAutoencoder, {"latent": 24, "sparsity": name, "k": 3, "aux_weight": 0.0})
            for name in ("topk", "batchtopk")
        ),
    ],
)
def test_models_say_whether_a_step_waits(cls, options):
    """With a latent that is dead, and one that is not."""
    torch.manual_seed(0)
    model = cls(input_size=16, **options)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2))
    (batch,) = batches(1)
    if hasattr(model, "unused"):
        model.unused[0] = model.config.option("dead_after")
    step(batch)
    # The optimizer that is not captured reads its steps.
    step._update.step = step._update.zero_grad = lambda *_: None
    with aefast.backend("eager"), Waits() as waits:
        step(batch)
    assert model.can_be_captured == (not waits.found), waits.found


@pytest.fixture
def as_on_cuda(monkeypatch):
    return graphs.emulate(monkeypatch)


def _by_torch_schedule(model, optimizer):
    with warnings.catch_warnings():
        # It wants to be made before the optimizer takes a step.
        warnings.simplefilter("ignore")
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lambda step: schedule.step()


def _by_hand(model, optimizer):
    def change(step):
        if step == 6:
            optimizer.param_groups[0]["lr"] = 1e-3

    return change


def _by_load(model, optimizer):
    kept = []

    def change(step):
        if step == 5:
            kept.append(copy.deepcopy(optimizer.state_dict()))
        if step == 9:
            optimizer.load_state_dict(kept[0])

    return change


def _by_option(model, optimizer):
    def change(step):
        if step == 6:
            optimizer.param_groups[0]["weight_decay"] = 0.1

    return change


def _by_freezing(model, optimizer):
    def change(step):
        if step == 6:
            next(model.parameters()).requires_grad_(False)

    return change


CHANGES = [_by_torch_schedule, _by_hand, _by_load, _by_option, _by_freezing]


def _changed_run(step, change, data):
    change = change(step.model, step.optimizer)
    for number, batch in enumerate(data):
        step(batch)
        change(number)
    return parameters(step.model)


@pytest.mark.parametrize("change", CHANGES)
def test_emulated_replays_heed_what_is_changed(as_on_cuda, change):
    data, model = batches(18), make_model()
    expected = copy.deepcopy(model)
    alone = CapturedStep(expected, make_optimizer(expected.parameters(), 1e-2))
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2))
    found = _changed_run(as_on_cuda(step, 1), change, data)
    assert step._recordings[1]._graph.replays > 3
    assert torch.equal(found, _changed_run(as_on_cuda(alone, 0), change, data))


def test_emulated_replays_are_the_steps(as_on_cuda):
    """In groups, with a schedule, a limit and averages, and a batch of another size among them."""
    options = {"clip_norm": 0.1, "ema_decay": 0.9, "schedule": Schedule("cosine", 4, 40)}
    data = [*batches(16), *batches(1, size=5), *batches(13)]
    model = make_model()
    expected = copy.deepcopy(model)
    alone = CapturedStep(expected, make_optimizer(expected.parameters(), 1e-2), **options)
    losses = as_on_cuda(alone, 0).many(data)["mse"]
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), **options)
    assert torch.equal(as_on_cuda(step, 4).many(data)["mse"], losses)
    assert {count: one._graph.replays for count, one in step._recordings.items()} == {4: 6, 1: 2}
    assert step.count == len(data)
    assert torch.equal(parameters(model), parameters(expected))
    for one, other in zip(step.ema, alone.ema, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("lengths", [(8, 2, 8, 1, 8), (3, 2, 2, 1)])
def test_emulated_steps_that_are_left_over_are_replayed(as_on_cuda, lengths):
    """In the memory of the whole groups if there are any, with gradients that each leaves to those who look."""
    options = {"clip_norm": 0.1, "ema_decay": 0.9, "schedule": Schedule("cosine", 4, 40)}
    model = make_model()
    expected = copy.deepcopy(model)
    alone = CapturedStep(expected, make_optimizer(expected.parameters(), 1e-2), **options)
    as_on_cuda(alone, 0)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), **options)
    as_on_cuda(step, 4)
    data = batches(sum(lengths))
    taken_alone = []
    one_by_one = step._alone
    step._alone = lambda batch: taken_alone.append(batch) or one_by_one(batch)
    for length in lengths:
        group, data = data[:length], data[length:]
        assert torch.equal(step.many(group)["mse"], alone.many(group)["mse"])
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
    assert torch.equal(parameters(model), parameters(expected))
    assert len(taken_alone) == 3
    assert len({id(one._graph.memory) for one in step._recordings.values()}) == 1
    assert set(step._recordings) == ({1, 4} if max(lengths) > 4 else {1})


def test_emulated_batches_that_come_in_groups_are_recorded_before_others(as_on_cuda):
    step = CapturedStep(model := make_model(), make_optimizer(model.parameters(), 1e-2))
    as_on_cuda(step, 2)
    for batch in batches(5, size=5):
        step(batch)
    assert step._recordings[1].form[0][0] == (5, 16)
    step.many(batches(8))
    assert {one.form[0][0] for one in step._recordings.values()} == {(12, 16)}
    before = dict(step._recordings)
    step.many(batches(8, size=5))
    assert step._recordings == before


def test_emulated_batches_of_another_type_are_taken_one_by_one(as_on_cuda):
    seen = []

    def loss(model, x, y):
        seen.append(y.dtype)
        return (model(x) - y).square().mean()

    model = nn.Linear(16, 16)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), loss=loss)
    as_on_cuda(step, 1)
    for batch in batches(6):
        step(batch, batch)
    del seen[:]
    step(batch, batch)
    step(batch, batch.half())
    assert seen == [torch.float16]


def test_emulated_steps_that_are_not_recorded_keep_to_the_stream(as_on_cuda, monkeypatch):
    """Gradients of one stream are synchronised with nodes of another."""
    for steps_per_replay in (0, 1):
        model, entered = make_model(), []
        step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2))
        as_on_cuda(step, steps_per_replay)
        monkeypatch.setattr(
            torch.cuda,
            "stream",
            lambda stream, entered=entered: entered.append(stream) or contextlib.nullcontext(),
        )
        step(*batches(1))
        assert entered == [step._stream] * steps_per_replay


class Slower(torch.optim.SGD):
    """Its rate falls with the steps that it has counted on the host, among its options or in its state."""

    def __init__(self, parameters, lr, is_option):
        super().__init__(parameters, lr=lr)
        self.is_option = is_option

    def step(self):
        for group in self.param_groups:
            for one in group["params"]:
                kept = group if self.is_option else self.state[one]
                kept["taken"] = kept.get("taken", 0) + 1
                one.data.sub_(one.grad * (group["lr"] / kept["taken"]))


@pytest.mark.parametrize("is_option", [True, False])
def test_emulated_steps_that_are_counted_on_the_host_are_not_recorded(as_on_cuda, is_option):
    data, found = batches(8), []
    for steps_per_replay in (0, 2):
        model = make_model()
        step = CapturedStep(model, Slower(model.parameters(), 0.1, is_option))
        as_on_cuda(step, steps_per_replay).many(data)
        assert not step._recordings
        found.append(parameters(model))
    assert torch.equal(*found)


def test_emulated_rates_that_are_set_between_steps_do_not_count_as_the_optimizers(as_on_cuda):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = as_on_cuda(CapturedStep(model, optimizer), 1)
    schedule = _by_torch_schedule(model, optimizer)
    for number, batch in enumerate(batches(3)):
        step(batch)
        schedule(number)
    step(*batches(1))
    assert step._recordings[1]._graph.replays == 1


def test_emulated_steps_with_state_on_the_host_are_not_recorded(as_on_cuda, monkeypatch):
    monkeypatch.setattr("aefast.train.step._is_on_device", lambda optimizer: False)
    model = make_model()
    step = as_on_cuda(CapturedStep(model, make_optimizer(model.parameters(), 1e-2)), 1)
    step.many(batches(6))
    assert not step._recordings


def test_state_on_the_host_is_found():
    for make, is_there in (
        (lambda weights: torch.optim.Adagrad(weights, lr_decay=0.1), False),
        (lambda weights: torch.optim.SGD(weights, momentum=0.9), True),
    ):
        weight = nn.Parameter(torch.ones(3, device="meta"))
        optimizer = make([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.state[weight].setdefault("momentum_buffer", torch.ones_like(weight))
        assert _is_on_device(optimizer) == is_there


def test_emulated_steps_without_replays(as_on_cuda):
    model = make_model()
    step = as_on_cuda(CapturedStep(model, make_optimizer(model.parameters(), 1e-2)), 1)
    for batch in batches(8):
        step(batch)
    replays = step._recordings[1]._graph.replays
    with without_replays():
        step(*batches(1))
    assert step._recordings[1]._graph.replays == replays > 0
    step(*batches(1))
    assert step._recordings[1]._graph.replays == replays + 1


def test_rates_that_are_read_on_the_host_are_not_recorded(as_on_cuda):
    schedule = Schedule("cosine", total_steps=40)
    for make, options, is_replayed in (
        (torch.optim.SGD, {}, False),
        (torch.optim.SGD, {"fused": True}, True),
        (torch.optim.RMSprop, {}, False),
        (torch.optim.AdamW, {"fused": True}, True),
        (torch.optim.AdamW, {}, True),
    ):
        for its_schedule in (None, schedule):
            model = make_model()
            step = CapturedStep(model, make(model.parameters(), lr=0.1, **options), schedule=its_schedule)
            as_on_cuda(step, 2)
            assert (step._replayed == 2) == (is_replayed or its_schedule is None)


def test_a_step_that_cannot_be_recorded_says_so(as_on_cuda, monkeypatch):
    @contextlib.contextmanager
    def refuse(graph, stream, error_mode, pool):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr("aefast.train.step.recording", refuse)
    model = make_model()
    step = as_on_cuda(CapturedStep(model, make_optimizer(model.parameters(), 1e-2)), 1)
    data = batches(4)
    for batch in data[:3]:
        step(batch)
    message = "a CUDA graph can record, got 'operation not permitted .*capturing'; with steps_per_replay=0"
    with pytest.raises(InputError, match=message):
        step(data[3])
    assert all(one.grad is None for one in model.parameters())


def test_a_recording_for_which_there_is_no_memory_says_so(as_on_cuda, monkeypatch):
    """In an op of aefast, whose error is not torch's."""

    @contextlib.contextmanager
    def refuse(graph, stream, error_mode, pool):
        yield
        raise RuntimeError("CUDA out of memory. Tried to allocate a tensor of shape (3, 4)")

    monkeypatch.setattr("aefast.train.step.recording", refuse)
    model = make_model()
    step = as_on_cuda(CapturedStep(model, make_optimizer(model.parameters(), 1e-2)), 1)
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory\. Tried to allocate"):
        step.many(batches(4))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@pytest.mark.smoke
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replays_are_the_steps(precision):
    """Of one size they come from the graph, and those of another size between and after them do not."""
    options = {
        "precision": precision,
        "clip_norm": 0.1,
        "ema_decay": 0.9,
        "accumulate": 2,
        "schedule": Schedule("cosine", 4, 40),
    }
    data = [batch.cuda() for batch in [*batches(16), *batches(1, size=5), *batches(13)]]
    model = make_model().cuda()
    expected = copy.deepcopy(model)
    alone = CapturedStep(expected, make_optimizer(expected.parameters(), 1e-2), **options)
    alone._replayed = 0
    losses = [alone(batch)["mse"].item() for batch in data]
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), steps_per_replay=4, **options)
    ours = step.many(data)["mse"]
    assert step._recordings
    assert step.count == len(data)
    torch.testing.assert_close(ours, torch.tensor(losses, device="cuda"), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parameters(model), parameters(expected), rtol=1e-3, atol=1e-5)
    for one, other in zip(step.ema, alone.ema, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("change", CHANGES)
def test_replays_heed_what_is_changed(change):
    data, model = [batch.cuda() for batch in batches(18)], make_model().cuda()
    expected = copy.deepcopy(model)
    alone = CapturedStep(expected, make_optimizer(expected.parameters(), 1e-2), steps_per_replay=0)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2))
    found = _changed_run(step, change, data)
    assert step._recordings
    torch.testing.assert_close(found, _changed_run(alone, change, data), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_waits_cannot_be_recorded_and_leaves_nothing_behind():
    model, stream = make_model().cuda(), torch.cuda.current_stream()
    step = CapturedStep(
        model,
        make_optimizer(model.parameters(), 1e-2),
        loss=lambda model, batch: model(batch).loss * (1.0 + 0.0 * batch.sum().item()),
    )
    data = [batch.cuda() for batch in batches(5)]
    for batch in data[:3]:
        step(batch)
    with pytest.raises(
        InputError, match=r"a CUDA graph can record, got .*not permitted when stream is capturing"
    ):
        step(data[3])
    assert torch.cuda.current_stream() == stream
    assert torch.rand(8, device="cuda").isfinite().all()
    step._replayed = 0
    step(data[4])


@pytest.mark.gpu
@needs_gpu
def test_a_rate_that_was_loaded_to_the_host_is_put_on_the_device():
    """And an optimizer whose rate is read on the host takes its scheduled steps one by one."""
    schedule = Schedule("cosine", total_steps=40)
    data = [batch.cuda() for batch in batches(8)]
    model = make_model().cuda()
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), schedule=schedule)
    state = step.optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = group["lr"].cpu()
    step.optimizer.load_state_dict(state)
    step.many(data)
    assert step._recordings and step.optimizer.param_groups[0]["lr"].is_cuda
    other = make_model().cuda()
    step = CapturedStep(other, torch.optim.SGD(other.parameters(), lr=0.1), schedule=schedule)
    step.many(data)
    assert not step._recordings


@pytest.mark.gpu
@needs_gpu
def test_steps_that_are_left_over_are_replayed():
    """In turns with whole groups, whose memory they work in."""
    options = {"clip_norm": 0.1, "ema_decay": 0.9, "schedule": Schedule("cosine", 4, 40)}
    model = make_model().cuda()
    expected = copy.deepcopy(model)
    alone = CapturedStep(expected, make_optimizer(expected.parameters(), 1e-2), steps_per_replay=0, **options)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), steps_per_replay=4, **options)
    data = [batch.cuda() for batch in batches(28)]
    found, losses = [], []
    for length in (8, 2, 8, 1, 8, 1):
        group, data = data[:length], data[length:]
        found.append(step.many(group)["mse"])
        losses.append(alone.many(group)["mse"])
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    assert set(step._recordings) == {1, 4}
    assert len({one._graph.pool() for one in step._recordings.values()}) == 1
    torch.testing.assert_close(torch.cat(found), torch.cat(losses), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parameters(model), parameters(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_rates_that_fall_with_steps_counted_on_the_host_fall():
    data, found = [batch.cuda() for batch in batches(10)], []
    for steps_per_replay in (0, 2):
        model = make_model().cuda()
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, lr_decay=0.5)
        step = CapturedStep(model, optimizer, steps_per_replay=steps_per_replay)
        step.many(data)
        assert not step._recordings
        found.append(parameters(model))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.smoke
@needs_gpu
def test_every_replay_draws_fresh_noise():
    model = make_model(cls=VAE).cuda()
    step = CapturedStep(model, torch.optim.SGD(model.parameters(), lr=0.0), steps_per_replay=2)
    (batch,) = batches(1, size=64)
    terms = step.many([batch.cuda()] * 16)
    assert set(step._recordings) == {1, 2}
    name = next(name for name in terms if name != "kl")
    assert len(set(terms[name].tolist())) == 16


@pytest.mark.gpu
@pytest.mark.smoke
@needs_gpu
def test_a_step_waits_for_nothing():
    model = make_model().cuda()
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2), clip_norm=1.0, steps_per_replay=2)
    data = [batch.cuda() for batch in batches(8)]
    left_over = batches(1, size=5)[0].cuda()
    step.many(data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.many(data)
        step(left_over)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("sparsity", "options"),
    [
        *((name, SPARSE[name]) for name in ("l1", "kl", "jumprelu", "topk")),
        ("topk", {"k": 3, "aux_weight": 0.0}),
    ],
)
def test_a_step_of_a_sparse_model_waits_for_nothing(sparsity, options):
    """Behind the first; with an auxiliary loss too, as long as no latent can be dead."""
    model = SparseAutoencoder(input_size=16, latent=24, sparsity=sparsity, device="cuda", **options)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2))
    data = [batch.cuda() for batch in batches(8)]
    step.many(data)
    assert (step._recording is not None) == model.can_be_captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.many(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
