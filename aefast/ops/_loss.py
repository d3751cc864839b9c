"""What reconstruction losses have in common: their kinds, and gradients that a forward keeps for the backward.

The value of a loss and its gradient come out of one pass. On the CPU, in float32 and float64, the gradient is complete
then, and handed on as it is where the loss is what is differentiated. Elsewhere what is kept lacks the normaliser,
such as 1/N: divided by it, gradients in half precision would be too small to have all of their digits. `scaled` puts
it in, together with the gradient of the loss.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aefast.errors import InputError
from aefast.ops import _arguments, _pairwise, _registry
from aefast.ops._library import LIBRARY, define, implement

KINDS = ("mse", "rmse", "l1", "huber", "lp", "charbonnier", "bce", "bce_with_logits")
REDUCTIONS = ("mean", "sum", "batchmean", "none")
# An eps of charbonnier below counts as 0: its square, and that of residuals beside it, would be no float32.
_LEAST_EPS = 1e-18


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of single elements, as launchers are told of it, and whether the root of its mean is taken.

    With r = input - target: "mse" r²; "l1" |r|; "huber" r² / 2 up to delta and delta (|r| - delta / 2) beyond; "lp"
    |r|^p; "charbonnier" √(r² + eps²); "bce" and "bce_with_logits" as PyTorch has them. `parameter` is delta, p, which
    is neither 1 nor 2, or eps, which is above 0.
    """

    kind: str
    parameter: float = 0.0
    root: bool = False

    @property
    def is_penalty(self) -> bool:
        """Whether it is a function of input - target alone."""
        return not self.kind.startswith("bce")

    def is_kept(self, dtype: torch.dtype) -> bool:
        """Whether `dtype` holds the derivative, without a normaliser, of residuals of up to half its largest number.

        That of lp grows faster than the residual or vanishes before it, and that of bce is up to 10¹².
        """
        return dtype.itemsize > 2 or self.kind not in ("lp", "bce")

    def elements(self, input: Tensor, target: Tensor) -> Tensor:
        """In plain PyTorch, in the accumulator."""
        wide = _arguments.accumulator(input.dtype)
        input, target = input.to(wide), target.to(wide)
        if self.kind == "bce_with_logits":
            return F.binary_cross_entropy_with_logits(input, target, reduction="none")
        if self.kind == "bce":
            device_type = input.device.type
            if not _arguments.has_autocast(device_type):
                return F.binary_cross_entropy(input, target, reduction="none")
            # Which autocast refuses, whatever the dtype.
            with torch.autocast(device_type, enabled=False):
                return F.binary_cross_entropy(input, target, reduction="none")
        if self.kind == "huber":
            return F.huber_loss(input, target, reduction="none", delta=self.parameter)
        residual = input - target
        if self.kind == "mse":
            return residual.square()
        if self.kind == "l1":
            return residual.abs()
        if self.kind == "lp":
            return residual.abs().pow(self.parameter)
        return (residual.square() + self.parameter * self.parameter).sqrt()

    def total(self, input: Tensor, target: Tensor, factor: float, count: int) -> Tensor:
        """factor / count * Σ elements, or its root, in plain PyTorch. The root of 0 has the gradient 0."""
        value = self.elements(input, target).sum()
        # The tracer's sizes are tensors: a number by one would be of float32, whatever the losses are of.
        is_traced = isinstance(count, Tensor)
        value = value * factor / count if is_traced else value * normalizer_of(factor, count)
        if not self.root:
            return value
        is_zero = value == 0
        return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, value).sqrt())


# With their types, lest a True that equals a 1 seen before goes unchecked.
@functools.lru_cache(maxsize=256, typed=True)
def _known_loss(op: str, kind: Any, p: Any, eps: Any, delta: Any) -> Loss:
    _arguments.check_name("kind", kind, KINDS, op)
    if p is None and kind == "lp":
        raise InputError(f"{op}: p must be a number of at least 1 for lp, got None")
    if p is not None:
        if kind != "lp":
            raise InputError(f"{op}: {kind} has no p, got {p!r}")
        _arguments.check_number("p", p, op, 1.0)
    if kind == "charbonnier":
        _arguments.check_number("eps", eps, op, 0.0)
    if kind == "huber":
        _arguments.check_positive("delta", delta, op)
    if kind == "rmse":
        return Loss("mse", root=True)
    if kind == "lp":
        return Loss("l1") if p == 1 else Loss("mse") if p == 2 else Loss("lp", float(p))
    if kind == "charbonnier":
        return Loss("l1") if eps < _LEAST_EPS else Loss("charbonnier", float(eps))
    return Loss(kind, float(delta) if kind == "huber" else 0.0)


def loss_of(op: str, kind: Any, p: Any, eps: Any, delta: Any) -> Loss:
    """What the arguments of a public function say.

    Raises:
        InputError: an unknown kind, a number that it reads out of its range, or p for a kind without one.
    """
    if torch.compiler.is_compiling():
        return _known_loss.__wrapped__(op, kind, p, eps, delta)
    try:
        return _known_loss(op, kind, p, eps, delta)
    except TypeError:
        # What cannot be a key is no option either.
        return _known_loss.__wrapped__(op, kind, p, eps, delta)


