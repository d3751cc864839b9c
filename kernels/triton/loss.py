"""Reconstruction losses of elements and their derivatives by the input, as Triton device functions: the formulae of
include/loss.h.

Everything takes and returns blocks in the type the maths runs in, float32 or float64. `KIND` is a compile-time
constant; of the parameters that kinds have, which are float64 numbers, a kernel is told one. Only `tl.*` is used, as in
activation.py.
"""

import triton
import triton.language as tl

from .activation import exp_nonpositive, log1p_unit

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.69314718055994530942)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit
def signed_as(residual, size):
    """size with the sign of residual: 0 for 0, and NaN for NaN."""
    return tl.where(residual < 0.0, -size, tl.where(residual > 0.0, size, residual))


@triton.jit
def parts_of(x):
    """(f, e) with x = (1 + f) 2^e and sqrt(1/2) <= 1 + f < sqrt(2), for float32 x > 0."""
    is_small = x < 1.1754943508222875e-38
    bits = tl.where(is_small, x * 16777216.0, x).to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return f, exponent.to(tl.float32) - tl.where(is_small, 24.0, 0.0)


@triton.jit
def log1p_small(f):
    """log(1 + f) for float32 f from sqrt(1/2) - 1 to sqrt(2) - 1: what the GPU's logarithm, exact only on the scale of
    1, is not near 1."""
    y = f * -7.63449371e-2 + 1.27615750e-1
    y = y * f - 1.31601825e-1
    y = y * f + 1.42017588e-1
    y = y * f - 1.66233569e-1
    y = y * f + 2.00012267e-1
    y = y * f - 2.50008196e-1
    y = y * f + 3.33333313e-1
    return f + f * f * (f * y - 0.5)


@triton.jit
def log(x):
    """For x >= 0, -infinity at 0; NaN below, and NaN stays NaN."""
    if x.dtype == tl.float64:
        y = tl.log(x)
    else:
        f, e = parts_of(x)
        y = e * 0.693145752 + (log1p_small(f) + e * 1.42860677e-6)
        y = tl.where(x < float("inf"), y, x)
        y = tl.where(x > 0.0, y, tl.where(x == 0.0, float("-inf"), float("nan")))
    return y


@triton.jit
def log_of_rest(x):
    """log(1 - x) for x <= 1."""
    rest = 1.0 - x
    # What was rounded off, which is nothing from 1/2 on, divided by the rest to first order.
    lost = (1.0 - rest) - x
    return log(rest) + (lost + lost * x)


@triton.jit
def power(x, exponent):
    """x^exponent for x >= 0 and a positive exponent, a float64 number."""
    if x.dtype == tl.float64:
        y = tl.exp2(tl.log2(tl.where(x > 0.0, x, 1.0)) * exponent)
    else:
        f, e = parts_of(x)
        # Of the logarithm's product the large part is exact: eight bits by thirteen.
        whole = tl.full(x.shape, exponent, tl.float32)
        leading = (whole.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        exact, rest = leading * e, (whole - leading) * e + whole * (log1p_small(f) * LOG2E)
        total = tl.minimum(tl.maximum(exact + rest, -250.0), 250.0)
        n = tl.floor(total + 0.5)
        r = tl.minimum(tl.maximum((exact - n) + rest, -1.0), 1.0)
        # 2^n as two factors: no float32 holds it in one.
        half = n.to(tl.int32) >> 1
        first = ((half + 127) << 23).to(tl.float32, bitcast=True)
        second = ((n.to(tl.int32) - half + 127) << 23).to(tl.float32, bitcast=True)
        y = tl.exp2(r) * first * second
        y = tl.where(x < float("inf"), y, x)
    return tl.where(x > 0.0, y, x)


@triton.jit
def penalty(residual, parameter, KIND: tl.constexpr):
    """(phi, phi') of a residual; the derivative is 0 at 0."""
    given = tl.full(residual.shape, parameter, residual.dtype)
    if KIND == "mse":
        value, slope = residual * residual, residual + residual
    elif KIND == "l1":
        value, slope = tl.abs(residual), signed_as(residual, tl.full(residual.shape, 1.0, residual.dtype))
    elif KIND == "huber":
        # Comparisons, and no minimum: NaN stays NaN.
        slope = tl.where(residual < -given, -given, tl.where(residual > given, given, residual))
        value = slope * (residual - 0.5 * slope)
    elif KIND == "lp":
        size = tl.abs(residual)
        one_less = power(size, parameter - 1.0)
        value, slope = size * one_less, signed_as(residual, given * one_less)
    else:
        tl.static_assert(KIND == "charbonnier")
        square = residual * residual + given * given
        value = tl.sqrt_rn(square) if square.dtype == tl.float32 else tl.sqrt(square)
        slope = residual / value
    return value, slope


@triton.jit
def bce(x, target):
    """(loss, derivative) of probabilities, with PyTorch's limits."""
    rest = 1.0 - x
    of_input, of_rest = log(x), log_of_rest(x)
    of_input = tl.where(of_input < -100.0, -100.0, of_input)
    of_rest = tl.where(of_rest < -100.0, -100.0, of_rest)
    product = x * rest
    slope = (x - target) / tl.where(product < 1e-12, 1e-12, product)
    return (target - 1.0) * of_rest - target * of_input, slope


@triton.jit
def log1p_and_reciprocal(e):
    """(log(1 + e), 1 / (1 + e)) for 0 <= e <= 1."""
    if e.dtype == tl.float64:
        log1p, reciprocal = log1p_unit(e), 1.0 / (1.0 + e)
    else:
        # One division for both. With s = e / (2 + e) the logarithm is 2 atanh(s), and (atanh(s) / s - 1) / s² on
        # s <= 1/3 is a polynomial in s².
        inverse = 1.0 / ((1.0 + e) * (2.0 + e))
        reciprocal = (2.0 + e) * inverse
        s = e * ((1.0 + e) * inverse)
        q = s * s
        series = q * 1.40891710e-1 + 1.39803049e-1
        series = q * series + 2.00124545e-1
        series = q * series + 3.33331574e-1
        log1p = 2.0 * (s + s * q * series)
    return log1p, reciprocal


@triton.jit
def bce_with_logits(x, target):
    e = exp_nonpositive(-tl.abs(x))
    log1p, large = log1p_and_reciprocal(e)
    slope = tl.where(x < 0.0, e * large, large) - target
    return tl.abs(x) * tl.where(x > 0.0, 1.0 - target, target) + log1p, slope


@triton.jit
def evaluate(x, target, parameter, KIND: tl.constexpr):
    """(loss, its derivative by x)."""
    if KIND == "bce":
        value, slope = bce(x, target)
    elif KIND == "bce_with_logits":
        value, slope = bce_with_logits(x, target)
    else:
        value, slope = penalty(x - target, parameter, KIND)
    return value, slope
