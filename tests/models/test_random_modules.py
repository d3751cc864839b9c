"""Reparameterize, GaussianHead and Corrupt beside plain PyTorch given the same noise."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import prune

import aefast.functional as AF
from aefast.errors import InputError
from aefast.nn import Corrupt, GaussianHead, Reparameterize
from support.noise import next_normals, next_uniforms


@pytest.fixture
def same_noise(monkeypatch):
    """Plain PyTorch code that runs after a call of it draws the noise that an op would have drawn then."""

    def settle(*shape):
        normals, uniforms = next_normals(*shape), next_uniforms(*shape)
        monkeypatch.setattr(torch, "randn_like", lambda like: normals.to(like.dtype).reshape(like.shape))
        monkeypatch.setattr(torch, "rand_like", lambda like: uniforms.reshape(like.shape))
        return normals

    return settle


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("reduction", "logvar_range"), [("mean", None), ("none", (-0.5, 0.5)), ("sum", None)]
)
def test_reparameterize_is_the_formula(same_noise, training, reduction, logvar_range):
    torch.manual_seed(0)
    mu, logvar = torch.randn(2, 7, 5, dtype=torch.float64)
    eps = same_noise(7, 5)
    module = Reparameterize(reduction, logvar_range).train(training)
    z, kl = module(mu, logvar)

    held = logvar if logvar_range is None else logvar.clamp(*logvar_range)
    q = Normal(mu, torch.exp(held / 2))
    divergence = kl_divergence(q, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(-1)
    torch.testing.assert_close(z, mu + q.stddev * eps)
    torch.testing.assert_close(kl, divergence if reduction == "none" else getattr(divergence, reduction)())
    twin = module.eager()
    assert twin.training is training
    torch.testing.assert_close(twin(mu, logvar), (z, kl))


def test_reparameterize_takes_a_seed_and_draws_one_without():
    module = Reparameterize()
    mu, logvar = torch.zeros(2, 4, 3)
    assert torch.equal(module(mu, logvar, seed=5)[0], AF.reparameterize(mu, logvar, seed=5)[0])
    torch.manual_seed(1)
    first, second = module(mu, logvar)[0], module(mu, logvar)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(module(mu, logvar)[0], first)
    assert torch.equal(module(mu, logvar, generator=torch.Generator().manual_seed(1))[0], first)


def test_gaussian_head_has_the_parameters_of_linear():
    torch.manual_seed(3)
    head = GaussianHead(20, 5)
    torch.manual_seed(3)
    linear = nn.Linear(20, 10)
    assert list(head.state_dict()) == list(linear.state_dict()) == ["weight", "bias"]
    copied = head.eager_linear()
    assert type(copied) is nn.Linear
    for ours, theirs, copy in zip(head.parameters(), linear.parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, copy)
        assert ours.data_ptr() != copy.data_ptr()
    linear.load_state_dict(head.state_dict())
    assert list(GaussianHead(4, 2, bias=False).state_dict()) == ["weight"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gaussian_head_is_a_layer_and_a_sample(same_noise, bias, training):
    torch.manual_seed(4)
    head = GaussianHead(6, 3, bias, logvar_range=(-0.2, 0.2), dtype=torch.float64).train(training)
    h = torch.randn(9, 6, dtype=torch.float64)
    eps = same_noise(9, 3)
    z, kl, mu, logvar = head(h)

    layer = h @ head.weight.T + (head.bias if bias else 0)
    torch.testing.assert_close((mu, logvar), (layer[:, :3], layer[:, 3:]))
    held = logvar.clamp(-0.2, 0.2)
    assert not torch.equal(held, logvar)
    torch.testing.assert_close(z, mu + torch.exp(held / 2) * eps)
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(kl, kl_divergence(Normal(mu, torch.exp(held / 2)), prior).sum(-1).mean())
    torch.testing.assert_close(head.moments(h), (mu, held))
    twin = head.eager()
    assert list(twin.state_dict()) == list(head.state_dict())
    torch.testing.assert_close(twin(h), (z, kl, mu, logvar))


def test_moments_of_a_pruned_head_are_of_its_weights_of_the_moment():
    torch.manual_seed(0)
    head = GaussianHead(6, 3, logvar_range=(-0.2, 0.2))
    prune.random_unstructured(head, "weight", amount=0.5)
    with torch.no_grad():
        head.weight_orig.mul_(2)
    h = torch.randn(4, 6)
    before = torch.get_rng_state()
    mu, logvar = head.moments(h)
    assert torch.equal(torch.get_rng_state(), before)
    expected = h @ (head.weight_orig * head.weight_mask).T + head.bias
    torch.testing.assert_close(mu, expected[:, :3])
    torch.testing.assert_close(logvar, expected[:, 3:].clamp(-0.2, 0.2))


NOISES = [
    ("gaussian", {"mean": 0.5, "std": 0.25}),
    ("gaussian", {"std": 2.0}),
    ("salt_and_pepper", {"p": 0.4, "low": -1.0, "high": 3.0}),
    ("masking", {"p": 0.3}),
    ("dropout", {"p": 0.3}),
]


@pytest.mark.parametrize(("noise", "options"), NOISES)
def test_corrupt_is_the_function_in_training_and_nothing_in_eval(noise, options):
    x = torch.rand(50, 20)
    module = Corrupt(noise, **options)
    torch.manual_seed(2)
    noisy = module(x)
    torch.manual_seed(2)
    assert torch.equal(noisy, AF.corrupt(x, noise, **options))
    assert not torch.equal(noisy, x)
    assert module.eval()(x) is x
    torch.manual_seed(2)
    assert torch.equal(module.corrupt(x), noisy)
    assert torch.equal(module.corrupt(x, seed=7), AF.corrupt(x, noise, seed=7, **options))


@pytest.mark.parametrize(("noise", "options"), NOISES[:-1])
def test_corrupt_and_its_twin_agree_on_the_same_noise(same_noise, noise, options):
    x = torch.rand(30, 20, dtype=torch.float64) + 0.5
    module = Corrupt(noise, **options)
    same_noise(30, 20)
    torch.testing.assert_close(module.eager()(x), module(x))
    assert module.eval().eager()(x) is x


@pytest.mark.parametrize("shape", [(4, 3, 8, 6), (2, 5, 7)])
def test_blocks_and_their_twin_agree_on_the_same_noise(same_noise, shape):
    x = torch.rand(shape, dtype=torch.float64) + 0.5
    module = Corrupt("masking", p=0.4, block=3)
    height, width = -(-shape[-2] // 3), -(-shape[-1] // 3)
    same_noise(*shape[:-3], 1, height, width)
    noisy = module(x)
    assert 0 < (noisy == 0).double().mean() < 1
    torch.testing.assert_close(module.eager()(x), noisy)


def test_dropout_has_torchs_as_its_twin():
    twin = Corrupt("dropout", p=0.3).eager()
    assert type(twin) is nn.Dropout
    assert (twin.p, twin.training) == (0.3, True)


def test_modules_show_their_options():
    assert repr(Reparameterize("sum", (-3, 2))) == "Reparameterize(reduction=sum, logvar_range=(-3, 2))"
    assert repr(Corrupt("gaussian", std=0.5)) == "Corrupt(gaussian, mean=0, std=0.5)"
    assert repr(Corrupt("masking", block=4)) == "Corrupt(masking, p=0.1, block=4)"
    shown = repr(GaussianHead(4, 2, bias=False))
    for part in ("in_features=4", "latent=2", "bias=False", "reduction=mean"):
        assert part in shown


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Reparameterize("avg"),
            "Reparameterize: reduction must be one of none, mean, sum, got 'avg'",
        ),
        (lambda: Reparameterize(logvar_range=3), "Reparameterize: logvar_range must be a pair"),
        (lambda: Reparameterize(logvar_range=(2, 1)), r"logvar_range must be \(low, high\) with low <= high"),
        (lambda: GaussianHead(0, 3), "in_features=0: expected a positive integer"),
        (lambda: GaussianHead(3, 1.5), "latent=1.5: expected a positive integer"),
        (lambda: GaussianHead(3, 3, reduction=1), "GaussianHead: reduction must be one of"),
        (lambda: GaussianHead(3, 3, logvar_range=("a", 1)), r"GaussianHead: logvar_range\[0\] must be"),
        (
            lambda: GaussianHead(2**31 - 1, 2**31 - 1),
            "in_features=2147483647, latent=2147483647: .*memory",
        ),
        (lambda: Corrupt("gausian"), "Corrupt: noise must be one of gaussian.*got 'gausian'"),
        (lambda: Corrupt("gaussian", p=0.2), "Corrupt: gaussian noise has no p; it takes mean, std"),
        (lambda: Corrupt("gaussian", std=-1), "Corrupt: std must be a finite number of at least 0"),
        (lambda: Corrupt("dropout", p=1.5), "Corrupt: p must be a number from 0 to 1"),
        (lambda: Corrupt("masking", block=0), "Corrupt: block must be an integer from 1 to"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
