"""The last dense layer of a decoder and the loss of what it gives, of which only a part exists at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.kernels.activation import NEED_BIAS, NEED_WEIGHT, NEED_X, STORES_DERIVATIVE, specification
from aefast.ops import _arguments, _loss, _registry, linear_act, reconstruction_loss
from aefast.ops._flops import counted, of_layer, wanted
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement
from aefast.ops._loss import Loss

REDUCTIONS = ("mean", "sum", "batchmean")

# Elements of the reconstruction that exist at a time, with their gradients: products of them are still long, and a few
# times as many bytes fit a last-level cache.
_PART = 1 << 22


def reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    kind: str = "mse",
    *,
    output_activation: str = "identity",
    reduction: str = "mean",
    p: float | None = None,
    eps: float = 1e-3,
    delta: float = 1.0,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    loss_weight: float = 1.0,
) -> Tensor:
    """`linear_reconstruction_loss` in plain PyTorch."""
    loss = _loss.loss_of("linear_reconstruction_loss", kind, p, eps, delta)
    activation = specification(output_activation, negative_slope, alpha)
    fraction = _loss.factor_and_count(loss, reduction, target.shape, loss_weight)
    return _reference(h, weight, bias, target, activation, loss, *fraction)


def _reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    activation: str,
    loss: Loss,
    factor: float,
    count: int,
) -> Tensor:
    output = linear_act.specified_reference(h, weight, bias, activation)
    return loss.total(output, target, factor, count)


# h (M, K), weight (N, K), bias (N,), target (M, N), in h's dtype or its accumulator; activation and needs as in
# kernels/activation.py, kind and parameter as in Loss. factor / count * Σ losses, a scalar in the accumulator; and what
# is kept of the gradients of h, weight and bias, in their dtype, of no elements where they are not wanted: those of the
# value where `_loss.is_folded`, else `_scale_of` times those of Σ losses.
define(
    "linear_reconstruction_loss(Tensor h, Tensor weight, Tensor? bias, Tensor target, str activation, str kind, "
    "float parameter, float factor, SymInt count, int needs, bool checked, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
# A gradient of the value times grad, a scalar, of what is kept where it is not folded, `rows` being those of h.
define(
    "linear_reconstruction_loss_backward(Tensor gradient, Tensor grad, float factor, SymInt count, SymInt rows, "
    "str backend) -> Tensor"
)


@implement("linear_reconstruction_loss")
def _(*arguments):
    return _sweep(*arguments)


@implement("linear_reconstruction_loss_backward")
def _unscaled(gradient, grad, factor, count, rows, backend):
    missing = _loss.normalizer_of(factor, count) / _scale_of(gradient.dtype, rows)
    return _registry.kernels(backend, "loss_gradient").loss_gradient(gradient, grad, missing)


@torch.library.register_fake("aefast::linear_reconstruction_loss", lib=LIBRARY)
def _(h, weight, bias, target, activation, kind, parameter, factor, count, needs, checked, backend):
    value = h.new_empty((), dtype=_arguments.accumulator(h.dtype))
    operands = ((h, NEED_X), (weight, NEED_WEIGHT), (bias, NEED_BIAS))
    return value, *(h.new_empty(one.shape if needs & need else (0,)) for one, need in operands)


@torch.library.register_fake("aefast::linear_reconstruction_loss_backward", lib=LIBRARY)
def _(gradient, grad, factor, count, rows, backend):
    return torch.empty_like(gradient)


@counted("linear_reconstruction_loss")
def _(h, weight, bias, target, activation, kind, parameter, factor, count, needs, checked, backend):
    # The gradients come in the forward.
    return (1 + wanted(needs)) * of_layer(h, weight)


def _sweep(
    h, weight, bias, target, activation, kind, parameter, factor, count, needs, checked, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op is defined to give, by parts: of the rows, or where there are more of them of the features, so that
    the gradients that parts have in common are the smaller."""
    normalizer = _loss.normalizer_of(factor, count)
    scale = normalizer if _loss.is_folded(backend, h.dtype) else _scale_of(h.dtype, h.shape[0])
    if backend == "cpu":
        return _registry.kernels(backend, "linear_reconstruction_loss").linear_reconstruction_loss(
            *(h, weight, bias, target, activation, kind, parameter, normalizer, scale, needs, checked, _PART)
        )
    dense = _registry.kernels(backend, "linear_act")
    losses = _registry.kernels(backend, "reconstruction_loss")
    rows, features = target.shape
    by_rows = rows >= features
    whole = rows if by_rows else features
    # The parts depend on the shape alone, and so do all sums.
    length = min(max(64, _PART // max(1, min(rows, features)) // 64 * 64), max(1, whole))
    values: list[Tensor] = []
    is_in_parts = whole > length
    gradients = [
        _Gradient(needs & NEED_X, h, by_rows, is_in_parts),
        _Gradient(needs & NEED_WEIGHT, weight, not by_rows, is_in_parts),
        _Gradient(needs & NEED_BIAS, h if bias is None else bias, not by_rows, is_in_parts),
    ]
    for first in range(0, whole, length):
        part = slice(first, first + length)
        some_h, some_target = (h[part], target[part]) if by_rows else (h, target[:, part])
        layer = (weight, bias) if by_rows else (weight[part], None if bias is None else bias[part])
        output, derivative = dense.linear_act(some_h, *layer, activation, needs > 0)
        wide = output.to(target.dtype)
        value, upstream = losses.reconstruction_loss(
            *(wide, some_target.contiguous(), kind, parameter, 1.0, False, scale, needs > 0, checked)
        )
        values.append(value)
        if needs:
            saved = derivative if activation in STORES_DERIVATIVE else output
            found = dense.linear_act_backward(
                *(upstream.to(h.dtype), some_h, layer[0], saved, activation, needs)
            )
            for gradient, of_part in zip(gradients, found, strict=True):
                gradient.take(part, of_part)
    wide = _arguments.accumulator(h.dtype)
    total = torch.stack(values).sum(dtype=torch.float64) if values else h.new_zeros((), dtype=torch.float64)
    return (total * normalizer).to(wide), *(gradient.whole() for gradient in gradients)


class _Gradient:
    """Of an operand, from those of parts: of which each has rows of its own, or all a share in the sum."""

    def __init__(self, is_wanted: int, operand: Tensor, has_own_rows: bool, is_in_parts: bool) -> None:
        self._is_wanted = bool(is_wanted)
        self._operand = operand
        self._has_own_rows = has_own_rows
        self._is_in_parts = is_in_parts
        self._found: Tensor | None = None

    def take(self, part: slice, found: Tensor | None) -> None:
        if not self._is_wanted:
            return
        if not self._is_in_parts:
            self._found = found
        elif self._has_own_rows:
            if self._found is None:
                self._found = self._operand.new_empty(self._operand.shape)
            self._found[part] = found
        elif self._found is None:
            # Sums of what half precision holds are kept in float32.
            self._found = found.to(_arguments.accumulator(found.dtype))
        else:
            self._found += found

    def whole(self) -> Tensor:
        if not self._is_wanted:
            return self._operand.new_empty(0)
        if self._found is None:
            return self._operand.new_zeros(self._operand.shape)
        return self._found.to(self._operand.dtype)


def _scale_of(dtype: torch.dtype, rows: int) -> float:
    """Of gradients that are kept. Those of weight and bias are sums over the rows of h, of which float16 would hold
    neither such sums of derivatives as they are nor derivatives divided by the number of rows."""
    if dtype.itemsize > 2:
        return 1.0
    return 2.0 ** -round(0.5 * math.log2(max(1, rows)))


class _LinearReconstructionLoss(torch.autograd.Function):
    """`call` is (activation, loss, factor, count, whether probabilities are checked, backend)."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, call):
        activation, loss, factor, count, checked, backend = call
        bits = zip((NEED_X, NEED_WEIGHT, NEED_BIAS), ctx.needs_input_grad, strict=False)
        needs = sum(bit for bit, need in bits if need)
        arguments = (
            *(h, weight, bias, target, activation, loss.kind, loss.parameter, factor, count),
            *(needs, checked, backend),
        )
        if _registry.is_direct(backend, h, weight, bias, target):
            value, *gradients = _sweep(*arguments)
        else:
            with below_autograd():
                value, *gradients = torch.ops.aefast.linear_reconstruction_loss.default(*arguments)
        ctx.save_for_backward(h, weight, bias, target, *gradients)
        ctx.call = activation, loss, factor, count, backend
        return value

    @staticmethod
    def backward(ctx, grad):
        activation, loss, factor, count, backend = ctx.call
        h, weight, bias, target, *gradients = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if needs[3] or _registry.wants_reference(grad):

            def function(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
                return _reference(h, weight, bias, target, activation, loss, factor, count)

            return *_registry.differentiate(function, (h, weight, bias, target), needs, grad), None

        def whole(gradient: Tensor) -> Tensor:
            if _loss.is_folded(backend, h.dtype):
                return _loss.scaled(gradient, grad, 1.0, 1, backend)
            arguments = (gradient, grad, factor, count, h.shape[0], backend)
            if _registry.is_direct(backend, gradient, grad):
                return _unscaled(*arguments)
            return torch.ops.aefast.linear_reconstruction_loss_backward.default(*arguments)

        return (
            *(whole(one) if need else None for one, need in zip(gradients, needs, strict=False)),
            None,
            None,
        )


_apply = direct_apply(_LinearReconstructionLoss)


@torch.library.impl(LIBRARY, "linear_reconstruction_loss", "Autograd")
def _(h, weight, bias, target, activation, kind, parameter, factor, count, needs, checked, backend):
    """The value's gradients are autograd's, and none are returned beside it."""
    operands = (h, weight, bias, target)
    loss = Loss(kind, parameter)
    if _registry.is_transformed():
        value = _reference(*operands, activation, loss, factor, count)
    elif _registry.needs_gradient(*operands):
        call = (activation, loss, factor, count, checked, backend)
        value = _LinearReconstructionLoss.apply(*operands, call)
    else:
        with below_autograd():
            return torch.ops.aefast.linear_reconstruction_loss.default(
                *operands, activation, kind, parameter, factor, count, needs, checked, backend
            )
    return value, *(h.new_empty(0) for _ in range(3))


def linear_reconstruction_loss(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    kind: str = "mse",
    *,
    output_activation: str = "identity",
    reduction: str = "mean",
    p: float | None = None,
    eps: float = 1e-3,
    delta: float = 1.0,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    loss_weight: float = 1.0,
) -> Tensor:
    """``reconstruction_loss(linear_act(h, weight, bias, output_activation), target, kind)`` without the reconstruction.

    It is made in parts of some millions of elements. Each is compared with its part of the target, and where gradients
    are wanted is differentiated at once, so that the forward does the work of both passes and nothing of the
    reconstruction's size is kept. The gradients of h, weight and bias are; none of the four operands may be modified in
    place before the backward.

    Args:
        h: (*, K), what the layer is given: float32, bfloat16, float16 or float64, any strides.
        weight: (N, K), the dtype and device of h.
        bias: (N,) or None.
        target: (*, N), what the layer's output is compared with; the dtype and device of h, under autocast any dtype.
            Where it requires a gradient, and in half precision for lp and bce, the two ops run one after the other.
        kind: "mse", "rmse", "l1", "huber", "lp", "charbonnier", "bce" (which takes an activation that gives
            probabilities) or "bce_with_logits", as `reconstruction_loss` defines them.
        output_activation: the layer's, as `linear_act` has them.
        reduction: "mean" over all elements; "sum"; "batchmean", the sum divided by the size of the first dimension.
        p, eps, delta: of the loss, as in `reconstruction_loss`.
        negative_slope, alpha: of the activation, as in `linear_act`.
        loss_weight: at least 0, what the result is multiplied by.

    Returns:
        A scalar, in float32 for half precision. A mean of nothing is NaN, and has the gradients 0.

    Raises:
        InputError: a shape, dtype, device, name or number is not as above; on the CPU in eager mode, bce's target or
            probabilities are not from 0 to 1, or an operand that is not finite makes the loss NaN. The message names
            it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(h, weight, bias, target) and _arguments.are_stand_ins(
        h, weight, bias, target
    ):
        return _arguments.deferred(linear_reconstruction_loss, locals())
    loss = _loss.loss_of("linear_reconstruction_loss", kind, p, eps, delta)
    _loss.check_reduction("linear_reconstruction_loss", reduction, REDUCTIONS)
    _loss.check_weight("linear_reconstruction_loss", loss_weight)
    _arguments.check_activation("output_activation", output_activation, "linear_reconstruction_loss")
    _arguments.check_activation_parameter(
        output_activation, negative_slope, alpha, "linear_reconstruction_loss"
    )
    h, weight, bias = _arguments.autocast(h, weight, bias)
    linear_act.check_layer(h, weight, bias, "linear_reconstruction_loss", "weight", "bias", "h")
    _check_target(target, h, weight)
    activation = specification(output_activation, negative_slope, alpha)
    fraction = _loss.factor_and_count(loss, reduction, target.shape, loss_weight)
    backend = _registry.choose("linear_reconstruction_loss", h, weight, bias, target)
    # Under autocast a target may be of any dtype.
    is_known = target.dtype in (h.dtype, _arguments.accumulator(h.dtype))
    # A mean of nothing is NaN, and gradients that were to be multiplied by its normaliser would be.
    is_apart = (
        _registry.needs_gradient(target) or not loss.is_kept(h.dtype) or not is_known or target.numel() == 0
    )
    if backend == "eager" or is_apart:
        output = linear_act.linear_act(
            h, weight, bias, output_activation, negative_slope=negative_slope, alpha=alpha
        )
        wide = torch.promote_types(output.dtype, target.dtype)
        if output.is_cpu and not loss.is_penalty and not _registry.is_watched():
            probabilities = [output, target] if loss.kind == "bce" else [target]
            if any(_is_outside(one).any() for one in probabilities):
                raise _range_error(loss, target, output_activation)
        return reconstruction_loss.reconstruction_loss(
            *(output.to(wide), target.to(wide), kind),
            p=p,
            eps=eps,
            delta=delta,
            reduction=reduction,
            loss_weight=loss_weight,
        )
    rows = math.prod(h.shape[:-1])
    operands = (h.reshape(rows, h.shape[-1]), weight, bias, target.reshape(rows, weight.shape[0]))
    plain = dataclasses.replace(loss, root=False)
    try:
        value = _launch(*operands, activation, plain, fraction, backend)
    except RuntimeError:
        # Where the kernel has come upon numbers that are no probabilities, it does not say which.
        if loss.is_penalty or not h.is_cpu or _registry.is_watched():
            raise
        probabilities = [target]
        if loss.kind == "bce":
            with torch.no_grad():
                probabilities.append(
                    linear_act.linear_act(
                        h, weight, bias, output_activation, negative_slope=negative_slope, alpha=alpha
                    )
                )
        if not any(_is_outside(one).any() for one in probabilities):
            raise
        raise _range_error(plain, target, output_activation) from None
    biases = {} if bias is None else {"bias": bias}
    _loss.check_finite("linear_reconstruction_loss", value, h=h, weight=weight, **biases, target=target)
    if not loss.root:
        return value
    is_zero = value == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, value).sqrt())


