"""The Triton kernels of mmd in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter. Products of TF32 numbers, which it
takes for float32 ones, read here what a tensor core would.
"""

import dataclasses
import itertools
import math
import os

import numpy
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime import interpreter

from aefast.kernels.triton import mmd as kernels
from aefast.ops import _pairwise
from aefast.ops import mmd as op
from support import numerics

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.usefixtures("poisoned_memory"),
    # 1 / √0, which a selection leaves out, and products whose kernel is 0.
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning"),
]

ALONE = (0.0, 0.0, 1.0, 0.0)  # the weights of the sum over pairs of two samples


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spec_of(kernel, bandwidth=None, alpha=1.0):
    return _pairwise.kernel_of("mmd", kernel, bandwidth, alpha)


def launched(x, y, spec, weights, needs=3, unit=None):
    return kernels.mmd(x, y, unit, spec.name, spec.rates, spec.alpha, weights, needs)


def exact(x, y, spec, weights, unit=None):
    """Value and gradients of the reference in float64."""
    x, y = (one.double().requires_grad_() for one in (x, y))
    value = op.sum_reference(x, y, None if unit is None else unit.double(), spec, weights)
    return value.detach(), *torch.autograd.grad(value, (x, y), materialize_grads=True)


def check_close(found, expected, spec, tolerance=4e-6):
    """Of the gradients in units of their largest number, by default to what is left of some hundred terms of both
    signs, each to some 1e-7. The value is what is left of sums of kernels: in units of their number, or its own."""
    units = [max(one.abs().max().item(), 1e-30) if one.numel() else 0.0 for one in expected]
    units[0] = 0.25 * max(units[0], spec.at_zero or 1.0)
    for ours, true, unit in zip(found, expected, units, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0.0, atol=tolerance * unit)


