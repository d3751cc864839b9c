"""The KL divergence of discrete distributions, the rows of two matrices, and its backward: a pass over both each."""

import torch
import triton
import triton.language as tl

from .activation import widen
from .linear_act import COMPILE, accumulator, on_device
from .rows import row_sums, sum_columns, tiling, unit_of

__all__ = ["kl_discrete", "kl_discrete_backward"]


# --- device functions -------------------------------------------------------------------------------------


@triton.jit
def load_pair(
    p, q, rows, cols, inside, stride_p_row, stride_p_col, stride_q_row, stride_q_col, UNIT: tl.constexpr
):  # fmt: skip
    """p and q of a tile, both 1 where p is 0 and outside, and where that is: neither is to reach the others."""
    at_rows = rows[:, None] * UNIT
    left = widen(tl.load(p + at_rows * stride_p_row + cols * stride_p_col, mask=inside, other=0.0))
    right = widen(tl.load(q + at_rows * stride_q_row + cols * stride_q_col, mask=inside, other=1.0))
    is_out = left == 0.0
    return tl.where(is_out, 1.0, left), tl.where(is_out, 1.0, right), is_out


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def kl_discrete_kernel(
    p,  # (B, C), any strides
    q,  # (B, C), any strides
    kl,  # (B, chunks) fp32, fp64 for fp64: sums over a chunk of each row
    chunks,  # of a row
    B,
    C,  # in units, as the strides of rows
    stride_p_row,
    stride_p_col,
    stride_q_row,
    stride_q_col,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,  # tiles of a chunk
):
    # 64-bit: any offset may exceed 2^31 elements.
    C = tl.cast(C, tl.int64) * UNIT
    tile = tl.program_id(0)
    chunk = tile % chunks
    rows = (tile // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = chunk.to(tl.int64) * (STEPS * COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), kl.dtype.element_ty)
    for start in range(first, tl.minimum(first + STEPS * COLUMNS, C), COLUMNS):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        inside = (rows < B)[:, None] & (cols < C)
        left, right, _ = load_pair(
            p, q, rows, cols, inside, stride_p_row, stride_p_col, stride_q_row, stride_q_col, UNIT
        )
        total += left * (tl.log(left) - tl.log(right))
    tl.store(kl + rows * chunks + chunk, sum_columns(total, ROWS, COLUMNS), mask=rows < B)


@triton.jit
def kl_discrete_backward_kernel(
    grad,  # (B,), any stride
    p,  # (B, C), any strides
    q,  # (B, C), any strides
    p_gradient,  # (B, C) contiguous
    q_gradient,  # (B, C) contiguous
    chunks,  # of a row
    B,
    C,  # in units, as the strides of rows
    stride_grad,
    stride_p_row,
    stride_p_col,
    stride_q_row,
    stride_q_col,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    C = tl.cast(C, tl.int64) * UNIT
    tile = tl.program_id(0)
    rows = (tile // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tile % chunks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < B)[:, None] & (cols < C)
    left, right, is_out = load_pair(
        p, q, rows, cols, inside, stride_p_row, stride_p_col, stride_q_row, stride_q_col, UNIT
    )
    upstream = tl.load(grad + rows * stride_grad, mask=rows < B, other=0.0).to(left.dtype)[:, None]
    to_p = tl.where(is_out, 0.0, upstream * (tl.log(left) - tl.log(right) + 1.0))
    to_q = tl.where(is_out, 0.0, -upstream * (left / right))
    out = rows[:, None] * C + cols
    tl.store(p_gradient + out, to_p.to(p_gradient.dtype.element_ty), mask=inside)
    tl.store(q_gradient + out, to_q.to(q_gradient.dtype.element_ty), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------


def kl_discrete(p, q):
    """p and q (B, C) of any strides -> the divergence of each row (B,)."""
    B, C = p.shape
    wide = accumulator(p.dtype)
    if p.numel() == 0:
        return torch.zeros(B, dtype=wide, device=p.device)
    tiles = tiling(B, C, p.itemsize)
    unit = unit_of(p.itemsize, C, p.stride(0), q.stride(0))
    with on_device(p):
        kl = torch.empty((B, tiles.chunks), dtype=wide, device=p.device)
        kl_discrete_kernel[(triton.cdiv(B, tiles.rows) * tiles.chunks,)](
            p,
            q,
            kl,
            tiles.chunks,
            B,
            C // unit,
            p.stride(0) // unit,
            p.stride(1),
            q.stride(0) // unit,
            q.stride(1),
            UNIT=unit,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            STEPS=tiles.steps,
            num_warps=tiles.warps,
            **COMPILE,
        )
        return row_sums(kl)


def kl_discrete_backward(grad, p, q):
    """The gradients of p and q for grad (B,) of any stride."""
    B, C = p.shape
    to_p, to_q = (torch.empty((B, C), dtype=p.dtype, device=p.device) for _ in range(2))
    if p.numel() == 0:
        return to_p, to_q
    tiles = tiling(B, C, p.itemsize, longest=1)
    unit = unit_of(p.itemsize, C, p.stride(0), q.stride(0))
    with on_device(p):
        kl_discrete_backward_kernel[(triton.cdiv(B, tiles.rows) * tiles.chunks,)](
            grad,
            p,
            q,
            to_p,
            to_q,
            tiles.chunks,
            B,
            C // unit,
            grad.stride(0),
            p.stride(0) // unit,
            p.stride(1),
            q.stride(0) // unit,
            q.stride(1),
            UNIT=unit,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            num_warps=tiles.warps,
            **COMPILE,
        )
    return to_p, to_q
