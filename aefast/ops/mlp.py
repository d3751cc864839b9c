"""A stack of dense layers as one op."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from aefast.errors import InputError
from aefast.kernels.activation import EXPS, STORES_DERIVATIVE, specification
from aefast.ops import _arguments, _registry, linear_act
from aefast.ops._flops import counted, of_layer
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    *,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> Tensor:
    """`mlp` in plain PyTorch."""
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        x = linear_act.reference(x, weight, bias, activation, negative_slope=negative_slope, alpha=alpha)
    return x


def _reference(x: Tensor, weights: Any, biases: Any, activations: str) -> Tensor:
    for weight, bias, activation in zip(weights, biases, activations.split(","), strict=True):
        x = linear_act.specified_reference(x, weight, bias, activation)
    return x


_LAYERS = "Tensor x, Tensor[] weights, Tensor?[] biases"
# `activations` are specifications, as in kernels/activation.py, between commas.
define(f"mlp({_LAYERS}, str activations, str backend) -> Tensor")
# Every layer's output, then the derivatives of the layers whose activation stores one.
define(f"mlp_saving({_LAYERS}, str activations, str backend) -> Tensor[]")
# The gradients of x, the weights and the biases for which `needs` has a 1, and not a 0. `saved` is what mlp_saving
# returns; of a last output that `_reads_output` says nothing reads, any tensor of its shape.
define(
    "mlp_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] saved, str activations, str needs,"
    " str backend) -> Tensor[]"
)


@implement("mlp")
def _(x, weights, biases, activations, backend):
    return _registry.kernels(backend, "mlp").mlp(x, weights, biases, activations, False)[0]


@implement("mlp_saving")
def _(x, weights, biases, activations, backend):
    return _registry.kernels(backend, "mlp").mlp(x, weights, biases, activations, True)


@implement("mlp_backward")
def _(grad, x, weights, saved, activations, needs, backend):
    launchers = _registry.kernels(backend, "mlp")
    return launchers.mlp_backward(grad, x, weights, saved, activations, needs)


@torch.library.register_fake("aefast::mlp", lib=LIBRARY)
def _(x, weights, biases, activations, backend):
    return x.new_empty(x.shape[0], weights[-1].shape[0])


@torch.library.register_fake("aefast::mlp_saving", lib=LIBRARY)
def _(x, weights, biases, activations, backend):
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    derivatives = [
        x.new_empty(x.shape[0], weight.shape[0])
        for weight, activation in zip(weights, activations.split(","), strict=True)
        if activation in STORES_DERIVATIVE
    ]
    return [*outputs, *derivatives]


@torch.library.register_fake("aefast::mlp_backward", lib=LIBRARY)
def _(grad, x, weights, saved, activations, needs, backend):
    shapes = [x.shape, *(w.shape for w in weights), *(w.shape[:1] for w in weights)]
    return [x.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need == "1"]


@counted("mlp", "mlp_saving")
def _(x, weights, biases, activations, backend):
    return sum(of_layer(x, weight) for weight in weights)


@counted("mlp_backward")
def _(grad, x, weights, saved, activations, needs, backend):
    layers = len(weights)
    flops = 0
    for layer, weight in enumerate(weights):
        # Of a layer's input there is a gradient where x or a layer below has one.
        below = "1" in needs[: 1 + layer] + needs[1 + layers : 1 + layers + layer]
        flops += (below + (needs[1 + layer] == "1")) * of_layer(x, weight)
    return flops


@functools.cache
def _needs(needs_input_grad: tuple[bool, ...]) -> str:
    """The `needs` of mlp_backward, from those of _Mlp's x, call and parameters."""
    return "".join("01"[need] for index, need in enumerate(needs_input_grad) if index != 1)


@functools.cache
def _reads_output(activations: str) -> bool:
    """Whether the backward reads the last layer's output."""
    last = activations.rpartition(",")[2].partition(":")[0]
    return last != "identity" and last not in STORES_DERIVATIVE


