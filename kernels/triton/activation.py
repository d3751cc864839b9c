"""The activations as Triton device functions: the formulae of include/activation.h.

Everything takes and returns blocks in the type the maths runs in, float32 or float64. `ACTIVATION`,
`SLOPE` and `ALPHA` are compile-time constants: a kernel holds the code of one activation.

Only `tl.*` is used, no libdevice, so that the same code runs in the interpreter. exp is always taken of
an argument <= 0, where it cannot overflow, and everything that needs expm1 or log1p near 0 gets it from
a series, in float32 and float64 alike. NaN goes through every activation.

A named constant is a factor from the right, `x * SLOPE`: from the left the interpreter takes it for
compile-time arithmetic.
"""

import triton
import triton.language as tl

from ..activation import ACTIVATION_CODE

# What kernels are told: the value of `ACTIVATION`.

IDENTITY = tl.constexpr(ACTIVATION_CODE["identity"])
RELU = tl.constexpr(ACTIVATION_CODE["relu"])
LEAKY_RELU = tl.constexpr(ACTIVATION_CODE["leaky_relu"])
ELU = tl.constexpr(ACTIVATION_CODE["elu"])
SELU = tl.constexpr(ACTIVATION_CODE["selu"])
SILU = tl.constexpr(ACTIVATION_CODE["silu"])
GELU = tl.constexpr(ACTIVATION_CODE["gelu"])
GELU_TANH = tl.constexpr(ACTIVATION_CODE["gelu_tanh"])
TANH = tl.constexpr(ACTIVATION_CODE["tanh"])
SIGMOID = tl.constexpr(ACTIVATION_CODE["sigmoid"])
SOFTPLUS = tl.constexpr(ACTIVATION_CODE["softplus"])

SELU_ALPHA = tl.constexpr(1.6732632423543772848170429916717)
SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)
INV_SQRT2 = tl.constexpr(0.70710678118654752440)
INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)
SQRT_2_OVER_PI = tl.constexpr(0.79788456080286535588)
GELU_TANH_CUBIC = tl.constexpr(0.044715)
SOFTPLUS_THRESHOLD = tl.constexpr(20.0)

# log2(e) as a float32 and what that rounding leaves over; ln(2).
LOG2E_HIGH = tl.constexpr(1.44269502162933349609375)
LOG2E_LOW = tl.constexpr(1.925963033500864e-8)
LN2 = tl.constexpr(0.69314718055994530942)
# exp of anything below rounds to 0 in float32.
EXP_FLOOR = tl.constexpr(-104.0)


@triton.jit
def widen(x):
    """To the type the maths runs in."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def exp_nonpositive(x):
    """exp(x) for x <= 0. The GPU's exp2 of the rounded product x*log2(e) is wrong by |x| units in the
    last place; the rounding error of the product, recovered by fma, is put back to first order."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        x = tl.where(x < EXP_FLOOR, EXP_FLOOR, x)
        scaled = x * LOG2E_HIGH
        lost = tl.fma(x, tl.full(x.shape, LOG2E_HIGH, tl.float32), -scaled) + x * LOG2E_LOW
        y = tl.exp2(scaled)
        y += y * (lost * LN2)
    return y


