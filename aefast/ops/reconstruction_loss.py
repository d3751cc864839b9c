"""Losses of a reconstruction: value and gradient in one pass over both tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.ops import _arguments, _loss, _pairwise, _registry
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement
from aefast.ops._loss import Loss


def reference(
    input: Tensor,
    target: Tensor,
    kind: str = "mse",
    *,
    p: float | None = None,
    eps: float = 1e-3,
    delta: float = 1.0,
    reduction: str = "mean",
    loss_weight: float = 1.0,
) -> Tensor:
    """`reconstruction_loss` in plain PyTorch."""
    loss = _loss.loss_of("reconstruction_loss", kind, p, eps, delta)
    if reduction == "none":
        return loss_weight * loss.elements(input, target)
    return loss.total(input, target, *_loss.factor_and_count(loss, reduction, input.shape, loss_weight))


# input and target without gaps, and in the same order of dimensions; kind and parameter as in Loss.
_OPERANDS = "Tensor input, Tensor target, str kind, float parameter"
# factor / count * Σ losses, or its root, a scalar in input's accumulator; and if it is wanted the derivative by input,
# of the value where `_is_folded` and else of Σ losses, in input's dtype and layout; else nothing. `checked`: see the
# public function.
define(
    f"reconstruction_loss({_OPERANDS}, float factor, SymInt count, bool root, bool with_gradient, bool checked, "
    "str backend) -> (Tensor, Tensor)"
)
# The losses, in input's accumulator and layout; and their gradient times factor / count, for a grad that is a scalar or
# of input's layout.
define(f"reconstruction_loss_elements({_OPERANDS}, bool checked, str backend) -> Tensor")
define(
    f"reconstruction_loss_backward(Tensor grad, {_OPERANDS}, float factor, SymInt count, str backend) -> Tensor"
)


def _is_folded(root: bool, backend: str, dtype: torch.dtype) -> bool:
    """Whether the gradient that is kept is complete. That of a root depends on the value."""
    return not root and _loss.is_folded(backend, dtype)


@implement("reconstruction_loss")
def _reduced(input, target, kind, parameter, factor, count, root, with_gradient, checked, backend):
    normalizer = _loss.normalizer_of(factor, count)
    scale = normalizer if _is_folded(root, backend, input.dtype) else 1.0
    return _registry.kernels(backend, "reconstruction_loss").reconstruction_loss(
        input, target, kind, parameter, normalizer, root, scale, with_gradient, checked
    )


@implement("reconstruction_loss_elements")
def _(*arguments):
    *arguments, backend = arguments
    return _registry.kernels(backend, "reconstruction_loss").reconstruction_loss_elements(*arguments)


@implement("reconstruction_loss_backward")
def _reduced_backward(grad, input, target, kind, parameter, factor, count, backend):
    return _registry.kernels(backend, "reconstruction_loss").reconstruction_loss_backward(
        grad, input, target, kind, parameter, _loss.normalizer_of(factor, count)
    )


@torch.library.register_fake("aefast::reconstruction_loss", lib=LIBRARY)
def _(input, target, kind, parameter, factor, count, root, with_gradient, checked, backend):
    value = input.new_empty((), dtype=_arguments.accumulator(input.dtype))
    return value, torch.empty_like(input) if with_gradient else input.new_empty(0)


@torch.library.register_fake("aefast::reconstruction_loss_elements", lib=LIBRARY)
def _(input, target, kind, parameter, checked, backend):
    return torch.empty_like(input, dtype=_arguments.accumulator(input.dtype))


@torch.library.register_fake("aefast::reconstruction_loss_backward", lib=LIBRARY)
def _(grad, input, target, kind, parameter, factor, count, backend):
    return torch.empty_like(input)


def _derivative(
    grad: Tensor, input: Tensor, target: Tensor, loss: Loss, factor: float, count: int, backend: str
) -> Tensor:
    """factor / count * grad * the derivative by input, for grad a scalar or of input's shape."""
    if grad.dim() > 0:
        grad = _loss.as_laid_out(grad, input)
    arguments = (grad, input, target, loss.kind, loss.parameter, factor, count, backend)
    if _registry.is_direct(backend, grad, input, target):
        return _reduced_backward(*arguments)
    return torch.ops.aefast.reconstruction_loss_backward.default(*arguments)


def _of_target(
    by_input: Tensor | None, loss: Loss, function: Any, input: Tensor, target: Tensor, grad: Tensor
) -> Tensor:
    """The gradient of the target, given the input's where the loss is of their difference."""
    if loss.is_penalty:
        return -by_input
    _, by_target = _registry.differentiate(function, (input, target), (False, True), grad)
    return by_target.detach()