class _Mlp(torch.autograd.Function):
    """`call` is (activations, backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, x, call, *parameters):
        activations, backend, launchers = call
        layers = len(parameters) // 2
        weights, biases = parameters[:layers], parameters[layers:]
        if launchers is not None:
            saved = launchers.mlp(x, weights, biases, activations, True)
        else:
            with below_autograd():
                saved = torch.ops.aefast.mlp_saving.default(x, weights, biases, activations, backend)
        out = saved[layers - 1]
        if not _reads_output(activations):
            # Nobody else may want it by then, and it is often the largest of all.
            del saved[layers - 1]
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, grad):
        activations, backend, launchers = ctx.call
        needs_input_grad = ctx.needs_input_grad
        layers = len(needs_input_grad) // 2 - 1
        x, *rest = ctx.saved_tensors
        weights, saved = rest[:layers], rest[2 * layers :]
        if not _reads_output(activations):
            # In its place anything of its shape will do.
            saved.insert(layers - 1, grad)
        arguments = (grad, x, weights, saved, activations, _needs(needs_input_grad))
        if launchers is not None and _registry.may_launch(grad):
            try:
                return _spread(launchers.mlp_backward(*arguments), needs_input_grad)
            except _registry.REFUSALS as error:
                _registry.logger.debug("mlp: %s", error)
        if _registry.wants_reference(grad):
            x_gradient, *gradients = _registry.differentiate(
                lambda x, *parameters: _reference(x, parameters[:layers], parameters[layers:], activations),
                (x, *rest[: 2 * layers]),
                (needs_input_grad[0], *needs_input_grad[2:]),
                grad,
            )
            return x_gradient, None, *gradients
        if _registry.is_direct(backend, grad, x, *weights, *saved):
            gradients = _registry.kernels(backend, "mlp").mlp_backward(*arguments)
        else:
            gradients = torch.ops.aefast.mlp_backward.default(*arguments, backend)
        return _spread(gradients, needs_input_grad)


def _spread(gradients: list[Tensor], needs_input_grad: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """One entry for each input, from the gradients of those that need one."""
    found = iter(gradients)
    return tuple([next(found) if need else None for need in needs_input_grad])


_apply = direct_apply(_Mlp)


@torch.library.impl(LIBRARY, "mlp", "Autograd")
def _(x, weights, biases, activations, backend):
    if _registry.is_transformed():
        return _reference(x, weights, biases, activations)
    if _registry.needs_gradient(x, *weights, *biases):
        return _Mlp.apply(x, (activations, backend, None), *weights, *biases)
    with below_autograd():
        return torch.ops.aefast.mlp.default(x, weights, biases, activations, backend)


def _launch(x, weights, biases, activations, backend, launchers):
    if _registry.needs_gradient(x, *weights, *biases):
        return _apply(x, (activations, backend, launchers), *weights, *biases)
    return launchers.mlp(x, weights, biases, activations, False)[0]


def _specifications(activations: Sequence[str], negative_slope: float, alpha: float) -> str:
    return ",".join([specification(activation, negative_slope, alpha) for activation in activations])


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    *,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> Tensor:
    """A whole dense stack: ``h = act_l(h @ weights[l].T + biases[l])`` over l, starting from x.

    The backward applies layer l's derivative and sums its bias gradient while layer l+1's data gradient is
    in cache. What is saved for it: each layer's output, and for silu and the gelus the derivative; the last output only
    where its activation's derivative is computed from it.

    Args:
        x: (*, K), float32, bfloat16, float16 or float64, any strides.
        weights: one a layer, weights[l] (N_l, N_{l-1}) with N_{-1} = K, the dtype and device of x.
        biases: one a layer, (N_l,) or None.
        activations: one a layer, the names that `linear_act` takes.
        negative_slope: that of every leaky_relu, at least 0.
        alpha: that of every elu, at least 0.

    Returns:
        (*, N_last), contiguous, in x's dtype; in autocast's dtype under autocast.

    Raises:
        InputError: a shape, dtype, device, name or value is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if _are_plain(x, weights, biases, activations) and x.dim() == 2:
        chosen = _registry.unexamined("mlp", x)
        if chosen is not None:
            try:
                specifications = _specifications(activations, negative_slope, alpha)
                return _launch(x, weights, biases, specifications, *chosen)
            except _registry.REFUSALS as error:
                _registry.logger.debug("mlp: %s", error)
    weights, biases, activations = _lists(weights, biases, activations)
    if isinstance(weights, list) and isinstance(biases, list):
        operands = (x, *weights, *biases)
        if has_torch_function(operands) and _arguments.are_stand_ins(*operands):
            return _arguments.deferred(mlp, locals())
        # What a star collects is a tuple to torch.compile of older releases.
        x, *parameters = _arguments.autocast(x, *weights, *biases)
        weights, biases = list(parameters[: len(weights)]), list(parameters[len(weights) :])
    _check(x, weights, biases, activations)
    for activation in activations:
        _arguments.check_activation_parameter(activation, negative_slope, alpha, "mlp")
    backend = _registry.choose("mlp", x, *weights, *biases)
    if backend == "eager":
        return reference(x, weights, biases, activations, negative_slope=negative_slope, alpha=alpha)
    if torch.jit.is_tracing():
        # The tracer's graphs hold no list in which a bias may be None.
        for layer in zip(weights, biases, activations, strict=True):
            x = linear_act.linear_act(x, *layer, negative_slope=negative_slope, alpha=alpha)
        return x
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    specifications = _specifications(activations, negative_slope, alpha)
    if _registry.is_direct(backend, x, *weights, *biases):
        launchers = _registry.kernels(backend, "mlp")
        out = _launch(flat, weights, biases, specifications, backend, launchers)
    else:
        out = torch.ops.aefast.mlp.default(flat, weights, biases, specifications, backend)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out.shape[1])


