"""A dense layer and its activation: act(x @ weight.T + bias), and its backward.

All three products of a layer are one kernel, `gemm_kernel`: out (M, N) = epilogue(a (M, K) @ b (K, N)) with
operands of any strides.

  forward          a = x    b = weight.T   epilogue: bias, act, and act' where the backward needs it stored
  data gradient    a = g    b = weight     epilogue: act' and bias gradient of the layer below (mlp.py)
  weight gradient  a = g.T  b = x          K, the batch, split over programs; the parts summed in order

Beside the fused GEMM there is always the unfused candidate, cuBLAS and one pointwise kernel; tuning.py
chooses. float64 is always unfused.

Everything is bitwise repeatable and independent of tiles: one order of K per dtype, and column sums (bias
gradients) as a fixed tree over 64 rows, then over the blocks of 64 in order.
"""

import contextlib

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..activation import ACTIVATION_CODE, NEED_BIAS, NEED_WEIGHT, NEED_X, STORES_DERIVATIVE, specified
from . import tuning
from .activation import activate, activate_with_derivative, times_derivative, widen

SUM_ROWS = tl.constexpr(64)  # rows of one partial column sum
SUM_FAN_IN = tl.constexpr(1024)  # partial sums that one program of column_sum_kernel adds up
SUM_STEP = tl.constexpr(64)


# --- device functions -------------------------------------------------------------------------------------


@triton.jit
def sum_64_rows(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) -> (ROWS/64, COLUMNS). A tree of two-term sums: a + b = b + a bitwise, so the result
    does not depend on how the compiler lays the block out over threads, which a 64-term tl.sum would. In the
    layout of coalesced loads and stores, rows that differ in bits 4 and 5 sit in one thread's registers:
    summing these first quarters the data before any of it has to move."""
    x = tl.sum(tl.reshape(x, (ROWS // 64, 2, 32, COLUMNS)), axis=1)
    x = tl.sum(tl.reshape(x, (ROWS // 64, 2, 16, COLUMNS)), axis=1)
    x = tl.sum(tl.reshape(x, (ROWS // 8, 2, COLUMNS)), axis=1)
    x = tl.sum(tl.reshape(x, (ROWS // 16, 2, COLUMNS)), axis=1)
    x = tl.sum(tl.reshape(x, (ROWS // 32, 2, COLUMNS)), axis=1)
    return tl.sum(tl.reshape(x, (ROWS // 64, 2, COLUMNS)), axis=1)


@triton.jit
def store_column_sums(partials, g, row0, cols, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partials: (ceil(M/64), N) fp32 or fp64. g: rows row0 .. row0+ROWS of (M, N), zero outside."""
    sums = sum_64_rows(g, ROWS, COLUMNS)
    blocks = row0 // SUM_ROWS + tl.arange(0, ROWS // SUM_ROWS)
    mask = (blocks * SUM_ROWS < M)[:, None] & (cols < N)[None, :]
    tl.store(partials + blocks.to(tl.int64)[:, None] * N + cols[None, :], sums, mask=mask)


