"""MMDLoss: the function with its options, its twin in plain PyTorch, and the conventions of public code."""

import copy
import math

import pytest
import torch
import torch.distributed

import aefast.functional as AF
from aefast.errors import InputError
from aefast.nn import MMDLoss
from aefast.ops._pairwise import KERNELS

ALL_SCALES = (0.1, 0.2, 0.5, 1, 2, 5, 10)


def samples(count=9, other=9, size=4):
    """x, which requires a gradient, and y, apart from it, in float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, size, dtype=torch.float64, generator=generator) for rows in (count, other))
    return x.requires_grad_(), 0.7 * y + 0.5


def same(found, expected, x, rtol=1e-9):
    """That values and gradients are: sums of some hundred float64 numbers of one size, or as told."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    gradients = (torch.autograd.grad(value, x)[0] for value in (found, expected))
    torch.testing.assert_close(*gradients, rtol=rtol, atol=rtol)


def differences(x, y):
    return x[:, None] - y[None]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bandwidth", [None, 2.0, [0.5, 3.0]])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_it_is_the_function_and_so_is_its_twin(kernel, bandwidth, estimator):
    x, y = samples(30, 17)
    loss = MMDLoss(kernel, bandwidth, estimator, alpha=0.7, factor=3.0)
    for module, rtol in (
        (loss, 1e-9),
        # Distances from products, and their roots, have lost half of the digits where points are close.
        (loss.eager(), 1e-6),
    ):
        value = AF.mmd(x, y, kernel=kernel, bandwidth=bandwidth, estimator=estimator, alpha=0.7)
        same(module(x, y), 3.0 * value, x, rtol)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_twin_has_no_gradient_of_a_point_to_itself(kernel):
    x, _ = samples(5)
    y = x.detach().clone()
    for estimator in ("unbiased", "biased"):
        (gradient,) = torch.autograd.grad(MMDLoss(kernel, 1.0, estimator).eager()(x, y), x)
        assert gradient.isfinite().all()


def test_the_twin_computes_half_precision_in_single():
    x, y = (one.detach().bfloat16() for one in samples(40, 30))
    value = MMDLoss("imq", 2.0).eager()(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, AF.mmd(x, y, kernel="imq", bandwidth=2.0), rtol=1e-4, atol=1e-6)


def wae_penalty(x, y, sigma, scales=ALL_SCALES):
    """The IMQ penalty of https://github.com/tolstikhin/wae, wae.py."""
    n, size = x.shape
    total = 0.0
    for scale in scales:
        c = 2 * size * sigma**2 * scale
        within = sum(c / (c + differences(p, p).square().sum(-1)) for p in (x, y))
        within = within * (1 - torch.eye(n, dtype=x.dtype))
        across = c / (c + differences(x, y).square().sum(-1))
        total = total + within.sum() / (n * n - n) - across.sum() * 2 / (n * n)
    return total


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_the_penalty_of_the_wasserstein_autoencoder(sigma):
    x, y = samples()
    same(MMDLoss.wae(4, sigma=sigma)(x, y), wae_penalty(x, y, sigma), x)
    same(MMDLoss.wae(4, scales=[0.3])(x, y), wae_penalty(x, y, 1.0, [0.3]), x)


def pythae_mmd(x, y, kernel, width, scales):
    """mmd_loss of pythae 0.1.2, models/info_vae/info_vae_model.py and models/wae_mmd/wae_mmd_model.py."""
    n, size = x.shape
    c = 2.0 * size * width**2

    def gram(a, b):
        u = torch.linalg.vector_norm(differences(a, b) + 1e-300, dim=-1).square()
        return torch.exp(-u / c) if kernel == "rbf" else sum(s * c / (s * c + u) for s in scales or [1.0])

    grams = gram(x, x), gram(y, y)
    within = sum((k - torch.diag(torch.diagonal(k))).sum() / ((n - 1) * n) for k in grams)
    return within - 2 * gram(x, y).sum() / n**2


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("width", [1.0, 0.6])
@pytest.mark.parametrize("scales", [ALL_SCALES, [0.5, 4.0], None])
def test_the_mmd_of_pythae(kernel, width, scales):
    x, y = samples()
    loss = MMDLoss.pythae(4, kernel, kernel_bandwidth=width, scales=scales)
    same(loss(x, y), pythae_mmd(x, y, kernel, width, scales), x)


def test_the_defaults_of_pythae():
    x, y = samples()
    same(MMDLoss.pythae(4)(x, y), pythae_mmd(x, y, "imq", 1.0, ALL_SCALES), x)


def test_the_mmd_of_infovaes_authors():
    """compute_mmd and compute_kernel of https://github.com/ShengjiaZhao/MMD-Variational-Autoencoder."""
    x, y = samples(9, 6)

    def gram(a, b):
        return torch.exp(-differences(a, b).square().mean(-1) / a.shape[1])

    expected = gram(x, x).mean() + gram(y, y).mean() - 2 * gram(x, y).mean()
    same(MMDLoss.infovae(4)(x, y), expected, x)


