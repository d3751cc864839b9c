"""The activations every dense kernel applies, what their backward reads, and how launchers are told of them.

``include/activation.h`` holds the same names, in the same order, and the formulae.
"""

from numbers import Real

ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "silu",
    "gelu",
    "gelu_tanh",
    "tanh",
    "sigmoid",
    "softplus",
)

# The value of ``enum class Activation`` in C++ and of the constants in Triton.
ACTIVATION_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}


# The activations that read a parameter, and its name.
PARAMETER = {"leaky_relu": "negative_slope", "elu": "alpha"}


def specification(activation: str, negative_slope: float, alpha: float) -> str:
    """What launchers take for an activation: its name, and behind a colon the one parameter it reads.

    Each argument of a call costs as much as a short call's work.

    Raises:
        ValueError: it is none of `ACTIVATIONS`.
    """
    if activation not in ACTIVATION_CODE:
        raise ValueError(f"unknown activation {activation!r}")
    if activation not in PARAMETER:
        return activation
    parameter = alpha if activation == "elu" else negative_slope
    # What is no number is left as it is, for launchers to refuse.
    if isinstance(parameter, Real) and not isinstance(parameter, bool):
        parameter = float(parameter)
    return f"{activation}:{parameter!r}"


def specified(specification: str) -> tuple[str, float]:
    """The activation of a specification, and its parameter; 0 for one that reads none."""
    activation, _, parameter = specification.partition(":")
    return activation, float(parameter or 0.0)


# silu and the gelus are not monotonic, so their derivative is no function of their output. The
# forward, which has the exponential at hand, stores the derivative; the backward only multiplies.
STORES_DERIVATIVE = frozenset({"silu", "gelu", "gelu_tanh"})

# Exponentials and logarithms that an output takes; the backward takes none, but for softplus.
EXPS = {name: {"identity": 0, "relu": 0, "leaky_relu": 0, "softplus": 2}.get(name, 1) for name in ACTIVATIONS}

# Which gradients a backward is to compute, one bit each.
NEED_X, NEED_WEIGHT, NEED_BIAS = 1, 2, 4