class _Reduced(torch.autograd.Function):
    """A scalar; `call` is (loss, factor, count, backend, whether launchers may be called at once)."""

    @staticmethod
    def forward(ctx, input, target, call):
        loss, factor, count, backend, is_direct = call
        wants = ctx.needs_input_grad[0] or loss.is_penalty
        # Twice a residual may be beyond float16. To read the operands again costs what writing and reading it would.
        is_held = loss.kind != "mse" or input.dtype != torch.float16
        keeps = wants and is_held and loss.is_kept(input.dtype)
        arguments = (
            *(input, target, loss.kind, loss.parameter, factor, count, loss.root),
            *(keeps, is_direct, backend),
        )
        if is_direct:
            value, gradient = _reduced(*arguments)
        else:
            with below_autograd():
                value, gradient = torch.ops.aefast.reconstruction_loss.default(*arguments)
        ctx.save_for_backward(
            input, target, gradient if keeps else None, value.detach() if loss.root else None
        )
        ctx.call = loss, factor, count, backend
        return value

    @staticmethod
    def backward(ctx, grad):
        loss, factor, count, backend = ctx.call
        input, target, gradient, value = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]

        def function(input: Tensor, target: Tensor) -> Tensor:
            return loss.total(input, target, factor, count)

        if _registry.wants_reference(grad):
            return *_registry.differentiate(function, (input, target), needs, grad), None
        missing, upstream = (factor, count), grad
        if value is not None:
            missing = 0.5 * factor, count
            upstream = torch.where(value == 0, 0.0, grad / value)
        by_input = by_target = None
        if gradient is not None:
            if _is_folded(loss.root, backend, gradient.dtype):
                missing = 1.0, 1
            by_input = _loss.scaled(gradient, upstream, *missing, backend)
        elif needs[0] or loss.is_penalty:
            by_input = _derivative(upstream, input, target, loss, *missing, backend)
        if needs[1]:
            by_target = _of_target(by_input, loss, function, input, target, grad)
        return by_input if needs[0] else None, by_target, None


