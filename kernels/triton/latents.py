"""Sums over a sparse code: of the rows of a matrix that a row of the code names, the products of these rows with
another, and for each latent the sum over the entries that name it.

No two programs add to one sum, and terms are added in an order that the code alone decides: entries of a row in theirs,
entries of a latent in that of the code, for which their places are sorted. An index that is negative is padding. One
that is not less than the latents is no row's: what depends on it is NaN, and no latent's sum has it.
"""

import torch
import triton
import triton.language as tl

from .activation import widen
from .linear_act import COMPILE, power_of_two
from .rows import sum_columns

AT_ONCE = 4  # entries whose rows are asked for before the first is added
TOGETHER = tl.constexpr(256)  # entries that are added to one sum before that is added to the total
DOTS = 8  # entries of a program of dots_kernel
BYTES = 2048  # of a row, in a program: 16 for each of four warps' threads


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def weighted_sum_kernel(
    values,  # (N, K) contiguous
    indices,  # (N, K) int64 contiguous
    weight,  # (F, D), rows stride_weight apart
    bias,  # (D,) or None
    out,  # (N, D) contiguous
    K,
    D,
    F,
    stride_weight,
    stride_bias,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # 64-bit: any offset may exceed 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = cols < D
    wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((COLUMNS,), wide)
    if bias is not None:
        total += widen(tl.load(bias + cols.to(tl.int64) * stride_bias, mask=inside, other=0.0))
    for first in range(0, K, AT_ONCE):
        for offset in tl.static_range(AT_ONCE):
            entry = tl.cast(first + offset, tl.int32)
            is_entry = entry < K
            index = tl.load(indices + row * K + entry, mask=is_entry, other=-1)
            is_latent = (index >= 0) & (index < F)
            value = widen(tl.load(values + row * K + entry, mask=is_latent, other=0.0))
            value = tl.where(index >= F, float("nan"), value)
            named = tl.load(
                weight + index * stride_weight + cols, mask=cols < tl.where(is_latent, D, 0), other=0.0
            )
            total += value * widen(named)
    tl.store(out + row * D + cols, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dots_kernel(
    grad,  # (N, D), rows stride_grad apart
    indices,  # (N, K) int64 contiguous
    weight,  # (F, D), rows stride_weight apart
    out,  # (N, K) contiguous
    K,
    D,
    F,
    stride_grad,
    stride_weight,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    parts = tl.cdiv(K, ENTRIES)
    row = (tl.program_id(0) // parts).to(tl.int64)
    entries = tl.program_id(0) % parts * ENTRIES + tl.arange(0, ENTRIES)
    index = tl.load(indices + row * K + entries, mask=entries < K, other=-1)
    is_latent = (index >= 0) & (index < F)
    wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((ENTRIES, COLUMNS), wide)
    cols = tl.arange(0, COLUMNS)
    for start in range(0, D, COLUMNS):
        inside = start + cols < D
        of_row = widen(tl.load(grad + row * stride_grad + start + cols, mask=inside, other=0.0))
        named = tl.load(
            weight + index[:, None] * stride_weight + (start + cols)[None, :],
            mask=is_latent[:, None] & inside[None, :],
            other=0.0,
        )
        # Whatever the row holds, padding's product is 0.
        total += tl.where(is_latent[:, None], of_row[None, :] * widen(named), 0.0)
    dots = tl.where(index >= F, float("nan"), sum_columns(total, ENTRIES, COLUMNS))
    tl.store(out + row * K + entries, dots.to(out.dtype.element_ty), mask=entries < K)


@triton.jit
def latent_kernel(
    values,  # (N, K) contiguous
    places,  # (N K,) int64, of the entries in the order of their latents
    starts,  # (F + 1,) int64
    rows,  # (N, D), rows stride_rows apart
    out,  # (F, D) contiguous
    sums,  # (F,), of the values alone, or None
    K,
    D,
    stride_rows,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = cols < D
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((COLUMNS,), wide)
    total_value = tl.zeros((), wide)
    for first in range(begin, end, TOGETHER):
        part = tl.zeros((COLUMNS,), wide)
        part_value = tl.zeros((), wide)
        last = tl.minimum(first + TOGETHER, end)
        for at in range(first, last, AT_ONCE):
            for offset in tl.static_range(AT_ONCE):
                entry = tl.cast(at + offset, tl.int64)
                is_entry = entry < last
                place = tl.load(places + entry, mask=is_entry, other=0)
                value = widen(tl.load(values + place, mask=is_entry, other=0.0))
                row = tl.load(
                    rows + place // K * stride_rows + cols, mask=cols < tl.where(is_entry, D, 0), other=0.0
                )
                part += value * widen(row)
                part_value += value
        total += part
        total_value += part_value
    tl.store(out + latent * D + cols, total.to(out.dtype.element_ty), mask=inside)
    if sums is not None:
        tl.store(sums + latent, total_value.to(sums.dtype.element_ty), mask=tl.program_id(1) == 0)


# --- launches ---------------------------------------------------------------------------------------------


def with_unit_columns(matrix):
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def tiling(D, itemsize):
    """(columns of a tile, warps)."""
    columns = power_of_two(D, 16, BYTES // itemsize)
    return columns, max(1, columns * itemsize // 512)


def weighted_sum(values, indices, weight, bias):
    """values and indices (N, K), weight (F, D), bias (D,) or None -> (N, D)."""
    (N, K), (F, D) = values.shape, weight.shape
    out = torch.empty((N, D), dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    weight = with_unit_columns(weight)
    columns, warps = tiling(D, weight.itemsize)
    weighted_sum_kernel[(N, triton.cdiv(D, columns))](
        values.contiguous(),
        indices.contiguous(),
        weight,
        bias,
        out,
        K,
        D,
        F,
        weight.stride(0),
        1 if bias is None else bias.stride(0),
        AT_ONCE=AT_ONCE,
        COLUMNS=columns,
        num_warps=warps,
        **COMPILE,
    )
    return out


def dots(grad, indices, weight):
    """grad (N, D), indices (N, K), weight (F, D) -> (N, K)."""
    (N, K), (F, D) = indices.shape, weight.shape
    out = torch.empty((N, K), dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    grad, weight = with_unit_columns(grad), with_unit_columns(weight)
    columns = power_of_two(D, 16, 256)
    dots_kernel[(N * triton.cdiv(K, DOTS),)](
        grad,
        indices.contiguous(),
        weight,
        out,
        K,
        D,
        F,
        grad.stride(0),
        weight.stride(0),
        ENTRIES=DOTS,
        COLUMNS=columns,
        num_warps=4 if columns >= 128 else 1,
        **COMPILE,
    )
    return out


def latent_sums(values, indices, rows, F, need_sums):
    """values and indices (N, K), rows (N, D) -> for each latent Σ value row, (F, D), and Σ value, (F,), or None."""
    K, D = values.shape[1], rows.shape[1]
    out = torch.empty((F, D), dtype=rows.dtype, device=rows.device)
    sums = torch.empty(F, dtype=rows.dtype, device=rows.device) if need_sums else None
    if F == 0:
        return out, sums
    latents = indices.reshape(-1)
    # What is no latent's comes last.
    latents, places = torch.where(latents < 0, F, latents).sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(F + 1, device=latents.device))
    rows = with_unit_columns(rows)
    columns, warps = tiling(D, rows.itemsize)
    latent_kernel[(F, max(1, triton.cdiv(D, columns)))](
        values.contiguous(),
        places,
        starts,
        rows,
        out,
        sums,
        K,
        D,
        rows.stride(0),
        AT_ONCE=AT_ONCE,
        COLUMNS=columns,
        num_warps=warps,
        **COMPILE,
    )
    return out, sums
