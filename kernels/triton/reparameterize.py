"""A sample of normal distributions with diagonal covariance and its KL divergence to N(0, I), in one pass; kl_normal.py
launches the same kernels without noise.

A tile is made of quads, the four elements of one Philox block, so that a thread holds noise for the elements that lie
side by side in its loads. Where 4 does not divide D, rows begin inside a quad: their tiles begin up to three columns
earlier, and the quads at both ends of a row are made twice.
"""

import math

import torch
import triton
import triton.language as tl

from .activation import LN2, LOG2E_HIGH, LOG2E_LOW, widen
from .linear_act import COMPILE, accumulator, on_device
from .philox import normals
from .rows import row_sums, sum_columns, tiling, unit_of

__all__ = ["reparameterize", "reparameterize_backward"]


# --- device functions -------------------------------------------------------------------------------------


@triton.jit
def exp(x):
    """exp(x), infinite above 88.7 in float32; the rounding error of x*log2(e) is put back as in exp_nonpositive."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)  # 0, also for what overflows x*log2(e) - x*log2(e)
        x = tl.where(x > 89.0, 89.0, x)
        scaled = x * LOG2E_HIGH
        lost = tl.fma(x, tl.full(x.shape, LOG2E_HIGH, tl.float32), -scaled) + x * LOG2E_LOW
        y = tl.exp2(scaled) * (lost * LN2 + 1.0)
    return y


@triton.jit
def clamped(x, low, high):
    """x as its nearest value in [low, high]; NaN stays NaN."""
    low, high = tl.full(x.shape, low, x.dtype), tl.full(x.shape, high, x.dtype)
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_at(rows, start, B, D, SHIFT: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a tile that begins at column `start`, a multiple of 4, or with SHIFT where the quad begins that holds it: its
    columns (1 or ROWS, COLUMNS), which of its elements exist, and the first Philox block of each row (ROWS,)."""
    first = rows * D + start
    cols = start + tl.arange(0, COLUMNS)[None, :]
    if SHIFT:
        cols -= (first & 3)[:, None]
        inside = (rows < B)[:, None] & (cols < D) & (cols >= 0)
    else:
        inside = (rows < B)[:, None] & (cols < D)
    return cols, inside, first >> 2


@triton.jit
def noise_of(seed, block, QUADS: tl.constexpr, FP64: tl.constexpr):
    """N(0, 1) for the elements of QUADS blocks from each of `block` on: (ROWS, 4 * QUADS)."""
    e0, e1, e2, e3 = normals(seed, 0, block[:, None] + tl.arange(0, QUADS)[None, :], FP64)
    return tl.interleave(tl.interleave(e0, e2), tl.interleave(e1, e3))


