"""The Triton kernels of reparameterize in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import math
import os
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from aefast.kernels.triton import reparameterize as kernels
from aefast.kernels.triton import rows
from aefast.ops import _philox
from aefast.ops import reparameterize as op
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]

# Programs that a launch is to have, bytes of a warp's share of a tile.
GEOMETRIES = [(256, 1024), (1, 1024), (1, 2**15)]
NO_LIMITS = (-math.inf, math.inf)


@pytest.fixture
def large_tiles(monkeypatch):
    """Few programs of many elements: the interpreter takes as long for a small tile."""
    monkeypatch.setattr(rows, "ENOUGH", 1)
    monkeypatch.setattr(rows, "WARP_BYTES", 2**15)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def moments(B, D, dtype=torch.float32):
    return normal(B, D, dtype=dtype), normal(B, D, dtype=dtype, seed=1)


def exact_gradients(grad_z, grad_kl, mu, logvar, seed, low, high):
    """Those of the reference in float64."""
    mu, logvar = (t.detach().double().requires_grad_() for t in (mu, logvar))
    outputs = op.rows_reference(mu, logvar, seed, low, high)
    given = [
        (out, grad.double()) for out, grad in zip(outputs, (grad_z, grad_kl), strict=True) if grad is not None
    ]
    outputs, grads = zip(*given, strict=True)
    return torch.autograd.grad(outputs, (mu, logvar), grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype, large_tiles):
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("D", [1, 6, 16, 257, 1031])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_noise_is_that_of_the_seed(D, dtype, tolerance, large_tiles):
    """Whatever the quads that rows begin in."""
    zeros = torch.zeros(7, D, dtype=dtype)
    for seed in (torch.tensor(0), torch.tensor(-(2**40) - 3)):
        z, kl = kernels.reparameterize(zeros, zeros, seed, *NO_LIMITS)
        expected = _philox.normals(seed, zeros.shape, torch.float64)
        assert (z.double() - expected).abs().max() <= tolerance
        assert (kl == 0).all()


def test_the_seed_is_read_where_it_lies():
    mu, logvar = moments(3, 8)
    seed = torch.tensor(1)
    first, _ = kernels.reparameterize(mu, logvar, seed, *NO_LIMITS)
    seed.fill_(2)
    second, _ = kernels.reparameterize(mu, logvar, seed, *NO_LIMITS)
    torch.testing.assert_close(second, op.rows_reference(mu, logvar, seed, *NO_LIMITS)[0])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("B, D", [(37, 16), (9, 6), (5, 300), (3, 2051), (2, 4100)])
def test_results_do_not_depend_on_the_launch(B, D, monkeypatch):
    mu, logvar = moments(B, D)
    grad_z, grad_kl, seed = normal(B, D, seed=2), normal(B, seed=3), torch.tensor(5)
    results = []
    for enough, warp_bytes in GEOMETRIES:
        monkeypatch.setattr(rows, "ENOUGH", enough)
        monkeypatch.setattr(rows, "WARP_BYTES", warp_bytes)
        sample = kernels.reparameterize(mu, logvar, seed, -0.5, 0.75)
        gradients = kernels.reparameterize_backward(grad_z, grad_kl, mu, logvar, seed, -0.5, 0.75)
        results.append((*sample, *gradients))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("D", [16, 20, 21])
def test_results_do_not_depend_on_strides(D, large_tiles):
    mu, logvar = moments(9, D)
    grad_z, grad_kl, seed = normal(9, D, seed=2), normal(9, seed=3), torch.tensor(5)

    def results(mu, logvar, grad_z, grad_kl):
        gradients = kernels.reparameterize_backward(grad_z, grad_kl, mu, logvar, seed, *NO_LIMITS)
        return (*kernels.reparameterize(mu, logvar, seed, *NO_LIMITS), *gradients)

    contiguous = results(mu, logvar, grad_z, grad_kl)
    assert all(result.is_contiguous() for result in contiguous)
    both = torch.cat([mu, logvar], 1)
    wide = torch.stack([grad_kl, grad_kl], 1)
    for strided in (
        (both[:, :D], both[:, D:], grad_z, grad_kl),
        (mu.t().contiguous().t(), logvar, grad_z, wide[:, 1]),
        (mu, logvar.repeat_interleave(3, 1)[:, ::3], grad_z.t().contiguous().t(), grad_kl),
    ):
        assert all(torch.equal(a, b) for a, b in zip(contiguous, results(*strided), strict=True))


def test_a_row_does_not_depend_on_the_others(large_tiles):
    mu, logvar = moments(11, 48)
    _, together = kernels.reparameterize(mu, logvar, torch.tensor(5), *NO_LIMITS)
    _, alone = kernels.reparameterize(mu[7:8], logvar[7:8], torch.tensor(5), *NO_LIMITS)
    assert torch.equal(together[7:8], alone)


@pytest.mark.parametrize("D", [5, 16])
@pytest.mark.parametrize("given", ["z", "kl", "both"])
def test_either_gradient_may_be_absent(given, D, large_tiles):
    mu, logvar = moments(6, D)
    seed = torch.tensor(5)
    grad_z = None if given == "kl" else normal(6, D, seed=2)
    grad_kl = None if given == "z" else normal(6, seed=3)
    exact = exact_gradients(grad_z, grad_kl, mu, logvar, seed, -1.0, 1.0)
    # Without grad_z no noise is made: there is no seed to make it of.
    seed = None if given == "kl" else seed
    found = kernels.reparameterize_backward(grad_z, grad_kl, mu, logvar, seed, -1.0, 1.0)
    for ours, true in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_gradients(dtype, large_tiles):
    mu, logvar = moments(6, 10, dtype)
    seed, wide = torch.tensor(5), torch.float64 if dtype == torch.float64 else torch.float32
    grad_z, grad_kl = torch.tensor(0.5, dtype=dtype).expand(6, 10), torch.tensor(0.25, dtype=wide).expand(6)
    found = kernels.reparameterize_backward(grad_z, grad_kl, mu, logvar, seed, *NO_LIMITS)
    exact = exact_gradients(grad_z, grad_kl, mu, logvar, seed, *NO_LIMITS)
    for ours, true in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), true, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_the_ends_of_the_range(dtype, large_tiles):
    """-0.1 is no float32: the ends are compared as the dtype has them."""
    low, high = -0.1, 0.3
    ends = torch.tensor([low, high], dtype=dtype)
    below, above = torch.nextafter(ends, torch.tensor([-9.0, 9.0], dtype=dtype))
    logvar = torch.stack([*ends, below, above, below * 100, torch.tensor(0.0, dtype=dtype)])[None]
    mu, seed = normal(1, 6, dtype=dtype), torch.tensor(5)
    grad_z, grad_kl = torch.ones(1, 6, dtype=dtype), torch.ones(1, dtype=dtype)
    _, gradient = kernels.reparameterize_backward(grad_z, grad_kl, mu, logvar, seed, low, high)
    assert (gradient != 0).tolist() == [[True, True, False, False, False, True]]
    leaf = logvar.clone().requires_grad_()
    z, kl = op.rows_reference(mu, leaf, seed, low, high)
    (expected,) = torch.autograd.grad(z.sum() + kl.sum(), leaf)
    torch.testing.assert_close(gradient, expected)
    ours, theirs = kernels.reparameterize(mu, logvar, seed, low, high), (z.detach(), kl.detach())
    torch.testing.assert_close(ours, theirs)


def test_what_fills_a_tile_adds_nothing(large_tiles):
    """Outside the matrix logvar is read as 0, which in this range has a divergence."""
    mu, logvar = moments(5, 21)
    ours, theirs = (
        f(mu, logvar, torch.tensor(5), 0.5, 0.75) for f in (kernels.reparameterize, op.rows_reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)


def test_overflow_is_eager_s(large_tiles):
    logvar = torch.tensor([[200.0], [100.0], [88.0], [-math.inf], [math.inf], [math.nan], [-1e30]])
    mu, seed = torch.ones(7, 1), torch.tensor(5)
    torch.testing.assert_close(
        kernels.reparameterize(mu, logvar, seed, *NO_LIMITS),
        op.rows_reference(mu, logvar, seed, *NO_LIMITS),
        equal_nan=True,
        rtol=1e-5,
        atol=1e-5,
    )
    # What underflows is the variance before the standard deviation.
    zeros = torch.zeros(1, 1)
    tiny, _ = kernels.reparameterize(zeros, zeros - 120, torch.tensor(5), *NO_LIMITS)
    expected = math.exp(-60) * _philox.normals(torch.tensor(5), tiny.shape, torch.float64)
    torch.testing.assert_close(tiny.double(), expected, rtol=1e-5, atol=0)
    # A range keeps all but NaN finite.
    z, kl = kernels.reparameterize(mu, logvar, seed, -30.0, 20.0)
    assert (z.isfinite()[:, 0] & kl.isfinite()).tolist() == [True] * 5 + [False, True]


@pytest.mark.skipif(
    not hasattr(sys.modules["triton.runtime.interpreter"]._interpreter, "fma_fp32"),
    reason="this Triton's interpreter rounds the product of a multiply-add",
)
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 8.0), (torch.float32, 80.0), (torch.float64, 80.0)])
def test_exponential(dtype, scale, large_tiles):
    """The product of logvar and log2(e) is rounded: exp2 of that would be wrong by its ulps."""
    logvar = torch.linspace(-scale, scale, 999, dtype=dtype)[:, None]
    _, kl = kernels.reparameterize(torch.zeros_like(logvar), logvar, torch.tensor(5), *NO_LIMITS)
    exact = 0.5 * (logvar.double().expm1() - logvar.double())[:, 0]
    unit = torch.finfo(dtype).eps * torch.maximum(0.5 * logvar.double().exp()[:, 0], torch.ones(()))
    assert ((kl.double() - exact).abs() <= (4 if scale == 8 else 40) * unit).all()