@triton.jit
def expm1_nonpositive(x):
    """exp(x) - 1 for x <= 0: the Taylor series down to -1/2, where it ends below half a unit in the last
    place; the difference below, where nothing cancels."""
    small = tl.where(x > -0.5, x, 0.0)
    if x.dtype == tl.float64:
        series = 1.0 + small * (1.0 / 15)
        series = 1.0 + small * (1.0 / 14) * series
        series = 1.0 + small * (1.0 / 13) * series
        series = 1.0 + small * (1.0 / 12) * series
        series = 1.0 + small * (1.0 / 11) * series
        series = 1.0 + small * (1.0 / 10) * series
        series = 1.0 + small * (1.0 / 9) * series
    else:
        series = 1.0 + small * (1.0 / 9)
    series = 1.0 + small * (1.0 / 8) * series
    series = 1.0 + small * (1.0 / 7) * series
    series = 1.0 + small * (1.0 / 6) * series
    series = 1.0 + small * (1.0 / 5) * series
    series = 1.0 + small * (1.0 / 4) * series
    series = 1.0 + small * (1.0 / 3) * series
    series = 1.0 + small * (1.0 / 2) * series
    return tl.where(x > -0.5, small * series, exp_nonpositive(x) - 1.0)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for 0 <= u <= 1, as 2 atanh(s), s = u/(2 + u) <= 1/3, by its series in s*s <= 1/9."""
    s = u / (2.0 + u)
    q = s * s
    if u.dtype == tl.float64:
        series = q * (1.0 / 33) + 1.0 / 31
        series = q * series + 1.0 / 29
        series = q * series + 1.0 / 27
        series = q * series + 1.0 / 25
        series = q * series + 1.0 / 23
        series = q * series + 1.0 / 21
        series = q * series + 1.0 / 19
        series = q * series + 1.0 / 17
        series = q * series + 1.0 / 15
    else:
        series = q * 0.0 + 1.0 / 15
    series = q * series + 1.0 / 13
    series = q * series + 1.0 / 11
    series = q * series + 1.0 / 9
    series = q * series + 1.0 / 7
    series = q * series + 1.0 / 5
    series = q * series + 1.0 / 3
    return 2.0 * s + 2.0 * s * (q * series)


@triton.jit
def sigmoid_and_rest(x):
    """(sigmoid(x), 1 - sigmoid(x)), neither of which cancels."""
    e = exp_nonpositive(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0.0, small, large), tl.where(x < 0.0, large, small)


@triton.jit
def sigmoid(x):
    s, _ = sigmoid_and_rest(x)
    return s


@triton.jit
def gelu_tanh_argument(x):
    """2u, where gelu_tanh(x) = x (1 + tanh(u))/2 = x sigmoid(2u)."""
    return x * (2.0 * SQRT_2_OVER_PI) * (1.0 + x * x * GELU_TANH_CUBIC)


@triton.jit
def tanh(x):
    m = expm1_nonpositive(-2.0 * tl.abs(x))
    t = -m / (m + 2.0)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.math.erf(x * INV_SQRT2))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ALPHA: tl.constexpr):
    """act(x)."""
    if ACTIVATION == RELU:
        y = tl.where(x < 0.0, 0.0, x)  # not tl.maximum: NaN stays NaN
    elif ACTIVATION == LEAKY_RELU:
        y = tl.where(x > 0.0, x, x * SLOPE)
    elif ACTIVATION == ELU:
        y = tl.where(x > 0.0, x, expm1_nonpositive(tl.where(x > 0.0, 0.0, x)) * ALPHA)
    elif ACTIVATION == SELU:
        y = tl.where(x > 0.0, x, expm1_nonpositive(tl.where(x > 0.0, 0.0, x)) * SELU_ALPHA) * SELU_SCALE
    elif ACTIVATION == SILU:
        y = x * sigmoid(x)
    elif ACTIVATION == GELU:
        y = x * normal_cdf(x)
    elif ACTIVATION == GELU_TANH:
        y = x * sigmoid(gelu_tanh_argument(x))
    elif ACTIVATION == TANH:
        y = tanh(x)
    elif ACTIVATION == SIGMOID:
        y = sigmoid(x)
    elif ACTIVATION == SOFTPLUS:
        y = tl.where(x > 0.0, x, 0.0) + log1p_unit(exp_nonpositive(-tl.abs(x)))
        y = tl.where(x > SOFTPLUS_THRESHOLD, x, y)
    else:
        tl.static_assert(ACTIVATION == IDENTITY)
        y = x
    return y


@triton.jit
def activate_with_derivative(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x), for the activations of STORES_DERIVATIVE."""
    if ACTIVATION == SILU:
        s, rest = sigmoid_and_rest(x)
        y = x * s
        derivative = s + y * rest
    elif ACTIVATION == GELU:
        cdf = normal_cdf(x)
        y = x * cdf
        derivative = cdf + x * (exp_nonpositive(-0.5 * (x * x)) * INV_SQRT_2PI)
    else:
        tl.static_assert(ACTIVATION == GELU_TANH)
        s, rest = sigmoid_and_rest(gelu_tanh_argument(x))
        # Finite where x * x overflows: there y * rest is 0, as it is from 32 on.
        square = tl.minimum(x * x, 1024.0)
        slope = square * (6.0 * GELU_TANH_CUBIC * SQRT_2_OVER_PI) + (2.0 * SQRT_2_OVER_PI)
        y = x * s
        derivative = s + y * rest * slope
    return y, derivative


@triton.jit
def times_derivative(g, saved, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ALPHA: tl.constexpr):
    """g * act', where `saved` is act' itself for STORES_DERIVATIVE and act's output otherwise. relu selects
    instead of multiplying: an infinite g at a zero slope gives 0, as in torch."""
    if ACTIVATION == RELU:
        product = tl.where(saved <= 0.0, 0.0, g)
    elif ACTIVATION == LEAKY_RELU:
        product = tl.where(saved > 0.0, g, g * SLOPE)
    elif ACTIVATION == ELU:
        product = tl.where(saved > 0.0, g, g * (saved + ALPHA))
    elif ACTIVATION == SELU:
        product = g * tl.where(saved > 0.0, SELU_SCALE, saved + SELU_SCALE * SELU_ALPHA)
    elif ACTIVATION == TANH:
        product = g * (1.0 - saved * saved)
    elif ACTIVATION == SIGMOID:
        product = g * (saved * (1.0 - saved))
    elif ACTIVATION == SOFTPLUS:
        product = g * -expm1_nonpositive(-saved)
    elif ACTIVATION == IDENTITY:
        product = g
    else:  # SILU, GELU, GELU_TANH
        product = g * saved
    return product
