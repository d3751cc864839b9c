"""The Triton kernels of jumprelu in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from aefast.kernels.jumprelu import NEED_THRESHOLD, NEED_X
from aefast.kernels.triton import jumprelu as kernels
from aefast.kernels.triton import rows
from aefast.ops import jumprelu as op
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]
ALL = NEED_X | NEED_THRESHOLD

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


def thresholds(size, dtype=torch.float32):
    return normal(size, dtype=dtype, seed=1).abs() + 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype, large_tiles):
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("B, D", [(37, 16), (9, 6), (3, 2051), (2, 5000)])
def test_results_do_not_depend_on_the_launch(B, D, monkeypatch):
    x, threshold = normal(B, D), thresholds(D)
    results = []
    for enough, warp_bytes in GEOMETRIES:
        monkeypatch.setattr(rows, "ENOUGH", enough)
        monkeypatch.setattr(rows, "WARP_BYTES", warp_bytes)
        results.append(kernels.jumprelu(x, threshold))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
    assert torch.equal(results[0][1], (x > threshold).float().sum(1))


@pytest.mark.parametrize("given", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("needs", [NEED_X, NEED_THRESHOLD, ALL])
def test_either_gradient_may_be_absent_and_only_those_needed_are_made(needs, given, large_tiles):
    x, threshold = normal(70, 6), thresholds(6)
    grads = [
        one if index in given else None
        for index, one in enumerate((normal(70, 6, seed=2), normal(70, seed=3)))
    ]
    leaves = x.double().requires_grad_(), threshold.double().requires_grad_()
    outputs = op.reference(*leaves, 0.5)
    exact = torch.autograd.grad(
        [outputs[index] for index in given],
        leaves,
        [grads[index].double() for index in given],
        allow_unused=True,
        materialize_grads=True,
    )
    found = kernels.jumprelu_backward(*grads, x, threshold, 0.5, needs)
    for bit, ours, true in zip((NEED_X, NEED_THRESHOLD), found, exact, strict=True):
        if needs & bit:
            torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=2e-5)
        else:
            assert ours is None


def test_gradients_of_any_strides(large_tiles):
    x, threshold = normal(70, 6), thresholds(6)
    grads = normal(70, 6, seed=2), normal(70, seed=3)
    expected = kernels.jumprelu_backward(*grads, x, threshold, 0.5, ALL)
    strided = grads[0].t().contiguous().t(), grads[1].repeat_interleave(2)[::2]
    transposed = x.t().contiguous().t()
    for ours, true in zip(
        kernels.jumprelu_backward(*strided, transposed, threshold.repeat_interleave(2)[::2], 0.5, ALL),
        expected,
        strict=True,
    ):
        assert torch.equal(ours, true)
    one = torch.ones(())
    found = kernels.jumprelu_backward(one.expand(70, 6), one.expand(70), x, threshold, 0.5, ALL)
    expected = kernels.jumprelu_backward(torch.ones(70, 6), torch.ones(70), x, threshold, 0.5, ALL)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_edges(large_tiles):
    """A pre-activation at its threshold is off, and one at the rectangle's edge has no part in the gradient."""
    x = torch.tensor([[0.5], [0.5 + 2.0**-24], [0.375], [0.625], [0.380]])
    threshold = torch.tensor([0.5])
    h, l0 = kernels.jumprelu(x, threshold)
    assert l0.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert h.flatten().tolist() == [0.0, x[1].item(), 0.0, 0.625, 0.0]
    _, gradient = kernels.jumprelu_backward(None, torch.ones(5), x, threshold, 0.25, ALL)
    assert gradient.tolist() == [-3 / 0.25]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_propagate(large_tiles):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]] * 9).t().contiguous()
    h, l0 = kernels.jumprelu(x, torch.full((9,), 0.5))
    assert h[0].isnan().all() and (h[1] == math.inf).all() and not h[2].any() and (h[3] == 1.0).all()
    assert l0[1:].tolist() == [9.0, 0.0, 9.0]


def test_thresholds_of_half_precision_are_compared_wide(large_tiles):
    x = torch.ones(1, 2, dtype=torch.float16)
    h, l0 = kernels.jumprelu(x, torch.tensor([1.0001, 0.9999]))
    assert h.tolist() == [[0.0, 1.0]] and h.dtype == torch.float16
    assert l0.tolist() == [1.0] and l0.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_threshold_that_is_no_number_is_seen(large_tiles):
    x, threshold = normal(70, 6), thresholds(6)
    threshold[2] = math.nan
    is_wrong = torch.arange(6) == 2
    h, l0 = kernels.jumprelu(x, threshold)
    assert torch.equal(h.isnan(), is_wrong.expand(70, 6)) and l0.isnan().all()
    _, gradient = kernels.jumprelu_backward(normal(70, 6), torch.ones(70), x, threshold, 0.5, ALL)
    assert torch.equal(gradient.isnan(), is_wrong)
