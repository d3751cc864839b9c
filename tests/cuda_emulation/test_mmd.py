"""The CUDA kernels of mmd, emulated, and kernels/cuda/mmd.cu whole, against float64."""

import ctypes
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from aefast.ops import _pairwise, _registry
from aefast.ops import mmd as op
from support import numerics

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "kernels/cuda"
KERNELS = CUDA / "mmd_kernels.cuh"

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FIVE = (0.5, 1.0, 2.0, 4.0, 8.0)
ALONE = (0.0, 0.0, 1.0, 0.0)  # the weights of the sum over pairs of two samples


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spec_of(kernel, bandwidth=None, alpha=1.0):
    return _pairwise.kernel_of("mmd", kernel, bandwidth, alpha)


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


def is_same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def ops(load_operators):
    return load_operators(CUDA / "mmd.cu")


@pytest.fixture(scope="module")
def launched(ops):
    def launched(x, y, spec, weights, needs=3, unit=None):
        return ops.mmd(x, y, unit, spec.name, spec.rates, spec.alpha, weights, needs)

    return launched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(ops, monkeypatch, dtype):
    """Those of at most so many dimensions, with the operators in the place of the CPU's."""
    numerics.require_backend("cpu", "mmd", "cpu", dtype)
    kernels = _registry.kernels
    monkeypatch.setattr(
        _registry, "kernels", lambda name, one: ops if (name, one) == ("cpu", "mmd") else kernels(name, one)
    )
    for index, sample in enumerate(op.samples(torch.device("cpu"), dtype)):
        if sample["x"].shape[1] <= op.CUDA_DIMENSIONS:
            numerics.check(op.OP, "cpu", sample, dtype, expand_grad=index % 2 == 0)


# One tile of rows and parts of two, whatever the dimensions: they are of 128 to 512.
SHAPES = [
    *itertools.product([(1, 1), (2, 1), (3, 2), (130, 9)], [1, 2, 3, 5, 9, 16]),
    *itertools.product([(520, 70)], [2, 16]),
]


@pytest.mark.parametrize("counts, D", SHAPES)
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_shapes(launched, counts, D, kernel):
    x, y = draw(counts[0], D), draw(counts[1], D, seed=1) + 0.5
    spec = spec_of(kernel)
    weights = op.weights_of("biased", spec, *counts)
    unit = op.unit_of(spec, None, x, y)
    check_close(launched(x, y, spec, weights, unit=unit), exact(x, y, spec, weights, unit), spec)


@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
@pytest.mark.parametrize("D", [2, 16])
def test_float64(launched, kernel, D):
    x, y = draw(140, D, dtype=torch.float64), draw(9, D, seed=1, dtype=torch.float64) + 0.5
    spec = spec_of(kernel, None, 0.7)
    weights = op.weights_of("unbiased", spec, 140, 9)
    unit = op.unit_of(spec, None, x, y)
    check_close(launched(x, y, spec, weights, unit=unit), exact(x, y, spec, weights, unit), spec, 1e-13)


@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
@pytest.mark.parametrize("D", [2, 16])
def test_only_the_gradients_asked_for(launched, kernel, D):
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
def test_one_sample_alone(launched, D, needs):
    x, spec = draw(70, D), spec_of("imq")
    weights = (1.0 / (70 * 69), 0.0, 0.0, 0.25)
    expected = exact(x, x[:0], spec, weights)
    found = launched(x, x[:0], spec, weights, needs)
    check_close(found, (expected[0], expected[1] if needs else expected[1][:0], expected[2]), spec)


@pytest.mark.parametrize("kernel", ["rbf", "energy"])
@pytest.mark.parametrize("D", [3, 16])
@pytest.mark.parametrize("needs", range(4))
def test_rows_of_uneven_shards(ops, launched, kernel, D, needs):
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
        settings = (unit, spec.name, spec.rates, spec.alpha, weights, needs)
        found = ops.mmd_rows(*rows, x, y, *firsts, *settings)
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
@pytest.mark.parametrize("D", [4, 12])
def test_points_that_coincide(launched, kernel, D):
    x = draw(1, D).expand(6, D).clone()
    x[4:] += 1.0
    y = x[:5]
    spec = spec_of(kernel, 2.0)
    weights = op.weights_of("unbiased", spec, 6, 5)
    found = launched(x, y, spec, weights)
    assert all(one.isfinite().all() for one in found)
    # More than elsewhere: what x and y have in common cancels.
    check_close(found, exact(x, y, spec, weights), spec, 2e-5)


