"""The activations every dense kernel applies, and what their backward reads.

``include/activation.h`` holds the same names, in the same order, and the formulae.
"""

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

# silu and the gelus are not monotonic, so their derivative is no function of their output. The
# forward, which has the exponential at hand, stores the derivative; the backward only multiplies.
STORES_DERIVATIVE = frozenset({"silu", "gelu", "gelu_tanh"})