class _Elements(torch.autograd.Function):
    """Of input's shape; `call` is (loss, backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, input, target, call):
        loss, backend, launchers = call
        ctx.save_for_backward(input, target)
        ctx.call = call
        arguments = (input, target, loss.kind, loss.parameter, launchers is not None)
        if launchers is not None:
            return launchers.reconstruction_loss_elements(*arguments)
        with below_autograd():
            return torch.ops.aefast.reconstruction_loss_elements.default(*arguments, backend)

    @staticmethod
    def backward(ctx, grad):
        loss, backend, _ = ctx.call
        input, target = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if _registry.wants_reference(grad):
            return *_registry.differentiate(loss.elements, (input, target), needs, grad), None
        by_input = by_target = None
        if needs[0] or loss.is_penalty:
            by_input = _derivative(grad, input, target, loss, 1.0, 1, backend)
        if needs[1]:
            by_target = _of_target(by_input, loss, loss.elements, input, target, grad)
        return by_input if needs[0] else None, by_target, None


_apply_reduced = direct_apply(_Reduced)
_apply_elements = direct_apply(_Elements)


@torch.library.impl(LIBRARY, "reconstruction_loss", "Autograd")
def _(input, target, kind, parameter, factor, count, root, with_gradient, checked, backend):
    """The value's gradient is autograd's, and none is returned beside it."""
    loss = Loss(kind, parameter, root)
    if _registry.is_transformed():
        value = loss.total(input, target, factor, count)
    elif _registry.needs_gradient(input, target):
        value = _Reduced.apply(input, target, (loss, factor, count, backend, False))
    else:
        with below_autograd():
            return torch.ops.aefast.reconstruction_loss.default(
                input, target, kind, parameter, factor, count, root, with_gradient, checked, backend
            )
    return value, input.new_empty(0)


@torch.library.impl(LIBRARY, "reconstruction_loss_elements", "Autograd")
def _(input, target, kind, parameter, checked, backend):
    loss = Loss(kind, parameter)
    if _registry.is_transformed():
        return loss.elements(input, target)
    if _registry.needs_gradient(input, target):
        return _Elements.apply(input, target, (loss, backend, None))
    with below_autograd():
        return torch.ops.aefast.reconstruction_loss_elements.default(
            input, target, kind, parameter, checked, backend
        )


def _check_range(loss: Loss, input: Tensor, target: Tensor) -> None:
    """That probabilities are from 0 to 1."""
    for name, value in (("input", input), ("target", target)):
        if loss.is_penalty or (name == "input" and loss.kind != "bce"):
            continue
        outside = (value < 0) | (value > 1)
        if outside.any():
            raise _loss.range_error("reconstruction_loss", name, loss.kind, value[outside])


def _eager(input: Tensor, target: Tensor, loss: Loss, fraction: tuple[float, int] | None) -> Tensor:
    if input.is_cpu and not _registry.is_watched():
        _check_range(loss, input, target)
    return loss.elements(input, target) if fraction is None else loss.total(input, target, *fraction)


def _launch(
    input: Tensor, target: Tensor, loss: Loss, fraction: tuple[float, int] | None, backend: str
) -> Tensor:
    is_direct = _registry.is_direct(backend, input, target)
    if not is_direct and torch.jit.is_tracing():
        # Of the op the tracer would keep this example's count and layout.
        return _eager(input, target, loss, fraction)
    input, target = _loss.in_one_layout(input, target)
    if fraction is None:
        launchers = _registry.kernels(backend, "reconstruction_loss") if is_direct else None
        if launchers is not None and _registry.needs_gradient(input, target):
            return _apply_elements(input, target, (loss, backend, launchers))
        arguments = (input, target, loss.kind, loss.parameter, is_direct)
        if launchers is not None:
            return launchers.reconstruction_loss_elements(*arguments)
        return torch.ops.aefast.reconstruction_loss_elements.default(*arguments, backend)
    if is_direct and _registry.needs_gradient(input, target):
        return _apply_reduced(input, target, (loss, *fraction, backend, True))
    arguments = (input, target, loss.kind, loss.parameter, *fraction, loss.root, False, is_direct, backend)
    if is_direct:
        return _reduced(*arguments)[0]
    return torch.ops.aefast.reconstruction_loss.default(*arguments)[0]


def reconstruction_loss(
    input: Tensor,
    target: Tensor,
    kind: str = "mse",
    *,
    p: float | None = None,
    eps: float = 1e-3,
    delta: float = 1.0,
    reduction: str = "mean",
    loss_weight: float = 1.0,
) -> Tensor:
    """How far a reconstruction is from what it was made of.

    With r = input - target, the loss of an element is

    - "mse": r²; "rmse" is the root of what "mse" gives, by default of the mean over all elements;
    - "l1": |r|;
    - "huber": r² / 2 where |r| <= delta, else delta (|r| - delta / 2) (Huber, Annals of Mathematical Statistics 35,
      1964);
    - "lp": |r|^p, of which no root is taken;
    - "charbonnier": √(r² + eps²) (Charbonnier et al., ICIP 1994); an eps below 1e-18 counts as 0;
    - "bce": -(target log(input) + (1 - target) log(1 - input)), of probabilities; as in
      ``torch.nn.functional.binary_cross_entropy`` logarithms count as -100 at least, and the derivative's
      denominator as 1e-12;
    - "bce_with_logits": the same with sigmoid(input) in the place of input, at any input.

    Value and gradient come out of one pass over input and target; both are saved, and must not be modified in place
    before the backward. The gradient of "l1" and "lp" at r = 0 is 0, and so is that of "rmse" where all r are 0. On the
    CPU the gradient of a float32 or float64 loss that is itself what ``backward()`` is called on is the buffer that
    the forward has filled: with ``retain_graph=True``, modifying a gradient that ``torch.autograd.grad`` returned makes
    the next backward an error.

    Args:
        input: the reconstruction, of any shape: float32, bfloat16, float16 or float64, any strides. Half precision is
            computed in float32. Under autocast input and target may differ in dtype.
        target: the shape, dtype and device of input.
        kind: one of the names above.
        p: of lp, at least 1; other kinds have none.
        eps: of charbonnier, at least 0, in units of input.
        delta: of huber, above 0, in units of input.
        reduction: "mean" over all elements; "sum"; "batchmean", the sum divided by the size of the first dimension, as
            the evidence lower bound has it; "none" for the loss of each element, which rmse has not.
        loss_weight: at least 0, what the result is multiplied by. A product with the result would have the gradient
            written once more.

    Returns:
        A scalar, or for "none" input's shape; in float32 for half precision. A mean of nothing is NaN.

    Raises:
        InputError: a shape, dtype, device, name or number is not as above; on the CPU in eager mode, bce's input or
            either bce's target is not from 0 to 1, or an operand that is not finite makes a scalar NaN. The message
            names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(input, target) and _arguments.are_stand_ins(input, target):
        return _arguments.deferred(reconstruction_loss, locals())
    loss = _loss.loss_of("reconstruction_loss", kind, p, eps, delta)
    _loss.check_reduction("reconstruction_loss", reduction)
    _loss.check_weight("reconstruction_loss", loss_weight)
    _loss.check_pair("reconstruction_loss", input, target)
    if input.dtype != target.dtype:
        input, target = _pairwise.without_autocast(input, target)
    _arguments.check_like("target", target, "input", input, "reconstruction_loss")
    if reduction == "none" and loss.root:
        raise InputError("reconstruction_loss: reduction must be mean, sum or batchmean for rmse, got 'none'")
    if reduction == "batchmean" and input.dim() == 0:
        raise InputError(
            "reconstruction_loss: input must have at least one dimension for batchmean, got a scalar"
        )
    is_reduced = reduction != "none"
    fraction = _loss.factor_and_count(loss, reduction, input.shape, loss_weight) if is_reduced else None
    backend = _registry.choose("reconstruction_loss", input, target)
    if backend == "eager":
        value = _eager(input, target, loss, fraction)
    else:
        try:
            value = _launch(input, target, loss, fraction, backend)
        except RuntimeError:
            # The kernel has come upon numbers that are no probabilities; it does not say which.
            if not input.is_cpu or _registry.is_watched():
                raise
            _check_range(loss, input, target)
            raise
    if is_reduced:
        _loss.check_finite("reconstruction_loss", value, input=input, target=target)
        return value
    return value if loss_weight == 1.0 else loss_weight * value


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every kind and reduction over shapes and strides: empty, scalar, one, prime, more than a task; images in memory
    order, operands in different layouts, with gaps and expanded; residuals of 0; weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def pair(kind: str, *shape: int) -> dict[str, Any]:
        first, second = draw(*shape), draw(*shape)
        if kind.startswith("bce"):
            second = second.sigmoid()
        if kind == "bce":
            first = first.sigmoid()
        return {"input": first.to(device, dtype), "target": second.to(device, dtype), "kind": kind}

    variants: list[tuple[str, dict[str, Any]]] = [
        *((kind, {}) for kind in _loss.KINDS if kind != "lp"),
        *(("lp", {"p": p}) for p in (1, 1.5, 2, 3.5)),
        ("huber", {"delta": 0.3}),
        ("charbonnier", {"eps": 0.7}),
    ]
    for kind, options in variants:
        yield {**pair(kind, 31, 17), **options}
        yield {**pair(kind, 5, 3, 7), **options, "reduction": "sum"}
        yield {**pair(kind, 3, 4099), **options, "reduction": "batchmean"}
        yield {**pair(kind, 1), **options}
        if kind != "rmse":
            yield {**pair(kind, 7, 13), **options, "reduction": "none"}
            yield {**pair(kind), **options, "reduction": "none"}
    for kind, reduction in (("rmse", "mean"), ("l1", "batchmean"), ("huber", "none")):
        yield {**pair(kind, 7, 13), "reduction": reduction, "loss_weight": 2.5}
    for shape, reduction in (((0,), "sum"), ((4, 0), "batchmean"), ((0, 3), "none")):
        yield {**pair("mse", *shape), "reduction": reduction}
    images = pair("l1", 2, 3, 5, 4)
    permuted = {name: images[name].to(memory_format=torch.channels_last) for name in ("input", "target")}
    for reduction in ("mean", "none"):
        yield {**images, **permuted, "reduction": reduction}
        yield {**images, "input": permuted["input"], "reduction": reduction}
        yield {**images, "target": permuted["target"], "reduction": reduction}
    strided = pair("huber", 18, 66)
    yield {**strided, "input": strided["input"].t()[::2], "target": strided["target"].t()[::2]}
    yield {**pair("mse", 9, 12), "target": pair("mse", 1, 12)["target"].expand(9, 12), "reduction": "sum"}
    same = pair("l1", 6, 5)
    same["target"][::2] = same["input"][::2]
    for kind in ("l1", "huber", "charbonnier", "mse"):
        yield {**same, "kind": kind}
    yield {**same, "kind": "lp", "p": 1.25}
    # Where logarithms are cut off, and where those of sigmoids would be.
    edges = {"input": [0.0, 1.0, 0.0, 1.0, 0.5], "target": [0.0, 1.0, 1.0, 0.0, 1.0]}
    edges = {name: torch.tensor(values, device=device, dtype=dtype) for name, values in edges.items()}
    yield {**edges, "kind": "bce_with_logits", "input": 60 * (edges["input"] - 0.5)}


def cost(
    backward: bool, input: Tensor, target: Tensor, kind: str = "mse", reduction: str = "mean", **settings: Any
) -> _registry.Cost:
    """Both operands are read once, and the gradient is written in the same pass; but each pass of "none" reads both,
    and its losses and their gradient are as large. Cross-entropies take two of exponential and logarithm."""
    count, size = input.numel(), input.element_size()
    moved = (2 + backward) * count * size
    if reduction == "none":
        moved += (backward * 2 * size + (1 + backward) * _arguments.accumulator(input.dtype).itemsize) * count
    return _registry.Cost(moved, 0, count * {"lp": 2, "bce": 2, "bce_with_logits": 2}.get(kind, 0))


OP = _registry.register(_registry.Op("reconstruction_loss", reconstruction_loss, reference, samples, cost))
