"""The Triton kernels of gaussian_head in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import math
import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

import triton.runtime.interpreter as interpreter

from aefast.kernels.activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from aefast.kernels.triton import gaussian_head as kernels
from aefast.kernels.triton import reparameterize, rows, tuning
from aefast.ops import gaussian_head as op
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]
ALL = NEED_X | NEED_WEIGHT | NEED_BIAS
LIMITS = (-0.5, 0.75)
SMALL, WIDE = tuning.Tile(64, 32, 4, 2), tuning.Tile(64, 128, 4, 4)


@pytest.fixture
def large_tiles(monkeypatch):
    """Few programs of many elements: the interpreter takes as long for a small tile."""
    monkeypatch.setattr(rows, "ENOUGH", 1)
    monkeypatch.setattr(rows, "WARP_BYTES", 2**15)


@pytest.fixture
def launched(monkeypatch):
    """Grows with every launch of the fused kernel."""
    launches, launch = [], kernels.fused

    def fused(*args):
        launches.append(True)
        return launch(*args)

    monkeypatch.setattr(kernels, "fused", fused)
    return launches


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(M=9, K=7, D=6):
    return normal(M, K), normal(2 * D, K, seed=1) * max(1, K) ** -0.5, normal(2 * D, seed=2)


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
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_fused(dtype, launched, large_tiles):
    served = [
        sample
        for sample in op.samples(torch.device("cpu"), dtype)
        if (h := sample["h"]).numel() and kernels.takes(h.reshape(-1, h.shape[-1]), sample["weight"])
    ]
    assert len(served) == 3
    for index, sample in enumerate(served):
        with tuning.force("fused", SMALL):
            numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)
        assert len(launched) == index + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "M, K, D",
    [
        (1, 0, 8),
        (1, 5, 4),
        (37, 17, 16),
        (37, 64, 132),
        (130, 5, 64),
        (130, 64, 8),
        (1, 17, 64),
        (37, 5, 256),
    ],
)
def test_shapes_fused(M, K, D, dtype, launched, large_tiles):
    h, weight, bias = layer(M, K, D)
    sample = {"h": h, "weight": weight, "bias": bias if D != 16 else None, "seed": M + K + D}
    sample |= {"reduction": "none", "logvar_range": LIMITS if M == 37 else None}
    with tuning.force("fused", SMALL if D < 64 else WIDE):
        numerics.check(op.OP, "triton", numerics.cast(sample, dtype), dtype)
    assert len(launched) == 1


@pytest.mark.parametrize(
    "D, with_bias, dtype",
    [
        (D, with_bias, (torch.float32, torch.float16)[(index + with_bias) % 2])
        for index, D in enumerate((4, 16, 64, 68))
        for with_bias in (False, True)
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_candidates_agree(D, with_bias, dtype, launched, large_tiles):
    """To the last bit where no product rounds, whatever the tile and the loads, and where values are not finite too."""
    M, K = 70, 16
    h, weight = normal(M, K).mul(2).round().to(dtype), normal(2 * D, K, seed=1).round().to(dtype)
    bias = (normal(2 * D, seed=2) * 8).round().to(dtype) if with_bias else None
    h[3, 1], h[5, 2], h[69, 0] = math.nan, math.inf, -math.inf
    seed = torch.tensor(5)
    for limits in (LIMITS, (-math.inf, math.inf)):
        with tuning.force("unfused"):
            expected = kernels.gaussian_head(h, weight, bias, seed, *limits)
        assert not launched
        assert all(out[3].isnan().all() and out[[0, 68]].isfinite().all() for out in expected[2:])
        for tile, descriptors in (
            (SMALL, False),
            (SMALL, True),
            (WIDE, False),
            (tuning.Tile(128, 64, 4, 4), True),
        ):
            with tuning.force("fused", tile, descriptors):
                found = kernels.gaussian_head(h, weight, bias, seed, *limits)
            assert launched.pop()
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.is_contiguous() and ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_do_not_depend_on_the_tile(dtype, launched, monkeypatch):
    # The interpreter's dot is BLAS's, whose order of K changes with the tile's shape as no GPU's does. In
    # float64 the order is lost in rounding to float32.
    def dot(self, a, b, d, *options):
        product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    h, weight, bias = (t.to(dtype) for t in layer(70, 72, 132))
    results = []
    for tile in (SMALL, WIDE, tuning.Tile(128, 64, 4, 4), tuning.Tile(64, 256, 8, 3)):
        for descriptors in (False, True):
            with tuning.force("fused", tile, descriptors):
                results.append(kernels.gaussian_head(h, weight, bias, torch.tensor(5), *LIMITS))
    assert len(launched) == 8
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_results_do_not_depend_on_strides(launched):
    h, weight, bias = layer(9, 24, 8)
    seed = torch.tensor(5)
    with tuning.force("fused", SMALL):
        expected = kernels.gaussian_head(h, weight, bias, seed, *LIMITS)
        for strided in (
            (h.repeat(1, 2)[:, 24:], weight, bias),
            (h.repeat_interleave(3, 0)[::3], weight.repeat(1, 2)[:, :24], bias),
            (torch.cat([h[:, :5], h], 1)[:, 5:], torch.cat([weight, weight[:, :1]], 1)[:, :-1], bias),
            (h, weight, bias.repeat_interleave(2)[::2]),
        ):
            found = kernels.gaussian_head(*strided, seed, *LIMITS)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(launched) == 5
        first = h[:1].expand(9, 24)
        found = kernels.gaussian_head(first, weight, bias, seed, *LIMITS)
        expected = kernels.gaussian_head(first.contiguous(), weight, bias, seed, *LIMITS)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_the_fused_kernel_does_not_take(launched, large_tiles):
    def outputs(h, weight, bias):
        with tuning.force("fused", SMALL):
            return kernels.gaussian_head(h, weight, bias, torch.tensor(5), *LIMITS)

    h, weight, bias = layer(D=8)
    transposed = h.t().contiguous().t(), weight.t().contiguous().t()
    for operands in (
        layer(D=6),
        layer(M=2, D=260),
        layer(M=0, D=8),
        layer(D=0),
        [t.double() for t in (h, weight, bias)],
        (transposed[0], weight, bias),
        (h, transposed[1], bias),
    ):
        z, kl, moments = outputs(*operands)
        torch.testing.assert_close(moments, torch.nn.functional.linear(*operands))
        assert z.shape[1] * 2 == moments.shape[1] and not kl.isnan().any()
    assert not launched
    outputs(h, weight, bias)
    assert launched


def test_unfused_without_a_table(launched):
    kernels.gaussian_head(*layer(D=8), torch.tensor(5), *LIMITS)
    assert not launched


def test_tuning_case(launched, large_tiles):
    cpu = torch.device("cpu")
    key, call = kernels.tuning_case(37, 64, 32, torch.float32, cpu)
    assert key == "gaussian_head/m32-n32-k64/float32-ieee/aligned"
    call()
    assert not launched
    with tuning.force("fused", SMALL):
        call()
    assert launched
    for out_features in (7, 12, 520):
        assert kernels.tuning_case(37, 64, out_features, torch.float32, cpu) is None
    wide, head = (
        tuning.tiles(torch.float16, "ieee"),
        tuning.tiles(torch.float16, "ieee", True, "gaussian_head"),
    )
    assert set(head) == {tile for tile in wide if tile.block_m * tile.block_n <= 128 * 128}


@pytest.mark.parametrize("D", [6, 8])
@pytest.mark.parametrize("candidate", ["unfused", "fused"])
def test_is_the_layer_and_the_sample_of_it(candidate, D, large_tiles):
    h, weight, bias = layer(D=D)
    seed = torch.tensor(5)
    with tuning.force(candidate, SMALL):
        z, kl, moments = kernels.gaussian_head(h, weight, bias, seed, *LIMITS)
    torch.testing.assert_close(moments, torch.nn.functional.linear(h, weight, bias))
    assert moments.is_contiguous() and moments[:, D:].max() > LIMITS[1]
    again = reparameterize.reparameterize(moments[:, :D], moments[:, D:], seed, *LIMITS)
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
