"""Sums along the rows of a matrix (B, D), read in tiles of ROWS × COLUMNS.

The terms of a row are added in one order that D alone decides: in each of the COLUMNS lanes of a tile over the tiles
of a chunk, then as a tree over the lanes, then over the chunks of a row, which row_sum_kernel adds up. How many rows
a program has, how wide its loads are and what else is in the batch change nothing.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .linear_act import COMPILE, power_of_two

WIDEST = 256  # columns of a tile
LONGEST = 8  # tiles of a chunk: beyond it a row is shared by programs
ENOUGH = 256  # programs, two for each of a large GPU's multiprocessors
WARP_BYTES = 1024  # of an operand, in a warp's share of a tile: two loads of 16 bytes a thread


@triton.jit
def sum_columns(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) -> (ROWS,). A tree of two-term sums: a + b = b + a bitwise, so the result does not depend on how
    the compiler lays the tile out over threads, which a sum of more terms would."""
    width: tl.constexpr = COLUMNS.bit_length() - 1
    for level in tl.static_range(width):
        x = tl.sum(tl.reshape(x, (ROWS, COLUMNS >> (level + 1), 2)), axis=2)
    return tl.reshape(x, (ROWS,))


@triton.jit
def row_sum_kernel(
    partials,  # (B, D) fp32 or fp64 contiguous
    out,  # (B,)
    B,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    for start in range(0, D, COLUMNS):
        inside = (rows < B)[:, None] & (start + cols < D)[None, :]
        total += tl.load(partials + rows[:, None] * D + (start + cols)[None, :], mask=inside, other=0.0)
    tl.store(out + rows, sum_columns(total, ROWS, COLUMNS), mask=rows < B)


@dataclass(frozen=True)
class Tiling:
    rows: int  # of a tile
    columns: int
    steps: int  # tiles of a chunk, one program's share
    chunks: int  # of a row
    warps: int


def tiling(B, D, itemsize, longest=LONGEST):
    """The tiles of a (B, D) matrix, and how many of them, of the same rows, are one program's at most."""
    columns = power_of_two(D, 4, WIDEST)
    tiles = triton.cdiv(D, columns)
    steps = min(tiles, longest)
    chunks = triton.cdiv(tiles, steps)
    # Four warps; fewer where there would be few programs.
    warp = WARP_BYTES // itemsize
    rows = power_of_two(B * chunks // ENOUGH, max(1, warp // columns), 4 * warp // columns)
    return Tiling(rows, columns, steps, chunks, max(1, rows * columns // warp))


def unit_of(itemsize, *sizes):
    """The largest power of two that divides all `sizes`, and counts at most the elements of 16 bytes, or four.

    Kernels are told sizes in units of it: of what 16 does not divide, Triton sees no divisor else, and loads one
    element at a time.
    """
    return math.gcd(max(4, 16 // itemsize), *sizes)


def row_sums(partials):
    """(B, chunks) -> (B,)."""
    B, chunks = partials.shape
    if chunks == 1:
        return partials[:, 0]
    out = torch.empty(B, dtype=partials.dtype, device=partials.device)
    tiles = tiling(B, chunks, partials.itemsize)
    row_sum_kernel[(triton.cdiv(B, tiles.rows),)](
        partials, out, B, chunks, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.warps, **COMPILE
    )
    return out
