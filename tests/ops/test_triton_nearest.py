"""The Triton kernels of nearest in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import dataclasses
import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

import aefast
import aefast.functional as AF
from aefast.kernels.triton import nearest as kernels
from aefast.ops import chamfer
from aefast.ops import nearest as op
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]
DISTANCE = dataclasses.replace(
    op.OP, function=lambda x, y: AF.nearest(x, y)[0], reference=lambda x, y: op.reference(x, y)[0]
)
# Dimensions of either kernel.
SIZES = [3, 16, kernels.DIFFERENCES + 8]


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter takes as long for a small tile."""
    monkeypatch.setattr(kernels, "LANES", 64)


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def short(*shape, seed=0):
    """Multiples of 2^-5, whose products and their sums are exact: a BLAS, the interpreter's too, may sum otherwise for
    another column or another size of tile, so that rows which are equal are not as far away."""
    return draw(*shape, seed=seed).mul(2**5).round().div(2**5)


def mirrored(y):
    """Rows (B, M, D) and their negatives, whose centre is 0 and leaves them as short."""
    return torch.cat([y, -y], 1)


def all_squared(x, y):
    return (x.double()[:, :, None] - y.double()[:, None]).square().sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype, large_tiles):
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        numerics.check(DISTANCE, "triton", sample, dtype, expand_grad=index % 2 == 0)
        with aefast.backend("triton"):
            _, found = AF.nearest(**sample)
        assert found.dtype == torch.int64
        assert torch.equal(found, op.reference(**sample)[1])


def test_samples_of_chamfer(large_tiles):
    for sample in chamfer.samples(torch.device("cpu"), torch.float32):
        numerics.check(chamfer.OP, "triton", sample, torch.float32)


@pytest.mark.parametrize("size", SIZES)
def test_results_do_not_depend_on_the_launch(size, monkeypatch):
    x, y = short(2, 45, size), short(2, 350, size, seed=1)
    y[:, 200:350] = y[:, 50:200]
    y = mirrored(y)
    squared, index = kernels.nearest(x, y)
    assert torch.equal(index, op.squared_reference(x, y)[1])
    for enough, least, lanes in ((1, 1, 32), (64, 1, 32), (64, 128, 32), (8, 64, 128)):
        monkeypatch.setattr(kernels, "ENOUGH", enough)
        monkeypatch.setattr(kernels, "LEAST", least)
        monkeypatch.setattr(kernels, "LANES", lanes)
        again = kernels.nearest(x, y)
        assert torch.equal(again[0], squared) and torch.equal(again[1], index)
    alone = kernels.nearest(x[1:, 7:8], y[1:])
    assert torch.equal(alone[0], squared[1:, 7:8]) and torch.equal(alone[1], index[1:, 7:8])


def test_shares_have_every_row_once():
    for programs, rows, columns in (
        (1, 1, 128),
        (1, 2**20, 128),
        (3, 100_003, 64),
        (10**6, 5000, 128),
        (1, 2**32, 64),
    ):
        splits, per_split = kernels.shares(programs, rows, columns)
        assert per_split % columns == 0 and per_split <= kernels.MOST
        assert (splits - 1) * per_split < rows <= splits * per_split


