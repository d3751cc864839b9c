"""The denoising autoencoder: when there is noise, which, and what it is compared with."""

import json
import math

import pytest
import torch

import aefast.functional as AF
from aefast.errors import InputError
from aefast.models import (
    MODELS,
    Autoencoder,
    AutoencoderConfig,
    DenoisingAutoencoder,
    DenoisingConfig,
    from_pretrained,
)
from support.noise import next_normals, next_seed, next_uniforms

SIZES = {"input_size": 24, "hidden": (10,), "latent": 4}
NOISES = [
    {"noise": "gaussian", "noise_std": 0.3, "noise_mean": 0.1},
    {"noise": "salt_and_pepper", "noise_p": 0.3, "noise_low": -1, "noise_high": 2.0},
    {"noise": "masking", "noise_p": 0.4},
    {"noise": "masking", "noise_p": 0.4, "noise_block": 2, "image_shape": (2, 4, 3)},
    {"noise": "dropout", "noise_p": 0.4},
]


def make(**options):
    torch.manual_seed(0)
    return DenoisingAutoencoder(**{**SIZES, **options})


def data(*shape):
    return torch.rand(*(shape or (40, 24)), generator=torch.Generator().manual_seed(1)) + 0.1


def functional(x, config, seed):
    """The noise of a config by `aefast.functional`."""
    if config.image_shape is not None:
        x = x.reshape(-1, *config.image_shape)
    options = {
        name: value
        for name in ("mean", "std", "p", "low", "high", "block")
        if (value := getattr(config, f"noise_{name}")) is not None
    }
    return AF.corrupt(x, config.noise, seed=seed, **options).flatten(1)


@pytest.mark.parametrize("options", NOISES)
def test_training_compares_what_is_made_of_noise_with_the_clean(options):
    model, x = make(**options), data()
    noisy = functional(x, model.config, next_seed())
    output = model(x)
    latent = model.encode(noisy)
    assert torch.equal(output.latent, latent)
    assert torch.equal(output.reconstruction, model.decode(latent))
    torch.testing.assert_close(output.loss, ((model.decode(latent) - x) ** 2).mean())
    assert output.terms.keys() == {"mse"}
    assert not torch.equal(noisy, x)


@pytest.mark.parametrize("options", NOISES)
def test_eval_reconstructs_what_it_is_given(options):
    model, x = make(**options).eval(), data()
    output = model(x)
    plain = Autoencoder(AutoencoderConfig(**SIZES)).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output.reconstruction, plain(x).reconstruction)
    assert torch.equal(output.loss, plain(x).loss)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", NOISES)
def test_corrupt_makes_noisy_samples_in_either_mode(options, training):
    model, x = make(**options).train(training), data()
    noisy = model.corrupt(x, seed=3)
    assert torch.equal(noisy, functional(x, model.config, 3))
    assert torch.equal(model.corrupt(x.reshape(40, 2, 4, 3), seed=3), noisy.reshape(40, 2, 4, 3))
    torch.manual_seed(4)
    drawn = model.corrupt(x)
    assert torch.equal(model.corrupt(x, generator=torch.Generator().manual_seed(4)), drawn)


def test_masked_squares_span_the_channels():
    model = make(noise="masking", noise_p=0.5, noise_block=2, image_shape=(2, 4, 3))
    masked = (model.corrupt(data(60, 24)) == 0).reshape(60, 2, 4, 3)
    assert torch.equal(masked[:, 0], masked[:, 1])
    square = masked[:, 0, :2, :2].flatten(1)
    assert (square.all(1) | ~square.any(1)).all()
    assert square.any()
    assert not square.all()


@pytest.mark.parametrize("options", NOISES[:-1])
def test_the_eager_loss_is_the_same(options, monkeypatch):
    model, x = make(**options).double(), data().double()
    twin = model.eager_twin()
    shape = (40, 1, 2, 2) if "image_shape" in options else (40, 24)
    normals, uniforms = next_normals(*shape), next_uniforms(*shape)
    monkeypatch.setattr(torch, "randn_like", lambda like: normals)
    monkeypatch.setattr(torch, "rand_like", lambda like: uniforms)
    torch.testing.assert_close(model.eager_loss(twin, x), model(x).loss)
    monkeypatch.undo()
    torch.testing.assert_close(model.eval().eager_twin()(x), model(x).reconstruction)


