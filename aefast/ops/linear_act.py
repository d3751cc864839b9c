"""A dense layer and its activation in one op: ``act(x @ weight.T + bias)``."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.kernels.activation import (
    EXPS,
    NEED_BIAS,
    NEED_WEIGHT,
    NEED_X,
    STORES_DERIVATIVE,
    specification,
    specified,
)
from aefast.ops import _arguments, _registry
from aefast.ops._flops import counted, of_layer, wanted
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement

# The functions that torch.nn.functional's wrappers end in.
_EAGER_ACTIVATIONS = {
    "identity": lambda x, negative_slope, alpha: x,
    "relu": lambda x, negative_slope, alpha: torch.relu(x),
    "leaky_relu": lambda x, negative_slope, alpha: F.leaky_relu(x, negative_slope),
    "elu": lambda x, negative_slope, alpha: F.elu(x, alpha),
    "selu": lambda x, negative_slope, alpha: torch.selu(x),
    "silu": lambda x, negative_slope, alpha: torch._C._nn.silu(x),
    "gelu": lambda x, negative_slope, alpha: F.gelu(x),
    "gelu_tanh": lambda x, negative_slope, alpha: F.gelu(x, approximate="tanh"),
    "tanh": lambda x, negative_slope, alpha: torch.tanh(x),
    "sigmoid": lambda x, negative_slope, alpha: torch.sigmoid(x),
    "softplus": lambda x, negative_slope, alpha: F.softplus(x),
}


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    *,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> Tensor:
    """`linear_act` in plain PyTorch."""
    return _EAGER_ACTIVATIONS[activation](F.linear(x, weight, bias), negative_slope, alpha)


def specified_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    name, parameter = specified(activation)
    return reference(x, weight, bias, name, negative_slope=parameter, alpha=parameter)


# `activation` is a specification, and `needs` says which gradients are wanted, as in kernels/activation.py.
define("linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, str backend) -> Tensor")
define(
    "linear_act_with_derivative(Tensor x, Tensor weight, Tensor? bias, str activation, str backend)"
    " -> (Tensor, Tensor)"
)
define(
    "linear_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor? saved, str activation, int needs,"
    " str backend) -> Tensor[]"
)


@implement("linear_act")
def _(x, weight, bias, activation, backend):
    return _registry.kernels(backend, "linear_act").linear_act(x, weight, bias, activation, False)[0]


@implement("linear_act_with_derivative")
def _(x, weight, bias, activation, backend):
    return _registry.kernels(backend, "linear_act").linear_act(x, weight, bias, activation, True)


@implement("linear_act_backward")
def _(grad, x, weight, saved, activation, needs, backend):
    launch = _registry.kernels(backend, "linear_act").linear_act_backward
    gradients = launch(grad, x, weight, saved, activation, needs)
    return [gradient for gradient in gradients if gradient is not None]


@torch.library.register_fake("aefast::linear_act", lib=LIBRARY)
def _(x, weight, bias, activation, backend):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("aefast::linear_act_with_derivative", lib=LIBRARY)
def _(x, weight, bias, activation, backend):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("aefast::linear_act_backward", lib=LIBRARY)
def _(grad, x, weight, saved, activation, needs, backend):
    gradients = []
    if needs & NEED_X:
        gradients.append(x.new_empty(x.shape))
    if needs & NEED_WEIGHT:
        gradients.append(weight.new_empty(weight.shape))
    if needs & NEED_BIAS:
        gradients.append(weight.new_empty(weight.shape[0]))
    return gradients


@counted("linear_act", "linear_act_with_derivative")
def _(x, weight, bias, activation, backend):
    return of_layer(x, weight)


@counted("linear_act_backward")
def _(grad, x, weight, saved, activation, needs, backend):
    return wanted(needs) * of_layer(x, weight)


# By what needs a gradient of (x, weight, bias, call).
_NEEDS = {
    (x, weight, bias, False): NEED_X * x + NEED_WEIGHT * weight + NEED_BIAS * bias
    for x in (False, True)
    for weight in (False, True)
    for bias in (False, True)
}


class _LinearAct(torch.autograd.Function):
    """`call` is (activation, backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, x, weight, bias, call):
        activation, backend, launchers = call
        if launchers is not None:
            out, saved = launchers.linear_act(x, weight, bias, activation, True)
        else:
            with below_autograd():
                if activation in STORES_DERIVATIVE:
                    forward = torch.ops.aefast.linear_act_with_derivative.default
                    out, saved = forward(x, weight, bias, activation, backend)
                else:
                    out = torch.ops.aefast.linear_act.default(x, weight, bias, activation, backend)
                    saved = None
        if saved is None and activation != "identity":
            saved = out
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, grad):
        activation, backend, launchers = ctx.call
        x, weight, bias, saved = ctx.saved_tensors
        needs = _NEEDS[ctx.needs_input_grad]
        if launchers is not None and _registry.may_launch(grad):
            try:
                return *launchers.linear_act_backward(grad, x, weight, saved, activation, needs), None
            except _registry.REFUSALS as error:
                _registry.logger.debug("linear_act: %s", error)
        if _registry.wants_reference(grad):
            gradients = _registry.differentiate(
                lambda x, weight, bias: specified_reference(x, weight, bias, activation),
                (x, weight, bias),
                ctx.needs_input_grad[:3],
                grad,
            )
        else:
            tensors, settings = (grad, x, weight, saved), (activation, needs)
            gradients = _registry.gradients(
                "linear_act", backend, tensors, settings, ctx.needs_input_grad[:3]
            )
        return *gradients, None


