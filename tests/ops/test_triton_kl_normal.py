"""The Triton kernels of kl_normal in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from aefast.kernels.triton import kl_normal as kernels
from aefast.kernels.triton import rows
from aefast.ops import kl_normal as op
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]

# Programs that a launch is to have, bytes of a warp's share of a tile.
GEOMETRIES = [(256, 1024), (1, 1024), (1, 2**15)]


@pytest.fixture
def large_tiles(monkeypatch):
    """Few programs of many elements: the interpreter takes as long for a small tile."""
    monkeypatch.setattr(rows, "ENOUGH", 1)
    monkeypatch.setattr(rows, "WARP_BYTES", 2**15)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype, large_tiles):
    for sample in op.samples(torch.device("cpu"), dtype):
        for expand_grad in (False, True):
            numerics.check(op.OP, "triton", sample, dtype, expand_grad)


@pytest.mark.parametrize("B, D", [(37, 16), (9, 6), (3, 2051), (2, 5000)])
def test_results_do_not_depend_on_the_launch(B, D, monkeypatch):
    mu, logvar, grad = normal(B, D), normal(B, D, seed=1), normal(B, seed=2)
    results = []
    for enough, warp_bytes in GEOMETRIES:
        monkeypatch.setattr(rows, "ENOUGH", enough)
        monkeypatch.setattr(rows, "WARP_BYTES", warp_bytes)
        gradients = kernels.kl_normal_backward(grad, mu, logvar)
        results.append((kernels.kl_normal(mu, logvar), *gradients))
        # A row's sum is its own, whatever is above and below it.
        assert torch.equal(kernels.kl_normal(mu[-1:], logvar[-1:]), results[-1][0][-1:])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_chunks_of_a_row_are_added(large_tiles):
    """Rows longer than a program's share; a second pass adds up what the programs found."""
    mu, logvar = normal(3, 5000), normal(3, 5000, seed=1)
    assert rows.tiling(3, 5000, 4).chunks == 3
    exact = op.divergence(mu.double(), logvar.double())
    torch.testing.assert_close(kernels.kl_normal(mu, logvar).double(), exact, rtol=1e-6, atol=0)


def test_values_of_half_precision_are_summed_wide(large_tiles):
    mu, logvar = normal(2, 1031, dtype=torch.float16), normal(2, 1031, dtype=torch.float16, seed=1)
    kl = kernels.kl_normal(mu, logvar)
    assert kl.dtype == torch.float32
    exact = op.divergence(mu.double(), logvar.double())
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)


def test_overflow_is_eager_s(large_tiles):
    logvar = torch.tensor([[89.0], [88.5], [200.0], [-math.inf], [math.inf], [math.nan], [-1e30]])
    mu = torch.ones(7, 1)
    torch.testing.assert_close(
        kernels.kl_normal(mu, logvar), op.divergence(mu, logvar), equal_nan=True, rtol=1e-5, atol=0
    )
    leaf = logvar.clone().requires_grad_()
    (expected,) = torch.autograd.grad(op.divergence(mu, leaf).sum(), leaf)
    _, gradient = kernels.kl_normal_backward(torch.ones(7), mu, logvar)
    torch.testing.assert_close(gradient, expected, equal_nan=True, rtol=1e-5, atol=0)
