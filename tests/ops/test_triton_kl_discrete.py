"""The Triton kernels of kl_discrete in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from aefast.kernels.triton import kl_discrete as kernels
from aefast.kernels.triton import rows
from aefast.ops import kl_discrete as op
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


def positive(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).add(0.01).to(dtype)


def reference(p, q):
    """The divergence of each row, and the gradients of both for ones."""
    p, q = (t.clone().requires_grad_() for t in (p, q))
    kl = op._reference(p, q)
    return (kl.detach(), *torch.autograd.grad(kl.sum(), (p, q)))


def ours(p, q):
    kl = kernels.kl_discrete(p, q)
    return (kl, *kernels.kl_discrete_backward(torch.ones(()).to(kl.dtype).expand(p.shape[0]), p, q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype, large_tiles):
    for sample in op.samples(torch.device("cpu"), dtype):
        for expand_grad in (False, True):
            numerics.check(op.OP, "triton", sample, dtype, expand_grad)


@pytest.mark.parametrize("B, C", [(37, 16), (9, 6), (3, 2051), (2, 5000)])
def test_results_do_not_depend_on_the_launch(B, C, monkeypatch):
    p, q = positive(B, C), positive(B, C, seed=1)
    results = []
    for enough, warp_bytes in GEOMETRIES:
        monkeypatch.setattr(rows, "ENOUGH", enough)
        monkeypatch.setattr(rows, "WARP_BYTES", warp_bytes)
        results.append(ours(p, q))
        assert torch.equal(kernels.kl_discrete(p[-1:], q[-1:]), results[-1][0][-1:])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_zeros(large_tiles):
    """Nothing where p is 0, not even NaN from q; infinite where only q is."""
    p = torch.tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [-0.0, 1.0, 0.0]])
    q = torch.tensor([[0.0, 0.5, 0.5], [0.3, 0.7, 0.0], [0.0, 1.0, 0.0], [math.nan, 1.0, math.inf]])
    kl, to_p, to_q = ours(p, q)
    torch.testing.assert_close(kl, torch.tensor([0.0, -math.log(0.7), math.inf, 0.0]))
    assert (to_p[p == 0] == 0).all() and (to_q[p == 0] == 0).all()
    assert to_p[2, 0] == math.inf and to_q[2, 0] == -math.inf
    torch.testing.assert_close((kl, to_p, to_q), reference(p, q))


def test_nan_stays(large_tiles):
    p, q = positive(3, 5), positive(3, 5, seed=1)
    p[0, 1] = q[2, 3] = math.nan
    for found in ours(p, q):
        assert found.reshape(3, -1).isnan().any(1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    "dtype, tiny", [(torch.float32, 1e-37), (torch.float64, 1e-300), (torch.float16, 6e-8)]
)
def test_tiny_probabilities(dtype, tiny, large_tiles):
    """p / q would overflow or be 0; the difference of their logarithms is neither."""
    p = torch.tensor([[tiny, 0.5], [0.5, tiny], [tiny, 1 - tiny]], dtype=dtype)
    q = torch.tensor([[0.5, 0.5], [0.5, 0.5], [tiny, 1.0]], dtype=dtype)
    if dtype == torch.float64:
        p[1, 0], q[1, 0] = 1e30, tiny
    for found, true in zip(ours(p, q), reference(p, q), strict=True):
        torch.testing.assert_close(found, true)
