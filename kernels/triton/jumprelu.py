"""JumpReLU, the number of active latents of each row, and the straight-through gradients of both: a pass over x each.

The forward goes along rows, as rows.py does; the backward sums columns in tiles of 64 rows, as linear_act.py does.
"""

import torch
import triton
import triton.language as tl

from ..jumprelu import NEED_THRESHOLD, NEED_X
from .activation import widen
from .linear_act import (
    COMPILE,
    SUM_ROWS,
    accumulator,
    new_partials,
    on_device,
    power_of_two,
    store_column_sums,
    sum_partials,
)
from .rows import row_sums, sum_columns, tiling, unit_of

__all__ = ["jumprelu", "jumprelu_backward"]


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def jumprelu_kernel(
    x,  # (B, D), any strides
    threshold,  # (D,) fp32, fp64 for fp64, contiguous
    h,  # (B, D) contiguous
    l0,  # (B, chunks) fp32, fp64 for fp64: how many of a chunk of each row are active
    chunks,  # of a row
    B,
    D,  # in units, as the stride of rows
    stride_x_row,
    stride_x_col,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,  # tiles of a chunk
):
    # 64-bit: any offset may exceed 2^31 elements.
    D = tl.cast(D, tl.int64) * UNIT
    tile = tl.program_id(0)
    chunk = tile % chunks
    rows = (tile // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = chunk.to(tl.int64) * (STEPS * COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), l0.dtype.element_ty)
    for start in range(first, tl.minimum(first + STEPS * COLUMNS, D), COLUMNS):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        inside = (rows < B)[:, None] & (cols < D)
        limit = tl.load(threshold + cols, mask=cols < D, other=0.0)
        value = tl.load(x + rows[:, None] * UNIT * stride_x_row + cols * stride_x_col, mask=inside, other=0.0)
        wide = widen(value)
        is_off = wide <= limit
        # A threshold that is no number makes none of what it decides.
        one = tl.where(limit == limit, 1.0, limit)
        kept = (wide * one).to(value.dtype)
        tl.store(h + rows[:, None] * D + cols, tl.where(is_off, tl.zeros_like(value), kept), mask=inside)
        total += tl.where(is_off | ~inside, 0.0, one)
    tl.store(l0 + rows * chunks + chunk, sum_columns(total, ROWS, COLUMNS), mask=rows < B)


@triton.jit
def jumprelu_backward_kernel(
    grad_h,  # (B, D), any strides, 0 included, or None
    grad_l0,  # (B,) fp32, fp64 for fp64, any stride, or None
    x,  # (B, D), any strides
    threshold,  # (D,) fp32, fp64 for fp64, contiguous
    x_gradient,  # (B, D) contiguous or None
    partials,  # (ceil(B/64), D) fp32, fp64 for fp64, or None: the threshold's gradients over 64 rows
    B,
    D,
    stride_h_row,
    stride_h_col,
    stride_l0,
    stride_x_row,
    stride_x_col,
    bandwidth: tl.float64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles = tl.cdiv(D, COLUMNS)
    row0 = (tile // tiles) * ROWS
    cols = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    rows = row0 + tl.arange(0, ROWS)
    inside = (rows < B)[:, None] & (cols < D)[None, :]
    rows_wide, cols_wide = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    value = widen(tl.load(x + rows_wide * stride_x_row + cols_wide * stride_x_col, mask=inside, other=0.0))
    limit = tl.load(threshold + cols, mask=cols < D, other=0.0)[None, :]
    upstream = tl.zeros_like(value)
    if grad_h is not None:
        of_h = grad_h + rows_wide * stride_h_row + cols_wide * stride_h_col
        upstream = widen(tl.load(of_h, mask=inside, other=0.0))
    if x_gradient is not None:
        to_x = tl.where(value <= limit, 0.0, upstream).to(x_gradient.dtype.element_ty)
        tl.store(x_gradient + rows_wide * D + cols[None, :], to_x, mask=inside)
    if partials is not None:
        slope = limit * upstream
        if grad_l0 is not None:
            slope += tl.load(grad_l0 + rows.to(tl.int64) * stride_l0, mask=rows < B, other=0.0)[:, None]
        width = tl.full((), bandwidth, value.dtype)
        is_near = tl.abs(value - limit) < width * 0.5
        summand = tl.where(limit == limit, tl.where(is_near, slope * (-1.0 / width), 0.0), limit)
        summand = tl.where(inside, summand, 0.0)
        store_column_sums(partials, summand, row0, cols, B, D, ROWS, COLUMNS)


# --- launchers --------------------------------------------------------------------------------------------


def jumprelu(x, threshold):
    """x (B, D) of any strides, threshold (D,) in the accumulator -> h (B, D), and l0 (B,), how many are active."""
    B, D = x.shape
    wide = accumulator(x.dtype)
    h = torch.empty((B, D), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return h, torch.zeros(B, dtype=wide, device=x.device)
    tiles = tiling(B, D, x.itemsize)
    unit = unit_of(x.itemsize, D, x.stride(0))
    with on_device(x):
        l0 = torch.empty((B, tiles.chunks), dtype=wide, device=x.device)
        jumprelu_kernel[(triton.cdiv(B, tiles.rows) * tiles.chunks,)](
            x,
            threshold.contiguous(),
            h,
            l0,
            tiles.chunks,
            B,
            D // unit,
            x.stride(0) // unit,
            x.stride(1),
            UNIT=unit,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            STEPS=tiles.steps,
            num_warps=tiles.warps,
            **COMPILE,
        )
        return h, row_sums(l0)


def jumprelu_backward(grad_h, grad_l0, x, threshold, bandwidth, needs):
    """(dx | None, dthreshold | None). One of grad_h (B, D) and grad_l0 (B,) may be None, which stands for zeros; needs:
    the sum of NEED_X and NEED_THRESHOLD."""
    B, D = x.shape
    need_x, need_threshold = bool(needs & NEED_X), bool(needs & NEED_THRESHOLD)
    to_x = torch.empty((B, D), dtype=x.dtype, device=x.device) if need_x else None
    if x.numel() == 0:
        return to_x, torch.zeros_like(threshold) if need_threshold else None
    columns = power_of_two(D, 16, 128 // x.itemsize)
    with on_device(x):
        partials = new_partials(B, D, x) if need_threshold else None
        jumprelu_backward_kernel[(triton.cdiv(B, SUM_ROWS.value) * triton.cdiv(D, columns),)](
            grad_h,
            grad_l0,
            x,
            threshold.contiguous(),
            to_x,
            partials,
            B,
            D,
            *((0, 0) if grad_h is None else grad_h.stride()),
            0 if grad_l0 is None else grad_l0.stride(0),
            *x.stride(),
            bandwidth,
            ROWS=SUM_ROWS.value,
            COLUMNS=columns,
            num_warps=4,
            **COMPILE,
        )
        return to_x, sum_partials(partials, partials.dtype) if need_threshold else None
