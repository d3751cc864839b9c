"""The Triton kernels of pyramid_loss in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import itertools
import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from aefast.kernels.triton import pyramid_loss as kernels
from aefast.ops import pyramid_loss as op
from support import numerics

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.usefixtures("poisoned_memory"),
    # Of what a selection leaves out: √(0 + 0) and powers of 0.
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PENALTIES = [("power", 1.0), ("power", 1.5), ("power", 2.0), ("power", 3.0), ("charbonnier", 0.25)]
FACTORS = (1.0, 0.5, 3.0, 0.25, 2.0, 0.0, 1.5, 4.0)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Wide and short: the interpreter takes as long for few columns, and rows are unrolled."""
    monkeypatch.setattr(kernels, "WARPS", 32)
    monkeypatch.setattr(kernels, "REDUCED_ROWS", 2)


def pair(*shape, dtype=torch.float32, layout="contiguous"):
    generator = torch.Generator().manual_seed(7)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [one.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for one in drawn]


def exact(input, target, pyramid, penalty, parameter, factors):
    """The samples' sums and the gradient, in float64."""
    form = op.Form(pyramid, penalty, parameter, tuple(factors), 1.0, False)
    input = input.double().requires_grad_()
    sums = op.form_reference(input, target.double(), form)
    return sums.detach(), torch.autograd.grad(sums.sum(), input)[0]


def check(input, target, *form, alone=True):
    sums, gradient = kernels.pyramid_loss(input, target, *form, True)
    true_sums, true_gradient = exact(input, target, *form)
    assert sums.dtype == (torch.float64 if input.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == input.dtype and gradient.stride() == input.stride()
    # Sums are of positive numbers and made as trees, so that they err by a few spacings; a gradient by one rounding,
    # of laplacian ones in half precision by two, and by some of its largest terms, the weights of which add up to 9.
    wide = torch.finfo(sums.dtype).eps
    narrow = torch.finfo(input.dtype).eps
    torch.testing.assert_close(sums.double(), true_sums, rtol=8 * wide, atol=0)
    largest = true_gradient.abs().max().item()
    torch.testing.assert_close(
        gradient.double(), true_gradient, rtol=narrow, atol=(2 * narrow + 16 * wide) * largest
    )
    # The value does not depend on whether a gradient is made.
    if alone:
        value, nothing = kernels.pyramid_loss(input, target, *form, False)
        assert torch.equal(value, sums) and nothing.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_samples(dtype):
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "contiguous"),
        (torch.float32, "channels_last"),
        (torch.float64, "channels_last"),
        (torch.float16, "contiguous"),
    ],
)
def test_every_number_of_levels(dtype, layout):
    input, target = pair(2, 3, 37, 68, dtype=dtype, layout=layout)
    forms = {
        ("average" if levels % 2 == (dtype == torch.float64) else op.PYRAMIDS[levels % 3], levels)
        for levels in range(1, 7)
    }
    for pyramid, levels in sorted({*forms, ("average", 6)}):
        check(input, target, pyramid, "power", 2.0, FACTORS[:levels])


@pytest.mark.parametrize("pyramid", op.PYRAMIDS)
@pytest.mark.parametrize(("penalty", "parameter"), PENALTIES)
def test_every_penalty(pyramid, penalty, parameter):
    input, target = pair(1, 2, 18, 36)
    target[0, 0, 3:12] = input[0, 0, 3:12]  # residuals of 0 on all levels
    check(input, target, pyramid, penalty, parameter, FACTORS[:4], alone=penalty == "charbonnier")


@pytest.mark.parametrize("shape", [(1, 1, 130, 70), (1, 2, 256, 129)])
def test_more_levels_than_a_program_has(shape):
    levels = op._most_levels("average", min(shape[2:]))
    assert levels > kernels.DEEPEST
    for layout in LAYOUTS:
        check(*pair(*shape, layout=layout), "average", "charbonnier", 0.25, FACTORS[:levels])


@pytest.mark.parametrize("pyramid", op.PYRAMIDS)
def test_every_small_size(pyramid):
    """With as many levels as there are: both borders within a few pixels of each other."""
    least = 1 if pyramid == "average" else 3
    for height, width in itertools.product(range(least, 6), repeat=2):
        levels = op._most_levels(pyramid, min(height, width))
        input, target = pair(1, 2, height, width, dtype=torch.float64)
        check(input, target, pyramid, "power", 2.0, FACTORS[:levels], alone=False)


@pytest.mark.parametrize("pyramid", op.PYRAMIDS)
@pytest.mark.parametrize("width", [33, 96, 300])
def test_several_tiles_beside_each_other(pyramid, width):
    layout = "channels_last" if width == 96 else "contiguous"
    check(*pair(1, 2, 9, width, layout=layout), pyramid, "power", 1.0, FACTORS[:3])


@pytest.mark.parametrize("pyramid", op.PYRAMIDS)
def test_results_do_not_depend_on_the_launch(pyramid, monkeypatch):
    input, target = pair(5, 2, 12, 24)
    results = []
    for warps in (4, 32):
        monkeypatch.setattr(kernels, "WARPS", warps)
        results.append(kernels.pyramid_loss(input, target, pyramid, "power", 1.0, FACTORS[:2], True))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
    # A sample's numbers are its own, whatever else is in the batch.
    sums, gradient = kernels.pyramid_loss(input[3:4], target[3:4], pyramid, "power", 1.0, FACTORS[:2], True)
    assert torch.equal(sums, results[0][0][3:4]) and torch.equal(gradient, results[0][1][3:4])


@pytest.mark.parametrize("pyramid", op.PYRAMIDS)
def test_nan_reaches_what_depends_on_it(pyramid):
    """And nothing else: not the sums of other samples, and no pixel that shares no level's pixel with it."""
    input, target = pair(2, 1, 32, 32)
    input[0, 0, 31, 0] = math.nan
    sums, gradient = kernels.pyramid_loss(input, target, pyramid, "power", 2.0, FACTORS[:2], True)
    assert sums.isnan().tolist() == [True, False]
    _, expected = exact(input, target, pyramid, "power", 2.0, FACTORS[:2])
    assert torch.equal(gradient.isnan(), expected.isnan())


def test_an_odd_border_is_in_no_mean():
    input, target = pair(1, 1, 5, 5)
    input[0, 0, 4, 4] = math.nan
    _, gradient = kernels.pyramid_loss(input, target, "average", "power", 2.0, (0.0, 1.0), True)
    _, expected = exact(input, target, "average", "power", 2.0, (0.0, 1.0))
    assert torch.equal(gradient.isnan(), expected.isnan()) and gradient.isnan().sum() == 1


def test_columns_of_tiles():
    """Few empty columns, and no tile narrower than 32 but for narrower images."""
    for width, expected in (
        (1, (1, 1)), (5, (8, 1)), (28, (32, 1)), (33, (64, 1)), (96, (32, 3)), (100, (128, 1)),
        (128, (128, 1)), (160, (32, 5)), (192, (64, 3)), (224, (32, 7)), (1024, (128, 8)),
    ):  # fmt: skip
        assert kernels.columns_of(width, 1, 128) == expected
    assert kernels.columns_of(5, 32, 128) == (32, 1)