@pytest.mark.parametrize("kernel", ["laplacian", "energy"])
@pytest.mark.parametrize("D", [2, 16])
def test_points_close_to_each_other(launched, kernel, D):
    """1e-6 apart around 1: their distance keeps what the difference of two numbers has, and so does the gradient."""
    x = 1.0 + draw(1, D).expand(2, D).clone()
    y = x + 1e-6 * draw(2, D, seed=1)
    spec = spec_of(kernel, 1e-6)
    centre = torch.cat((x, y)).double().mean(0)
    as_centred = [(one.double() - centre).float() for one in (x, y)]
    check_close(launched(x, y, spec, ALONE), exact(*as_centred, spec, ALONE), spec)


@pytest.mark.parametrize("dtype, scale, tolerance", numerics.TINY_POINTS)
@pytest.mark.parametrize("kernel", ["laplacian", "energy"])
@pytest.mark.parametrize("D", [2, 16])
def test_tiny_points_keep_their_digits(launched, kernel, dtype, scale, tolerance, D):
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


@pytest.mark.parametrize("D", [3, 16])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_data_far_from_zero(launched, D, kernel):
    x, y = draw(20, D) + 100.0, draw(15, D, seed=1) + 100.5
    spec = spec_of(kernel)
    weights = op.weights_of("unbiased", spec, 20, 15)
    unit = op.unit_of(spec, None, x, y)
    check_close(launched(x, y, spec, weights, unit=unit), exact(x, y, spec, weights, unit), spec)


@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
@pytest.mark.parametrize("D", [2, 10])
def test_nan_goes_through(launched, kernel, D):
    x, y = draw(5, D), draw(4, D, seed=1)
    x[3, 1] = math.nan
    spec = spec_of(kernel, None, 0.7)
    for needs in (0, 3):
        found = launched(x, y, spec, op.weights_of("unbiased", spec, 5, 4), needs)
        assert all(one.isnan().all() for one in found)


@pytest.mark.parametrize("D", [3, 16])
def test_the_same_bits_whatever_the_strides(launched, D):
    x, y = draw(21, D), draw(10, D, seed=1)
    spec = spec_of("rbf")
    weights = op.weights_of("unbiased", spec, 21, 10)
    first = launched(x, y, spec, weights)
    both = torch.cat((x, x), 1)
    assert is_same(launched(both[:, D:], y.t().contiguous().t(), spec, weights), first)
    assert is_same(
        launched(x.repeat_interleave(2, 0)[::2], y.repeat_interleave(3, 1)[:, ::3], spec, weights), first
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("count", [1, 2, 5, 7, 70])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "imq", "rational_quadratic"])
def test_any_number_of_rates(launched, kernel, count, dtype, tolerance):
    """Also more than a launch takes. 3e-6: exponents up to 12 are rounded to 1e-6."""
    for D in (3, 16):
        x, y = draw(5, D, dtype=dtype), draw(3, D, seed=1, dtype=dtype)
        spec = spec_of(kernel, [0.4 + 0.31 * index for index in range(count)], 1.3)
        check_close(launched(x, y, spec, ALONE), exact(x, y, spec, ALONE), spec, tolerance)