def check_reduction(op: str, reduction: Any, reductions: tuple[str, ...] = REDUCTIONS) -> None:
    _arguments.check_name("reduction", reduction, reductions, op)


def check_weight(op: str, loss_weight: Any) -> None:
    if type(loss_weight) is not float or loss_weight != 1.0:
        _arguments.check_number("loss_weight", loss_weight, op, 0.0)


def factor_and_count(loss: Loss, reduction: str, shape: torch.Size, loss_weight: float) -> tuple[float, int]:
    """What the sum of all losses is multiplied by, before a root, and then divided by.

    Ops are told of both, and not of the quotient: a compiler makes a graph of its own for each value of a float, but
    one for all of an integer.
    """
    factor = float(loss_weight * loss_weight if loss.root else loss_weight)
    if reduction == "sum":
        return factor, 1
    return factor, shape[0] if reduction == "batchmean" else math.prod(shape)


def normalizer_of(factor: float, count: int) -> float:
    """factor / count, NaN for a mean of nothing."""
    return factor / count if count > 0 else math.nan


def check_pair(op: str, input: Any, target: Any) -> None:
    """That both are dense floating-point tensors of one shape and device."""
    _arguments.check_tensor("input", input, op)
    _arguments.check_tensor("target", target, op)
    for name, value in (("input", input), ("target", target)):
        _arguments.check_floating(name, value, op)
        _arguments.check_dense(name, value, op)
    if target.shape != input.shape:
        raise InputError(
            f"{op}: target must have the shape of input, {_arguments.shape_of(input)}, "
            f"got {_arguments.shape_of(target)}"
        )


def range_error(op: str, name: str, kind: str, outside: Tensor) -> InputError:
    """Of the elements (n,), at least one, of a tensor of probabilities that are not from 0 to 1."""
    others = outside.numel() - 1
    more = {0: "", 1: " and 1 more element that is not"}.get(
        others, f" and {others} more elements that are not"
    )
    return InputError(f"{op}: {name} must be from 0 to 1 for {kind}, got {outside[0].item():g}{more}")


def is_folded(backend: str, dtype: torch.dtype) -> bool:
    """Whether a gradient that is kept in `dtype` has its normaliser in it."""
    return backend == "cpu" and dtype.itemsize > 2


def in_one_layout(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both without gaps and in the same order of dimensions, which is that of `input` if it has no gaps."""
    if input.is_contiguous() and target.is_contiguous():
        return input, target
    if not _has_no_gaps(input):
        return input.contiguous(), target.contiguous()
    return input, as_laid_out(target, input)


def as_laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the order of dimensions of `like`, which has its shape and no gaps."""
    strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if all(ours == theirs for size, ours, theirs in strides if size != 1):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _has_no_gaps(tensor: Tensor) -> bool:
    left = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
    expected = 1
    # One after the other and not sorted, which a compiler does not do with sizes that it does not know.
    while left:
        found = next((index for index, (stride, _) in enumerate(left) if stride == expected), None)
        if found is None:
            return False
        expected *= left.pop(found)[1]
    return True


def check_finite(op: str, value: Tensor, **operands: Tensor) -> None:
    """That no operand is what made the scalar `value` NaN; looks as `_pairwise.check_finite` does."""
    if value.is_cpu and not _registry.is_watched() and math.isnan(value.item()):
        _pairwise.check_finite(op, value, **operands)


# gradient of any shape, its elements filling a piece of memory in whatever order of its dimensions; grad in its
# accumulator, a scalar, or (B,) for a gradient (B, ...) whose first dimension is the outermost in memory. The result,
# in the layout of gradient, is gradient * (grad * (factor / count)), rounded once.
define("loss_gradient(Tensor gradient, Tensor grad, float factor, SymInt count, str backend) -> Tensor")


@implement("loss_gradient")
def _(gradient, grad, factor, count, backend):
    launch = _registry.kernels(backend, "loss_gradient").loss_gradient
    return launch(gradient, grad, normalizer_of(factor, count))


@torch.library.register_fake("aefast::loss_gradient", lib=LIBRARY)
def _(gradient, grad, factor, count, backend):
    return torch.empty_like(gradient)


def scaled(gradient: Tensor, grad: Tensor, factor: float, count: int, backend: str) -> Tensor:
    """gradient * (grad * (factor / count)), for the backward of a loss.

    What multiplies is made in gradient's accumulator, and the product is rounded once. The host waits for no device. On
    the CPU, where that leaves float32 and float64 gradients as they are, the result is `gradient` itself.

    Args:
        gradient: what the forward kept, dense, in whatever order of its dimensions.
        grad: of the loss, in its dtype: a scalar, or (B,) for a gradient (B, ...) that has its samples one after
            another in memory.
        factor, count: the quotient is what the gradient lacks.
        backend: the forward's.
    """
    if not _registry.is_direct(backend, gradient, grad):
        return torch.ops.aefast.loss_gradient.default(gradient, grad, factor, count, backend)
    if is_folded(backend, gradient.dtype) and factor == count and grad.dim() == 0 and grad.item() == 1.0:
        return gradient
    launch = _registry.kernels(backend, "loss_gradient").loss_gradient
    return launch(gradient, grad, normalizer_of(factor, count))
