"""A dense layer, its activation and a sparsity penalty of its output.

The layer is linear_act.py's. The output's columns are summed in tiles of 64 rows, as bias gradients are, and one
program makes the penalty of the sums. In the backward the pointwise pass adds the penalty's gradient to the output's
before it multiplies by act': it needs no pass of its own.
"""

import torch
import triton
import triton.language as tl

from ..activation import NEED_BIAS, NEED_WEIGHT, NEED_X, STORES_DERIVATIVE
from ..penalty import EPS as PENALTY_EPS
from .activation import times_derivative, widen
from .linear_act import (
    COMPILE,
    SUM_ROWS,
    accumulator,
    constants,
    forward,
    linear_act_backward,
    new_partials,
    on_device,
    power_of_two,
    product,
    store_column_sums,
    sum_partials,
)
from .rows import sum_columns

__all__ = ["penalized_linear_act", "penalized_linear_act_backward"]

EPS = tl.constexpr(PENALTY_EPS)
VALUE_COLUMNS = 1024  # of penalty_kernel's lanes


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def activity_kernel(
    h,  # (M, N) contiguous
    partials,  # (ceil(M/64), N) fp32, fp64 for fp64: column sums over 64 rows
    M,
    N,
    MAGNITUDES: tl.constexpr,  # whether to sum |h|
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, COLUMNS)
    row0 = (tile // tiles_n) * ROWS
    cols = (tile % tiles_n) * COLUMNS + tl.arange(0, COLUMNS)
    rows = row0 + tl.arange(0, ROWS)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    value = widen(tl.load(h + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=inside, other=0.0))
    if MAGNITUDES:
        value = tl.abs(value)
    store_column_sums(partials, value, row0, cols, M, N, ROWS, COLUMNS)


@triton.jit
def penalty_kernel(
    sums,  # (N,) fp32, fp64 for fp64: of the columns of |h| for l1, of h for kl
    value,  # scalar in memory, of the same dtype
    M,
    N,
    rate: tl.float64,
    KL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.cast(M, value.dtype.element_ty)
    total = tl.zeros((1, COLUMNS), value.dtype.element_ty)
    for start in range(0, N, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        each = tl.load(sums + cols, mask=cols < N, other=0.0)
        if KL:
            target = tl.full((), rate, each.dtype)
            q = each / rows
            # A NaN goes through.
            q = tl.where(q < EPS, EPS, tl.where(q > 1.0 - EPS, 1.0 - EPS, q)).to(each.dtype)
            each = target * tl.log(target / q) + (1.0 - target) * tl.log((1.0 - target) / (1.0 - q))
            each = tl.where(cols < N, each, 0.0)
        total += each
    found = sum_columns(total, 1, COLUMNS)
    if not KL:
        found = found / rows
    tl.store(value + tl.arange(0, 1), found)


@triton.jit
def penalized_backward_kernel(
    grad,  # (M, N), any strides, 0 included
    grad_penalty,  # scalar in memory, fp32, fp64 for fp64
    saved,  # (M, N) contiguous, or None for identity
    h,  # (M, N) contiguous for l1 where `saved` is not the output, else None
    sums,  # (N,) for kl, else None: as penalty_kernel read them
    g,  # (M, N) contiguous or None: (grad + the penalty's) * act'
    partials,  # (ceil(M/64), N) fp32, fp64 for fp64, or None: column sums of g over 64 rows
    M,
    N,
    stride_gm,
    stride_gn,
    rate: tl.float64,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ALPHA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, COLUMNS)
    row0 = (tile // tiles_n) * ROWS
    cols = (tile % tiles_n) * COLUMNS + tl.arange(0, COLUMNS)
    rows = row0 + tl.arange(0, ROWS)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    rows_wide = rows.to(tl.int64)[:, None]
    upstream = grad + rows_wide * stride_gm + cols.to(tl.int64)[None, :] * stride_gn
    value = widen(tl.load(upstream, mask=inside, other=0.0))
    offsets = rows_wide * N + cols[None, :]
    kept = value
    if saved is not None:
        kept = widen(tl.load(saved + offsets, mask=inside, other=0.0))
    count = tl.cast(M, value.dtype)
    factor = tl.load(grad_penalty) / count
    if sums is not None:
        target = tl.full((), rate, value.dtype)
        q = tl.load(sums + cols, mask=cols < N, other=0.0) / count
        is_within = (q >= EPS) & (q <= 1.0 - EPS)
        q = tl.where(is_within, q, 0.5)
        slope = (1.0 - target) / (1.0 - q) - target / q
        value += (factor * tl.where(is_within, slope, 0.0))[None, :]
    else:
        output = kept
        if h is not None:
            output = widen(tl.load(h + offsets, mask=inside, other=0.0))
        # The product is 0 where the output is, and NaN where it is.
        value += tl.where(output > 0.0, factor, tl.where(output < 0.0, -factor, factor * output))
    if saved is not None:
        value = times_derivative(value, kept, ACTIVATION, SLOPE, ALPHA)
    result = value.to(grad.dtype.element_ty)
    if g is not None:
        tl.store(g + offsets, result, mask=inside)
    if partials is not None:
        summand = widen(result)
        summand = tl.where(inside, summand, tl.zeros_like(summand))
        store_column_sums(partials, summand, row0, cols, M, N, ROWS, COLUMNS)


# --- launches ---------------------------------------------------------------------------------------------


def columns_of(N, itemsize):
    """Of a tile: eight rows of threads, each of which loads 16 bytes of a row."""
    return power_of_two(N, 16, 128 // itemsize)


def column_sums(h, magnitudes):
    """Of h (M, N) or of its magnitudes, in the accumulator."""
    M, N = h.shape
    wide = accumulator(h.dtype)
    if h.numel() == 0:
        return torch.zeros(N, dtype=wide, device=h.device)
    partials = new_partials(M, N, h)
    columns = columns_of(N, h.itemsize)
    activity_kernel[(triton.cdiv(M, SUM_ROWS.value) * triton.cdiv(N, columns),)](
        h,
        partials,
        M,
        N,
        MAGNITUDES=magnitudes,
        ROWS=SUM_ROWS.value,
        COLUMNS=columns,
        num_warps=4,
        **COMPILE,
    )
    return sum_partials(partials, wide)


def penalized_gradient(grad, grad_penalty, saved, h, sums, activation, rate, need_g, need_bias):
    """(g, dbias), g = (grad + the penalty's gradient) * act'. grad (M, N)."""
    M, N = grad.shape
    if grad.numel() == 0:
        dbias = torch.zeros(N, dtype=grad.dtype, device=grad.device) if need_bias else None
        return torch.empty_like(grad), dbias
    g = torch.empty((M, N), dtype=grad.dtype, device=grad.device) if need_g else None
    partials = new_partials(M, N, grad) if need_bias else None
    if g is not None or partials is not None:
        if activation == "identity":
            saved = None
        elif activation not in STORES_DERIVATIVE:
            h = None  # that is saved
        columns = columns_of(N, grad.itemsize)
        penalized_backward_kernel[(triton.cdiv(M, SUM_ROWS.value) * triton.cdiv(N, columns),)](
            grad,
            grad_penalty,
            None if saved is None else saved.contiguous(),
            None if h is None else h.contiguous(),
            None if sums is None else sums.contiguous(),
            g,
            partials,
            M,
            N,
            grad.stride(0),
            grad.stride(1),
            rate,
            **constants(activation),
            ROWS=SUM_ROWS.value,
            COLUMNS=columns,
            num_warps=4,
            **COMPILE,
        )
    return g, sum_partials(partials, grad.dtype) if need_bias else None


# --- launchers --------------------------------------------------------------------------------------------


def penalized_linear_act(x, weight, bias, activation, penalty, rate, save):
    """h = act(x @ weight.T + bias), its penalty, and with `save` what the backward reads beside h: the sums of h's
    columns for "kl", else None; act' for STORES_DERIVATIVE, else None."""
    is_kl = penalty == "kl"
    with on_device(x):
        h, derivative = forward(x, weight, bias, activation, save)
        sums = column_sums(h, not is_kl)
        value = torch.empty((), dtype=sums.dtype, device=x.device)
        penalty_kernel[(1,)](
            sums, value, h.shape[0], h.shape[1], rate, KL=is_kl, COLUMNS=VALUE_COLUMNS, num_warps=4, **COMPILE
        )
    return h, value, sums if save and is_kl else None, derivative


def penalized_linear_act_backward(
    grad, grad_penalty, x, weight, saved, h, sums, activation, penalty, rate, needs
):
    """(dx | None, dweight | None, dbias | None). One of grad (M, N) and grad_penalty may be None, which stands for
    zeros; h is read for "l1", sums for "kl"; saved and needs as linear_act_backward takes them."""
    if grad_penalty is None:
        return linear_act_backward(grad, x, weight, saved, activation, needs)
    with on_device(x):
        if grad is None:
            grad = x.new_zeros(()).expand(x.shape[0], weight.shape[0])
        kept = (None, sums) if penalty == "kl" else (h, None)
        g, dbias = penalized_gradient(
            grad,
            grad_penalty,
            saved,
            *kept,
            activation,
            rate,
            bool(needs & (NEED_X | NEED_WEIGHT)),
            bool(needs & NEED_BIAS),
        )
        dx = product("dgrad", g, weight) if needs & NEED_X else None
        dweight = product("wgrad", g.t(), x) if needs & NEED_WEIGHT else None
    return dx, dweight, dbias