@pytest.fixture(autouse=True)
def operands_of_tensor_cores(monkeypatch):
    """float32 operands without the 13 last bits, which a tensor core does not read."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def cut(operand):
        if operand.data.dtype != numpy.float32:
            return operand
        kept = operand.data.view(numpy.int32) & numpy.int32(-0x2000)
        return interpreter.TensorHandle(kept.view(numpy.float32), operand.dtype)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda builder, a, b, *rest: create_dot(builder, cut(a), cut(b), *rest),
    )


@pytest.fixture(autouse=True)
def large_strips(monkeypatch):
    """The interpreter takes as long for a small program."""
    monkeypatch.setattr(kernels, "STRIP", 2**14)


@pytest.fixture
def narrow_scans(monkeypatch):
    """Several blocks of rows where one would do."""
    tiling = kernels.tiling

    def narrow(*arguments):
        tiles = tiling(*arguments)
        return dataclasses.replace(tiles, rows=64, warps=1) if tiles.scan else tiles

    monkeypatch.setattr(kernels, "tiling", narrow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_samples(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


# 130 points are more than a block of rows, and than a split of the columns.
SHAPES = [
    *itertools.product([(1, 1), (2, 1), (3, 2)], [1, 2, 3, 16, 64, 257]),
    *itertools.product([(130, 9)], [2, 16, 64]),
    ((66, 9), 257),
]


@pytest.mark.parametrize("counts, D", SHAPES)
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_shapes(counts, D, kernel, narrow_scans):
    x, y = draw(counts[0], D), draw(counts[1], D, seed=1) + 0.5
    spec = spec_of(kernel)
    weights = op.weights_of("biased", spec, *counts)
    unit = op.unit_of(spec, None, x, y)
    check_close(launched(x, y, spec, weights, unit=unit), exact(x, y, spec, weights, unit), spec)


@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
@pytest.mark.parametrize("D", [2, 20])
def test_only_the_gradients_asked_for(kernel, D, narrow_scans):
    """Without gradients, pairs of one sample are computed once, and the value has other roundings."""
    x, y = draw(66, D), draw(9, D, seed=1) + 0.5
    spec = spec_of(kernel, None if kernel != "rational_quadratic" else (4.0, 1.0), 0.7)
    weights = op.weights_of("unbiased", spec, 66, 9)
    unit = op.unit_of(spec, None, x, y)
    expected = exact(x, y, spec, weights, unit)
    for needs in range(4):
        value, *gradients = launched(x, y, spec, weights, needs, unit)
        wanted = [true if needs >> index & 1 else true[:0] for index, true in enumerate(expected[1:])]
        check_close((value, *gradients), (expected[0], *wanted), spec)
        assert all(one.is_contiguous() and one.dtype == torch.float32 for one in gradients)


@pytest.mark.parametrize("D", [2, 16])
@pytest.mark.parametrize("needs", [0, 1, 3])
def test_one_sample_alone(D, needs):
    x, spec = draw(70, D), spec_of("imq")
    weights = (1.0 / (70 * 69), 0.0, 0.0, 0.25)
    expected = exact(x, x[:0], spec, weights)
    found = launched(x, x[:0], spec, weights, needs)
    check_close(found, (expected[0], expected[1] if needs else expected[1][:0], expected[2]), spec)


@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
def test_called_as_an_op(kernel):
    """Which makes lists of tuples, and weights of the numbers of points."""
    x, y = draw(5, 3), draw(4, 3, seed=1)
    spec = spec_of(kernel, (2.0, 1.0))
    weights = op.weights_of("biased", spec, 5, 4)
    settings = (None, kernel, list(spec.rates), 1.0, "biased", 3)
    found = torch.ops.aefast.mmd.default(x, y, *settings, "triton")
    assert all(map(torch.equal, found, launched(x, y, spec, weights)))


@pytest.mark.parametrize("kernel", ["rbf", "energy"])
@pytest.mark.parametrize("D", [3, 20])
@pytest.mark.parametrize("needs", range(4))
def test_rows_of_uneven_shards(kernel, D, needs):
    """Also of none; the parts are the whole."""
    x, y = draw(30, D), draw(12, D, seed=1) + 0.5
    spec = spec_of(kernel)
    weights = op.weights_of("biased", spec, 30, 12)
    unit = op.unit_of(spec, None, x, y)
    total = torch.tensor(weights[-1], dtype=torch.float64)
    gradients = [], []
    for (first_x, end_x), (first_y, end_y) in (((0, 22), (0, 3)), ((22, 22), (3, 10)), ((22, 30), (10, 12))):
        rows = x[first_x:end_x], y[first_y:end_y]
        firsts = first_x, first_y
        found = kernels.mmd_rows(
            *rows, x, y, *firsts, unit, spec.name, spec.rates, spec.alpha, weights, needs
        )
        leaves = [one.double().requires_grad_() for one in rows]
        part = op.rows_reference(
            *leaves, x.double(), y.double(), firsts, None if unit is None else unit.double(), spec, weights
        )
        expected = torch.autograd.grad(part, leaves)
        expected = [one if needs >> index & 1 else one[:0] for index, one in enumerate(expected)]
        check_close(found, (part.detach(), *expected), spec)
        total += found[0]
        for all_of_one, one in zip(gradients, found[1:], strict=True):
            all_of_one.append(one)
    whole = launched(x, y, spec, weights, needs, unit)
    check_close((total, *map(torch.cat, gradients)), [one.double() for one in whole], spec)


@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
@pytest.mark.parametrize("D", [4, 24])
def test_points_that_coincide(kernel, D):
    x = draw(1, D).expand(6, D).clone()
    x[4:] += 1.0
    y = x[:5]
    spec = spec_of(kernel, 2.0)
    weights = op.weights_of("unbiased", spec, 6, 5)
    found = launched(x, y, spec, weights)
    assert all(one.isfinite().all() for one in found)
    # More than elsewhere: what x and y have in common cancels.
    check_close(found, exact(x, y, spec, weights), spec, 2e-5)


@pytest.mark.parametrize("dtype, scale, tolerance", numerics.TINY_POINTS)
@pytest.mark.parametrize("kernel", ["laplacian", "energy"])
@pytest.mark.parametrize("D", [2, 20])
def test_tiny_points_keep_their_digits(kernel, dtype, scale, tolerance, D):
    """The root of a squared distance knows no smallest one, but 0."""
    x, y = scale * draw(20, D, dtype=torch.float64), scale * (draw(9, D, seed=1, dtype=torch.float64) + 0.5)
    x, y = x.to(dtype), y.to(dtype)
    x[1] = x[0]
    spec = spec_of(kernel)
    weights = op.weights_of("biased", spec, 20, 9)
    unit = op.unit_of(spec, None, x, y)
    expected = exact(x, y, spec, weights, unit)
    for ours, true in zip(launched(x, y, spec, weights, unit=unit), expected, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0, atol=tolerance * true.abs().max().item())


@pytest.mark.parametrize("D", [3, 16, 130])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_data_far_from_zero(D, kernel):
    """What centring leaves over is the data's own rounding, which the truth is given too."""
    x, y = draw(20, D) + 100.0, draw(15, D, seed=1) + 100.5
    spec = spec_of(kernel)
    weights = op.weights_of("unbiased", spec, 20, 15)
    unit = op.unit_of(spec, None, x, y)
    check_close(launched(x, y, spec, weights, unit=unit), exact(x, y, spec, weights, unit), spec)


