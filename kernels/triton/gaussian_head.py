"""A dense layer to [mu | logvar], a sample of it and its divergence.

Two candidates for the forward, between which tuning.py chooses as for any GEMM:

  fused    one GEMM whose programs hold the same columns of mu and of logvar, and sample in the epilogue;
  unfused  linear_act.py's product, then reparameterize.py's kernel over its result.

The fused one takes what `takes` says, and of float64 nothing. Of the same moments both make the same sample and
divergence: mu and logvar are rounded to the dtype before they are sampled, and the tree over the columns of a row is
the same, whatever the tile. In the backward one kernel writes the gradient of both halves side by side, where the
products read it.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from . import reparameterize, tuning
from .linear_act import (
    COMPILE,
    aligned,
    describable,
    input_precision,
    linear_act,
    linear_act_backward,
    on_device,
    plan,
)
from .reparameterize import clamped, exp, noise_of, tile_at
from .rows import WIDEST, row_sums, sum_columns, unit_of

__all__ = ["gaussian_head", "gaussian_head_backward"]


# --- device functions -------------------------------------------------------------------------------------


@triton.jit
def left_and_right(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) -> its two halves (ROWS, COLUMNS / 2)."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def sample_tile(
    mu,  # (ROWS, COLUMNS) fp32, of h @ weight.T
    logvar,  # the same; the tensors are gaussian_head_kernel's
    bias,
    seed,
    z,
    moments,
    rows,
    start,
    M,
    D,
    stride_bias,
    low,
    high,
    CLAMP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stores z and the moments of a tile that begins at column `start` of z, and returns twice the divergence of each
    of its rows (ROWS,)."""
    cols, inside, block = tile_at(rows, start, M, D, False, COLUMNS)
    if bias is not None:
        bias += cols.to(tl.int64) * stride_bias
        mu += tl.load(bias, mask=cols < D, other=0.0).to(tl.float32)
        logvar += tl.load(bias + D.to(tl.int64) * stride_bias, mask=cols < D, other=0.0).to(tl.float32)
    # What is sampled is what was stored: rounded to the dtype, as reparameterize would read it.
    dtype: tl.constexpr = z.dtype.element_ty
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    at = rows[:, None] * (2 * D) + cols
    tl.store(moments + at, mu, mask=inside)
    tl.store(moments + at + D, logvar, mask=inside)
    m, v = mu.to(tl.float32), logvar.to(tl.float32)
    if CLAMP:
        v = clamped(v, low, high)
    std = exp(0.5 * v)
    noise = noise_of(tl.load(seed), block, COLUMNS // 4, False)
    tl.store(z + rows[:, None] * D + cols, (m + std * noise).to(dtype), mask=inside)
    return sum_columns(tl.where(inside, m * m + (std * std - 1.0 - v), 0.0), ROWS, COLUMNS)


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def gaussian_head_kernel(
    h,  # (M, K), rows of stride_h; with DESCRIPTORS a descriptor of it
    weight,  # (2 D, K), rows of stride_weight; likewise
    bias,  # (2 D,) or None
    seed,  # int64 scalar in memory
    z,  # (M, D) contiguous
    kl,  # (M, chunks) fp32: sums over a chunk of each row
    moments,  # (M, 2 D) contiguous: [mu | logvar]
    chunks,  # of a row: tiles of BLOCK_N columns of z
    M,
    D,  # in units, as K and the strides of rows
    K,
    stride_h,
    stride_weight,
    stride_bias,
    low: tl.float64,
    high: tl.float64,
    CLAMP: tl.constexpr,  # whether to read low and high
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of mu, and as many of logvar
    BLOCK_K: tl.constexpr,
):
    D = tl.cast(D, tl.int32) * UNIT
    K = tl.cast(K, tl.int32) * UNIT
    # The tiles of a row one after another: programs that run together share their rows of h in L2.
    tile = tl.program_id(0)
    chunk = tile % chunks
    row0, col0 = (tile // chunks) * BLOCK_M, chunk * BLOCK_N
    # 64-bit: any offset may exceed 2^31 elements.
    rows = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)[None, :]

    mu = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    logvar = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for k in range(0, K, BLOCK_K):
            h_tile = h.load([row0, k])
            mu = tl.dot(h_tile, weight.load([col0, k]).T, mu, input_precision=INPUT_PRECISION)
            logvar = tl.dot(h_tile, weight.load([D + col0, k]).T, logvar, input_precision=INPUT_PRECISION)
    else:
        stride_h = tl.cast(stride_h, tl.int64) * UNIT
        stride_weight = tl.cast(stride_weight, tl.int64) * UNIT
        ks = tl.arange(0, BLOCK_K)
        h_pointers = h + rows[:, None] * stride_h + ks[None, :]
        mu_pointers = weight + cols * stride_weight + ks[:, None]
        logvar_pointers = mu_pointers + D * stride_weight
        h_inside, weight_inside = (rows < M)[:, None], cols < D
        for k in range(0, K, BLOCK_K):
            k_inside = ks < K - k
            h_tile = tl.load(h_pointers, mask=h_inside & k_inside[None, :], other=0.0)
            mu_tile = tl.load(mu_pointers, mask=weight_inside & k_inside[:, None], other=0.0)
            logvar_tile = tl.load(logvar_pointers, mask=weight_inside & k_inside[:, None], other=0.0)
            mu = tl.dot(h_tile, mu_tile, mu, input_precision=INPUT_PRECISION)
            logvar = tl.dot(h_tile, logvar_tile, logvar, input_precision=INPUT_PRECISION)
            h_pointers += BLOCK_K
            mu_pointers += BLOCK_K
            logvar_pointers += BLOCK_K

    if BLOCK_M * BLOCK_N > 64 * 32:
        # In halves: an epilogue over 32 elements of z a thread, with as many sums again, would spill. The tree over
        # the columns ends in the same sum of both.
        mu, more_mu = left_and_right(mu, BLOCK_M, BLOCK_N)
        logvar, more_logvar = left_and_right(logvar, BLOCK_M, BLOCK_N)
        total = sample_tile(
            mu, logvar, bias, seed, z, moments, rows, col0, M, D, stride_bias, low, high,
            CLAMP, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        total += sample_tile(
            more_mu, more_logvar, bias, seed, z, moments, rows, col0 + BLOCK_N // 2, M, D, stride_bias, low, high,
            CLAMP, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        total = sample_tile(
            mu, logvar, bias, seed, z, moments, rows, col0, M, D, stride_bias, low, high,
            CLAMP, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    tl.store(kl + rows * chunks + chunk, 0.5 * total, mask=rows < M)


# --- launches ---------------------------------------------------------------------------------------------


def takes(h, weight):
    """Whether the fused kernel takes h (M, K) and weight (2 D, K): no row begins inside the four elements of a Philox
    block, a row's divergence is one tree over its columns, and the elements of a row lie side by side."""
    D = weight.shape[0] // 2
    return h.shape[0] > 0 and 0 < D <= WIDEST and D % 4 == 0 and h.stride(1) == weight.stride(1) == 1


def fused(h, weight, bias, seed, low, high, chosen):
    """gaussian_head of what `takes` says. A tile's block_n are its columns of the product: half of them mu's."""
    (M, K), D = h.shape, weight.shape[0] // 2
    tile, block_k = chosen.tile, tuning.BLOCK_K[h.itemsize]
    columns = tile.block_n // 2
    chunks = triton.cdiv(D, columns)
    z = torch.empty((M, D), dtype=h.dtype, device=h.device)
    kl = torch.empty((M, chunks), dtype=torch.float32, device=h.device)
    moments = torch.empty((M, 2 * D), dtype=h.dtype, device=h.device)
    described = chosen.descriptors and describable(h) and describable(weight)
    unit = unit_of(h.itemsize, D, K, h.stride(0), weight.stride(0))
    gaussian_head_kernel[(triton.cdiv(M, tile.block_m) * chunks,)](
        TensorDescriptor.from_tensor(h, [tile.block_m, block_k]) if described else h,
        TensorDescriptor.from_tensor(weight, [columns, block_k]) if described else weight,
        bias,
        seed,
        z,
        kl,
        moments,
        chunks,
        M,
        D // unit,
        K // unit,
        h.stride(0) // unit,
        weight.stride(0) // unit,
        1 if bias is None else bias.stride(0),
        **reparameterize.limits(low, high),
        DESCRIPTORS=described,
        INPUT_PRECISION=input_precision(h.dtype),
        UNIT=unit,
        BLOCK_M=tile.block_m,
        BLOCK_N=columns,
        BLOCK_K=block_k,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **COMPILE,
    )
    return z, row_sums(kl), moments


def forward(h, weight, bias, seed, low, high):
    if takes(h, weight):
        chosen = plan("gaussian_head", h, weight.t())
        if chosen.fused:
            return fused(h, weight, bias, seed, low, high, chosen)
    moments, _ = linear_act(h, weight, bias, "identity", False)
    z, kl = reparameterize.forward(*moments.chunk(2, 1), seed, low, high)
    return z, kl, moments


# --- launchers --------------------------------------------------------------------------------------------


def gaussian_head(h, weight, bias, seed, low, high):
    """h (M, K), weight (2 D, K), bias (2 D,) or None, seed an int64 scalar -> z (M, D), the divergence of each row
    (M,), and [mu | logvar] (M, 2 D)."""
    with on_device(h):
        return forward(h, weight, bias, seed, low, high)


def gaussian_head_backward(grad_z, grad_kl, grad_moments, h, weight, moments, seed, low, high, needs):
    """(dh | None, dweight | None, dbias | None). Of the gradients that arrive, of any strides, each may be None."""
    if not needs & (NEED_X | NEED_WEIGHT | NEED_BIAS):
        return None, None, None
    grad = grad_moments
    if grad_z is not None or grad_kl is not None:
        grad = torch.empty_like(moments)
        with on_device(h):
            reparameterize.backward(
                grad_z, grad_kl, halves(grad_moments), *moments.chunk(2, 1), seed, low, high, halves(grad)
            )
    return linear_act_backward(grad, h, weight, None, "identity", needs)


def halves(t):
    """(M, 2 D) -> (2, M, D), its left half and its right."""
    return None if t is None else t.unflatten(1, (2, -1)).movedim(1, 0)


# --- what tune() times ------------------------------------------------------------------------------------


def tuning_case(batch, in_features, out_features, dtype, device):
    """(row key, call) of a head with out_features / 2 latent variables; None where there is nothing to choose."""

    def random(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    h, weight, bias = random(batch, in_features), random(out_features, in_features), random(out_features)
    if out_features % 2 or not takes(h, weight):
        return None
    seed = torch.zeros((), dtype=torch.int64, device=device)

    def call():
        return forward(h, weight, bias, seed, -10.0, 10.0)

    is_aligned = aligned(h) and aligned(weight)
    key = tuning.row_key(
        "gaussian_head", batch, out_features, in_features, dtype, input_precision(dtype), is_aligned
    )
    return key, call
