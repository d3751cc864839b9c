"""Functions phi of a residual that losses sum up, and their derivatives: the formulae of include/loss.h.

`KIND` and `parameter` are those of `specified`. Only `tl.*` is used, no libdevice, so that the same code runs in the
interpreter.
"""

import triton
import triton.language as tl

from .activation import log1p_unit

# What kernels are told: the value of `KIND`.
ABSOLUTE = tl.constexpr("absolute")  # |r|
SQUARE = tl.constexpr("square")  # r²
POWER = tl.constexpr("power")  # |r|^parameter
CHARBONNIER = tl.constexpr("charbonnier")  # √(r² + parameter²)

KINDS = (ABSOLUTE.value, SQUARE.value, POWER.value, CHARBONNIER.value)

LOG2E = tl.constexpr(1.4426950408889634)


def specified(penalty, parameter):
    """(KIND, parameter): the powers that need no logarithm are kinds of their own."""
    if penalty == POWER.value and parameter in (1.0, 2.0):
        return (ABSOLUTE.value if parameter == 1.0 else SQUARE.value), 0.0
    return penalty, parameter


@triton.jit
def power(size, exponent):
    """size^exponent for size >= 0 and exponent > 0. In float32 the logarithm is that of a number from 1 to 2, and a
    whole power of two apart: of their sum, rounded, the exponential would magnify the error."""
    if size.dtype == tl.float64:
        y = tl.exp(exponent * tl.log(tl.where(size > 0.0, size, 1.0)))
    else:
        # Subnormal numbers have no exponent of their own.
        is_tiny = size < 1.0e-30
        bits = tl.where(is_tiny, size * 1.2676506002282294e30, size).to(tl.int32, bitcast=True)  # 2^100
        whole = ((bits >> 23) - tl.where(is_tiny, 227, 127)).to(tl.float32)
        fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        high = exponent * whole
        steps = tl.floor(high)
        lost = tl.fma(exponent, whole, -high)
        rest = exponent * (log1p_unit(fraction - 1.0) * LOG2E) + ((high - steps) + lost)
        # Two factors: the whole power alone may overflow or vanish where the result does not.
        more = tl.floor(rest)
        steps += more
        half = tl.floor(steps * 0.5)
        y = (tl.exp2(rest - more) * tl.exp2(half)) * tl.exp2(steps - half)
        y = tl.where(size < float("inf"), y, size)
    # 0 and NaN are their own powers.
    return tl.where(size > 0.0, y, size)


@triton.jit
def signed_as(r, size):
    """`size` with the sign of r: 0 for 0, and NaN for NaN."""
    return tl.where(r > 0.0, size, tl.where(r < 0.0, -size, r))


@triton.jit
def penalty(r, parameter, KIND: tl.constexpr):
    """(phi(r), phi'(r)) in the type of r, float32 or float64. At 0 the derivative is 0."""
    parameter = tl.full(r.shape, parameter, r.dtype)
    if KIND == ABSOLUTE:
        value = tl.abs(r)
        slope = signed_as(r, 1.0)
    elif KIND == SQUARE:
        value = r * r
        slope = r + r
    elif KIND == POWER:
        size = tl.abs(r)
        one_less = power(size, parameter - 1.0)
        value = size * one_less
        slope = signed_as(r, parameter * one_less)
    else:
        tl.static_assert(KIND == CHARBONNIER)
        value = tl.sqrt(r * r + parameter * parameter)
        slope = r / value
    return value, slope