@triton.jit
def epilogue(
    acc,  # (ROWS, COLUMNS) fp32 at (row0, col0) of the product; the tensors are gemm_kernel's
    bias,
    saved,
    out,
    derivative,
    partials,
    row0,
    col0,
    M,
    N,
    stride_bias,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ALPHA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = row0 + tl.arange(0, ROWS)
    cols = col0 + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if bias is not None:
        bias_row = tl.load(bias + cols.to(tl.int64) * stride_bias, mask=cols < N, other=0.0)
        acc += bias_row.to(tl.float32)[None, :]
    if saved is not None:
        kept = tl.load(saved + offsets, mask=inside, other=0.0).to(tl.float32)
        result = times_derivative(acc, kept, ACTIVATION, SLOPE, ALPHA).to(out.dtype.element_ty)
    elif derivative is not None:
        y, slope = activate_with_derivative(acc, ACTIVATION)
        tl.store(derivative + offsets, slope.to(derivative.dtype.element_ty), mask=inside)
        result = y.to(out.dtype.element_ty)
    else:
        result = activate(acc, ACTIVATION, SLOPE, ALPHA).to(out.dtype.element_ty)
    tl.store(out + offsets, result, mask=inside)
    if partials is not None:
        # What is summed is what was stored: rounded to the dtype, as an unfused sum would read it.
        g = tl.where(inside, result.to(tl.float32), 0.0)
        store_column_sums(partials, g, row0, cols, M, N, ROWS, COLUMNS)


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def gemm_kernel(
    a,  # (M, K), any strides; with DESCRIPTORS a descriptor of it, or of its transpose if TRANS_A
    b,  # (K, N), likewise; descriptor of (N, K) if TRANS_B
    bias,  # (N,) or None
    saved,  # (M, N) contiguous or None: what times_derivative reads
    out,  # (M, N) contiguous; (splits, M, N) fp32 if splits > 1
    derivative,  # (M, N) contiguous or None
    partials,  # (ceil(M/64), N) fp32 or None: column sums of out
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_bias,
    k_per_split,  # a multiple of BLOCK_K; program axis 1 is the split
    ACTIVATION: tl.constexpr,  # of the forward, or of `saved`
    SLOPE: tl.constexpr,
    ALPHA: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Tiles in groups of GROUP_M rows, column after column within a group: programs that run together share
    # their rows of a and columns of b in L2.
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile - group * (GROUP_M * tiles_n)
    row0 = (first + within % height) * BLOCK_M
    col0 = (within // height) * BLOCK_N

    split = tl.program_id(1)
    k_first = split * k_per_split
    k_end = tl.minimum(k_first + k_per_split, K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for k in range(k_first, k_end, BLOCK_K):
            a_tile = a.load([k, row0]).T if TRANS_A else a.load([row0, k])
            b_tile = b.load([col0, k]).T if TRANS_B else b.load([k, col0])
            acc = tl.dot(a_tile, b_tile, acc, input_precision=INPUT_PRECISION)
    else:
        a_rows = row0 + tl.arange(0, BLOCK_M)
        b_cols = col0 + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        # 64-bit: any of the strided offsets may exceed 2^31 elements.
        k_first_wide = k_first.to(tl.int64)
        a_offsets = a_rows.to(tl.int64)[:, None] * stride_am + ks.to(tl.int64)[None, :] * stride_ak
        b_offsets = ks.to(tl.int64)[:, None] * stride_bk + b_cols.to(tl.int64)[None, :] * stride_bn
        a_pointers = a + k_first_wide * stride_ak + a_offsets
        b_pointers = b + k_first_wide * stride_bk + b_offsets
        a_step = tl.full((), BLOCK_K, tl.int64) * stride_ak
        b_step = tl.full((), BLOCK_K, tl.int64) * stride_bk
        a_inside = (a_rows < M)[:, None]
        b_inside = (b_cols < N)[None, :]
        for k in range(k_first, k_end, BLOCK_K):
            a_tile = tl.load(a_pointers, mask=a_inside & (ks < k_end - k)[None, :], other=0.0)
            b_tile = tl.load(b_pointers, mask=b_inside & (ks < k_end - k)[:, None], other=0.0)
            acc = tl.dot(a_tile, b_tile, acc, input_precision=INPUT_PRECISION)
            a_pointers += a_step
            b_pointers += b_step

    out += split.to(tl.int64) * M * N
    if BLOCK_M * BLOCK_N > 128 * 128:
        # In halves: with 128 sums a thread, an epilogue over all of them at once would spill.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        epilogue(
            left, bias, saved, out, derivative, partials, row0, col0, M, N, stride_bias,
            ACTIVATION, SLOPE, ALPHA, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        epilogue(
            right, bias, saved, out, derivative, partials, row0, col0 + BLOCK_N // 2, M, N, stride_bias,
            ACTIVATION, SLOPE, ALPHA, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        epilogue(
            acc, bias, saved, out, derivative, partials, row0, col0, M, N, stride_bias,
            ACTIVATION, SLOPE, ALPHA, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def activation_kernel(
    x,  # (n,) contiguous: pre-activations in, outputs out
    derivative,  # (n,) contiguous or None
    n,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        # No mask: a mask at an n that 16 does not divide would forbid 16-byte accesses.
        value = widen(tl.load(x + offsets))
        if derivative is None:
            y = activate(value, ACTIVATION, SLOPE, ALPHA)
        else:
            y, slope = activate_with_derivative(value, ACTIVATION)
            tl.store(derivative + offsets, slope.to(derivative.dtype.element_ty))
        tl.store(x + offsets, y.to(x.dtype.element_ty))
    else:
        mask = offsets < n
        value = widen(tl.load(x + offsets, mask=mask, other=0.0))
        if derivative is None:
            y = activate(value, ACTIVATION, SLOPE, ALPHA)
        else:
            y, slope = activate_with_derivative(value, ACTIVATION)
            tl.store(derivative + offsets, slope.to(derivative.dtype.element_ty), mask=mask)
        tl.store(x + offsets, y.to(x.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward_kernel(
    grad,  # (M, N), any strides, 0 included
    saved,  # (M, N) contiguous, or None for identity
    g,  # (M, N) contiguous or None: grad * act'. May be `grad` itself.
    partials,  # (ceil(M/64), N) fp32, fp64 for fp64, or None: column sums of g over 64 rows
    M,
    N,
    stride_gm,
    stride_gn,
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
    if saved is not None:
        kept = widen(tl.load(saved + offsets, mask=inside, other=0.0))
        value = times_derivative(value, kept, ACTIVATION, SLOPE, ALPHA)
    result = value.to(grad.dtype.element_ty)
    if g is not None:
        tl.store(g + offsets, result, mask=inside)
    if partials is not None:
        summand = widen(result)
        summand = tl.where(inside, summand, tl.zeros_like(summand))
        store_column_sums(partials, summand, row0, cols, M, N, ROWS, COLUMNS)


@triton.jit
def column_sum_kernel(
    partials,  # (R, N) fp32 or fp64, contiguous
    out,  # (ceil(R/1024), N) contiguous
    R,
    N,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, COLUMNS)
    block = tile // tiles_n
    cols = (tile % tiles_n) * COLUMNS + tl.arange(0, COLUMNS)
    first = block * SUM_FAN_IN
    rows = tl.arange(0, SUM_STEP)
    acc = tl.zeros((SUM_STEP, COLUMNS), partials.dtype.element_ty)
    for start in range(first, tl.minimum(first + SUM_FAN_IN, R), SUM_STEP):
        at = start + rows
        mask = (at < R)[:, None] & (cols < N)[None, :]
        acc += tl.load(partials + at.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    total = sum_64_rows(acc, SUM_STEP, COLUMNS)  # (1, COLUMNS)
    target = out + block.to(tl.int64) * N + cols[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(cols < N)[None, :])


@triton.jit
def split_sum_kernel(
    partials,  # (splits, n) fp32 contiguous
    out,  # (n,) contiguous
    splits,
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    acc = tl.zeros((BLOCK,), tl.float32)
    pointers = partials + offsets
    for _ in range(splits):
        acc += tl.load(pointers, mask=mask, other=0.0)
        pointers += n
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


# Triton's default for the contraction of a*b + c changes between versions; results must not.
COMPILE = {"enable_fp_fusion": True}

INTERPRETED = not isinstance(gemm_kernel, triton.JITFunction)


# --- launches ---------------------------------------------------------------------------------------------


def on_device(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def input_precision(dtype):
    """tl.dot's, as torch's own matmuls would choose on this process's settings."""
    if dtype != torch.float32:
        return "ieee"  # without effect on 16-bit operands
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def constants(activation):
    """ACTIVATION, SLOPE, ALPHA of a specification; what the activation does not read stays 0, which saves
    compiles."""
    name, parameter = specified(activation)
    return {
        "ACTIVATION": ACTIVATION_CODE[name],
        "SLOPE": parameter if name == "leaky_relu" else 0.0,
        "ALPHA": parameter if name == "elu" else 0.0,
    }


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_two(n, low, high):
    return min(high, max(low, triton.next_power_of_2(n)))


def rows_aligned(t):
    """(contiguous along dimension 1, every row starts at a multiple of 16 bytes)."""
    return t.stride(1) == 1 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0


def aligned(t):
    """Whether 16-byte loads fit t or its transpose."""
    return rows_aligned(t) or rows_aligned(t.t())


def describable(t):
    """Whether a tensor descriptor can point at t (a TMA's limits: 16-byte rows, 32-bit coordinates)."""
    return rows_aligned(t) and t.stride(0) >= t.shape[1] > 0 and 0 < t.shape[0] < 2**31 and t.shape[1] < 2**31


def plan(operation, a, b):
    (M, K), N = a.shape, b.shape[1]
    precision = input_precision(a.dtype)
    return tuning.plan(operation, M, N, K, a.dtype, precision, a.device, aligned(a) and aligned(b))


def split_count(M, N, K, itemsize):
    """(splits of a product's K, K of a split), functions of the shape only: as many as give 256 programs of
    128x128, two waves of a large GPU's 132 SMs, while each split keeps 2048 of K; beyond that the fp32
    partial products cost more than idle SMs."""
    programs = triton.cdiv(M, 128) * triton.cdiv(N, 128)
    splits = max(1, min(256 // programs, K // 2048))
    block = tuning.BLOCK_K[itemsize]
    step = max(1, triton.cdiv(triton.cdiv(K, splits), block)) * block
    return max(1, triton.cdiv(K, step)), step


def gemm(
    a,  # (M, K)
    b,  # (K, N)
    out,  # (M, N) contiguous
    chosen,  # tuning.Plan
    *,
    bias=None,
    saved=None,
    derivative=None,
    partials=None,
    split=False,
    activation="identity",
):
    """Launches gemm_kernel. `split` lets K be split; for products without an epilogue only."""
    (M, K), N = a.shape, b.shape[1]
    tile, block_k = chosen.tile, tuning.BLOCK_K[a.itemsize]
    splits, k_per_split = split_count(M, N, K, a.itemsize) if split else (1, max(K, 1))
    target = out if splits == 1 else torch.empty((splits, M, N), dtype=torch.float32, device=out.device)
    trans_a, trans_b = not rows_aligned(a), not rows_aligned(b)
    base_a, base_b = (a.t() if trans_a else a), (b.t() if trans_b else b)
    described = chosen.descriptors and describable(base_a) and describable(base_b)
    first, second = a, b
    if described:
        block_a, block_b = [tile.block_m, block_k], [block_k, tile.block_n]
        first = TensorDescriptor.from_tensor(base_a, block_a[::-1] if trans_a else block_a)
        second = TensorDescriptor.from_tensor(base_b, block_b[::-1] if trans_b else block_b)
    gemm_kernel[(triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n), splits)](
        first,
        second,
        bias,
        saved,
        target,
        derivative,
        partials,
        M,
        N,
        K,
        a.stride(0),
        a.stride(1),
        b.stride(0),
        b.stride(1),
        1 if bias is None else bias.stride(0),
        k_per_split,
        **constants(activation),
        DESCRIPTORS=described,
        TRANS_A=trans_a if described else False,
        TRANS_B=trans_b if described else False,
        INPUT_PRECISION=input_precision(a.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        GROUP_M=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **COMPILE,
    )
    if splits > 1:
        block = 1024
        split_sum_kernel[(triton.cdiv(out.numel(), block),)](
            target, out, splits, out.numel(), BLOCK=block, num_warps=4, **COMPILE
        )


def product(operation, a, b):
    """a (M, K) @ b (K, N), contiguous."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    chosen = plan(operation, a, b)
    if chosen.fused:
        gemm(a, b, out, chosen, split=operation == "wgrad")
        return out
    return torch.mm(a, b, out=out)


def new_partials(M, N, like):
    return torch.empty((triton.cdiv(M, SUM_ROWS.value), N), dtype=accumulator(like.dtype), device=like.device)


def sum_partials(partials, dtype):
    """(R, N) -> (N,) in `dtype`, 1024 rows a program and pass."""
    rows, N = partials.shape
    columns = power_of_two(N, 16, 64)
    while rows > 1:
        blocks = triton.cdiv(rows, SUM_FAN_IN.value)
        out = torch.empty((blocks, N), dtype=dtype if blocks == 1 else partials.dtype, device=partials.device)
        column_sum_kernel[(blocks * triton.cdiv(N, columns),)](
            partials, out, rows, N, COLUMNS=columns, num_warps=4, **COMPILE
        )
        partials, rows = out, blocks
    return partials[0].to(dtype)


def apply_activation(x, derivative, activation):
    """In place over contiguous x: pre-activations to outputs, and act' into `derivative` unless None."""
    block = 4096 // x.itemsize  # 128 threads, two 16-byte loads each
    activation_kernel[(triton.cdiv(x.numel(), block),)](
        x,
        derivative,
        x.numel(),
        **constants(activation),
        BLOCK=block,
        num_warps=4,
        **COMPILE,
    )


def apply_derivative(grad, saved, g, partials, activation):
    """g = grad * act' (g None: not stored), and g's column sums over 64 rows into `partials` unless None."""
    M, N = grad.shape
    rows, columns = SUM_ROWS.value, power_of_two(N, 16, 128 // grad.itemsize)
    activation_backward_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, columns),)](
        grad,
        saved,
        g,
        partials,
        M,
        N,
        grad.stride(0),
        grad.stride(1),
        **constants(activation),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        **COMPILE,
    )


def forward(x, weight, bias, activation, save_derivative):
    M, N = x.shape[0], weight.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    derivative = torch.empty_like(out) if save_derivative and activation in STORES_DERIVATIVE else None
    if out.numel() == 0:
        return out, derivative
    a, b = x, weight.t()
    chosen = plan("linear_act" if derivative is None else "linear_act_derivative", a, b)
    if chosen.fused:
        gemm(
            a,
            b,
            out,
            chosen,
            bias=bias,
            derivative=derivative,
            activation=activation,
        )
        return out, derivative
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)
    if activation != "identity":
        apply_activation(out, derivative, activation)
    return out, derivative


def outermost_gradient(grad, saved, activation, need_g, need_bias):
    """(g, dbias) of the layer that `grad` arrives at: g = grad * act'."""
    M, N = grad.shape
    if grad.numel() == 0:
        dbias = torch.zeros(N, dtype=grad.dtype, device=grad.device) if need_bias else None
        return torch.empty_like(grad), dbias
    pointwise = activation != "identity"
    g = torch.empty((M, N), dtype=grad.dtype, device=grad.device) if pointwise and need_g else None
    partials = new_partials(M, N, grad) if need_bias else None
    if g is not None or partials is not None:
        saved = saved.contiguous() if pointwise else None
        apply_derivative(grad, saved, g, partials, activation)
    dbias = sum_partials(partials, grad.dtype) if need_bias else None
    return (g if pointwise else grad), dbias


# --- launchers --------------------------------------------------------------------------------------------


def linear_act(x, weight, bias, activation, save_derivative):
    """act(x @ weight.T + bias) -> (out, derivative | None). x (M, K), weight (N, K), bias (N,) or None."""
    with on_device(x):
        return forward(x, weight, bias, activation, save_derivative)


def linear_act_backward(grad, x, weight, saved, activation, needs):
    """(dx | None, dweight | None, dbias | None). saved: act' for STORES_DERIVATIVE, else the output; needs: the
    sum of NEED_X, NEED_WEIGHT and NEED_BIAS."""
    with on_device(grad):
        g, dbias = outermost_gradient(
            grad, saved, activation, bool(needs & (NEED_X | NEED_WEIGHT)), bool(needs & NEED_BIAS)
        )
        dx = product("dgrad", g, weight) if needs & NEED_X else None
        dweight = product("wgrad", g.t(), x) if needs & NEED_WEIGHT else None
    return dx, dweight, dbias


# --- what tune() times ------------------------------------------------------------------------------------


def tuning_case(operation, batch, in_features, out_features, dtype, device):
    """(row key, call) of one operation of a layer: the call launches it on fresh-enough random operands."""

    def random(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    x, weight, bias = random(batch, in_features), random(out_features, in_features), random(out_features)
    g = random(batch, out_features)
    if operation == "linear_act":
        a, b = x, weight.t()

        def call():
            return forward(x, weight, bias, "relu", False)
    elif operation == "linear_act_derivative":
        a, b = x, weight.t()

        def call():
            return forward(x, weight, bias, "gelu", True)
    elif operation == "dgrad_act":
        from .mlp import inner_gradient

        a, b = g, weight

        def call():
            return inner_gradient(g, weight, x, "relu", True)
    elif operation == "dgrad":
        a, b = g, weight

        def call():
            return product("dgrad", g, weight)
    elif operation == "wgrad":
        a, b = g.t(), x

        def call():
            return product("wgrad", g.t(), x)
    else:
        raise ValueError(f"operation: expected one of {tuning.OPERATIONS}, got {operation!r}")
    (M, K), N = a.shape, b.shape[1]
    key = tuning.row_key(operation, M, N, K, dtype, input_precision(dtype), aligned(a) and aligned(b))
    return key, call