@pytest.mark.parametrize("bandwidths", [FIVE, (1.0, 2**0.5, 2.0, 8**0.5, 4.0), (1.0, 2.0, 4.0)], ids=str)
@pytest.mark.parametrize("D", [2, 16])
def test_rates_that_follow_by_squaring(launched, bandwidths, D):
    x, y = draw(6, D), draw(5, D, seed=1)
    spec = spec_of("rbf", bandwidths)
    check_close(launched(x, y, spec, ALONE), exact(x, y, spec, ALONE), spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
def test_slopes_of_all_distances(launched, kernel, dtype):
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
@pytest.mark.parametrize("D", [2, 16])
@pytest.mark.parametrize("count", [1, 5, 7])
def test_extreme_bandwidths(launched, kernel, bandwidth, D, count):
    """Products of rates and distances are beyond float32 where the kernel is 0."""
    x, y = 50 * draw(6, D), 50 * draw(5, D, seed=1)
    spec = spec_of(kernel, [bandwidth] * count, 0.7)
    weights = op.weights_of("unbiased", spec, 6, 5)
    found, expected = launched(x, y, spec, weights), exact(x, y, spec, weights)
    assert all(one.isfinite().all() for one in found)
    # 1e-6 where sums of ones are to cancel, or of distances of a hundred.
    largest = 100 if kernel == "energy" else count
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
def test_kernel_values(ops, kernel, dtype):
    """Of points of any dimensions."""
    for D, rates in ((1, 1), (3, 5), (70, 40)):
        x, y = draw(7, D, dtype=dtype), draw(2 * 9, D, seed=1, dtype=dtype)[::2] + 0.5
        spec = spec_of(kernel, [1.0 + 0.3 * index for index in range(rates)], 0.7)
        for unit in (
            None,
            torch.tensor(2.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        ):
            found = ops.kernel_values(x, y, unit, spec.name, spec.rates, spec.alpha)
            u = _pairwise.squared_distances(x.double(), y.double())
            expected = spec.values(u if unit is None else u / unit)
            torch.testing.assert_close(
                found.double(), expected, rtol=1e-13 if dtype == torch.float64 else 3e-6, atol=1e-30
            )
    assert ops.kernel_values(x[:0], y, None, spec.name, spec.rates, spec.alpha).shape == (0, 9)


def test_operators_refuse_what_does_not_fit(ops):
    x, y, weights = draw(4, 3), draw(5, 3), (1.0, 1.0, 1.0, 0.0)
    settings = ("rbf", [1.0], 1.0, weights, 3)
    wide = draw(4, 17)
    for message, call in (
        ("matrices of as many columns", lambda: ops.mmd(x, y[:, :2], None, *settings)),
        ("dtype of x", lambda: ops.mmd(x, y.double(), None, *settings)),
        ("unit must be", lambda: ops.mmd(x, y, torch.ones(2), *settings)),
        ("unit must be", lambda: ops.mmd(x, y, torch.ones((), dtype=torch.float64), *settings)),
        ("unknown kernel", lambda: ops.mmd(x, y, None, "cosine", *settings[1:])),
        ("four numbers", lambda: ops.mmd(x, y, None, "rbf", [1.0], 1.0, [1.0], 3)),
        ("up to 16 dimensions", lambda: ops.mmd(wide, wide, None, *settings)),
        ("must be rows of", lambda: ops.mmd_rows(x, y, x, y, 1, 0, None, *settings)),
        ("expected float32", lambda: ops.mmd(x.long(), y.long(), None, *settings)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# --- the launchers ----------------------------------------------------------------------------------------


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")),
    )


class Kernels:
    """The launchers of one compiled copy of the kernels."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.emulate_mmd.restype = ctypes.c_char_p

    def mmd(self, x, y, spec, weights, machine_seed=0):
        results = [x.new_full((), math.nan), torch.full_like(x, math.nan), torch.full_like(y, math.nan)]
        error = self.library.emulate_mmd(
            DTYPES.index(x.dtype),
            ctypes.c_uint64(machine_seed),
            *(Matrix(one.data_ptr(), *one.shape, *one.stride()) for one in (x, y)),
            None,
            _pairwise.KERNELS.index(spec.name),
            (ctypes.c_double * len(spec.rates))(*spec.rates),
            ctypes.c_int64(len(spec.rates)),
            ctypes.c_double(spec.alpha),
            None,
            (ctypes.c_double * 4)(*weights),
            *(ctypes.c_void_p(one.data_ptr()) for one in results),
        )
        assert error is None, error
        return results


BARRIER = re.compile(r"^ *__sync(?:threads|warp)\(\);\n", re.MULTILINE)


def line_of(barrier):
    return barrier.string[: barrier.start()].count("\n") + 1


def barriers():
    # That of values_kernel is at the head of a kernel that the driver does not launch.
    source = KERNELS.read_text()
    return list(BARRIER.finditer(source[: source.index(" values_kernel(")]))


@pytest.fixture(scope="module")
def altered(compile_emulated, tmp_path_factory):
    """The launchers of one copy of the kernels, in which a test takes away the barrier of a line, and says of how many
    bytes the columns' sums may be. It has few splits, so that a thousand columns make some of several stages."""
    source = KERNELS.read_text()
    before = source.index(" values_kernel(")

    def unless_missing(barrier):
        return f"  if (missing_barrier != {line_of(barrier)}) {barrier[0].lstrip()}"

    changed = BARRIER.sub(unless_missing, source[:before]) + source[before:]
    bytes_of_columns = "int64_t{1} << 27"
    limits = rf"kMostSplits = 128, kColumnBytes = {re.escape(bytes_of_columns)};"
    changed, found = re.subn(limits, "kMostSplits = 32;", changed)
    assert found == 1
    declared = f"int missing_barrier = 0;\nint64_t kColumnBytes = {bytes_of_columns};\n"
    declared = f'#pragma once\n#include <cstdint>\nextern "C" {{\n{declared}}}\n'
    folder = tmp_path_factory.mktemp("altered")
    (folder / KERNELS.name).write_text(changed.replace("#pragma once\n", declared, 1))
    return Kernels(compile_emulated(HERE / "mmd_driver.cpp", "-DEMULATE_FLOAT32_ONLY", first_include=folder))


@pytest.fixture
def missing(altered):
    """The line whose barrier is away, of which there is none unless a test says so."""
    line = ctypes.c_int.in_dll(altered.library, "missing_barrier")
    yield line
    line.value = 0


@pytest.mark.parametrize("kernel, D", [("rbf", 3), ("rbf", 16), ("energy", 16)])
def test_results_do_not_depend_on_order(altered, launched, kernel, D):
    x, y, spec = draw(150, D), draw(40, D, seed=1), spec_of(kernel)
    first = launched(x, y, spec, (0.5, 1.0, -2.0, 0.25))
    for machine_seed in range(3):
        assert is_same(altered.mmd(x, y, spec, (0.5, 1.0, -2.0, 0.25), machine_seed), first)


@pytest.mark.parametrize("D", [3, 16])
def test_gradients_in_several_launches(altered, monkeypatch, D):
    """The columns' sums of so many points would not fit one: here each launch has four tiles of six."""
    monkeypatch.setattr(ctypes.c_int64.in_dll(altered.library, "kColumnBytes"), "value", 1)
    x, y, spec = draw(2100 if D == 3 else 1100, D), draw(40, D, seed=1), spec_of("rbf")
    weights = op.weights_of("biased", spec, len(x), len(y))
    check_close(altered.mmd(x, y, spec, weights), exact(x, y, spec, weights), spec)


def test_a_missing_barrier_is_caught(altered, missing):
    """Each of them alone, but for those with a remark behind them, in whose place the emulation's products do."""
    lines = [line_of(one) for one in barriers()]
    assert len(lines) == 9
    # Several tiles, and of 16 dimensions splits of one stage of columns and of several. Most barriers are missed at
    # once, whatever the order of the warps.
    cases, spec = [], spec_of("rbf", 2.0)
    for D, n, m in ((2, 530, 40), (16, 5, 270), (16, 20, 1010)):
        arguments = draw(n, D), draw(m, D, seed=1), spec, op.weights_of("biased", spec, n, m)
        cases.append((arguments, exact(*arguments)))

    def is_right(arguments, expected, machine_seed):
        return all(
            torch.allclose(ours.double(), true, rtol=0, atol=1e-4 * true.abs().max().item())
            for ours, true in zip(altered.mmd(*arguments, machine_seed), expected, strict=True)
        )

    assert all(is_right(*case, machine_seed=0) for case in cases)
    for line in lines:
        missing.value = line
        assert not all(is_right(*case, machine_seed) for case in cases for machine_seed in range(2)), line
