"""The noise of kernels/include/philox.h: word i % 4 of block i / 4 is element i's, whatever the launch."""

import triton
import triton.language as tl


@triton.jit
def block_words(seed, offset, block):
    """The words of elements 4 * block to 4 * block + 3; seed and offset scalars, block int64."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    offset = tl.cast(offset, tl.int64)
    c0, c1 = low, high
    c2 = zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    seed = tl.cast(seed, tl.int64)
    low_key = (seed & 0xFFFFFFFF).to(tl.uint32)
    high_key = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    # Both words of a product are one instruction, where tl.philox has two.
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        third = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (third >> 32).to(tl.uint32) ^ c1 ^ low_key
        c1 = third.to(tl.uint32)
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ high_key
        c3 = first.to(tl.uint32)
        low_key += 0x9E3779B9
        high_key += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def squared_radius(word):
    """-2 log u of the uniform u = (word + 1/2) / 2^32, to 3 ulp."""
    # Below 1/2 from u itself, above it from 1 - u: each keeps all its digits, and neither rounds to 1.
    signed = word.to(tl.int32, bitcast=True)
    upper = signed < 0
    x = (tl.where(upper, ~signed, signed).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    # u = (1 + f) 2^e with -1/2 <= f <= 0
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    f = tl.where(upper, -x, mantissa - 1.0)
    e = tl.where(upper, 0, (bits >> 23) - 126).to(tl.float32)
    f2 = f * f
    f4 = f2 * f2
    low = (-2.42805079e-1 * f + 3.33700627e-1) * f2 + (-4.99992847e-1 * f + 1.0)
    high = (1.69581151 * f + 1.25766933) * f2 + (2.03538790e-1 * f + 2.69612730e-1)
    log1p = ((1.44110763 * f4 + high) * f4 + low) * f
    return -1.38629436 * e - (log1p + log1p)


@triton.jit
def sine_and_cosine(word):
    """Of the angle of (word + 1/2) / 2^32 turns, to 2 ulp."""
    # The nearest quarter turn, and the rest in quarter turns: its low 30 bits as a signed number.
    nearest = word + 0x20000000
    rest = ((nearest & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) + 0.5
    rest = rest * (1.0 / 1073741824.0)
    square = rest * rest
    s = ((-4.60165786e-3 * square + 7.96800330e-2) * square - 6.45963490e-1) * square
    c = ((9.03766544e-4 * square - 2.08601654e-2) * square + 2.53669232e-1) * square
    near_zero = s * rest + 1.57079637 * rest
    near_one = (c - 1.23370051) * square + 1.0
    swapped = (nearest & 0x40000000) != 0
    sine = tl.where(swapped, near_one, near_zero)
    cosine = tl.where(swapped, near_zero, near_one)
    sine = tl.where((nearest & 0x80000000) != 0, -sine, sine)
    cosine = tl.where(((nearest + 0x40000000) & 0x80000000) != 0, -cosine, cosine)
    return sine, cosine


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two independent normal values of two words, by Box and Muller; none is beyond 6.8."""
    radius = tl.sqrt(squared_radius(radius_word))
    sine, cosine = sine_and_cosine(angle_word)
    return radius * cosine, radius * sine


@triton.jit
def normal_pair_fp64(radius_word, angle_word):
    """The same values in double precision."""
    radius = tl.sqrt(-2.0 * tl.log((radius_word.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)))
    angle = (angle_word.to(tl.float64) + 0.5) * (6.28318530717958647692 / 4294967296.0)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(seed, offset, block, FP64: tl.constexpr = False):
    """N(0, 1) for elements 4 * block to 4 * block + 3, in four tensors of block's shape."""
    w0, w1, w2, w3 = block_words(seed, offset, block)
    if FP64:
        first, second = normal_pair_fp64(w0, w1)
        third, fourth = normal_pair_fp64(w2, w3)
    else:
        first, second = normal_pair(w0, w1)
        third, fourth = normal_pair(w2, w3)
    return first, second, third, fourth
