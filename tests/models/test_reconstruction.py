"""The losses that models take by name, with and without the reconstruction."""

import pytest
import torch

import aefast
from aefast.errors import InputError
from aefast.models import MODELS, Autoencoder, DenoisingAutoencoder, _reconstruction, from_pretrained
from aefast.models._reconstruction import LOSSES

SHAPE = (2, 6, 5)
OPTIONS = {
    **{loss: {} for loss in LOSSES},
    "lp": {"loss_p": 1.5},
    "huber": {"loss_delta": 0.4},
    "charbonnier": {"loss_eps": 0.1},
    "bce": {"output_activation": "sigmoid"},
    "pyramid": {"pyramid_levels": 2, "image_shape": SHAPE},
}


def make(name, loss, **options):
    torch.manual_seed(0)
    given = OPTIONS[loss] | options
    given |= {"sparsity": "l1"} if name == "sparse" else {"hidden": (8,), "activation": "tanh"}
    return MODELS[name](input_size=60, latent=3, loss=loss, **given)


@pytest.fixture(autouse=True)
def every_batch_is_large(monkeypatch):
    monkeypatch.setattr(_reconstruction, "_LARGE", 1)


def data():
    return torch.rand(7, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("loss", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_every_loss(monkeypatch, name, loss):
    """Without the reconstruction, value and gradients are those of the path that makes it."""
    model, x = make(name, loss, **({"noise_std": 0.0} if name == "denoising" else {})), data()
    results = []
    for least in (1, 10**6):
        monkeypatch.setattr(_reconstruction, "_LARGE", least)
        torch.manual_seed(5)
        out = model(x)
        assert callable(out.made) == (least == 1 and loss != "pyramid")
        results.append(
            [out.loss, *torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)]
        )
        assert out.reconstruction.shape == x.shape
        assert out.reconstruction is out.reconstruction
        torch.testing.assert_close(out.reconstruction, model.decode(out.latent).reshape(x.shape))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("loss", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_eager_twin_has_the_loss(name, loss):
    model, x = make(name, loss), data().flatten(1)
    output = torch.rand(7, 60, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.decoder_loss.eager(output, x), model.decoder_loss(output, x))
    if name == "autoencoder":
        torch.testing.assert_close(model.eager_loss(model.eager_twin(), x), model(x).loss)


@pytest.mark.parametrize("name", MODELS)
def test_without_gradients_the_reconstruction_is_of_the_pass(name):
    """What is made later would be of later weights, and have gradients."""
    model, x = make(name, "mse"), data()
    with torch.no_grad():
        out = model(x)
    assert isinstance(out.made, torch.Tensor)
    assert not out.reconstruction.requires_grad


def test_gradients_flow_through_the_reconstruction():
    model, x = make("autoencoder", "mse"), data()
    out = model(x)
    (out.reconstruction - x).square().mean().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    out = model(x)
    out.loss.backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])


@pytest.mark.parametrize("loss", ["mse", "bce", "pyramid"])
@pytest.mark.parametrize("least", [1, 10**6])
def test_what_is_not_finite_has_a_loss_that_is_not(monkeypatch, least, loss):
    monkeypatch.setattr(_reconstruction, "_LARGE", least)
    model = make("autoencoder", loss)
    with torch.no_grad():
        model.decoder.layers[-1].weight[5, 2] = float("nan")
    assert model(data()).loss.isnan()


@pytest.mark.parametrize("loss", ["mse", "bce", "bce_with_logits", "pyramid"])
@pytest.mark.parametrize("least", [1, 10**6])
def test_infinite_samples_have_a_loss_that_is_not_finite(monkeypatch, least, loss):
    """Also where the reconstruction is finite, as tanh makes it."""
    monkeypatch.setattr(_reconstruction, "_LARGE", least)
    model, x = make("autoencoder", loss), data()
    x[3, 1, 2, 4] = float("inf")
    assert model.decode(model.encode(x)).isfinite().all()
    assert not model(x).loss.isfinite()


def test_numbers_that_are_no_probabilities():
    with pytest.raises(InputError, match="target must be from 0 to 1"):
        make("autoencoder", "bce_with_logits")(data() + 1)


