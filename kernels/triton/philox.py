"""The noise of kernels/include/philox.h: word i % 4 of block i / 4 is element i's, whatever the launch."""

import triton
import triton.language as tl

TWO_PI = tl.constexpr(6.28318530717958647692)


@triton.jit
def block_words(seed, offset, block):
    """The words of elements 4 * block to 4 * block + 3; seed and offset scalars, block int64."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    offset = tl.to_tensor(offset).to(tl.int64)
    low_offset = (offset & 0xFFFFFFFF).to(tl.uint32)
    high_offset = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, zero + low_offset, zero + high_offset)


@triton.jit
def uniform(word):
    """In (0, 1): (word + 1/2) / 2^32, which for the largest words would round to 1."""
    u = word.to(tl.float32) * (1.0 / 4294967296.0) + (0.5 / 4294967296.0)
    return tl.minimum(u, 1.0 - 1.0 / 16777216.0)


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two independent normal values of two words, by Box and Muller."""
    radius = tl.sqrt(-2.0 * tl.log(uniform(radius_word)))
    angle = TWO_PI * uniform(angle_word)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(seed, offset, block):
    """N(0, 1) for elements 4 * block to 4 * block + 3, in four tensors of block's shape."""
    w0, w1, w2, w3 = block_words(seed, offset, block)
    first, second = normal_pair(w0, w1)
    third, fourth = normal_pair(w2, w3)
    return first, second, third, fourth