@pytest.mark.parametrize("size", SIZES)
def test_results_do_not_depend_on_strides(size, large_tiles):
    x, y = draw(2, 9, size), draw(2, 150, size, seed=1)
    expected = kernels.nearest(x, y)
    both = torch.cat((x, y), 1)
    for strided in (
        (both[:, :9], both[:, 9:]),
        (x.transpose(1, 2).contiguous().transpose(1, 2), y.transpose(0, 1).contiguous().transpose(0, 1)),
        (x.repeat_interleave(3, 2)[..., ::3], y.repeat_interleave(2, 1)[:, ::2]),
    ):
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(kernels.nearest(*strided), expected, strict=True)
        )
    one = kernels.nearest(x[:1].expand(2, -1, -1), y[:1].expand(2, -1, -1))
    assert all(torch.equal(ours[1], theirs[0]) for ours, theirs in zip(one, expected, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_of_equal_rows_the_first(size, large_tiles):
    y = mirrored(short(5, size).repeat(30, 1)[None])
    squared, index = kernels.nearest(y[:, :5] + short(5, size, seed=1) / 64, y)
    assert index.tolist() == [[0, 1, 2, 3, 4]] and (squared > 0).all()
    squared, index = kernels.nearest(y[:, 5:10], y)
    assert index.tolist() == [[0, 1, 2, 3, 4]] and (squared == 0).all()


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_far_from_zero(size, offset, large_tiles):
    """Coordinates are multiples of 2^-10, which float32 has at 1000 too: distances, and which are least, are exact."""
    x, y = (draw(1, count, size, seed=count).mul(2**10).round().div(2**10) + offset for count in (40, 130))
    squared, index = kernels.nearest(x, y)
    exact, expected = all_squared(x, y).min(-1)
    assert torch.equal(index, expected)
    torch.testing.assert_close(squared.double(), exact, rtol=size * 2.0**-24, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_the_distance_is_that_of_the_index(size, large_tiles):
    """Also where products cannot tell which row is nearest: by differences, the distance has no error of theirs."""
    y = 100 * draw(1, 1, size) + 1e-4 * draw(1, 200, size, seed=1)
    y = torch.cat((y, -y), 1)
    x = y[:, 50:70] + 1e-4 * draw(1, 20, size, seed=2)
    squared, index = kernels.nearest(x, y)
    chosen = all_squared(x, y).gather(2, index[..., None])[..., 0]
    torch.testing.assert_close(squared.double(), chosen, rtol=1e-5, atol=0)
    # Neither of those that are far: within the rounding of norms of about 100² D.
    assert (chosen <= all_squared(x, y).min(-1).values + 1e-6 * 100**2 * size).all()


@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_finite(size, large_tiles):
    x, y = draw(2, 6, size), draw(2, 200, size, seed=1)
    expected = kernels.nearest(x, y)
    x[0, 2, 1], x[1, 3, 0] = math.nan, math.inf
    squared, index = kernels.nearest(x, y)
    assert squared.isnan().nonzero().tolist() == [[0, 2]] and squared.isinf().nonzero().tolist() == [[1, 3]]
    is_finite = squared.isfinite()
    assert torch.equal(squared[is_finite], expected[0][is_finite])
    assert torch.equal(index[is_finite], expected[1][is_finite])
    assert ((index >= 0) & (index < 200)).all()
    # An infinite row is the nearest to none, and NaN in a row is everyone's of its cloud.
    y[0, 3] = math.inf
    squared, index = kernels.nearest(x, y)
    reference = op.squared_reference(x, y)
    torch.testing.assert_close(squared, reference[0], equal_nan=True)
    y[0, 199, size - 1] = math.nan
    squared, index = kernels.nearest(x, y)
    assert squared[0].isnan().all() and squared[1].isnan().sum() == 0
    assert ((index >= 0) & (index < 200)).all()


def test_empty():
    for shape in ((0, 4, 3), (2, 0, 3), (0, 0, 40)):
        squared, index = kernels.nearest(torch.ones(shape), torch.ones(shape[0], 5, shape[2]))
        assert squared.shape == index.shape == shape[:2]
        assert (squared.dtype, index.dtype) == (torch.float32, torch.int64)


def test_opcheck():
    for wants in (False, True):
        x, y = (draw(2, rows, 3, seed=rows).requires_grad_(wants) for rows in (4, 5))
        torch.library.opcheck(torch.ops.aefast.nearest.default, (x, y, "triton"))


def test_derivatives(large_tiles):
    x, y = (draw(rows, 2, dtype=torch.float64, seed=rows).requires_grad_() for rows in (3, 4))

    def distance(x, y):
        return AF.nearest(x, y)[0]

    with aefast.backend("triton"):
        assert torch.autograd.gradcheck(distance, (x, y))
        assert torch.autograd.gradgradcheck(distance, (x, y))
        assert torch.autograd.gradcheck(AF.chamfer, (x, y))
        assert torch.autograd.gradgradcheck(AF.chamfer, (x, y))


def test_compiles_whole(large_tiles):
    x, y = (draw(2, rows, 3, seed=rows).requires_grad_() for rows in (6, 5))
    with aefast.backend("triton"):
        expected = AF.chamfer(x, y), *torch.autograd.grad(AF.chamfer(x, y), (x, y))
        value = torch.compile(AF.chamfer, fullgraph=True)(x, y)
        found = value, *torch.autograd.grad(value, (x, y))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
