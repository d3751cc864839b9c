"""The autoencoder: shapes, values, options."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from aefast.errors import InputError
from aefast.models import MODELS, Autoencoder, AutoencoderConfig


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": (32, 12), "latent": 4, "activation": "gelu"},
        {"hidden": (20,), "latent": 90},
        {"hidden": (), "latent": 5},
        {"hidden": (32,), "latent": 4, "linear_decoder": True},
        {"hidden": (32,), "latent": 4, "decoder_hidden": (7, 9), "output_activation": "sigmoid"},
    ],
    ids=["symmetric", "overcomplete", "no-hidden", "linear-decoder", "asymmetric"],
)
def test_forward_and_gradients_match_the_eager_twin(options):
    torch.manual_seed(4)
    model = Autoencoder(input_size=24, **options)
    twin = model.eager_twin()
    exact = model.eager_twin().double()
    assert list(twin.state_dict()) == list(model.state_dict())

    x = torch.rand(10, 24)
    output = model(x)
    output.loss.backward()
    for module, data in ((twin, x), (exact, x.double())):
        F.mse_loss(module(data), data).backward()

    assert output.latent.shape == (10, options["latent"])
    pairs = [(output.reconstruction, twin(x), exact(x.double()))]
    for ours, plain, true in zip(model.parameters(), twin.parameters(), exact.parameters(), strict=True):
        pairs.append((ours.grad, plain.grad, true.grad))
    for ours, plain, true in pairs:
        noise = torch.finfo(torch.float32).eps * true.abs().max()
        assert (ours - true).abs().max() <= 2 * (plain - true).abs().max() + 2 * noise


def test_output_is_consistent():
    model = Autoencoder(input_size=12, hidden=(8,), latent=3)
    x = torch.rand(5, 3, 2, 2)
    output = model(x)
    assert output.reconstruction.shape == x.shape
    assert torch.equal(output.latent, model.encode(x))
    assert torch.equal(output.reconstruction, model.decode(output.latent).reshape(x.shape))
    torch.testing.assert_close(output.loss, ((output.reconstruction - x) ** 2).mean())
    assert output.terms.keys() == {"mse"}
    assert torch.equal(sum(output.terms.values()), output.loss)


def test_decoder_mirrors_the_encoder_unless_told():
    symmetric = Autoencoder(input_size=9, hidden=(7, 5), latent=2)
    assert symmetric.encoder.features == (9, 7, 5, 2)
    assert symmetric.decoder.features == (2, 5, 7, 9)
    linear = Autoencoder(input_size=9, hidden=(7, 5), latent=2, linear_decoder=True)
    assert linear.decoder.features == (2, 9)
    assert linear.decoder.activations == ("identity",)


def test_training_reduces_the_loss():
    torch.manual_seed(0)
    model = Autoencoder(input_size=16, hidden=(32,), latent=4)
    x = torch.rand(64, 4) @ torch.rand(4, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model(x).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    assert model(x).loss.item() < 0.2 * first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "missing option 'input_size'"),
        ({"input_size": 0}, "input_size=0: expected a positive integer"),
        ({"input_size": True}, "input_size=True"),
        ({"input_size": 4, "latent": -2}, "latent=-2"),
        ({"input_size": 4, "latnt": 2}, "unknown option 'latnt'.*did you mean 'latent'"),
        ({"input_size": 4, "hidden": 5}, "hidden=5: expected a sequence"),
        ({"input_size": 4, "hidden": (5, 0)}, r"hidden\[1\]=0"),
        ({"input_size": 4, "activation": "rleu"}, "activation='rleu'.*did you mean 'relu'"),
        ({"input_size": 4, "output_activation": 3}, "output_activation=3"),
        ({"input_size": 4, "linear_decoder": 1}, "linear_decoder=1: expected true or false"),
        ({"input_size": 4, "linear_decoder": True, "decoder_hidden": (3,)}, "decoder_hidden"),
        ({"input_size": 4, "loss": "mes"}, "loss='mes'.*did you mean 'mse'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Autoencoder(**options)


def test_config_and_options_together_are_refused():
    config = AutoencoderConfig(input_size=4)
    with pytest.raises(InputError, match="latent: give either"):
        Autoencoder(config, latent=3)
    with pytest.raises(InputError, match="config: expected AutoencoderConfig, got dict"):
        Autoencoder({"input_size": 4})


@pytest.mark.parametrize("shape", [(4,), (5, 3), (5, 2, 3)])
def test_input_of_the_wrong_shape_is_named(shape):
    with pytest.raises(InputError, match=r"x: expected shape \(B, 4\)"):
        Autoencoder(input_size=4)(torch.rand(shape))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_in_eval_mode_can_be_exported(name):
    options = {"latent": 24, "k": 3} if name == "sparse" else {"latent": 4}
    model = MODELS[name](input_size=12, **options).eval()
    sizes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (torch.rand(3, 12),), dynamic_shapes=sizes).module()
    for n in (3, 7):
        x = torch.rand(n, 12)
        torch.testing.assert_close(exported(x).reconstruction, model(x).reconstruction)


# What each model needs besides its sizes, and a kind of sparsity whose thresholds are wider than the rest.
KINDS = [*((name, {}) for name in sorted(MODELS)), ("sparse", {"sparsity": "jumprelu"})]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join([kind[0], *kind[1].values()]))
@pytest.mark.parametrize(
    ("of_model", "of_samples"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float32, torch.uint8),
        (torch.bfloat16, torch.float32),
    ],
)
def test_samples_of_another_dtype_are_refused_at_the_door(kind, of_model, of_samples):
    name, options = kind
    model = MODELS[name](input_size=12, latent=40, dtype=of_model, **options)
    expected, got = (str(one).removeprefix("torch.") for one in (of_model, of_samples))
    message = f"x: expected dtype {expected}, as the model's parameters have it, got {got}"
    for call in (model, model.encode, model.eval(), model.evaluate):
        with pytest.raises(InputError, match=message):
            call(torch.ones(3, 12, dtype=of_samples))


@pytest.mark.parametrize("name", ["autoencoder", "vae", "infovae"])
def test_samples_of_another_dtype_are_for_shards_of_mixed_precision(name):
    """Which are cast to that of the samples when their modules are called."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = MODELS[name](input_size=12, latent=4)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for one in (model.encoder, model.decoder, model):
            fully_shard(one, mp_policy=policy)
        model(torch.rand(3, 12)).loss.backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join([kind[0], *kind[1].values()]))
def test_samples_of_another_dtype_are_for_autocast(kind):
    name, options = kind
    model = MODELS[name](input_size=12, latent=40, **options)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.rand(3, 12).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.encode(x)
        if dtype == torch.float32:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(x).loss.backward()