@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
@pytest.mark.parametrize("D", [2, 70])
def test_nan_goes_through(kernel, D):
    x, y = draw(5, D), draw(4, D, seed=1)
    x[3, 1] = math.nan
    spec = spec_of(kernel, None, 0.7)
    for needs in (0, 3):
        found = launched(x, y, spec, op.weights_of("unbiased", spec, 5, 4), needs)
        assert all(one.isnan().all() for one in found)


@pytest.mark.parametrize("D", [3, 16, 70])
def test_repeated_to_the_last_bit_whatever_the_strides(D):
    x, y = draw(21, D), draw(10, D, seed=1)
    spec = spec_of("rbf")
    weights = op.weights_of("unbiased", spec, 21, 10)
    first = launched(x, y, spec, weights)
    both = torch.cat((x, x), 1)
    for again in (
        launched(x, y, spec, weights),
        launched(both[:, D:], y.t().contiguous().t(), spec, weights),
        launched(x.repeat_interleave(2, 0)[::2], y.repeat_interleave(3, 1)[:, ::3], spec, weights),
    ):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "imq", "rational_quadratic"])
def test_any_number_of_rates(kernel, count, dtype, tolerance):
    """3e-6: exponents up to 12 are rounded to 1e-6."""
    x, y = draw(5, 3, dtype=dtype), draw(3, 3, seed=1, dtype=dtype)
    spec = spec_of(kernel, [0.4 + 0.31 * index for index in range(count)], 1.3)
    check_close(launched(x, y, spec, ALONE), exact(x, y, spec, ALONE), spec, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
def test_slopes_of_all_distances(kernel, dtype):
    """Each row meets one point: its gradient is the slope alone. Squared distances are from 1e-8 to 1e4."""
    x, y = torch.logspace(-4, 2, 100, dtype=dtype)[:, None], torch.zeros(1, 1, dtype=dtype)
    spec = spec_of(kernel, (0.5, 1.0, 4.0, 64.0), 0.7)
    _, found, _ = launched(x, y, spec, ALONE, needs=1)
    _, expected, _ = exact(x, y, spec, ALONE)
    # What the points lost when they were centred, by the mean of all.
    lost = torch.finfo(dtype).eps * x.double().mean() / x.double()
    # Of its exponent, up to 3.2e3 where a term still counts beside the others, an exponential loses a rounding.
    bound = (64 * torch.finfo(dtype).eps + 2 * lost) * expected.abs()
    assert ((found.double() - expected).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
@pytest.mark.parametrize("bandwidth", [1e-18, 1e18])
@pytest.mark.parametrize("D", [2, 20])
def test_extreme_bandwidths(kernel, bandwidth, D):
    """Products of rates and distances are beyond float32 where the kernel is 0."""
    x, y = 50 * draw(6, D), 50 * draw(5, D, seed=1)
    spec = spec_of(kernel, bandwidth, 0.7)
    weights = op.weights_of("unbiased", spec, 6, 5)
    found, expected = launched(x, y, spec, weights), exact(x, y, spec, weights)
    assert all(one.isfinite().all() for one in found)
    # 1e-6 where sums of ones are to cancel.
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=1e-6)


def test_rates_that_follow_by_squaring():
    """Those of the default bandwidths are powers of two of each other but for their rounding."""
    cases = {
        spec_of("rbf").rates: (-1, 1, 1, 1, 1),
        spec_of("rbf", (1.0, 2.0, 4.0)).rates: (-1, 2, 2),
        (8.0, 2.0, 0.5, 0.25): (-1, 1, 2, -1),
        (64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0): (-1, 1, 1, 1, 1, -1, 1),
        (3.0, 1.0, 1.0): (-1, 0, -1),
        (1.0,): (-1,),
    }
    for rates, ladder in cases.items():
        assert kernels.ladder_of("rbf", rates) == ladder
        x, y = draw(6, 2), draw(5, 2, seed=1)
        spec = _pairwise.Kernel("rbf", rates, 1.0)
        check_close(launched(x, y, spec, ALONE), exact(x, y, spec, ALONE), spec)