def _launch(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    activation: str,
    loss: Loss,
    fraction: tuple[float, int],
    backend: str,
) -> Tensor:
    operands = (h, weight, bias, target)
    is_direct = _registry.is_direct(backend, *operands)
    if is_direct and _registry.needs_gradient(*operands):
        return _apply(*operands, (activation, loss, *fraction, True, backend))
    arguments = (*operands, activation, loss.kind, loss.parameter, *fraction, 0, is_direct, backend)
    if is_direct:
        return _sweep(*arguments)[0]
    if torch.jit.is_tracing():
        # Of the op the tracer would keep this example's count.
        return _reference(*operands, activation, loss, *fraction)
    return torch.ops.aefast.linear_reconstruction_loss.default(*arguments)[0]


def _check_target(target: Any, h: Tensor, weight: Tensor) -> None:
    op = "linear_reconstruction_loss"
    _arguments.check_tensor("target", target, op)
    _arguments.check_floating("target", target, op)
    _arguments.check_dense("target", target, op)
    expected = (*h.shape[:-1], weight.shape[0])
    if tuple(target.shape) != expected:
        raise InputError(
            f"{op}: target must be {expected} to match h of shape {_arguments.shape_of(h)} and weight of shape "
            f"{_arguments.shape_of(weight)}, got shape {_arguments.shape_of(target)}"
        )
    is_autocast = _arguments.is_autocast(h.device.type)
    # Of a cast target no more is made than what the check reads.
    _arguments.check_like("target", target[:0].to(h.dtype) if is_autocast else target, "h", h, op)