def test_hooks_are_called():
    model, x, seen = make("autoencoder", "mse"), data(), []
    expected = model(x).loss
    model.decoder.layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(model(x).loss, expected)
    assert len(seen) == 1


def test_logits_become_probabilities():
    for training in (True, False):
        model = make("autoencoder", "bce_with_logits").train(training)
        reconstruction = model(data()).reconstruction
        assert reconstruction.min() > 0 and reconstruction.max() < 1
    torch.testing.assert_close(model.eager_twin()(data().flatten(1)), reconstruction.flatten(1))


def test_options_are_saved(tmp_path):
    model = make("denoising", "pyramid", pyramid="laplacian", pyramid_weights=(2.0, 0.5), loss_p=1.5)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded, DenoisingAutoencoder) and loaded.config == model.config
    x = data()
    torch.testing.assert_close(loaded(x).loss, model.eval()(x).loss)


def test_compiled_models_have_the_loss():
    model, x = make("autoencoder", "huber"), data()

    def loss(x):
        return model(x).loss

    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(x), loss(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mae"}, "loss='mae': expected one of mse, rmse, l1"),
        ({"loss": None}, "loss=None: expected one of mse"),
        ({"loss": "lp"}, "p must be a number of at least 1 for lp, got None"),
        ({"loss": "lp", "loss_p": 0.5}, "p must be a finite number of at least 1, got 0.5"),
        ({"loss": "mse", "loss_p": 2.0}, "loss_p=2.0: loss 'mse' has no such option; it takes none"),
        ({"loss": "huber", "loss_eps": 2.0}, "loss_eps=2.0: .* it takes loss_delta"),
        ({"loss": "bce"}, "output_activation='identity': expected 'sigmoid'"),
        (
            {"loss": "bce_with_logits", "output_activation": "relu"},
            "output_activation='relu': expected 'identity'",
        ),
        ({"loss": "pyramid"}, r"loss='pyramid': needs image_shape, the \(C, H, W\)"),
        ({"loss": "pyramid", "image_shape": SHAPE}, "levels must be"),
        ({"loss": "pyramid", "image_shape": (2, 6)}, r"image_shape=\(2, 6\): expected \(C, H, W\)"),
        (
            {
                "loss": "pyramid",
                "image_shape": SHAPE,
                "pyramid_levels": 2,
                "loss_p": 1.0,
                "loss_eps": 0.1,
            },
            "loss_eps=0.1: give either loss_p or loss_eps",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Autoencoder(input_size=60, **options)


def test_options_are_checked_whatever_backend_is_asked_for():
    with aefast.backend("cuda"):
        assert make("autoencoder", "huber").config.loss_delta == 0.4


def test_a_loss_takes_the_place_of_a_likelihood():
    with pytest.raises(InputError, match="loss='l1': give either a loss or a likelihood, not both"):
        MODELS["vae"](input_size=60, loss="l1", likelihood="gaussian")
    model = make("vae", "l1").eval()
    assert "elbo" not in model.evaluate(data())
    with pytest.raises(InputError, match="elbo: this model has no likelihood, but the loss 'l1'"):
        model.elbo(data())
    output, x = torch.rand(7, 60), data().flatten(1)
    torch.testing.assert_close(model.decoder_loss(output, x), (output - x).abs().sum(1).mean())


@pytest.mark.parametrize("loss", [loss for loss in OPTIONS if loss != "rmse"])
@pytest.mark.parametrize("name", ["vae", "infovae", "stochastic"])
def test_a_loss_in_the_place_of_a_likelihood_is_a_mean_over_samples(name, loss):
    """Of sums over features, which are weighed against divergences of samples. A root has no such mean."""
    model, x = make(name, loss), data().flatten(1)
    output = torch.rand(7, 60, generator=torch.Generator().manual_seed(2))
    each = [model.decoder_loss(*pair) for pair in zip(output.split(1), x.split(1), strict=True)]
    torch.testing.assert_close(model.decoder_loss(output, x), torch.stack(each).mean())
