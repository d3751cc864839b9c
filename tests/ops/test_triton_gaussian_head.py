"""The Triton kernels of gaussian_head in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from aefast.kernels.activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from aefast.kernels.triton import gaussian_head as kernels
from aefast.kernels.triton import reparameterize, rows, tuning
from aefast.ops import gaussian_head as op
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]
ALL = NEED_X | NEED_WEIGHT | NEED_BIAS
LIMITS = (-0.5, 0.75)


@pytest.fixture
def large_tiles(monkeypatch):
    """Few programs of many elements: the interpreter takes as long for a small tile."""
    monkeypatch.setattr(rows, "ENOUGH", 1)
    monkeypatch.setattr(rows, "WARP_BYTES", 2**15)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(M=9, K=7, D=6):
    return normal(M, K), normal(2 * D, K, seed=1) * K**-0.5, normal(2 * D, seed=2)


def upstream(M=9, D=6):
    """Of z, of the divergence, and of [mu | logvar]."""
    return normal(M, D, seed=3), normal(M, seed=4), normal(M, 2 * D, seed=5)


def exact_gradients(grads, h, weight, bias, seed):
    leaves = [t.double().requires_grad_() for t in (h, weight, bias)]
    outputs = op._reference(*leaves, seed, *LIMITS)
    given = [(out, grad.double()) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    outputs, grads = zip(*given, strict=True)
    return torch.autograd.grad(outputs, leaves, grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype, large_tiles):
    for index, sample in enumerate(op.samples(torch.device("cpu"), dtype)):
        numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("candidate", ["unfused", "fused"])
def test_is_the_layer_and_the_sample_of_it(candidate, large_tiles):
    h, weight, bias = layer()
    seed = torch.tensor(5)
    with tuning.force(candidate, tuning.Tile(64, 32, 4, 2)):
        z, kl, moments = kernels.gaussian_head(h, weight, bias, seed, *LIMITS)
    torch.testing.assert_close(moments, torch.nn.functional.linear(h, weight, bias))
    assert moments.is_contiguous() and moments[:, 6:].max() > LIMITS[1]
    again = reparameterize.reparameterize(moments[:, :6], moments[:, 6:], seed, *LIMITS)
    assert torch.equal(z, again[0]) and torch.equal(kl, again[1])


@pytest.mark.parametrize("D", [6, 8])
@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_any_gradient_may_be_absent(given, D, large_tiles):
    h, weight, bias = layer(D=D)
    seed = torch.tensor(5)
    grads = [grad if index in given else None for index, grad in enumerate(upstream(D=D))]
    exact = exact_gradients(grads, h, weight, bias, seed)
    moments = torch.nn.functional.linear(h, weight, bias)
    found = kernels.gaussian_head_backward(*grads, h, weight, moments, seed, *LIMITS, ALL)
    for ours, true in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=2e-5)


def test_gradients_of_any_strides(large_tiles):
    h, weight, bias = layer()
    seed, moments = torch.tensor(5), torch.nn.functional.linear(h, weight, bias)
    grads = upstream()
    expected = kernels.gaussian_head_backward(*grads, h, weight, moments, seed, *LIMITS, ALL)
    strided = (
        grads[0].t().contiguous().t(),
        grads[1][:, None].repeat(1, 2)[:, 1],
        grads[2].repeat(1, 2)[:, :12].t().contiguous().t(),
    )
    found = kernels.gaussian_head_backward(*strided, h, weight, moments, seed, *LIMITS, ALL)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = torch.ones(())
    ones = (one.expand(9, 6), one.expand(9), one.expand(9, 12))
    found = kernels.gaussian_head_backward(*ones, h, weight, moments, seed, *LIMITS, ALL)
    for ours, true in zip(found, exact_gradients(ones, h, weight, bias, seed), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=2e-5)


def test_the_gradient_of_logvar_itself_passes_outside_the_range(large_tiles):
    """What is clamped is the sample's logvar, not the one that is returned."""
    h, weight = torch.eye(2), torch.tensor([[0.0, 0.0], [5.0, -5.0]])
    seed, moments = torch.tensor(5), h @ weight.t()
    sampled = (torch.ones(2, 1), torch.ones(2))
    grad = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    _, none, _ = kernels.gaussian_head_backward(*sampled, None, h, weight, moments, seed, *LIMITS, ALL)
    _, some, _ = kernels.gaussian_head_backward(*sampled, grad, h, weight, moments, seed, *LIMITS, ALL)
    assert none[1].tolist() == [0.0, 0.0] and some[1].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("needs", range(8))
def test_computes_what_is_needed(needs, large_tiles):
    h, weight, bias = layer()
    seed, moments = torch.tensor(5), torch.nn.functional.linear(h, weight, bias)
    full = kernels.gaussian_head_backward(*upstream(), h, weight, moments, seed, -math.inf, math.inf, ALL)
    found = kernels.gaussian_head_backward(*upstream(), h, weight, moments, seed, -math.inf, math.inf, needs)
    for bit, ours, true in zip((NEED_X, NEED_WEIGHT, NEED_BIAS), found, full, strict=True):
        assert torch.equal(ours, true) if needs & bit else ours is None