def _is_outside(probabilities: Tensor) -> Tensor:
    return (probabilities < 0) | (probabilities > 1)


def _range_error(loss: Loss, target: Tensor, output_activation: str) -> InputError:
    """Of numbers that are no probabilities: those of the target, or else those that the layer gives."""
    outside = _is_outside(target)
    if outside.any():
        return _loss.range_error("linear_reconstruction_loss", "target", loss.kind, target[outside])
    return InputError(
        "linear_reconstruction_loss: output_activation must give numbers from 0 to 1 for bce, as sigmoid does, "
        f"got {output_activation!r}, which gave others"
    )


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every kind over layers and reductions: empty, one-wide, prime and strided ones, wide and long ones, with and
    without a bias, and leading dimensions."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def layer(rows: int, inputs: int, features: int, kind: str = "mse", **options: Any) -> dict[str, Any]:
        target = draw(rows, features)
        if kind in ("l1", "charbonnier"):
            # No residual is so close to 0 that rounding to half precision decides its sign.
            target[:, ::2] += 9.0
            target[:, 1::2] -= 9.0
        operands = {
            "h": draw(rows, inputs),
            "weight": draw(features, inputs) * max(1, inputs) ** -0.5,
            "bias": draw(features),
            "target": target.sigmoid() if kind.startswith("bce") else target,
        }
        cast = {name: one.to(device, dtype) for name, one in operands.items()}
        return {**cast, "kind": kind, **options}

    for kind in _loss.KINDS:
        options = {"lp": {"p": 1.5}, "bce": {"output_activation": "sigmoid"}}.get(kind, {})
        yield layer(31, 17, 29, kind, **options)
        yield layer(37, 5, 11, kind, reduction="sum", **options)
    for activation in ("elu", "silu", "tanh", "softplus"):
        yield layer(23, 13, 41, output_activation=activation, reduction="batchmean")
    yield layer(40, 6, 300, "huber", delta=0.5)
    yield layer(300, 6, 40, "charbonnier", output_activation="gelu", eps=0.1)
    yield layer(19, 7, 23, "rmse", loss_weight=0.5)
    yield layer(1, 1, 1)
    yield layer(7, 3, 1, "huber")
    yield layer(1, 24, 130)
    yield layer(0, 5, 3, reduction="sum")
    yield layer(4, 5, 0, reduction="sum")
    yield {**layer(6, 24, 16), "bias": None}
    cube = layer(30, 24, 16, "bce_with_logits")
    yield {**cube, "h": cube["h"].reshape(5, 6, 24), "target": cube["target"].reshape(5, 6, 16)}
    strided = layer(66, 40, 48, "huber")
    transposed = {name: strided[name].t().contiguous().t() for name in ("h", "weight", "target")}
    yield {**strided, **transposed, "bias": strided["bias"].repeat_interleave(2)[::2]}


def cost(
    backward: bool,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    kind: str = "mse",
    **settings: Any,
) -> _registry.Cost:
    """Each operand is read once and each gradient written once; the products are all the operations that count."""
    inputs, features = weight.shape[1], weight.shape[0]
    rows = math.prod(h.shape[:-1])
    own = h.numel() + weight.numel() + (0 if bias is None else features)
    elements = target.numel() + own * (1 + backward)
    return _registry.Cost(
        elements * h.element_size(), 2 * rows * features * inputs * (3 if backward else 1), 0
    )


OP = _registry.register(
    _registry.Op(
        "linear_reconstruction_loss",
        linear_reconstruction_loss,
        reference,
        samples,
        cost,
        launchers="reconstruction_loss",
    )
)