@pytest.mark.parametrize("loss", ["gaussian", "laplacian", "energy"])
@pytest.mark.parametrize("blur", [0.05, 0.8])
def test_the_kernel_losses_of_geomloss(loss, blur):
    """kernel_samples.py of https://github.com/jeanfeydy/geomloss, with weights of 1 / N and 1 / M."""
    x, y = samples(9, 6)
    # Close enough for a blur of 0.05 to see anything.
    x, y = (0.1 * x.detach()).requires_grad_(), 0.1 * y

    def gram(a, b):
        u = differences(a, b).square().sum(-1)
        if loss == "gaussian":
            return torch.exp(-u / blur**2 / 2)
        distances = torch.where(u > 0, torch.where(u > 0, u, 1.0).sqrt(), 0.0)
        return -distances if loss == "energy" else torch.exp(-distances / blur)

    a, b = (torch.full((len(p),), 1 / len(p), dtype=torch.float64) for p in (x, y))
    expected = 0.5 * (a @ gram(x, x) @ a) + 0.5 * (b @ gram(y, y) @ b) - a @ gram(x, y) @ b
    found = MMDLoss.geomloss(loss, blur=blur)(x, y)
    assert found > 1e-3
    same(found, expected, x)


def test_the_default_blur_of_geomloss_is_its_own():
    x, y = (0.1 * one.detach() for one in samples())
    assert torch.equal(MMDLoss.geomloss()(x, y), MMDLoss.geomloss("gaussian", blur=0.05)(x, y))


def test_presets_show_what_they_are():
    assert repr(MMDLoss()) == "MMDLoss(rbf, unbiased)"
    assert repr(MMDLoss.pythae(8, "rbf", kernel_bandwidth=0.5)) == (
        f"MMDLoss(rbf, unbiased, bandwidth={0.5 * math.sqrt(8):g})"
    )
    assert repr(MMDLoss.geomloss("energy")) == "MMDLoss(energy, biased, factor=0.5)"
    assert repr(MMDLoss("rational_quadratic", [1, 2], alpha=0.5).eager()) == (
        "EagerMMD(rational_quadratic, unbiased, bandwidth=1 2, alpha=0.5)"
    )
    assert not MMDLoss().state_dict()


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_a_copy_has_the_same_group(group):
    loss = MMDLoss("imq", [1.0, 2.0], "biased", factor=2.0, group=group).eval()
    copied = copy.deepcopy(torch.nn.Sequential(loss))[0]
    assert copied is not loss
    assert copied.group is group
    assert not copied.training
    assert repr(copied) == repr(loss)
    x, y = samples()
    same(copied(x, y), 2.0 * AF.mmd(x, y, kernel="imq", bandwidth=[1.0, 2.0], estimator="biased"), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MMDLoss("gaussian"), "MMDLoss: kernel must be one of rbf, .*got 'gaussian'"),
        (lambda: MMDLoss(bandwidth=0), "MMDLoss: bandwidth must be a number above 0, .*got 0"),
        (lambda: MMDLoss(bandwidth=[]), "MMDLoss: bandwidth must have at least one number"),
        (lambda: MMDLoss(estimator="u"), "MMDLoss: estimator must be one of unbiased, biased, got 'u'"),
        (
            lambda: MMDLoss("rational_quadratic", alpha=-1),
            "MMDLoss: alpha must be a number above 0, from 1e-6 to 1e6, got -1",
        ),
        (lambda: MMDLoss(factor=math.nan), "MMDLoss: factor must be a finite number, got nan"),
        (lambda: MMDLoss.wae(0), "latent=0: expected a positive integer"),
        (lambda: MMDLoss.wae(2, sigma=0), "MMDLoss.wae: sigma must be above 0, got 0"),
        (lambda: MMDLoss.wae(2, scales=[]), "MMDLoss.wae: scales must be a sequence of numbers above 0"),
        (lambda: MMDLoss.wae(2, scales=[1, -1]), "MMDLoss.wae: scales must be above 0, got -1"),
        (
            lambda: MMDLoss.pythae(2, "laplacian"),
            "MMDLoss.pythae: kernel must be imq or rbf, got 'laplacian'",
        ),
        (
            lambda: MMDLoss.pythae(2, kernel_bandwidth="1"),
            "MMDLoss.pythae: kernel_bandwidth must be a finite number, got '1'",
        ),
        (lambda: MMDLoss.infovae(2.0), "latent=2.0: expected a positive integer"),
        (
            lambda: MMDLoss.geomloss("sinkhorn"),
            "MMDLoss.geomloss: loss must be one of gaussian, .*'sinkhorn'",
        ),
        (lambda: MMDLoss.geomloss(blur=0), "MMDLoss: bandwidth must be a number above 0"),
        (lambda: MMDLoss()(torch.ones(1, 2), torch.ones(3, 2)), "mmd: x must have at least 2 rows"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