_apply = direct_apply(_LinearAct)


@torch.library.impl(LIBRARY, "linear_act", "Autograd")
def _(x, weight, bias, activation, backend):
    if _registry.is_transformed():
        return specified_reference(x, weight, bias, activation)
    if _registry.needs_gradient(x, weight, bias):
        return _LinearAct.apply(x, weight, bias, (activation, backend, None))
    with below_autograd():
        return torch.ops.aefast.linear_act.default(x, weight, bias, activation, backend)


def _launch(x, weight, bias, activation, backend, launchers):
    if _registry.needs_gradient(x, weight, bias):
        return _apply(x, weight, bias, (activation, backend, launchers))
    return launchers.linear_act(x, weight, bias, activation, False)[0]


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    *,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> Tensor:
    """``act(x @ weight.T + bias)`` with the bias and the activation applied while the product is in cache.

    The backward needs no pre-activation: it works from the output, or, for silu and the gelus, from the
    derivative that the forward stored in its place. x, weight, bias and that tensor are saved, and must not be
    modified in place before it. A derivative from the output is as exact as the output: where tanh, sigmoid, elu
    or selu saturate, its error is a rounding of theirs. Products have the precision that ``torch.backends``
    sets: on GPUs they are torch's own, on the CPU the library's or torch's, whichever is faster. Sums are in
    float32 at least, in an order that depends on the shape alone.

    Args:
        x: (*, K), float32, bfloat16, float16 or float64, any strides.
        weight: (N, K), the dtype and device of x.
        bias: (N,) or None.
        activation: identity, relu, leaky_relu, elu, selu, silu, gelu (by erf), gelu_tanh (Hendrycks and
            Gimpel's approximation), tanh, sigmoid or softplus (torch's, with threshold 20).
        negative_slope: leaky_relu's, at least 0; the others do not look at it.
        alpha: elu's, at least 0; likewise.

    Returns:
        (*, N), contiguous, in x's dtype; in autocast's dtype under autocast.

    Raises:
        InputError: a shape, dtype, device, name or value is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    plain = _registry.PLAIN
    operands_are_plain = type(x) in plain and type(weight) in plain and type(bias) in plain
    if operands_are_plain and x is not None and weight is not None and x.dim() == 2:
        chosen = _registry.unexamined("linear_act", x)
        if chosen is not None:
            try:
                return _launch(x, weight, bias, specification(activation, negative_slope, alpha), *chosen)
            except _registry.REFUSALS as error:
                _registry.logger.debug("linear_act: %s", error)
    if has_torch_function_variadic(x, weight, bias) and _arguments.are_stand_ins(x, weight, bias):
        return _arguments.deferred(linear_act, locals())
    x, weight, bias = _arguments.autocast(x, weight, bias)
    _check(x, weight, bias, activation, negative_slope, alpha)
    backend = _registry.choose("linear_act", x, weight, bias)
    if backend == "eager":
        return reference(x, weight, bias, activation, negative_slope=negative_slope, alpha=alpha)
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    activation = specification(activation, negative_slope, alpha)
    if _registry.is_direct(backend, x, weight, bias):
        launchers = _registry.kernels(backend, "linear_act")
        out = _launch(flat, weight, bias, activation, backend, launchers)
    else:
        out = torch.ops.aefast.linear_act.default(flat, weight, bias, activation, backend)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], weight.shape[0])


def _check(x: Any, weight: Any, bias: Any, activation: Any, negative_slope: Any, alpha: Any) -> None:
    check_layer(x, weight, bias, "linear_act", "weight", "bias")
    _arguments.check_activation("activation", activation, "linear_act")
    _arguments.check_activation_parameter(activation, negative_slope, alpha, "linear_act")


def check_layer(
    x: Any, weight: Any, bias: Any, op: str, weight_name: str, bias_name: str, x_name: str = "x"
) -> None:
    """That (x, weight, bias) are the operands of a dense layer."""
    if (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and x.dim() >= 1
        and weight.shape[1] == x.size(-1)
        and x.dtype in _arguments.DTYPES
        and weight.dtype == x.dtype
        and weight.device == x.device
        and (bias is None or _is_bias(bias, weight))
    ):
        return
    _arguments.check_tensor(x_name, x, op)
    _arguments.check_tensor(weight_name, weight, op)
    _arguments.check_floating(x_name, x, op)
    if x.dim() < 1:
        raise InputError(f"{op}: {x_name} must have at least one dimension, (*, K), got a scalar")
    if weight.dim() != 2:
        raise InputError(
            f"{op}: {weight_name} must have two dimensions, (N, K), got shape {_arguments.shape_of(weight)}"
        )
    if weight.shape[1] != x.size(-1):
        raise InputError(
            f"{op}: {weight_name} must be (N, {x.size(-1)}) to match {x_name} of shape {_arguments.shape_of(x)}, "
            f"got shape {_arguments.shape_of(weight)}"
        )
    _arguments.check_like(weight_name, weight, x_name, x, op)
    if bias is not None:
        _arguments.check_tensor(bias_name, bias, op)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise InputError(
                f"{op}: {bias_name} must be ({weight.shape[0]},) to match {weight_name}, "
                f"got shape {_arguments.shape_of(bias)}"
            )
        _arguments.check_like(bias_name, bias, x_name, x, op)


def _is_bias(bias: Any, weight: Tensor) -> bool:
    return (
        isinstance(bias, Tensor)
        and bias.shape == weight.shape[:1]
        and bias.dtype == weight.dtype
        and bias.device == weight.device
    )


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Operands over shapes and strides: empty, one-wide, prime, multiples of a vector, transposed, sliced."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    for rows, inputs, features in (
        (0, 5, 3), (4, 0, 3), (4, 5, 0), (1, 1, 1), (7, 1, 1), (1, 13, 7), (31, 17, 29), (64, 32, 48),
        (257, 67, 131), (130, 8, 1030),
    ):  # fmt: skip
        scale = max(1, inputs) ** -0.5
        yield {"x": draw(rows, inputs), "weight": draw(features, inputs) * scale, "bias": draw(features)}
    yield {"x": draw(6, 5, 24), "weight": draw(16, 24) * 0.2, "bias": draw(16)}
    yield {"x": draw(24), "weight": draw(16, 24) * 0.2, "bias": None}
    yield {"x": draw(24, 66).t(), "weight": draw(24, 40).t() * 0.2, "bias": draw(80)[::2]}
    yield {"x": draw(50, 96)[3::2, 1::3], "weight": draw(33, 64)[:, ::2] * 0.2, "bias": draw(1).expand(33)}
    yield {"x": draw(1, 12).expand(40, 12), "weight": draw(9, 12) * 0.3, "bias": None}


def cost(
    backward: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "identity",
    **settings: Any,
) -> _registry.Cost:
    """Each operand is read once and each result written once; the products are all the operations that count."""
    rows, (features, inputs) = math.prod(x.shape[:-1]), weight.shape
    parameters = features * inputs + (0 if bias is None else features)
    output = rows * features
    elements = x.numel() + parameters + output
    flops = 2 * rows * features * inputs
    exps = EXPS[activation] * output
    if backward:
        # act' is written and read where it is stored, and otherwise the output read again.
        saved = 2 * output if activation in STORES_DERIVATIVE else 0 if activation == "identity" else output
        elements += saved + output + 2 * x.numel() + features * inputs + parameters
        flops *= 3
    return _registry.Cost(elements * x.element_size(), flops, exps)


OP = _registry.register(_registry.Op("linear_act", linear_act, reference, samples, cost))
