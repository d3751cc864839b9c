"""The stochastic autoencoder: its loss, its modes, and draws from both of its distributions."""

import math

import pytest
import torch
from torch.distributions import Normal

from aefast.errors import InputError
from aefast.models import MODELS, StochasticAutoencoder, from_pretrained
from support.noise import next_normals

SIZES = {"input_size": 8, "hidden": (6,), "latent": 3}


def make(**options):
    torch.manual_seed(0)
    return StochasticAutoencoder(**{**SIZES, **options}, dtype=torch.float64)


def data(rows=10):
    return torch.rand(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def log_likelihood(model, x, eps):
    """log p(x|h) for h = f(x) + eps, the mean over the batch, with its constant; and h."""
    h = model.encoder(x) + eps
    return Normal(model.decoder(h), 1.0).log_prob(x).sum(-1).mean(), h


@pytest.mark.parametrize("options", [{}, {"hidden": ()}, {"linear_decoder": True, "latent": 20}])
def test_loss_and_gradients_are_the_formula(options):
    model, x = make(**options), data()
    eps = next_normals(10, model.config.latent)
    output = model(x.reshape(10, 2, 4))
    likelihood, h = log_likelihood(model, x, eps)
    expected = -likelihood - 4 * math.log(2 * math.pi)
    torch.testing.assert_close(output.loss, expected)
    assert output.terms.keys() == {"reconstruction"}
    assert torch.equal(sum(output.terms.values()), output.loss)
    torch.testing.assert_close(output.latent, h)
    torch.testing.assert_close(output.reconstruction, model.decode(h).reshape(10, 2, 4))
    parameters = list(model.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(loss, parameters) for loss in (output.loss, expected)))


def test_eval_reconstructs_from_the_mean_and_still_samples_its_loss():
    model, x = make().eval(), data()
    eps = next_normals(10, 3)
    output = model(x)
    likelihood, _ = log_likelihood(model, x, eps)
    torch.testing.assert_close(output.loss, -likelihood - 4 * math.log(2 * math.pi))
    assert torch.equal(output.latent, model.encode(x))
    assert torch.equal(output.reconstruction, model.decode(model.encode(x)))
    again = model(x)
    assert torch.equal(again.reconstruction, output.reconstruction)
    assert not torch.equal(again.loss, output.loss)


def test_torchs_seed_repeats_training():
    model, x = make(), data()
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x).latent, first.latent)
    assert not torch.equal(second.latent, first.latent)


def test_draws_have_the_moments_of_their_distributions():
    model, rows = make(linear_decoder=True).eval(), 40_000
    x = data(1).expand(rows, 8)
    with torch.no_grad():
        latents = model.sample_latent(x)
        drawn = model.sample_reconstruction(x.reshape(rows, 2, 4)).flatten(1)
        mean = model.encode(x[:1])
        centre = model.decode(mean)
    # Five standard errors of a mean and of a variance of so many draws.
    bound = 5 / math.sqrt(rows)
    assert (latents.mean(0) - mean).abs().max() < bound
    assert (latents.var(0) - 1).abs().max() < math.sqrt(2) * bound
    # With g linear, its weight W, p(x) is N(g(f(x)), W W.T + I).
    weight = model.decoder.layers[0].weight
    covariance = weight @ weight.T + torch.eye(8)
    deviation = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - centre) / deviation).abs().max() < bound
    difference = drawn.T.cov() - covariance
    assert (difference / torch.outer(deviation, deviation)).abs().max() < math.sqrt(2) * bound
    assert (covariance - covariance.diag().diag()).abs().max() > 4 * bound


def test_draws_follow_the_generator():
    model, x = make(), data()
    for draw in (model.sample_latent, model.sample_reconstruction):
        first, second = (draw(x, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(draw(x), first)


def test_the_eager_loss_is_the_same(monkeypatch):
    model, x = make(), data()
    twin = model.eager_twin()
    assert list(twin.state_dict()) == list(model.state_dict())
    eps = next_normals(10, 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: eps)
        theirs, reconstruction = model.eager_loss(twin, x), twin(x)
    output = model(x)
    torch.testing.assert_close(theirs, output.loss)
    torch.testing.assert_close(reconstruction, output.reconstruction)
    torch.testing.assert_close(model.eval().eager_twin()(x), model(x).reconstruction)


def test_round_trip(tmp_path):
    model, x = make(), data()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is StochasticAutoencoder is MODELS["stochastic"]
    assert loaded.config == model.config
    assert torch.equal(loaded(x).reconstruction, model.eval()(x).reconstruction)


def test_a_training_step_compiles_whole():
    model, x = make(), data()
    step = torch.compile(lambda x: model(x).loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = model(x).loss
    torch.manual_seed(2)
    torch.testing.assert_close(step(x), expected)


def test_autocast():
    torch.manual_seed(0)
    model, x = StochasticAutoencoder(**SIZES), data(200).float()
    torch.manual_seed(1)
    expected = model(x).loss
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.02, atol=0)


def test_bad_options_are_named():
    with pytest.raises(InputError, match="unknown option 'gamma'"):
        make(gamma=1)
    with pytest.raises(InputError, match="latent=-1: expected a positive integer"):
        make(latent=-1)