@triton.jit
def sample_tile(
    mu,
    logvar,
    seed,
    z,
    rows,
    start,
    B,
    D,
    stride_mu_row,
    stride_mu_col,
    stride_logvar_row,
    stride_logvar_col,
    low,
    high,
    CLAMP: tl.constexpr,
    SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stores z of a tile, and returns the terms of twice its divergence. Arguments as for reparameterize_kernel."""
    cols, inside, block = tile_at(rows, start, B, D, SHIFT, COLUMNS)
    at_rows = rows[:, None]
    m = widen(tl.load(mu + at_rows * stride_mu_row + cols * stride_mu_col, mask=inside, other=0.0))
    v = tl.load(logvar + at_rows * stride_logvar_row + cols * stride_logvar_col, mask=inside, other=0.0)
    v = widen(v)
    if CLAMP:
        v = clamped(v, low, high)
    if z is None:
        variance = exp(v)
    else:
        std = exp(0.5 * v)
        variance = std * std
        noise = noise_of(seed, block, COLUMNS // 4, v.dtype == tl.float64)
        tl.store(z + at_rows * D + cols, (m + std * noise).to(z.dtype.element_ty), mask=inside)
    return tl.where(inside, m * m + (variance - 1.0 - v), 0.0)


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def reparameterize_kernel(
    mu,  # (B, D), any strides
    logvar,  # (B, D), any strides
    seed,  # int64 scalar in memory, or None: no sample
    z,  # (B, D) contiguous, or None
    kl,  # (B, chunks) fp32, fp64 for fp64: sums over a chunk of each row
    chunks,  # of a row
    B,
    D,  # in units, as the strides of rows
    stride_mu_row,
    stride_mu_col,
    stride_logvar_row,
    stride_logvar_col,
    low: tl.float64,
    high: tl.float64,
    CLAMP: tl.constexpr,  # whether to read low and high
    UNIT: tl.constexpr,
    SHIFT: tl.constexpr,  # whether rows begin inside a quad
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,  # tiles of a chunk
):
    # 64-bit: any offset may exceed 2^31 elements.
    D = tl.cast(D, tl.int64) * UNIT
    stride_mu_row = tl.cast(stride_mu_row, tl.int64) * UNIT
    stride_logvar_row = tl.cast(stride_logvar_row, tl.int64) * UNIT
    tile = tl.program_id(0)
    chunk = tile % chunks
    rows = (tile // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = chunk.to(tl.int64) * (STEPS * COLUMNS)
    if seed is not None:
        seed = tl.load(seed)
    if STEPS == 1:
        total = sample_tile(
            mu, logvar, seed, z, rows, first, B, D,
            stride_mu_row, stride_mu_col, stride_logvar_row, stride_logvar_col,
            low, high, CLAMP, SHIFT, COLUMNS,
        )  # fmt: skip
    else:
        total = tl.zeros((ROWS, COLUMNS), kl.dtype.element_ty)
        for start in range(first, tl.minimum(first + STEPS * COLUMNS, D + 3 if SHIFT else D), COLUMNS):
            total += sample_tile(
                mu, logvar, seed, z, rows, start, B, D,
                stride_mu_row, stride_mu_col, stride_logvar_row, stride_logvar_col,
                low, high, CLAMP, SHIFT, COLUMNS,
            )  # fmt: skip
    tl.store(kl + rows * chunks + chunk, 0.5 * sum_columns(total, ROWS, COLUMNS), mask=rows < B)


@triton.jit
def reparameterize_backward_kernel(
    grad_z,  # (B, D), any strides, or None
    grad_kl,  # (B,), any stride, or None
    grad_mu,  # (B, D) or None: what else flows to mu,
    grad_logvar,  # and to logvar before it is clamped; the strides of both are the same
    mu,  # (B, D), any strides
    logvar,  # (B, D), any strides
    seed,  # int64 scalar in memory; None without grad_z
    mu_gradient,  # (B, D), rows of stride_out
    logvar_gradient,  # the same
    chunks,  # of a row
    B,
    D,  # in units, as the strides of rows
    stride_z_row,
    stride_z_col,
    stride_kl,
    stride_grad_row,
    stride_grad_col,
    stride_mu_row,
    stride_mu_col,
    stride_logvar_row,
    stride_logvar_col,
    stride_out,
    low: tl.float64,
    high: tl.float64,
    CLAMP: tl.constexpr,
    UNIT: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    D = tl.cast(D, tl.int64) * UNIT
    tile = tl.program_id(0)
    rows = (tile // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = (tile % chunks).to(tl.int64) * COLUMNS
    cols, inside, block = tile_at(rows, start, B, D, SHIFT, COLUMNS)
    at_rows = rows[:, None] * UNIT
    v = tl.load(logvar + at_rows * stride_logvar_row + cols * stride_logvar_col, mask=inside, other=0.0)
    v = widen(v)
    if CLAMP:
        raw = v
        v = clamped(v, low, high)
    if grad_z is not None:
        std = exp(0.5 * v)
        variance = std * std
        to_z = widen(tl.load(grad_z + at_rows * stride_z_row + cols * stride_z_col, mask=inside, other=0.0))
        noise = noise_of(tl.load(seed), block, COLUMNS // 4, v.dtype == tl.float64)
        to_mu, to_logvar = to_z, to_z * (std * noise)
    else:
        variance = exp(v)
        to_mu, to_logvar = tl.zeros_like(v), tl.zeros_like(v)
    if grad_kl is not None:
        m = widen(tl.load(mu + at_rows * stride_mu_row + cols * stride_mu_col, mask=inside, other=0.0))
        to_kl = tl.load(grad_kl + rows * stride_kl, mask=rows < B, other=0.0).to(v.dtype)[:, None]
        to_mu += to_kl * m
        to_logvar += to_kl * (variance - 1.0)
    to_logvar *= 0.5
    if CLAMP:
        to_logvar = tl.where((raw < v) | (raw > v), 0.0, to_logvar)
    if grad_mu is not None:
        more = at_rows * stride_grad_row + cols * stride_grad_col
        to_mu += widen(tl.load(grad_mu + more, mask=inside, other=0.0))
        to_logvar += widen(tl.load(grad_logvar + more, mask=inside, other=0.0))
    out = at_rows * stride_out + cols
    tl.store(mu_gradient + out, to_mu.to(mu_gradient.dtype.element_ty), mask=inside)
    tl.store(logvar_gradient + out, to_logvar.to(logvar_gradient.dtype.element_ty), mask=inside)


# --- launches ---------------------------------------------------------------------------------------------


def limits(low, high):
    return {"low": low, "high": high, "CLAMP": low > -math.inf or high < math.inf}


def forward(mu, logvar, seed, low, high):
    """(z | None, kl): without a seed no sample."""
    B, D = mu.shape
    wide = accumulator(mu.dtype)
    z = None if seed is None else torch.empty((B, D), dtype=mu.dtype, device=mu.device)
    if mu.numel() == 0:
        return z, torch.zeros(B, dtype=wide, device=mu.device)
    shift = seed is not None and D % 4 != 0
    tiles = tiling(B, D + 3 * shift, mu.itemsize)
    unit = unit_of(mu.itemsize, D, mu.stride(0), logvar.stride(0))
    kl = torch.empty((B, tiles.chunks), dtype=wide, device=mu.device)
    reparameterize_kernel[(triton.cdiv(B, tiles.rows) * tiles.chunks,)](
        mu,
        logvar,
        seed,
        z,
        kl,
        tiles.chunks,
        B,
        D // unit,
        mu.stride(0) // unit,
        mu.stride(1),
        logvar.stride(0) // unit,
        logvar.stride(1),
        **limits(low, high),
        UNIT=unit,
        SHIFT=shift,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        STEPS=tiles.steps,
        num_warps=tiles.warps,
        **COMPILE,
    )
    return z, row_sums(kl)


def backward(grad_z, grad_kl, grad_moments, mu, logvar, seed, low, high, out):
    """Fills `out` (2, B, D), whose last stride is 1, with the gradients of mu and logvar. grad_moments (2, B, D), of
    any strides, or None is what else flows to them."""
    B, D = mu.shape
    if mu.numel() == 0:
        return
    seed = None if grad_z is None else seed
    shift = seed is not None and D % 4 != 0
    tiles = tiling(B, D + 3 * shift, mu.itemsize, longest=1)
    strides_z = (0, 0) if grad_z is None else grad_z.stride()
    strides_more = (0, 0) if grad_moments is None else grad_moments.stride()[1:]
    unit = unit_of(
        mu.itemsize, D, strides_z[0], strides_more[0], mu.stride(0), logvar.stride(0), out.stride(1)
    )
    reparameterize_backward_kernel[(triton.cdiv(B, tiles.rows) * tiles.chunks,)](
        grad_z,
        grad_kl,
        None if grad_moments is None else grad_moments[0],
        None if grad_moments is None else grad_moments[1],
        mu,
        logvar,
        seed,
        out[0],
        out[1],
        tiles.chunks,
        B,
        D // unit,
        strides_z[0] // unit,
        strides_z[1],
        0 if grad_kl is None else grad_kl.stride(0),
        strides_more[0] // unit,
        strides_more[1],
        mu.stride(0) // unit,
        mu.stride(1),
        logvar.stride(0) // unit,
        logvar.stride(1),
        out.stride(1) // unit,
        **limits(low, high),
        UNIT=unit,
        SHIFT=shift,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
        **COMPILE,
    )


# --- launchers --------------------------------------------------------------------------------------------


def reparameterize(mu, logvar, seed, low, high):
    """mu and logvar (B, D) of any strides, seed an int64 scalar -> z (B, D) and the divergence of each row (B,)."""
    with on_device(mu):
        return forward(mu, logvar, seed, low, high)


def reparameterize_backward(grad_z, grad_kl, mu, logvar, seed, low, high):
    """The gradients of mu and logvar. One of grad_z (B, D) and grad_kl (B,), of any strides, may be None."""
    with on_device(mu):
        gradients = torch.empty((2, *mu.shape), dtype=mu.dtype, device=mu.device)
        backward(grad_z, grad_kl, None, mu, logvar, seed, low, high, gradients)
    return gradients[0], gradients[1]
