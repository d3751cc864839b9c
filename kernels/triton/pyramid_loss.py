"""The weighted penalties of a residual on all levels of an image pyramid, with the residual's gradient.

average   One pass. A program holds whole cells of the coarsest level: it pools residuals on the way down and spreads
          gradients on the way back, in registers. Of more than DEEPEST levels the coarser ones are a call of its own,
          on the residual of the last level that a program reaches.
gaussian  `reduce_kernel` makes each level's residual from the finer one's, level by level, and adds up penalties;
          `level_kernel` brings the gradient back, the coarsest level first.
laplacian The same two kernels: a band is what is left of a level's residual without the expanded coarser one, and its
          gradient goes to both.

Each pixel gathers what it needs, in a fixed order, the gradients too: nothing is added up in memory. Penalties are
added in an order that the shape alone decides, one partial sum for each program and block of rows, and rows.py adds
those of a sample.
"""

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .activation import widen
from .linear_act import COMPILE, accumulator, on_device
from .loss import penalty
from .rows import row_sums, sum_columns, unit_of

__all__ = ["pyramid_loss"]

DEEPEST = 6  # levels of a program: its cells are 32 × 32 pixels
WARPS = 4
LANES = 32

# --- device functions: images -----------------------------------------------------------------------------


@triton.jit
def place_of(unit, channels, blocks):
    """(image, channel, block of rows) of a unit. Channels that lie side by side in memory are neighbours."""
    block = unit // channels % blocks
    return (unit // channels // blocks).to(tl.int64), unit % channels, block


@triton.jit
def offsets_of(image, channel, row, channels, H, W):
    """Where row `row` of a channel begins; a column is `channels` elements wide."""
    return (image * H + row) * W * channels + channel


@triton.jit
def residual_at(input, target, at, inside):
    """input - target, or input where there is no target; 0 outside."""
    r = widen(tl.load(input + at, mask=inside, other=0.0))
    if target is not None:
        r -= widen(tl.load(target + at, mask=inside, other=0.0))
    return r


# --- device functions: means of 2 × 2 pixels --------------------------------------------------------------


@triton.jit
def pooled(x, ROWS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of 2 × 2 pixels of x (ROWS, UNITS, COLUMNS). Where a unit has one row, two of them follow each other."""
    if ROWS > 1:
        x = tl.sum(tl.reshape(x, (ROWS // 2, 2, UNITS, COLUMNS)), axis=1)
        x = tl.sum(tl.reshape(x, (ROWS // 2, UNITS, COLUMNS // 2, 2)), axis=3)
    else:
        x = tl.sum(tl.reshape(x, (1, UNITS // 2, 2, COLUMNS)), axis=2)
        x = tl.sum(tl.reshape(x, (1, UNITS // 2, COLUMNS // 2, 2)), axis=3)
    return x


@triton.jit
def spread(x, ROWS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transpose of `pooled`: to (ROWS, UNITS, COLUMNS)."""
    if ROWS > 1:
        x = tl.broadcast_to(x[:, None, :, :, None], (ROWS // 2, 2, UNITS, COLUMNS // 2, 2))
    else:
        x = tl.broadcast_to(x[:, :, None, :, None], (1, UNITS // 2, 2, COLUMNS // 2, 2))
    return tl.reshape(x, (ROWS, UNITS, COLUMNS))


@triton.jit
def descend(
    r,  # (ROWS, UNITS, COLUMNS): the residual on LEVEL
    total,  # of its shape: the penalties of finer levels
    coarse,  # as for average_kernel, like all that follow
    coarse_gradient,
    first,  # unit of the program
    band,
    units,
    channels,
    blocks,
    H,
    W,
    factors,
    parameter,
    KIND: tl.constexpr,
    SLOPES: tl.constexpr,  # whether gradients are wanted
    LEVEL: tl.constexpr,
    LAST: tl.constexpr,  # the program's coarsest level
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(gradient of r, total with the penalties of LEVEL and all coarser ones, of LAST's shape)."""
    lane = tl.arange(0, UNITS)
    unit = first + lane // SPLITS
    image, channel, block = place_of(unit, channels, blocks)
    row = ((block * SPLITS + lane % SPLITS) * ROWS)[None, :, None] + tl.arange(0, ROWS)[:, None, None]
    column = band * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    # The last row and column of an odd size are in no cell of the coarser level.
    height, width = H >> LEVEL, W >> LEVEL
    inside = (row < height) & (column < width)
    if LEVEL == LAST and (coarse is not None or coarse_gradient is not None):
        inside &= (unit < units)[None, :, None]
        plane = (image * channels + channel)[None, :, None]
        at = (plane * height + row) * width + column
        if coarse is not None:
            tl.store(coarse + at, r, mask=inside)
        slope = r
        if coarse_gradient is not None:
            slope = tl.load(coarse_gradient + at, mask=inside, other=0.0)
    else:
        value, slope = penalty(r, parameter, KIND)
        factor = tl.full(r.shape, factors[LEVEL], r.dtype)
        total += tl.where(inside, factor * value, 0.0)
        slope = tl.where(inside, factor * slope, 0.0)
        if LEVEL < LAST:
            coarser = 0.25 * pooled(r, ROWS, UNITS, COLUMNS)
            total = pooled(total, ROWS, UNITS, COLUMNS)
            FEWER: tl.constexpr = 1 if ROWS > 1 else 2
            below, total = descend(
                coarser, total, coarse, coarse_gradient, first, band, units, channels, blocks, H, W,
                factors, parameter, KIND, SLOPES, LEVEL + 1, LAST,
                ROWS * FEWER // 2, SPLITS // FEWER, UNITS // FEWER, COLUMNS // 2,
            )  # fmt: skip
            if SLOPES:
                slope += 0.25 * spread(below, ROWS, UNITS, COLUMNS)
    return slope, total


# --- device functions: the five taps ----------------------------------------------------------------------


@triton.jit
def tap(distance):
    """The weight of a sample that is `distance` from the centre."""
    size = tl.abs(distance)
    return tl.where(size == 0, 0.375, tl.where(size == 1, 0.25, tl.where(size == 2, 0.0625, 0.0)))


@triton.jit
def weight_between(fine, coarse, size, EXPAND: tl.constexpr):
    """What stands in row `coarse` and column `fine` of the matrix that reduces `size` samples, or with EXPAND at the
    same place of the transpose of the one that expands to them. Both blur what is mirrored at the first and the last
    sample: the finer level, or the coarser one with zeros in between."""
    mirrored = 2 * coarse if EXPAND else fine
    weight = tap(fine - 2 * coarse)
    weight += tl.where(mirrored > 0, tap(fine + 2 * coarse), 0.0)
    weight += tl.where(mirrored < size - 1, tap(2 * (size - 1) - fine - 2 * coarse), 0.0)
    if EXPAND:
        weight *= 2.0
    return weight


@triton.jit
def pairs_of(x, UNITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The even and the odd columns of x (UNITS, 2 * COLUMNS)."""
    return tl.split(tl.reshape(x, (UNITS, COLUMNS, 2)))


@triton.jit
def reduced_row(
    input,
    target,
    at,  # (UNITS, 2 * COLUMNS): of one fine row of each unit
    inside,  # whether that row is there
    column,  # (1, 2 * COLUMNS)
    channels,
    W,
    weights,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What the five taps make of a row in every second column: (UNITS, COLUMNS). And the row itself."""
    # Loads as wide as can be, of the pair in the middle and right of it and of those beside it. Of the last the second
    # is not asked for.
    left = residual_at(input, target, at - 2 * channels, inside & (column >= 2) & (column < W + 2))
    middle = residual_at(input, target, at, inside & (column < W))
    right = residual_at(input, target, at + 2 * channels, inside & (column < W - 2))
    second_left, first_left = pairs_of(left, UNITS, COLUMNS)
    centre, first_right = pairs_of(middle, UNITS, COLUMNS)
    second_right, _ = pairs_of(right, UNITS, COLUMNS)
    total = weights[0].to(left.dtype) * second_left + weights[1].to(left.dtype) * first_left
    total += weights[2].to(left.dtype) * centre
    total += weights[3].to(left.dtype) * first_right + weights[4].to(left.dtype) * second_right
    return total, middle


@triton.jit
def spread_row(coarse, at_row, inside, column, width, weights):
    """What one coarse row of each unit gives to every second column and to those right of them: (UNITS, COLUMNS)."""
    left = tl.load(coarse + at_row + column - 1, mask=inside & (column > 0), other=0.0)
    middle = tl.load(coarse + at_row + column, mask=inside, other=0.0)
    right = tl.load(coarse + at_row + column + 1, mask=inside & (column < width - 1), other=0.0)
    even = weights[0] * left + weights[1] * middle + weights[2] * right
    odd = weights[3] * middle + weights[4] * right
    return even, odd


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def average_kernel(
    input,  # (B, C, H, W): rows of pixels of `channels` elements, in images (H, W, channels)
    target,  # like input, or None: input is a residual
    gradient,  # like input, or None
    coarse,  # (images * channels, H >> last, W >> last) fp32, fp64 for fp64, contiguous, or None: the last level's
    # residual, whose penalties are then not counted
    coarse_gradient,  # of its shape, or None: what is taken for the last level's gradient instead of its penalties'
    partials,  # (units, bands) fp32 or fp64, or None: sums of penalties
    units,  # UNITS / SPLITS a program: whole cells of the last level, as many rows of a channel as one has
    channels,  # 1 where each channel is an image of its own
    blocks,  # units of a channel
    bands,  # of COLUMNS columns
    H,
    W,  # in UNIT
    factor_0: tl.float64,  # of the penalties of each level
    factor_1: tl.float64,
    factor_2: tl.float64,
    factor_3: tl.float64,
    factor_4: tl.float64,
    factor_5: tl.float64,
    parameter: tl.float64,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,  # ROWS rows of a unit follow each other SPLITS times
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A tile is (ROWS, UNITS, COLUMNS): lanes lie along the columns, then along the units, so that a thread has ROWS
    # rows below each other and pools them without its neighbours.
    LAST: tl.constexpr = LEVELS - 1
    WHOLE: tl.constexpr = UNITS // SPLITS
    W = tl.cast(W, tl.int32) * UNIT
    # As wide as it has to be, also where it is specialised to 1.
    units += tl.zeros((), tl.int32)
    program = tl.program_id(0).to(units.dtype)
    band = (program % bands).to(tl.int32)
    first = program // bands * WHOLE
    lane = tl.arange(0, UNITS)
    unit = first + lane // SPLITS
    image, channel, block = place_of(unit, channels, blocks)
    row = ((block * SPLITS + lane % SPLITS) * ROWS)[None, :, None] + tl.arange(0, ROWS)[:, None, None]
    column = band * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    inside = (unit < units)[None, :, None] & (row < H) & (column < W)
    # 64-bit: any offset may exceed 2^31 elements.
    at = offsets_of(image[None, :, None], channel[None, :, None], row, channels, H, W)
    at += column.to(tl.int64) * channels
    r = residual_at(input, target, at, inside)
    slope, total = descend(
        r, tl.zeros_like(r), coarse, coarse_gradient, first, band, units, channels, blocks, H, W,
        (factor_0, factor_1, factor_2, factor_3, factor_4, factor_5), parameter,
        KIND, gradient is not None, 0, LAST, ROWS, SPLITS, UNITS, COLUMNS,
    )  # fmt: skip
    if gradient is not None:
        tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)
    if partials is not None:
        total = sum_columns(tl.reshape(total, (WHOLE, COLUMNS >> LAST)), WHOLE, COLUMNS >> LAST)
        unit = first + tl.arange(0, WHOLE)
        tl.store(partials + unit.to(tl.int64) * bands + band, total, mask=unit < units)


@triton.jit
def reduce_kernel(
    input,  # (B, C, H, W) as average_kernel's
    target,  # like input, or None
    base,  # like out, or None: out is what base has more than the reduced input. May be out itself
    out,  # (images * channels, ceil(H / 2), ceil(W / 2)) fp32, fp64 for fp64, contiguous
    partials,  # (units, bands) fp32 or fp64, or None: sums of factor * the input's penalties
    units,  # UNITS a program: ROWS rows of a channel of out
    channels,
    blocks,
    bands,  # of COLUMNS columns of out
    H,
    W,  # in UNIT
    factor: tl.float64,
    parameter: tl.float64,
    KIND: tl.constexpr,
    EXPAND: tl.constexpr,  # the transpose of expanding, instead of reducing
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    W = tl.cast(W, tl.int32) * UNIT
    height, width = (H + 1) // 2, (W + 1) // 2
    # As wide as it has to be, also where it is specialised to 1.
    units += tl.zeros((), tl.int32)
    program = tl.program_id(0).to(units.dtype)
    band = (program % bands).to(tl.int32)
    unit = program // bands * UNITS + tl.arange(0, UNITS)
    image, channel, block = place_of(unit, channels, blocks)
    is_unit = (unit < units)[:, None]
    plane = (image * channels + channel)[:, None]
    first = block[:, None] * ROWS
    column = band * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    weights = (
        weight_between(2 * column - 2, column, W, EXPAND),
        weight_between(2 * column - 1, column, W, EXPAND),
        weight_between(2 * column, column, W, EXPAND),
        weight_between(2 * column + 1, column, W, EXPAND),
        weight_between(2 * column + 2, column, W, EXPAND),
    )
    fine_column = 2 * band * COLUMNS + tl.arange(0, 2 * COLUMNS)[None, :]
    # Down the rows: what two of them share is made once.
    fine = 2 * first
    at = offsets_of(image[:, None], channel[:, None], fine, channels, H, W)
    at += fine_column.to(tl.int64) * channels
    step = W.to(tl.int64) * channels
    second_above, _ = reduced_row(
        input, target, at - 2 * step, is_unit & (fine >= 2) & (fine < H + 2), fine_column, channels, W, weights,
        UNITS, COLUMNS,
    )  # fmt: skip
    above, _ = reduced_row(
        input, target, at - step, is_unit & (fine >= 1) & (fine < H + 1), fine_column, channels, W, weights,
        UNITS, COLUMNS,
    )  # fmt: skip
    here, middle = reduced_row(
        input, target, at, is_unit & (fine < H), fine_column, channels, W, weights, UNITS, COLUMNS
    )
    total = tl.zeros_like(middle)
    for index in tl.static_range(ROWS):
        row = first + index
        fine = 2 * row
        if partials is not None:
            value, _ = penalty(middle, parameter, KIND)
            total += tl.where(is_unit & (fine < H) & (fine_column < W), value, 0.0)
        at += step
        below, middle = reduced_row(
            input, target, at, is_unit & (fine + 1 < H), fine_column, channels, W, weights, UNITS, COLUMNS
        )
        if partials is not None:
            value, _ = penalty(middle, parameter, KIND)
            total += tl.where(is_unit & (fine + 1 < H) & (fine_column < W), value, 0.0)
        at += step
        second_below, middle = reduced_row(
            input, target, at, is_unit & (fine + 2 < H), fine_column, channels, W, weights, UNITS, COLUMNS
        )
        value = weight_between(fine - 2, row, H, EXPAND).to(total.dtype) * second_above
        value += weight_between(fine - 1, row, H, EXPAND).to(total.dtype) * above
        value += weight_between(fine, row, H, EXPAND).to(total.dtype) * here
        value += weight_between(fine + 1, row, H, EXPAND).to(total.dtype) * below
        value += weight_between(fine + 2, row, H, EXPAND).to(total.dtype) * second_below
        to = (plane * height + row) * width + column
        inside = is_unit & (row < height) & (column < width)
        if base is not None:
            value = tl.load(base + to, mask=inside, other=0.0) - value
        tl.store(out + to, value, mask=inside)
        second_above, above, here = here, below, second_below
    if partials is not None:
        total = sum_columns(tl.full(total.shape, factor, total.dtype) * total, UNITS, 2 * COLUMNS)
        tl.store(partials + unit.to(tl.int64) * bands + band, total, mask=unit < units)


@triton.jit
def level_kernel(
    input,  # (B, C, H, W) as average_kernel's; with KIND None the gradient of its penalties
    target,  # like input, or None
    coarse,  # (images * channels, ceil(H / 2), ceil(W / 2)) fp32, fp64 for fp64, contiguous, or None. With EXPAND a
    # level that is expanded and subtracted from the residual, else the gradient of the level that is reduced to it
    gradient,  # like input, or None. May be input itself
    partials,  # (units, bands) fp32 or fp64, or None: sums of factor * the penalties
    units,  # UNITS a program: ROWS pairs of rows of a channel
    channels,
    blocks,
    bands,  # of COLUMNS pairs of columns
    H,
    W,  # in UNIT
    factor: tl.float64,
    parameter: tl.float64,
    KIND: tl.constexpr,
    EXPAND: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    W = tl.cast(W, tl.int32) * UNIT
    height, width = (H + 1) // 2, (W + 1) // 2
    # As wide as it has to be, also where it is specialised to 1.
    units += tl.zeros((), tl.int32)
    program = tl.program_id(0).to(units.dtype)
    band = (program % bands).to(tl.int32)
    unit = program // bands * UNITS + tl.arange(0, UNITS)
    image, channel, block = place_of(unit, channels, blocks)
    is_unit = (unit < units)[:, None]
    plane = (image * channels + channel)[:, None]
    first = block[:, None] * ROWS
    fine_column = 2 * band * COLUMNS + tl.arange(0, 2 * COLUMNS)[None, :]
    has_column = is_unit & (fine_column < W)
    at = offsets_of(image[:, None], channel[:, None], 2 * first, channels, H, W)
    at += fine_column.to(tl.int64) * channels
    if coarse is not None:
        column = band * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        there = is_unit & (column < width)
        weights = (
            weight_between(2 * column, column - 1, W, EXPAND),
            weight_between(2 * column, column, W, EXPAND),
            weight_between(2 * column, column + 1, W, EXPAND),
            weight_between(2 * column + 1, column, W, EXPAND),
            weight_between(2 * column + 1, column + 1, W, EXPAND),
        )
        at_coarse = (plane * height + first) * width
        even_above, odd_above = spread_row(
            coarse, at_coarse - width, there & (first > 0), column, width, weights
        )
        even_here, odd_here = spread_row(coarse, at_coarse, there & (first < height), column, width, weights)
    for step in tl.static_range(2 * ROWS):
        row = first + step // 2
        fine_row = 2 * first + step
        inside = has_column & (fine_row < H)
        slope = residual_at(input, target, at, inside)
        if step == 0:
            total = tl.zeros_like(slope)
        if coarse is not None:
            if step % 2 == 0:
                at_coarse += width
                even_below, odd_below = spread_row(
                    coarse, at_coarse, there & (row + 1 < height), column, width, weights
                )
            at_here = weight_between(fine_row, row, H, EXPAND).to(total.dtype)
            at_below = weight_between(fine_row, row + 1, H, EXPAND).to(total.dtype)
            even = at_here * even_here + at_below * even_below
            odd = at_here * odd_here + at_below * odd_below
            if step % 2 == 0:
                at_above = weight_between(fine_row, row - 1, H, EXPAND).to(total.dtype)
                even += at_above * even_above
                odd += at_above * odd_above
            else:
                even_above, odd_above = even_here, odd_here
                even_here, odd_here = even_below, odd_below
            from_coarse = tl.interleave(even, odd)
            if EXPAND:
                slope -= from_coarse
        if KIND is not None:
            value, slope = penalty(slope, parameter, KIND)
            if partials is not None:
                total += tl.where(inside, value, 0.0)
            slope *= tl.full(slope.shape, factor, slope.dtype)
        if gradient is not None:
            if coarse is not None and not EXPAND:
                slope += from_coarse
            tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)
        at += W * channels
    if partials is not None:
        total = sum_columns(tl.full(total.shape, factor, total.dtype) * total, UNITS, 2 * COLUMNS)
        tl.store(partials + unit.to(tl.int64) * bands + band, total, mask=unit < units)


# --- launches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    rows: int  # of a tile, or of its share of a unit
    splits: int  # shares of a unit
    units: int  # times splits
    columns: int
    blocks: int  # units of a channel
    bands: int  # tiles beside each other


def columns_of(width, least, most):
    """The columns of a tile, a power of two, and how many tiles `width` takes: few empty columns, then few tiles, but
    none narrower than a line of memory, 32 float32, if the image is not."""
    widest = max(least, min(most, triton.next_power_of_2(width)))
    choices = [widest >> halvings for halvings in range(widest.bit_length())]
    choices = [columns for columns in choices if columns >= max(least, min(widest, LANES))]
    columns = min(
        choices, key=lambda columns: triton.cdiv(width, columns) * columns
    )  # the first, of equal ones
    return columns, triton.cdiv(width, columns)


MOST, LEAST = 32, 16  # pixels of a thread of average_kernel
ROWS = 8  # and at most so many of them below each other
REDUCED_ROWS = 4  # of a unit of the other kernels, of the coarser level


def average_tiling(H, W, vector, levels):
    """With loads of `vector` pixels."""
    cell = 2 ** (levels - 1)
    rows = min(cell, ROWS, MOST // vector)
    splits = cell // rows
    columns, bands = columns_of(W, cell, max(cell, LANES * vector))
    units = max(splits, WARPS * LANES * max(vector, LEAST // rows) // columns)
    return Tiling(rows, splits, units, columns, triton.cdiv(H, cell), bands)


def coarser_tiling(H, W, each):
    """Of reduce_kernel and level_kernel, in rows and columns of the coarser level of (H, W), `each` thread having so
    many beside each other."""
    height, width = (H + 1) // 2, (W + 1) // 2
    columns, bands = columns_of(width, 1, LANES * each)
    units = WARPS * LANES * each // columns
    return Tiling(REDUCED_ROWS, 1, units, columns, triton.cdiv(height, REDUCED_ROWS), bands)


def reduce_tiling(H, W, vector):
    # With more, what a thread loads for both neighbours would not fit its registers.
    return coarser_tiling(H, W, min(2, max(1, vector // 2)))


def level_tiling(H, W, vector):
    return coarser_tiling(H, W, max(1, vector // 2))


@dataclass(frozen=True)
class Residual:
    """input - target, or input alone, of (B, C, H, W): dense, contiguous or in channels_last."""

    input: torch.Tensor
    target: torch.Tensor | None = None

    @property
    def channels(self):
        """That lie side by side."""
        return 1 if self.input.is_contiguous() else self.input.shape[1]

    @property
    def images(self):
        return self.input.shape[0] * self.input.shape[1] // self.channels

    @property
    def wide(self):
        return accumulator(self.input.dtype)

    @property
    def unit(self):
        return unit_of(self.input.itemsize, self.input.shape[3])

    @property
    def vector(self):
        """Pixels that one load may bring."""
        return min(self.unit, 16 // self.input.itemsize) if self.channels == 1 else 1

    def coarser(self, H, W):
        """An empty tensor for a residual of coarser levels, or its gradient."""
        shape = (*self.input.shape[:2], H, W)
        return torch.empty(shape, dtype=self.wide, device=self.input.device)

    def launch(self, kernel, tiles, operands, sums, settings):
        """`operands` are those between target and partials. Gives sums of penalties (B, n), or None."""
        B, C, H, W = self.input.shape
        units = self.images * self.channels * tiles.blocks
        partials = None
        if sums:
            partials = torch.empty(
                (B, C * tiles.blocks * tiles.bands), dtype=self.wide, device=self.input.device
            )
        kernel[(triton.cdiv(units * tiles.splits, tiles.units) * tiles.bands,)](
            self.input,
            self.target,
            *operands,
            partials,
            units,
            self.channels,
            tiles.blocks,
            tiles.bands,
            H,
            W // self.unit,
            **settings,
            UNIT=self.unit,
            ROWS=tiles.rows,
            UNITS=tiles.units,
            COLUMNS=tiles.columns,
            num_warps=WARPS,
            **COMPILE,
        )
        return partials


def average(residual, kind, parameter, factors, gradient):
    """Sums of factor * penalties (B,). Fills `gradient` unless None."""
    H, W = residual.input.shape[2:]
    levels = min(len(factors), DEEPEST)
    tiles = average_tiling(H, W, residual.vector, levels)
    settings = {f"factor_{level}": factor for level, factor in enumerate(factors[:levels])}
    settings |= {f"factor_{level}": 0.0 for level in range(levels, DEEPEST)}
    settings |= {"parameter": parameter, "KIND": kind, "LEVELS": levels, "SPLITS": tiles.splits}

    def launch(gradient, coarse, coarse_gradient, sums):
        operands = gradient, coarse, coarse_gradient
        return residual.launch(average_kernel, tiles, operands, sums, settings)

    if len(factors) == levels:
        return row_sums(launch(gradient, None, None, True))
    last = levels - 1
    coarse = residual.coarser(H >> last, W >> last)
    coarse_gradient = None if gradient is None else torch.empty_like(coarse)
    sums = row_sums(launch(None, coarse, None, True))
    sums = sums + average(Residual(coarse), kind, parameter, factors[last:], coarse_gradient)
    if gradient is not None:
        launch(gradient, None, coarse_gradient, False)
    return sums


def reduce(residual, out, *, base=None, expand=False, sums=False, factor=0.0, parameter=0.0, kind=None):
    settings = {"factor": factor, "parameter": parameter, "KIND": kind, "EXPAND": expand}
    tiles = reduce_tiling(*residual.input.shape[2:], residual.vector)
    return residual.launch(reduce_kernel, tiles, (base, out), sums, settings)


def level(residual, coarse, gradient, *, expand=False, sums=False, factor=0.0, parameter=0.0, kind=None):
    settings = {"factor": factor, "parameter": parameter, "KIND": kind, "EXPAND": expand}
    tiles = level_tiling(*residual.input.shape[2:], residual.vector)
    return residual.launch(level_kernel, tiles, (coarse, gradient), sums, settings)


def reductions(residual, levels):
    """The empty residuals of the coarser levels."""
    H, W = residual.input.shape[2:]
    for _ in range(levels - 1):
        H, W = (H + 1) // 2, (W + 1) // 2
        yield residual.coarser(H, W)


def gaussian(residual, kind, parameter, factors, gradient):
    """As `average`."""
    penalties = [{"kind": kind, "parameter": parameter, "factor": factor} for factor in factors]
    residuals, partials = [residual], []
    for coarse, of_level in zip(reductions(residual, len(factors)), penalties, strict=False):
        partials.append(reduce(residuals[-1], coarse, sums=True, **of_level))
        residuals.append(Residual(coarse))
    gradients = [None] * len(factors)
    if gradient is not None:
        gradients = [gradient, *(torch.empty_like(one.input) for one in residuals[1:])]
    partials.append(level(residuals[-1], None, gradients[-1], sums=True, **penalties[-1]))
    if gradient is not None:
        for finer in reversed(range(len(factors) - 1)):
            level(residuals[finer], gradients[finer + 1], gradients[finer], **penalties[finer])
    return row_sums(torch.cat(partials, 1))


def laplacian(residual, kind, parameter, factors, gradient):
    """As `average`."""
    penalties = [{"kind": kind, "parameter": parameter, "factor": factor} for factor in factors]
    residuals = [residual, *map(Residual, reductions(residual, len(factors)))]
    for finer, coarser in itertools.pairwise(residuals):
        reduce(finer, coarser.input)
    gradients = [None] * len(factors)
    if gradient is not None:
        gradients = [gradient, *(torch.empty_like(one.input) for one in residuals[1:])]
    partials = []
    for index, of_level in enumerate(penalties):
        coarser = residuals[index + 1].input if index + 1 < len(factors) else None
        partials.append(
            level(residuals[index], coarser, gradients[index], expand=True, sums=True, **of_level)
        )
    if gradient is not None:
        # Of a level, whose own the bands left there: less what the finer band took from it, and what the coarser
        # level is made of.
        for index in reversed(range(len(factors))):
            if index > 0:
                finer = Residual(gradients[index - 1])
                reduce(finer, gradients[index], base=gradients[index], expand=True)
            if index + 1 < len(factors):
                level(Residual(gradients[index]), gradients[index + 1], gradients[index])
    return row_sums(torch.cat(partials, 1))


PYRAMIDS = {"average": average, "gaussian": gaussian, "laplacian": laplacian}

# --- launchers --------------------------------------------------------------------------------------------


def pyramid_loss(input, target, pyramid, penalty, parameter, factors, needs_gradient):
    """input and target (B, C, H, W), both contiguous or both in channels_last, and a factor for each level -> for each
    sample (B,) the sum over the levels of factor * the penalties of the residual's pixels, and, if it is needed, else
    of no elements, the gradient of the sum of all of them by input, in its layout.

    penalty: "power", |r|^parameter, or "charbonnier", √(r² + parameter²). Sides are as long as the levels need.
    """
    gradient = torch.empty_like(input) if needs_gradient else input.new_empty(0)
    if input.numel() == 0:
        return torch.zeros(input.shape[0], dtype=accumulator(input.dtype), device=input.device), gradient
    kind = penalty if penalty != "power" else {1.0: "l1", 2.0: "mse"}.get(parameter, "lp")
    with on_device(input):
        sums = PYRAMIDS[pyramid](
            Residual(input, target), kind, parameter, factors, gradient if needs_gradient else None
        )
    return sums, gradient
