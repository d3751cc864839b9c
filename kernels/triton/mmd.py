"""Sums of kernels over pairs of points, and their gradients, without a matrix of pairs.

A program owns a block of rows and goes through a split of the columns, the points of one sample, in order. Of each pair
it takes the kernel's value κ and its slope s = -κ'(u) >= 0, and keeps for its rows Σ κ, Σ s and Σ s z', of which the
gradient is z Σ s - Σ s z' times a number. Splits hand on their sums through memory, and gather_kernel adds them up in
order. Shapes, dtype and kind of GPU alone decide about blocks and splits, so results are repeated to the last bit.

With gradients every pair is computed twice, once for each of its points. Once would save half of the distances and
exponentials, and no product: sums for the columns take another. And a program would have to hand those on to others,
through as many times the gradient's memory as there are blocks of rows. Without gradients, where there is nothing to
hand on, pairs of one sample are computed once.

The points are centred first. Two kernels differ in how they find u = ‖z - z'‖²:

  scan_kernel   few dimensions: a thread holds rows whole, and goes through the columns one by one. Differences are
                taken for u, and again used for the gradient. Some 3 D + 20 operations a pair.
  tile_kernel   u = ‖z‖² + ‖z'‖² - 2 z·z' by the tensor cores, and the gradient's Σ s z' too; some 35 operations a pair
                beside them. Kernels of √u, which the cancellation in u would hurt, take differences, dimension after
                dimension.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .activation import widen
from .linear_act import COMPILE, accumulator, on_device, power_of_two
from .rows import sum_columns

__all__ = ["mmd", "mmd_rows"]

LN2 = tl.constexpr(0.69314718055994530942)
LOG2E = tl.constexpr(1.4426950408889634)
CHUNK = tl.constexpr(64)  # columns that a scan sums up before it adds them to the others

SCANNED = 8  # dimensions up to which pairs are scanned
SCANNED_ROOTS = 16  # and those of kernels of √u
VALUES = 1024  # that gather_kernel adds up at a time
STRIP = 1024  # elements of a program of what goes over the points once
WIDEST = 64  # dimensions of a tile; beyond them it goes through parts
SQUARINGS = 4  # one after the other: each doubles the relative error of an exponential, to 16 times its own
PROGRAMS = 4096  # ten rounds of three a multiprocessor of a large GPU
SPLIT_BYTES = 1 << 24  # of the sums that splits hand on, if there are more than two
PADDING = 128  # rows that a sample's place is a multiple of
# Of which no kernel is to know divisors: batches of other sizes would have it compiled anew.
COUNTS = ["values", "x_rows", "y_rows", "x_columns", "y_columns", "splits"]


# --- device functions -------------------------------------------------------------------------------------


@triton.jit
def log2(x):
    """For x >= 1, to 1.3e-7 in float32. That of CUDA's library, for all numbers, is twice as long, and where a thread
    takes a hundred of them, the compiler keeps what they have under way in memory."""
    if x.dtype == tl.float64:
        y = tl.log2(x)
    else:
        # x = 2^exponent (1 + f), f from -1/3 to 1/3; a polynomial for (ln(1 + f) - f) / f².
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F2AAAAB) >> 23
        f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
        y = f * -0.12734152 + 0.13756539
        y = y * f - 0.12219618
        y = y * f + 0.14054218
        y = y * f - 0.16678093
        y = y * f + 0.20007323
        y = y * f - 0.24999839
        y = y * f + 0.33333272
        y = y * f - 0.5
        y = (y * (f * f) + f) * LOG2E + exponent.to(tl.float32)
        y = tl.where(x < float("inf"), y, x)
    return y


@triton.jit
def scale_of(unit, dtype: tl.constexpr):
    """What squared distances are multiplied by."""
    return tl.full((), 1.0, dtype) if unit is None else 1.0 / tl.load(unit).to(dtype)


@triton.jit
def evaluate(u, rates, alpha, KERNEL: tl.constexpr, LADDER: tl.constexpr):
    """(κ, -κ' without the factor that slope_factor() has) of squared distances. Rates of exponentials are those of
    powers of 2. LADDER has for each rate, from the smallest on, by how many squarings its exponential follows from the
    one before, or -1. Of a float64 rate there are three float32 numbers whose sum it is."""
    count: tl.constexpr = len(LADDER)
    is_double: tl.constexpr = u.dtype == tl.float64
    x = u
    if KERNEL == "laplacian" or KERNEL == "energy":
        # 1 / √u, and 0 where u is 0 or no normal number, which some roots are infinite of.
        least: tl.constexpr = 2.2250738585072014e-308 if is_double else 1.17549435e-38
        inverse = tl.where(u < least, 0.0, tl.rsqrt(u))
        x = u * inverse
    value, slope, e = x, x, x
    for i in tl.static_range(count):
        if is_double:
            rate = tl.full((), rates[3 * (count - 1 - i)], tl.float64)
            rate += tl.full((), rates[3 * (count - 1 - i) + 1], tl.float64)
            rate += tl.full((), rates[3 * (count - 1 - i) + 2], tl.float64)
        else:
            rate = rates[count - 1 - i]
        if KERNEL == "energy":
            of_rate, slope_of_rate = -x, u
        elif KERNEL == "rbf" or KERNEL == "laplacian":
            if LADDER[i] < 0:
                e = tl.exp2(x * -rate)
            if LADDER[i] >= 1:
                e = e * e
            if LADDER[i] == 2:
                e = e * e
            of_rate, slope_of_rate = e, e * rate
        else:
            base = x * rate + 1.0
            if is_double:
                reciprocal = 1.0 / base
            else:
                # A division takes eight instructions. This takes two, is as good, and 0 for infinity.
                root = tl.rsqrt(base)
                reciprocal = root * root
            of_rate = reciprocal
            if KERNEL == "rational_quadratic":
                of_rate = tl.exp2(log2(base) * -tl.full((), alpha, u.dtype))
            slope_of_rate = of_rate * (reciprocal * rate)
        if i == 0:
            value, slope = of_rate, slope_of_rate
        else:
            value, slope = value + of_rate, slope + slope_of_rate
    if KERNEL == "energy":
        slope = inverse
    elif KERNEL == "laplacian":
        slope *= inverse
    return value, slope


@triton.jit
def slope_factor(weight, scale, alpha, KERNEL: tl.constexpr):
    """What Σ (z - z') s is to be multiplied by; `weight` (float64) is of the pairs."""
    if KERNEL == "rbf":
        weight *= LN2
    elif KERNEL == "laplacian":
        weight *= 0.5 * LN2
    elif KERNEL == "energy":
        weight *= 0.5
    elif KERNEL == "rational_quadratic":
        weight *= tl.full((), alpha, tl.float64)
    return -weight.to(scale.dtype) * scale


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b as accurate as in float32: with "tf32", of the numbers that TF32 holds and what it leaves over of them,
    three products. Triton's own "tf32x3" does so too, and takes more instructions to let infinity through."""
    if PRECISION == "tf32":
        # To nearest. NaN becomes any number, but stays in what is left over.
        a_high = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        b_high = ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        y = tl.dot(a - a_high, b_high, input_precision="tf32")
        y = tl.dot(a_high, b - b_high, y, input_precision="tf32")
        y = tl.dot(a_high, b_high, y, input_precision="tf32")
    else:
        y = tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)
    return y


@triton.jit
def in_pairs(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) with the columns of each eight in the order 0 2 4 6 1 3 5 7. In what a product sums over, the
    order is no matter, and in this one the results of one product lie in the threads that need them for the next."""
    x = tl.permute(tl.reshape(x, (ROWS, COLUMNS // 8, 4, 2)), (0, 1, 3, 2))
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def in_pairs_of_rows(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """in_pairs() of the other factor."""
    x = tl.permute(tl.reshape(x, (ROWS // 8, 4, 2, COLUMNS)), (0, 2, 1, 3))
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def place(
    x_first,
    x_rows,
    y_first,
    y_rows,
    x_columns,
    y_start,
    y_columns,
    splits,
    split,
    of_x,
    of_y,
    of_both,
    across,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What a program is to do: its first row among the points, the end of those that are asked for, which number the
    first has among them, its split, the first column and the end of those, whether they are of the rows' sample, and
    what its values and its gradient are multiplied by. Arguments as for the kernels."""
    block = tl.program_id(0) // splits
    split_index = tl.program_id(0) % splits
    x_blocks = tl.cdiv(x_rows, ROWS)
    x_splits = tl.cdiv(x_columns, split)
    row_in_x, column_in_x = block < x_blocks, split_index < x_splits
    number = tl.where(row_in_x, block * ROWS, x_rows + (block - x_blocks) * ROWS)
    row0 = tl.where(row_in_x, x_first + block * ROWS, y_first + (block - x_blocks) * ROWS)
    row_end = tl.where(row_in_x, x_first + x_rows, y_first + y_rows)
    first = tl.where(column_in_x, split_index * split, y_start + (split_index - x_splits) * split)
    end = tl.minimum(first + split, tl.where(column_in_x, x_columns, y_start + y_columns))
    same = row_in_x == column_in_x
    of_same = tl.where(row_in_x, tl.full((), of_x, tl.float64), tl.full((), of_y, tl.float64))
    of_both, across = tl.full((), of_both, tl.float64), tl.full((), across, tl.float64)
    if SYMMETRIC:
        first = tl.where(same, tl.maximum(first, row0), first)
    # 4: a pair counts in both orders, and u has a square's derivative.
    return (
        row0, row_end, number, split_index, first, end, same,
        tl.where(same, of_same, of_both), tl.where(same, of_same, 0.5 * across) * 4.0,
    )  # fmt: skip


@triton.jit
def store_value(values, total, rows, row_end, weight, ROWS: tl.constexpr):
    """Of a program. In float64: the three sums of an MMD² nearly cancel."""
    total = tl.where(rows < row_end, total, 0.0).to(tl.float64)
    value = weight * sum_columns(tl.reshape(total, (1, ROWS)), 1, ROWS)
    tl.store(values + tl.program_id(0) + tl.arange(0, 1), value)


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["x_count", "y_count"])
def centre_kernel(
    data,  # (x_count + y_count, D) contiguous: x, and below it y
    centre,  # (D,) fp32, fp64 for fp64
    points,  # (count, WIDTH): x, and from row y_start on y, minus the centre; elsewhere 0
    transposed,  # (WIDTH, count), or None
    squares,  # (count,): the squared lengths, or None
    x_count,
    y_count,
    y_start,
    count,
    D,
    WIDTH,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_y = rows >= y_start
    given = tl.where(in_y, rows - y_start < y_count, rows < x_count)
    source = tl.where(in_y, rows - y_start + x_count, rows)
    total = tl.zeros((ROWS, COLUMNS), points.dtype.element_ty)
    for start in range(0, WIDTH, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        inside = given[:, None] & (cols < D)[None, :]
        value = widen(tl.load(data + source[:, None] * D + cols[None, :], mask=inside, other=0.0))
        value = tl.where(inside, value - tl.load(centre + cols, mask=cols < D, other=0.0)[None, :], 0.0)
        at = (rows < count)[:, None] & (cols < WIDTH)[None, :]
        tl.store(points + rows[:, None] * WIDTH + cols[None, :], value, mask=at)
        if transposed is not None:
            tl.store(transposed + cols.to(tl.int64)[None, :] * count + rows[:, None], value, mask=at)
        total += value * value
    if squares is not None:
        tl.store(squares + rows, sum_columns(total, ROWS, COLUMNS), mask=rows < count)


@triton.jit(do_not_specialize=COUNTS)
def scan_kernel(
    points,  # (count, DIMENSIONS)
    transposed,  # (DIMENSIONS, count)
    values,  # (programs,) fp64
    sums,  # (splits, rows, DIMENSIONS), or None: no gradient
    unit,  # a scalar in memory, or None
    rates,  # as evaluate() reads them
    alpha: tl.float64,
    of_x: tl.float64,  # weights of ordered pairs of two points of x,
    of_y: tl.float64,  # of y,
    of_both: tl.float64,  # and of both, here,
    across: tl.float64,  # and in the sum of all
    count,
    x_first,  # the first row of x that is asked for, and how many are
    x_rows,
    y_first,  # among the points; likewise
    y_rows,
    x_columns,  # of x, or 0
    y_start,
    y_columns,
    splits,
    split,  # columns of a split
    KERNEL: tl.constexpr,
    LADDER: tl.constexpr,
    SYMMETRIC: tl.constexpr,  # whether pairs of one sample are computed once
    DIMENSIONS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row0, row_end, number, index, first, end, same, of_values, of_gradient = place(
        x_first, x_rows, y_first, y_rows, x_columns, y_start, y_columns, splits, split,
        of_x, of_y, of_both, across, SYMMETRIC, ROWS,
    )  # fmt: skip
    dtype: tl.constexpr = points.dtype.element_ty
    scale = scale_of(unit, dtype)
    rows = row0 + tl.arange(0, ROWS)
    k = tl.arange(0, DIMENSIONS)
    # The points side by side along the rows: a thread gets all dimensions of some, and no sum leaves it.
    row = tl.load(transposed + k.to(tl.int64)[:, None] * count + rows[None, :])
    gradient = tl.zeros((DIMENSIONS, ROWS), dtype)
    total = tl.zeros((ROWS,), dtype)
    for start in range(first, end, CHUNK):
        of_chunk = tl.zeros((ROWS,), dtype)
        for column in range(start, tl.minimum(start + CHUNK, end)):
            other = tl.load(points + tl.cast(column, tl.int64) * DIMENSIONS + k)
            difference = row - other[:, None]
            u = tl.sum(difference * difference, 0)
            if unit is not None:
                u *= scale
            value, slope = evaluate(u, rates, alpha, KERNEL, LADDER)
            of_chunk += tl.where(rows != column, value, 0.0)
            if sums is not None:
                gradient += difference * slope[None, :]
        if SYMMETRIC:
            of_chunk *= tl.where(same & (start >= row0 + ROWS), 2.0, 1.0).to(dtype)
        total += of_chunk
    store_value(values, total, rows, row_end, of_values, ROWS)
    if sums is not None:
        gradient *= slope_factor(of_gradient, scale, alpha, KERNEL)
        place_of = (index.to(tl.int64) * (x_rows + y_rows) + number + tl.arange(0, ROWS)) * DIMENSIONS
        tl.store(sums + place_of[None, :] + k[:, None], gradient, mask=(rows < row_end)[None, :])


@triton.jit
def squared_differences(transposed, row0, col0, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of a tile's pairs, dimension after dimension."""
    u = tl.zeros((ROWS, COLUMNS), transposed.dtype.element_ty)
    row_at, col_at = transposed + row0, transposed + col0
    for _ in range(0, width, 2):
        for _ in tl.static_range(2):
            of_rows = tl.load(row_at + tl.arange(0, ROWS))[:, None]
            difference = of_rows - tl.load(col_at + tl.arange(0, COLUMNS))[None, :]
            u += difference * difference
            row_at += count
            col_at += count
    return u


@triton.jit
def inner_products(
    row_points, col_points, row_offsets, col_offsets, width,
    PRECISION: tl.constexpr, DIMENSIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) of a tile's pairs, part after part of the dimensions."""
    inner = tl.zeros((ROWS, COLUMNS), row_points.dtype.element_ty)
    for start in range(0, width, DIMENSIONS):
        row = tl.load(row_points + start + row_offsets)
        # Subtracted: what is added to a product, the tensor cores add, and cut off what does not fit.
        inner -= product(row, tl.load(col_points + start + col_offsets).T, PRECISION)
    return -inner


@triton.jit(do_not_specialize=COUNTS)
def tile_kernel(
    points,  # (count, width)
    transposed,  # (width, count), with DIRECT
    squares,  # (count,)
    values,  # (programs,) fp64
    sums,  # (splits, rows, width), or None: no gradient
    unit,  # a scalar in memory, or None
    rates,  # as evaluate() reads them
    alpha: tl.float64,
    of_x: tl.float64,  # weights of ordered pairs of two points of x,
    of_y: tl.float64,  # of y,
    of_both: tl.float64,  # and of both, here,
    across: tl.float64,  # and in the sum of all
    count,
    width,
    x_first,  # the first row of x that is asked for, and how many are
    x_rows,
    y_first,  # among the points; likewise
    y_rows,
    x_columns,  # of x, or 0
    y_start,
    y_columns,
    splits,
    split,  # columns of a split
    KERNEL: tl.constexpr,
    LADDER: tl.constexpr,
    SYMMETRIC: tl.constexpr,  # whether pairs of one sample are computed once
    DIRECT: tl.constexpr,  # whether u is made of differences
    PRECISION: tl.constexpr,  # of product()
    PARTS: tl.constexpr,  # whether DIMENSIONS are but a part of `width`, and the sums for the gradient are in memory
    DIMENSIONS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row0, row_end, number, index, first, end, same, of_values, of_gradient = place(
        x_first, x_rows, y_first, y_rows, x_columns, y_start, y_columns, splits, split,
        of_x, of_y, of_both, across, SYMMETRIC, ROWS,
    )  # fmt: skip
    dtype: tl.constexpr = points.dtype.element_ty
    scale = scale_of(unit, dtype)
    # 64-bit: any offset may exceed 2^31 elements. Within a tile none does.
    stride = tl.cast(width, tl.int64)
    step = DIMENSIONS
    if PARTS:
        step = width
    k = tl.arange(0, DIMENSIONS)[None, :]
    row_offsets = tl.arange(0, ROWS)[:, None] * step + k
    col_offsets = tl.arange(0, COLUMNS)[:, None] * step + k
    rows = row0 + tl.arange(0, ROWS)
    row_points = points + row0 * stride
    if not DIRECT:
        row_squares = tl.load(squares + rows) * scale
        if not PARTS:
            row = tl.load(row_points + row_offsets) * (-2.0 * scale)
    total = tl.zeros((ROWS,), dtype)
    if sums is not None:
        slopes = tl.zeros((ROWS,), dtype)
        weighted = tl.zeros((ROWS, DIMENSIONS), dtype)
        own_sums = sums + (index.to(tl.int64) * (x_rows + y_rows) + number) * stride
        asked_for = (rows < row_end)[:, None]
        if PARTS:
            for part in range(0, width, DIMENSIONS):
                tl.store(own_sums + part + row_offsets, weighted, mask=asked_for)
            tl.debug_barrier()
    for start in range(first, end, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        col_points = points + start * stride
        if DIRECT:
            u = squared_differences(transposed, row0, start, tl.cast(count, tl.int64), width, ROWS, COLUMNS)
            if unit is not None:
                u *= scale
        else:
            lengths = row_squares[:, None] + (tl.load(squares + cols) * scale)[None, :]
            if PARTS:
                u = lengths - (2.0 * scale) * inner_products(
                    row_points, col_points, row_offsets, col_offsets, width,
                    PRECISION, DIMENSIONS, ROWS, COLUMNS,
                )  # fmt: skip
            else:
                other = tl.load(col_points + col_offsets)
                u = lengths + product(row, other.T, PRECISION)
            u = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value, slope = evaluate(u, rates, alpha, KERNEL, LADDER)
        # In few tiles: a branch costs nothing there, and selections would everywhere.
        if (start + COLUMNS > end) | ((start < row0 + ROWS) & (start + COLUMNS > row0)):
            is_pair = (rows[:, None] != cols[None, :]) & (cols < end)[None, :]
            value = tl.where(is_pair, value, 0.0)
            slope = tl.where(is_pair, slope, 0.0)
        of_tile = tl.sum(value, 1)
        if SYMMETRIC:
            of_tile *= tl.where(same & (start >= row0 + ROWS), 2.0, 1.0).to(dtype)
        total += of_tile
        if sums is not None:
            slopes += tl.sum(slope, 1)
            slope = in_pairs(slope, ROWS, COLUMNS)
            if PARTS:
                for part in range(0, width, DIMENSIONS):
                    at = own_sums + part + row_offsets
                    before = tl.load(at, mask=asked_for, other=0.0)
                    of_part = in_pairs_of_rows(tl.load(col_points + part + col_offsets), COLUMNS, DIMENSIONS)
                    tl.store(at, before - product(slope, of_part, PRECISION), mask=asked_for)
                tl.debug_barrier()  # the next tile's loads may be other threads'
            else:
                if DIRECT:
                    other = tl.load(col_points + col_offsets)
                weighted -= product(slope, in_pairs_of_rows(other, COLUMNS, DIMENSIONS), PRECISION)
    store_value(values, total, rows, row_end, of_values, ROWS)
    if sums is not None:
        factor = slope_factor(of_gradient, scale, alpha, KERNEL)
        if PARTS:
            for part in range(0, width, DIMENSIONS):
                at = own_sums + part + row_offsets
                gradient = tl.load(row_points + part + row_offsets) * slopes[:, None]
                gradient += tl.load(at, mask=asked_for, other=0.0)
                tl.store(at, gradient * factor, mask=asked_for)
        else:
            gradient = tl.load(row_points + row_offsets) * slopes[:, None] + weighted
            tl.store(own_sums + row_offsets, gradient * factor, mask=asked_for)


@triton.jit(do_not_specialize=["programs", "splits", "rows"])
def gather_kernel(
    values,  # (programs,) fp64
    value,  # a scalar: their sum and a constant
    sums,  # (splits, rows, width), or None
    gradient,  # (rows, D) contiguous
    programs,
    constant: tl.float64,
    splits,
    rows,
    D,
    width,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0) - 1
    if tile < 0:
        at = tl.arange(0, VALUES)
        total = tl.zeros((1, VALUES), tl.float64)
        for start in range(0, programs, VALUES):
            total += tl.load(values + start + at, mask=start + at < programs, other=0.0)[None, :]
        result = tl.full((1,), constant, tl.float64) + sum_columns(total, 1, VALUES)
        tl.store(value + tl.arange(0, 1), result.to(value.dtype.element_ty))
    elif sums is not None:
        tiles = tl.cdiv(D, COLUMNS)
        at_rows = (tile // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        cols = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (at_rows < rows)[:, None] & (cols < D)[None, :]
        split = sums + at_rows[:, None] * width + cols[None, :]
        step = tl.cast(rows, tl.int64) * width
        of_tile = tl.zeros((ROWS, COLUMNS), gradient.dtype.element_ty)
        for _ in range(splits):
            of_tile += tl.load(split, mask=inside, other=0.0)
            split += step
        tl.store(gradient + at_rows[:, None] * D + cols[None, :], of_tile, mask=inside)


# --- launches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """What a program of pairs goes through."""

    scan: bool  # by scan_kernel, else tile_kernel
    direct: bool  # u from differences
    width: int  # dimensions, as they are stored
    dimensions: int  # of a tile
    rows: int  # of a tile, and of a program
    columns: int  # of a tile
    warps: int
    precision: str = "ieee"  # of product()


def tiling(D, dtype, kernel, rows, capability):
    """For `rows` rows, of each of one or two samples, at most; `capability` is that of an NVIDIA GPU, or None."""
    direct = kernel in ("laplacian", "energy")
    size = 8 if dtype == torch.float64 else 4
    scanned = (SCANNED_ROOTS if direct else SCANNED) * 4 // size
    if scanned >= D:
        width = power_of_two(D, 1, SCANNED_ROOTS)
        # A thread's rows are one load of 16 bytes.
        warp = 32 * 16 // size
        block = power_of_two(rows, warp, 4 * warp)
        return Tiling(True, True, width, width, block, 1, block // warp)
    width = power_of_two(D, 16, WIDEST) if D <= WIDEST else triton.cdiv(D, WIDEST) * WIDEST
    if size == 8:
        return Tiling(False, direct, width, min(width, WIDEST // 2), 32, 32, 4)
    # A thread holds, of its rows, the two numbers of TF32 for each coordinate and the gradient's sums, and what it
    # computes of its pairs: of more than these it runs out of registers.
    is_hopper = capability is not None and capability[0] == 9
    dimensions = min(width, WIDEST if is_hopper and not direct else WIDEST // 2)
    columns = 64 if width == 16 and kernel != "rational_quadratic" else 32
    precision = "tf32" if capability is not None and capability >= (8, 0) else "ieee"
    return Tiling(False, direct, width, dimensions, 64, columns, 4, precision)


def capability_of(x):
    if not x.is_cuda:
        return 9, 0
    return None if torch.version.hip else torch.cuda.get_device_capability(x.device)


def ladder_of(kernel, rates):
    """LADDER of evaluate(), of rates in descending order."""
    if kernel not in ("rbf", "laplacian"):
        return (-1,) * len(rates)
    ladder, since = [-1], 0
    for rate, before in zip(rates[-2::-1], rates[:0:-1], strict=True):
        # Rates come of bandwidths, which are rounded.
        steps = next((n for n in range(3) if math.isclose(rate, 2**n * before, rel_tol=1e-15)), -1)
        if since + steps > SQUARINGS:
            steps = -1
        since = 0 if steps < 0 else since + steps
        ladder.append(steps)
    return tuple(ladder)


def exponentials_of(kernel, ladder):
    """Of a pair, and what takes as long."""
    others = {"rational_quadratic": 2 * len(ladder), "laplacian": 1}.get(kernel, 0)
    return ladder.count(-1) + others


def rates_of(kernel, rates, dtype):
    """As evaluate() reads them."""
    if kernel in ("rbf", "laplacian"):
        rates = tuple(rate / LN2.value for rate in rates)
    if dtype != torch.float64:
        return rates
    parts = []
    for rate in rates:
        for _ in range(3):
            part = torch.tensor(rate, dtype=torch.float32).item()
            parts.append(part)
            rate -= part
    return tuple(parts)


@dataclass(frozen=True)
class Cloud:
    """The points of both samples, centred: those of x are rows 0, ... and those of y rows y_start, ..."""

    points: torch.Tensor  # (count, width), 0 where there are none
    transposed: torch.Tensor | None  # (width, count)
    squares: torch.Tensor | None  # (count,)
    x_count: int
    y_count: int
    y_start: int


def strip(width):
    """(rows, columns) of STRIP."""
    columns = min(width, WIDEST)
    return STRIP // columns, columns


def centred(x, y, tiles):
    """x (N, D) and y (M, D) of any strides as a Cloud."""
    wide = accumulator(x.dtype)
    data = torch.cat((x, y))
    centre = data.to(wide).mean(0)
    y_start = triton.cdiv(len(x), PADDING) * PADDING
    # A block that begins at the last row is to lie inside.
    count = y_start + triton.cdiv(len(y), PADDING) * PADDING + max(tiles.rows, PADDING)
    points = torch.empty((count, tiles.width), dtype=wide, device=x.device)
    transposed = torch.empty((tiles.width, count), dtype=wide, device=x.device) if tiles.direct else None
    squares = None if tiles.direct else torch.empty(count, dtype=wide, device=x.device)
    rows, columns = strip(tiles.width)
    centre_kernel[(triton.cdiv(count, rows),)](
        data,
        centre,
        points,
        transposed,
        squares,
        len(x),
        len(y),
        y_start,
        count,
        data.shape[1],
        tiles.width,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        **COMPILE,
    )
    return Cloud(points, transposed, squares, len(x), len(y), y_start)


@dataclass(frozen=True)
class Part:
    """A launch: rows of the two samples, (first, count), and the columns that they meet, all of a sample or none. What
    they have with the other sample counts `across` times."""

    x_rows: tuple[int, int]
    y_rows: tuple[int, int]
    x_columns: bool
    y_columns: bool
    across: float
    gradient: bool
    symmetric: bool = False

    @property
    def count(self):
        return self.x_rows[1] + self.y_rows[1]


def splits_of(blocks, x_columns, y_columns, row_bytes):
    """(splits of the columns, columns of a split), of the shape alone; a split hands on `row_bytes`, of all rows."""
    splits = triton.cdiv(PROGRAMS, blocks)
    if row_bytes:
        splits = min(splits, max(2, SPLIT_BYTES // row_bytes))
    least = 2 * CHUNK.value
    split = max(least, triton.cdiv(triton.cdiv(x_columns + y_columns, splits), least) * least)
    return triton.cdiv(x_columns, split) + triton.cdiv(y_columns, split), split


def launch(part, cloud, tiles, constants, arguments, weights, values, sums, splits, split):
    """Fills `values` and `sums`, of the kernels' arguments."""
    of_x, of_y, across, _ = weights
    settings = (
        *part.x_rows,
        cloud.y_start + part.y_rows[0],
        part.y_rows[1],
        cloud.x_count if part.x_columns else 0,
        cloud.y_start,
        cloud.y_count if part.y_columns else 0,
        splits,
        split,
    )
    grid = (len(values),)
    weights = (of_x, of_y, part.across, across)
    options = {
        "SYMMETRIC": part.symmetric,
        "ROWS": tiles.rows,
        "num_warps": tiles.warps,
        **constants,
        **COMPILE,
    }
    if tiles.scan:
        scan_kernel[grid](
            cloud.points,
            cloud.transposed,
            values,
            sums,
            *arguments,
            *weights,
            len(cloud.points),
            *settings,
            DIMENSIONS=tiles.width,
            **options,
        )
    else:
        tile_kernel[grid](
            cloud.points,
            cloud.transposed,
            cloud.squares,
            values,
            sums,
            *arguments,
            *weights,
            len(cloud.points),
            tiles.width,
            *settings,
            DIRECT=tiles.direct,
            PRECISION=tiles.precision,
            PARTS=tiles.width > tiles.dimensions,
            DIMENSIONS=tiles.dimensions,
            COLUMNS=tiles.columns,
            num_stages=1,
            **options,
        )


def total(parts, cloud, D, tiles, unit, kernel, rates, alpha, weights, constant):
    """The sum of what `parts` stand for and a constant, and the gradient (rows, D) of the one that has it, if any."""
    if kernel == "rational_quadratic" and alpha == 1.0:
        kernel = "imq"  # the same
    wide, device = cloud.points.dtype, cloud.points.device
    rates = tuple(sorted(rates, reverse=True)) or (1.0,)
    constants = {"KERNEL": kernel, "LADDER": ladder_of(kernel, rates)}
    arguments = (unit, rates_of(kernel, rates, wide), alpha)
    planned, programs, rows, gathered, splits_gathered = [], 0, 0, None, 0
    for part in parts:
        blocks = sum(triton.cdiv(count, tiles.rows) for _, count in (part.x_rows, part.y_rows))
        columns = cloud.x_count * part.x_columns, cloud.y_count * part.y_columns
        if blocks == 0 or sum(columns) == 0:
            continue
        row_bytes = part.count * tiles.width * wide.itemsize if part.gradient else 0
        splits, split = splits_of(blocks, *columns, row_bytes)
        sums = None
        if part.gradient:
            rows, splits_gathered = part.count, splits
            sums = gathered = torch.empty((splits, rows, tiles.width), dtype=wide, device=device)
        planned.append((part, sums, slice(programs, programs + blocks * splits), splits, split))
        programs += blocks * splits
    values = torch.empty(programs, dtype=torch.float64, device=device)
    for part, sums, own, splits, split in planned:
        launch(part, cloud, tiles, constants, arguments, weights, values[own], sums, splits, split)
    value = torch.empty((), dtype=wide, device=device)
    gradient = torch.empty((rows, D), dtype=wide, device=device)
    height, columns = strip(tiles.width)
    gather_kernel[(1 + triton.cdiv(rows, height) * triton.cdiv(D, columns),)](
        values,
        value,
        gathered,
        gradient,
        programs,
        constant,
        splits_gathered,
        rows,
        D,
        tiles.width,
        VALUES=VALUES,
        ROWS=height,
        COLUMNS=columns,
        num_warps=4,
        **COMPILE,
    )
    return value, gradient


# --- launchers --------------------------------------------------------------------------------------------


def mmd(x, y, unit, kernel, rates, alpha, weights, needs):
    """The weighted sum of a kernel over the pairs of rows of x (N, D) and y (M, D), of any strides, and its gradients,
    of which bits 0 and 1 of `needs` ask for those of x and y; one that is not asked for has no rows."""
    (N, D), M = x.shape, y.shape[0]
    across = weights[2]
    nothing = (0, 0)
    with on_device(x):
        tiles = tiling(D, x.dtype, kernel, {1: N, 2: M}.get(needs, max(N, M)), capability_of(x))
        cloud = centred(x, y, tiles)
        # A sample without a gradient meets itself alone, and the other does what is across.
        of_x = Part((0, N), nothing, True, False, 0.0, False, True)
        of_y = Part(nothing, (0, M), False, True, 0.0, False, True)
        parts = {
            0: (Part((0, N), nothing, True, True, across, False, True), of_y),
            1: (Part((0, N), nothing, True, True, across, True), of_y),
            2: (of_x, Part(nothing, (0, M), True, True, across, True)),
            3: (Part((0, N), (0, M), True, True, 0.5 * across, True),),
        }[needs]
        value, gradient = total(parts, cloud, D, tiles, unit, kernel, rates, alpha, weights, weights[3])
        return value, *halves(gradient, N, needs)


def mmd_rows(x, y, all_x, all_y, first_x, first_y, unit, kernel, rates, alpha, weights, needs):
    """What x, the rows first_x, ... of all_x, and y, those from first_y on of all_y, have in the weighted sum over all
    pairs, without the constant: a pair of two of all samples' parts counts for either with a half. The gradients of x
    and y are those of the whole sum."""
    D = x.shape[1]
    across = 0.5 * weights[2]
    of_x, of_y, nothing = (first_x, len(x)), (first_y, len(y)), (0, 0)
    with on_device(x):
        tiles = tiling(D, x.dtype, kernel, max(len(x), len(y)), capability_of(x))
        cloud = centred(all_x, all_y, tiles)
        parts = (
            Part(of_x, nothing, True, True, across, bool(needs & 1)),
            Part(nothing, of_y, True, True, across, bool(needs & 2)),
        )
        if needs in (0, 3):
            parts = (Part(of_x, of_y, True, True, across, needs == 3),)
        value, gradient = total(parts, cloud, D, tiles, unit, kernel, rates, alpha, weights, 0.0)
        return value, *halves(gradient, len(x), needs)


def halves(gradient, x_rows, needs):
    """(that of x, that of y), of no rows where there is none."""
    x_rows = x_rows if needs & 1 else 0
    return gradient[:x_rows], gradient[x_rows:] if needs & 2 else gradient[:0]