def test_the_eager_twin_drops_as_many(monkeypatch):
    model, ones = make(noise="dropout", noise_p=0.4), torch.ones(2000, 24)
    ours, theirs = model.corrupt(ones), model.eager_twin().noise(ones)
    for noisy in (ours, theirs):
        assert noisy.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
        assert (noisy == 0).double().mean().item() == pytest.approx(0.4, abs=0.01)


def test_state_dicts_move_between_all_three():
    model = make()
    keys = list(model.state_dict())
    assert keys == list(model.eager_twin().state_dict())
    assert keys == list(Autoencoder(**SIZES).state_dict())


def test_evaluate_denoises():
    model, x = make(noise_std=0.5).eval(), data()
    noisy = functional(x, model.config, next_seed())
    measures = model.evaluate(x)
    denoised = model.decode(model.encode(noisy))
    assert measures.keys() == {"loss", "mse", "noisy_mse"}
    torch.testing.assert_close(measures["mse"], ((denoised - x) ** 2).mean())
    torch.testing.assert_close(measures["loss"], measures["mse"])
    torch.testing.assert_close(measures["noisy_mse"], ((noisy - x) ** 2).mean())
    shown = model.illustrate(x)
    assert list(shown) == ["original", "noisy", "denoised"]
    assert {samples.shape for samples in shown.values()} == {x.shape}


def test_training_learns_to_take_noise_away():
    torch.manual_seed(0)
    mixing = torch.rand(3, 24)
    x, held_out = (torch.rand(1000, 3) @ mixing / 3 for _ in range(2))
    model = make(hidden=(), latent=3, noise_std=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    with torch.no_grad():
        measures = model.eval().evaluate(held_out)
    # An unbiased projection onto 3 of 24 dimensions leaves an eighth of the noise, 9 dB.
    assert 10 * math.log10(measures["noisy_mse"] / measures["mse"]) > 7


@pytest.mark.parametrize("options", NOISES)
def test_round_trip(tmp_path, options):
    model, x = make(**options), data()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model"] == "denoising"
    assert content["config"]["noise"] == options["noise"]
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is DenoisingAutoencoder is MODELS["denoising"]
    assert loaded.config == model.config
    # A loaded denoiser adds no noise of its own.
    assert torch.equal(loaded(x).reconstruction, model.eval()(x).reconstruction)
    assert torch.equal(loaded.corrupt(x, seed=1), model.corrupt(x, seed=1))


def test_a_training_step_compiles_whole():
    model, x = make(noise="salt_and_pepper", noise_p=0.3), data()
    step = torch.compile(lambda x: model(x).loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = model(x).loss
    torch.manual_seed(2)
    torch.testing.assert_close(step(x), expected)


@pytest.mark.parametrize("options", NOISES)
def test_autocast(options):
    model, x = make(**options), data()
    torch.manual_seed(1)
    expected = model(x).loss
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "gausian"}, "noise='gausian': expected one of gaussian.*did you mean 'gaussian'"),
        ({"noise": 3}, "noise=3: expected one of"),
        ({"noise_p": 0.1}, "noise_p=0.1: gaussian noise has no such option; it takes noise_mean, noise_std"),
        ({"noise": "dropout", "noise_std": 0.1}, "noise_std=0.1: dropout noise has no such option"),
        ({"noise_std": -0.5}, "noise_std=-0.5: std must be a finite number of at least 0"),
        ({"noise_mean": "x"}, "noise_mean='x': mean must be a finite number"),
        ({"noise": "masking", "noise_p": 1.5}, "noise_p=1.5: p must be a number from 0 to 1"),
        ({"noise": "masking", "noise_block": 0}, "noise_block=0: block must be an integer from 1 to"),
        ({"noise": "masking", "noise_block": 2}, r"noise_block=2: needs image_shape, the \(C, H, W\)"),
        ({"image_shape": (4, 6)}, r"image_shape=\(4, 6\): expected \(C, H, W\) with a product of 24"),
        ({"image_shape": (1, 5, 5)}, r"image_shape=\(1, 5, 5\): expected \(C, H, W\)"),
        ({"image_shape": 24}, "image_shape=24: expected a sequence of positive integers"),
        ({"image_shape": (1, -4, -6)}, r"image_shape\[1\]=-4"),
        ({"loss": "mes"}, "loss='mes'.*did you mean 'mse'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


def test_a_subclass_config_is_refused():
    """The folder it would be saved in could not be loaded."""
    with pytest.raises(InputError, match="config: expected AutoencoderConfig, got DenoisingConfig"):
        Autoencoder(DenoisingConfig(**SIZES))
