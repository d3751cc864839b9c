"""Noise on a tensor, as aefast/ops/corrupt.py defines it: each element's comes from its word of a Philox draw."""

import torch
import triton
import triton.language as tl

from .activation import widen
from .linear_act import COMPILE, on_device, power_of_two
from .philox import block_words, normals
from .rows import unit_of

__all__ = ["corrupt"]

BLOCK_BYTES = 4096  # of a program: two loads of 16 bytes for each of 128 threads
SQUARES_TILE = 1024  # elements of a program of mask_squares_kernel


# --- device functions -------------------------------------------------------------------------------------


@triton.jit
def unsigned(bits):
    """The 32-bit word whose bits a launcher passed as a signed number."""
    return tl.cast(bits, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def with_noise(x, seed, block, first, second, last, half, KIND: tl.constexpr, QUADS: tl.constexpr):
    """x (4 * QUADS,), the elements of the Philox blocks from `block` on. The others are corrupt_kernel's."""
    blocks = block + tl.arange(0, QUADS)
    if KIND == "gaussian":
        e0, e1, e2, e3 = normals(seed, 0, blocks, x.dtype == tl.float64)
        value = widen(x)
        mean, std = tl.full(value.shape, first, value.dtype), tl.full(value.shape, second, value.dtype)
        noise = tl.interleave(tl.interleave(e0, e2), tl.interleave(e1, e3))
        result = value + (noise * std + mean)
    else:
        w0, w1, w2, w3 = block_words(seed, 0, blocks)
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        kept, new = x, tl.zeros_like(x)
        if KIND == "salt_and_pepper":
            low, high = tl.full(x.shape, first, x.dtype), tl.full(x.shape, second, x.dtype)
            new = tl.where(word < unsigned(half), low, high)
        elif KIND == "dropout":
            value = widen(x)
            kept = (value * tl.full(value.shape, first, value.dtype)).to(x.dtype)
        else:
            tl.static_assert(KIND == "masking")
        result = tl.where(word <= unsigned(last), new, kept)
    return result.to(x.dtype)


@triton.jit
def word_of(seed, index):
    """The word of element `index`, int64."""
    w0, w1, w2, w3 = block_words(seed, 0, index >> 2)
    is_odd = (index & 1) != 0
    return tl.where((index & 2) != 0, tl.where(is_odd, w3, w2), tl.where(is_odd, w1, w0))


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["last", "half"])
def corrupt_kernel(
    x,  # (n,) contiguous
    seed,  # int64 scalar in memory
    out,  # (n,) contiguous
    n,
    first: tl.float64,  # what Noise says of them
    second: tl.float64,
    last,  # words up to it are replaced: limit - 1, which 32 bits hold where they do not hold the limit
    half,  # words below it become salt and pepper's low
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    seed = tl.load(seed)
    if start + BLOCK <= n:
        # No mask: a mask at an n that 16 does not divide would forbid 16-byte accesses.
        value = with_noise(
            tl.load(x + offsets), seed, start >> 2, first, second, last, half, KIND, BLOCK // 4
        )
        tl.store(out + offsets, value)
    else:
        inside = offsets < n
        value = tl.load(x + offsets, mask=inside, other=0.0)
        value = with_noise(value, seed, start >> 2, first, second, last, half, KIND, BLOCK // 4)
        tl.store(out + offsets, value, mask=inside)


@triton.jit(do_not_specialize=["last"])
def mask_squares_kernel(
    x,  # (images, channels, height, width) contiguous
    seed,  # int64 scalar in memory
    out,  # like x
    channels,
    height,
    width,  # in units
    last,  # squares of words up to it are set to 0
    UNIT: tl.constexpr,
    SIDE: tl.constexpr,  # of a square
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A tile is of one channel of one image, so that what divides by run-time numbers is scalar.
    width = (width + tl.zeros((), tl.int32)) * UNIT
    tiles_across = tl.cdiv(width, COLUMNS)
    tiles_down = tl.cdiv(height, ROWS)
    tile = tl.program_id(0)
    col0 = tile % tiles_across * COLUMNS
    tile //= tiles_across
    rows = tile % tiles_down * ROWS + tl.arange(0, ROWS)
    plane = (tile // tiles_down).to(tl.int64)
    image = plane // channels
    squares_across = tl.cdiv(width, SIDE)
    squares_down = tl.cdiv(height, SIDE)
    first_square = (image * squares_down + rows // SIDE) * squares_across
    seed = tl.load(seed)

    # Four columns side by side are of one square or of two.
    fours = col0 + 4 * tl.arange(0, COLUMNS // 4)
    left = word_of(seed, first_square[:, None] + (fours // SIDE)[None, :]) <= unsigned(last)
    if SIDE % 4 == 0:
        right = left
    else:
        right = word_of(seed, first_square[:, None] + ((fours + 3) // SIDE)[None, :]) <= unsigned(last)
    left = tl.interleave(tl.interleave(left, left), tl.interleave(left, left))
    right = tl.interleave(tl.interleave(right, right), tl.interleave(right, right))
    cols = col0 + tl.arange(0, COLUMNS)
    is_left = (cols // SIDE == (cols & -4) // SIDE)[None, :]
    is_masked = (left & is_left) | (right & ~is_left)

    inside = (rows < height)[:, None] & (cols < width)[None, :]
    offsets = (plane * height + rows)[:, None] * width + cols[None, :]
    value = tl.load(x + offsets, mask=inside, other=0.0)
    tl.store(out + offsets, tl.where(is_masked, tl.zeros_like(value), value), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------


def signed(word):
    """The signed number with the bits of a 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def corrupt(x, seed, kind, first, second, limit, block):
    """x contiguous, and (N, C, H, W) for masking with a block above 1; seed an int64 scalar; the rest as in Noise."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    last = signed(limit - 1)
    with on_device(x):
        if block > 1:
            mask_squares(x, seed, out, last, block)
            return out
        size = BLOCK_BYTES // x.itemsize
        corrupt_kernel[(triton.cdiv(x.numel(), size),)](
            x,
            seed,
            out,
            x.numel(),
            first,
            second,
            last,
            signed(limit // 2),
            KIND=kind,
            BLOCK=size,
            num_warps=4,
            **COMPILE,
        )
    return out


def mask_squares(x, seed, out, last, side):
    images, channels, height, width = x.shape
    columns = power_of_two(width, 4, 128)
    rows = power_of_two(height, 1, SQUARES_TILE // columns)
    unit = unit_of(x.itemsize, width)
    tiles = triton.cdiv(height, rows) * triton.cdiv(width, columns)
    # A side longer than the image is one square of it, whatever its length.
    side = min(side, power_of_two(max(height, width), 4, 2**30))
    mask_squares_kernel[(images * channels * tiles,)](
        x,
        seed,
        out,
        channels,
        height,
        width // unit,
        last,
        UNIT=unit,
        SIDE=side,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=max(1, rows * columns // 256),
        **COMPILE,
    )