def _are_plain(x: Any, weights: Any, biases: Any, activations: Any) -> bool:
    if type(x) is not Tensor:
        return False
    for value in (weights, biases, activations):
        if type(value) not in (list, tuple) or len(value) != len(weights):
            return False
    return _registry.PLAIN.issuperset(map(type, (*weights, *biases)))


def _lists(*values: Any) -> list[Any]:
    return [
        list(value) if isinstance(value, Iterable) and not isinstance(value, str | Tensor) else value
        for value in values
    ]


def _check(x: Any, weights: Any, biases: Any, activations: Any) -> None:
    _arguments.check_tensor("x", x, "mlp")
    for name, value in (("weights", weights), ("biases", biases), ("activations", activations)):
        if not isinstance(value, list):
            raise InputError(
                f"mlp: {name} must be a sequence with one entry a layer, got {type(value).__name__}"
            )
    if len(weights) == 0:
        raise InputError("mlp: weights must hold at least one layer, got none")
    for name, value in (("biases", biases), ("activations", activations)):
        if len(value) != len(weights):
            raise InputError(
                f"mlp: {name} must have one entry for each of the {len(weights)} weights, got {len(value)}"
            )
    for layer, (weight, bias, activation) in enumerate(zip(weights, biases, activations, strict=True)):
        _arguments.check_activation(f"activations[{layer}]", activation, "mlp")
        if layer == 0:
            linear_act.check_layer(x, weight, bias, "mlp", "weights[0]", "biases[0]")
            continue
        name = f"weights[{layer}]"
        _arguments.check_tensor(name, weight, "mlp")
        inputs = weights[layer - 1].shape[0]
        if weight.dim() != 2 or weight.shape[1] != inputs:
            raise InputError(
                f"mlp: {name} must be (N, {inputs}) to follow weights[{layer - 1}], "
                f"got shape {_arguments.shape_of(weight)}"
            )
        _arguments.check_like(name, weight, "x", x, "mlp")
        if bias is not None:
            _arguments.check_tensor(f"biases[{layer}]", bias, "mlp")
            if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
                raise InputError(
                    f"mlp: biases[{layer}] must be ({weight.shape[0]},) to match {name}, "
                    f"got shape {_arguments.shape_of(bias)}"
                )
            _arguments.check_like(f"biases[{layer}]", bias, "x", x, "mlp")


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Stacks of one to four layers over the shapes that `linear_act` is sampled at.

    Kinked activations come first in a stack: above other layers, rounding decides which side of the kink
    an element is on, and the gradient's error is that of a coin toss.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    for rows, widths, activations in (
        (0, (5, 3, 2), ("relu", "identity")),
        (1, (1, 1), ("tanh",)),
        (3, (4, 0, 2), ("relu", "gelu")),
        (67, (31, 17), ("gelu",)),
        (33, (13, 8, 29), ("elu", "sigmoid")),
        (129, (64, 32, 7, 32), ("relu", "silu", "identity")),
        (300, (40, 131, 16, 131, 40), ("gelu_tanh", "identity", "elu", "softplus")),
    ):
        yield {
            "x": draw(rows, widths[0]),
            "weights": [draw(n, k) * max(1, k) ** -0.5 for k, n in itertools.pairwise(widths)],
            "biases": [draw(n) if layer != 1 else None for layer, n in enumerate(widths[1:])],
            "activations": list(activations),
        }
    yield {
        "x": draw(4, 48, 3)[:, ::2].transpose(1, 2),
        "weights": [draw(24, 10).t() * 0.2, draw(9, 20)[:, ::2] * 0.3],
        "biases": [draw(20)[::2], draw(1).expand(9)],
        "activations": ["selu", "tanh"],
    }


def cost(
    backward: bool,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    **settings: Any,
) -> _registry.Cost:
    """As for `linear_act`, but that what lies between layers is in memory only if it is saved."""
    rows, size = math.prod(x.shape[:-1]), x.element_size()
    products = sum(weight.numel() for weight in weights)
    parameters = products + sum(bias.numel() for bias in biases if bias is not None)
    outputs = [rows * weight.shape[0] for weight in weights]
    elements = x.numel() + parameters + outputs[-1]
    flops = 2 * rows * products
    exps = sum(EXPS[activation] * output for activation, output in zip(activations, outputs, strict=True))
    if backward:
        stores = [activation in STORES_DERIVATIVE for activation in activations]
        # What the forward saves is written and read; the last output, which it writes anyway, is read if its
        # activation's derivative comes from it.
        elements += 2 * sum(outputs[:-1]) + 2 * sum(itertools.compress(outputs, stores))
        elements += 0 if stores[-1] or activations[-1] == "identity" else outputs[-1]
        elements += outputs[-1] + 2 * x.numel() + products + parameters
        flops *= 3
    return _registry.Cost(elements * size, flops, exps)


OP = _registry.register(_registry.Op("mlp", mlp, reference, samples, cost))
