"""Losses over the levels of an image pyramid, with value and gradient from one pass over the images."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.ops import _arguments, _loss, _registry
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement

PYRAMIDS = ("average", "gaussian", "laplacian")
TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
# Of the largest image whose sides fit into 32 bits, a gaussian one.
_MOST_LEVELS = 32


def levels_of(images: Tensor, levels: int = 4, pyramid: str = "average") -> list[Tensor]:
    """The pyramid of images (B, C, H, W), in plain PyTorch and in their dtype: the finest level first.

    - "average": each level has the means of the squares of 2 × 2 elements of the one before; what is left over of an
      odd side is dropped.
    - "gaussian": each level is the one before, blurred by [1, 4, 6, 4, 1] / 16 along either side, with borders
      reflected, and of that every second element, the first one among them.
    - "laplacian": the differences of each gaussian level and the next one, expanded to its size, and the last gaussian
      level. To expand is to put zeros between the elements, to blur, and to multiply by 4 (Burt and Adelson, The
      Laplacian Pyramid as a Compact Image Code, IEEE Transactions on Communications 31, 1983).
    """
    found = [images]
    for _ in range(levels - 1):
        found.append(_halved(found[-1]) if pyramid == "average" else _blurred(found[-1])[..., ::2, ::2])
    if pyramid == "laplacian":
        bands = [fine - expanded(coarse, fine.shape[-2:]) for fine, coarse in itertools.pairwise(found)]
        found = [*bands, found[-1]]
    return found


def expanded(images: Tensor, size: Sequence[int]) -> Tensor:
    """A level of a gaussian pyramid, (B, C, H, W), at the size (height, width) of the next finer one."""
    for dim, length in ((-1, size[-1]), (-2, size[-2])):
        # Behind each column, or row, one of zeros.
        pairs = torch.stack((images, torch.zeros_like(images)), dim)
        images = pairs.flatten(dim - 1, dim).narrow(dim, 0, length)
    return 4.0 * _blurred(images)


def _planes(images: Tensor) -> Tensor:
    """(B, C, H, W) as (B · C, 1, H, W)."""
    return images.flatten(0, 1)[:, None]


def _halved(images: Tensor) -> Tensor:
    return F.avg_pool2d(_planes(images), 2)[:, 0].unflatten(0, images.shape[:2])


def _blurred(images: Tensor) -> Tensor:
    blurred = _planes(images)
    for dim, border in ((-2, (0, 0, 2, 2)), (-1, (2, 2, 0, 0))):
        padded = F.pad(blurred, border, mode="reflect")
        # Products of slices, since autocast would make those of a convolution in half precision.
        taps = [tap * padded.narrow(dim, at, images.shape[dim]) for at, tap in enumerate(TAPS)]
        blurred = sum(taps[1:], start=taps[0])
    return blurred[:, 0].unflatten(0, images.shape[:2])


def sizes_of(pyramid: str, levels: int, height: int, width: int) -> list[tuple[int, int]]:
    """The heights and widths of the levels."""
    odd = 0 if pyramid == "average" else 1
    sizes = [(height, width)]
    for _ in range(levels - 1):
        height, width = (height + odd) // 2, (width + odd) // 2
        sizes.append((height, width))
    return sizes


def _most_levels(pyramid: str, side: int) -> int:
    """Of images with the shorter side `side`: squares of 2 × 2 take two elements of it, and a blur three."""
    least, odd = (2, 0) if pyramid == "average" else (3, 1)
    levels = 1
    while side >= least:
        side = (side + odd) // 2
        levels += 1
    return levels


class Settings(NamedTuple):
    """What ops are told of a loss, which depends on no shape: a compiler makes a graph of its own for each value of a
    float.

    penalty and parameter are as in `Form`, the rest as in the public function.
    """

    pyramid: str
    penalty: str
    parameter: float
    weights: tuple[float, ...]
    reduction: str

    def factor_and_count(self, shape: Sequence[int]) -> tuple[float, int]:
        """Of images of this shape: the largest weight, and what the sum of all is divided by."""
        factor = max(self.weights) or 1.0
        if self.reduction == "sum":
            return factor, 1
        return factor, math.prod(shape if self.reduction == "mean" else shape[1:])

    def form(self, shape: Sequence[int], folded: bool) -> Form:
        """Of images of this shape. With `folded` the normaliser is in the factors, else the largest weight in the
        normaliser: what is kept of the gradient has the size of the data then, which half precision holds."""
        _, channels, height, width = shape
        sizes = sizes_of(self.pyramid, len(self.weights), height, width)
        counts = [channels * rows * columns for rows, columns in sizes]
        scale, total = self.factor_and_count(shape)
        factors = [weight / scale for weight in self.weights]
        if self.reduction != "sum":
            # Of a mean the levels count alike, whatever their size.
            factors = [
                factor * (counts[0] / max(1, count)) for factor, count in zip(factors, counts, strict=True)
            ]
        normalizer = _loss.normalizer_of(scale, total)
        if folded and total > 0:
            factors, normalizer = [factor * normalizer for factor in factors], 1.0
        is_summed = self.reduction != "none"
        return Form(self.pyramid, self.penalty, self.parameter, tuple(factors), normalizer, is_summed)


@dataclasses.dataclass(frozen=True)
class Form:
    """What launchers are told of a loss, and what is done with what they give.

    Of each sample, Σ_l factors[l] · Σ phi(residual) over all elements of level l; of that the sum over the samples if
    `summed`, times `normalizer`. phi is |r|^parameter for the penalty "power" and √(r² + parameter²) for "charbonnier".
    """

    pyramid: str
    penalty: str
    parameter: float
    factors: tuple[float, ...]
    normalizer: float
    summed: bool

    @property
    def of_launchers(self) -> tuple[Any, ...]:
        return self.pyramid, self.penalty, self.parameter, self.factors

    def finished(self, sums: Tensor) -> Tensor:
        """The loss, of the samples' sums."""
        value = sums.sum() if self.summed else sums
        return value if self.normalizer == 1.0 else value * self.normalizer


def _settings_of(pyramid: str, loss: _loss.Loss, weights: tuple[float, ...], reduction: str) -> Settings:
    power = {"l1": 1.0, "mse": 2.0, "lp": loss.parameter}.get(loss.kind)
    penalty, parameter = ("charbonnier", loss.parameter) if power is None else ("power", power)
    return Settings(pyramid, penalty, parameter, weights, reduction)


def form_reference(input: Tensor, target: Tensor, form: Form) -> Tensor:
    """A loss in plain PyTorch. What is linear is done with the residual alone."""
    wide = _arguments.accumulator(input.dtype)
    sums = 0.0
    levels = levels_of(input.to(wide) - target.to(wide), len(form.factors), form.pyramid)
    for factor, residual in zip(form.factors, levels, strict=True):
        if form.penalty == "charbonnier":
            values = (residual.square() + form.parameter * form.parameter).sqrt()
        elif form.parameter == 2.0:
            values = residual.square()
        else:
            values = residual.abs() if form.parameter == 1.0 else residual.abs().pow(form.parameter)
        sums = sums + factor * values.sum((1, 2, 3))
    return form.finished(sums)


def reference(
    input: Tensor,
    target: Tensor,
    *,
    levels: int = 4,
    p: float | str = 1,
    pyramid: str = "average",
    weights: Sequence[float] | None = None,
    reduction: str = "mean",
    eps: float = 1e-3,
) -> Tensor:
    """`pyramid_loss` in plain PyTorch."""
    loss, weights = checked("pyramid_loss", levels, p, pyramid, weights, reduction, eps)
    return _reference(input, target, _settings_of(pyramid, loss, weights, reduction))


def _reference(input: Tensor, target: Tensor, settings: Settings) -> Tensor:
    return form_reference(input, target, settings.form(input.shape, False))


# input and target (B, C, H, W) of one dtype, both contiguous or both channels_last, of sides that the pyramid has so
# many levels of; the rest as in `Settings`. The loss is (B,) for "none", and else (), in the accumulator. What is kept
# of the gradient lacks the normaliser, or nothing where `_loss.is_folded`; it has the input's dtype and layout, or no
# elements if it is not wanted.
_SETTINGS = "str pyramid, str penalty, float parameter, float[] weights, str reduction"
define(
    f"pyramid_loss(Tensor input, Tensor target, {_SETTINGS}, bool with_gradient, str backend) -> (Tensor, Tensor)"
)


@implement("pyramid_loss")
def _(input, target, pyramid, penalty, parameter, weights, reduction, with_gradient, backend):
    settings = Settings(pyramid, penalty, parameter, tuple(weights), reduction)
    return _launch(input, target, settings, with_gradient, backend)


def _launch(
    input: Tensor, target: Tensor, settings: Settings, with_gradient: bool, backend: str
) -> tuple[Tensor, Tensor]:
    form = settings.form(input.shape, _loss.is_folded(backend, input.dtype))
    launch = _registry.kernels(backend, "pyramid_loss").pyramid_loss
    sums, gradient = launch(input, target, *form.of_launchers, with_gradient)
    return form.finished(sums), gradient


@torch.library.register_fake("aefast::pyramid_loss", lib=LIBRARY)
def _(input, target, pyramid, penalty, parameter, weights, reduction, with_gradient, backend):
    shape = input.shape[:1] if reduction == "none" else ()
    value = input.new_empty(shape, dtype=_arguments.accumulator(input.dtype))
    return value, torch.empty_like(input) if with_gradient else input.new_empty(0)


class _PyramidLoss(torch.autograd.Function):
    """`call` is (settings, backend, whether launchers may be called at once)."""

    @staticmethod
    def forward(ctx, input, target, call):
        settings, backend, is_direct = call
        if is_direct:
            value, gradient = _launch(input, target, settings, True, backend)
        else:
            with below_autograd():
                value, gradient = torch.ops.aefast.pyramid_loss.default(
                    input, target, *settings, True, backend
                )
        ctx.save_for_backward(input, target, gradient)
        ctx.call = settings, backend
        return value

    @staticmethod
    def backward(ctx, grad):
        settings, backend = ctx.call
        input, target, gradient = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if _registry.wants_reference(grad):
            gradients = _registry.differentiate(
                lambda input, target: _reference(input, target, settings), (input, target), needs, grad
            )
            return *gradients, None
        is_folded = _loss.is_folded(backend, input.dtype)
        missing = (1.0, 1) if is_folded else settings.factor_and_count(input.shape)
        by_input = _loss.scaled(gradient, grad, *missing, backend)
        return by_input if needs[0] else None, -by_input if needs[1] else None, None


_apply = direct_apply(_PyramidLoss)


@torch.library.impl(LIBRARY, "pyramid_loss", "Autograd")
def _(input, target, pyramid, penalty, parameter, weights, reduction, with_gradient, backend):
    """The loss's gradient is autograd's, and none is returned beside it."""
    settings = Settings(pyramid, penalty, parameter, tuple(weights), reduction)
    if _registry.is_transformed():
        value = _reference(input, target, settings)
    elif _registry.needs_gradient(input, target):
        value = _PyramidLoss.apply(input, target, (settings, backend, False))
    else:
        with below_autograd():
            return torch.ops.aefast.pyramid_loss.default(input, target, *settings, with_gradient, backend)
    return value, input.new_empty(0)


def checked(
    op: str, levels: Any, p: Any, pyramid: Any, weights: Any, reduction: Any, eps: Any
) -> tuple[_loss.Loss, tuple[float, ...]]:
    """The loss of an element, and the weights of the levels.

    Raises:
        InputError: an unknown name, or a number out of its range.
    """
    _arguments.check_name("pyramid", pyramid, PYRAMIDS, op)
    if isinstance(levels, bool) or not isinstance(levels, Integral) or levels < 1:
        raise InputError(f"{op}: levels must be an integer of at least 1, got {levels!r}")
    if levels > _MOST_LEVELS:
        raise InputError(f"{op}: levels must be at most {_MOST_LEVELS}, got {levels!r}")
    if isinstance(p, str):
        if p != "charbonnier":
            raise InputError(f"{op}: p must be a number of at least 1, or 'charbonnier', got {p!r}")
        loss = _loss.loss_of(op, "charbonnier", None, eps, 1.0)
    else:
        _arguments.check_number("p", p, op, 1.0)
        loss = _loss.loss_of(op, "lp", p, eps, 1.0)
    _arguments.check_reduction(reduction, op)
    if weights is None:
        # No image has more levels, and who knows the image refuses them.
        return loss, (1.0,) * min(int(levels), 64)
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != levels:
        raise InputError(
            f"{op}: weights must be a sequence of {levels} numbers, one a level, got {weights!r}"
        )
    for weight in weights:
        _arguments.check_number("each of weights", weight, op, 0.0)
    return loss, tuple(float(weight) for weight in weights)


def pyramid_loss(
    input: Tensor,
    target: Tensor,
    *,
    levels: int = 4,
    p: float | str = 1,
    pyramid: str = "average",
    weights: Sequence[float] | None = None,
    reduction: str = "mean",
    eps: float = 1e-3,
) -> Tensor:
    """The difference of two batches of images at several scales: Σ_l w_l · mean |P_l(input) - P_l(target)|^p.

    P_l is level l of a pyramid, and level 0 the image itself; `aefast.ops.pyramid_loss.levels_of` makes them. Pyramids
    are linear, so that of input - target is all that is made, in one pass that gives value and gradient.

    - "average": means of 2 × 2 elements, as ``F.avg_pool2d(..., 2)``, which drops what is left over of an odd side.
    - "gaussian": blurred by [1, 4, 6, 4, 1] / 16 along either side, with borders reflected, and of that every second
      element: Burt and Adelson, The Laplacian Pyramid as a Compact Image Code, IEEE Transactions on Communications 31,
      1983.
    - "laplacian": the differences of a gaussian level and the next one, expanded to its size, and the last gaussian
      level. With p = 1 it is Lap_1 of Bojanowski et al., Optimizing the Latent Space of Generative Networks
      (arXiv:1707.05776), up to a factor: the mean over a level is 4^l times its sum.

    Args:
        input: (B, C, H, W): float32, bfloat16, float16 or float64, any strides; contiguous and channels_last ones are
            not copied. Half precision is computed in float32, and so is everything under autocast.
        target: of the shape and device of input; of two dtypes both are computed in the wider one.
        levels: how many, at least 1. The average pyramid needs sides of at least 2^(levels - 1); the others sides of
            at least 3 before each blur, after which a side n is ⌈n / 2⌉.
        p: the power, at least 1, or "charbonnier" for √(r² + eps²) in the place of |r|^p, whose gradient is
            0 at r = 0.
        pyramid: one of the names above.
        weights: w_l, one a level, at least 0; None for 1.
        reduction: "mean", within each level over all of its elements; "sum", Σ_l w_l Σ |…|^p; or "none", for each
            sample the mean within it.
        eps: of charbonnier, at least 0.

    Returns:
        A scalar, or (B,) for "none"; in float32 for half precision. Gradients have the dtype of their tensor, and the
        layout of input if that is contiguous or channels_last.

    Raises:
        InputError: a shape, dtype, device, name or number is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(input, target) and _arguments.are_stand_ins(input, target):
        return _arguments.deferred(pyramid_loss, locals())
    _loss.check_pair("pyramid_loss", input, target)
    loss, weights = checked("pyramid_loss", levels, p, pyramid, weights, reduction, eps)
    shape = input.shape
    if len(shape) != 4:
        raise InputError(f"pyramid_loss: input must be (B, C, H, W), got shape {_arguments.shape_of(input)}")
    side = min(shape[2:])
    if side < 1:
        raise InputError(
            f"pyramid_loss: input must have sides of at least 1, got shape {_arguments.shape_of(input)}"
        )
    if levels > _most_levels(pyramid, side):
        raise InputError(
            f"pyramid_loss: levels must be at most {_most_levels(pyramid, side)} for a pyramid of kind {pyramid!r} of "
            f"images of {shape[2]} × {shape[3]}, got {levels}"
        )
    if target.device != input.device:
        raise InputError(
            f"pyramid_loss: target must be on the device of input, {input.device}, got {target.device}"
        )
    dtype = torch.promote_types(input.dtype, target.dtype)
    # Half precision does not hold the derivatives of every power.
    dtype = dtype if loss.is_kept(dtype) else torch.float32
    input, target = input.to(dtype), target.to(dtype)
    backend = _registry.choose("pyramid_loss", input, target)
    settings = _settings_of(pyramid, loss, weights, reduction)
    if backend == "eager":
        return _reference(input, target, settings)
    is_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    layout = torch.channels_last if is_last else torch.contiguous_format
    input, target = input.contiguous(memory_format=layout), target.contiguous(memory_format=layout)
    if not _registry.is_direct(backend, input, target):
        return torch.ops.aefast.pyramid_loss.default(input, target, *settings, False, backend)[0]
    if _registry.needs_gradient(input, target):
        return _apply(input, target, (settings, backend, True))
    return _launch(input, target, settings, False, backend)[0]


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every pyramid, power and reduction over sizes and strides: no images, the smallest, odd and prime sides, one side
    longer than a tile, channels first and last, few and many."""
    generator = torch.Generator().manual_seed(0)

    def pair(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> dict[str, Tensor]:
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        input, target = (one.to(device, dtype).contiguous(memory_format=layout) for one in drawn)
        return {"input": input, "target": target}

    last = torch.channels_last
    yield {**pair(2, 3, 16, 24), "reduction": "none"}
    yield {**pair(2, 3, 16, 24, layout=last), "p": 2}
    yield {**pair(3, 1, 1, 1), "levels": 1}
    yield {**pair(1, 2, 19, 45), "weights": (1.0, 0.5, 0.0, 2.0), "reduction": "sum"}
    yield {**pair(2, 5, 33, 17, layout=last), "levels": 5, "p": 3}
    yield {**pair(1, 1, 34, 131), "levels": 6, "p": "charbonnier", "eps": 0.25}
    yield {**pair(1, 2, 5, 2100), "levels": 3}
    yield {**pair(0, 3, 8, 8), "reduction": "none"}
    yield {**pair(3, 0, 8, 8), "reduction": "sum"}
    for index, pyramid in enumerate(("gaussian", "laplacian")):
        settings = {"pyramid": pyramid}
        yield {**pair(2, 3, 16, 24), **settings, "reduction": "none"}
        yield {**pair(2, 3, 16, 24, layout=last), **settings, "p": 2}
        yield {**pair(1, 2, 3, 4), **settings, "levels": 2}
        yield {**pair(2, 1, 5, 3, layout=last), **settings, "levels": 1 + index, "p": 1.5}
        yield {**pair(1, 2, 19, 45), **settings, "weights": (1.0, 0.5, 0.0, 2.0), "reduction": "sum"}
        yield {**pair(1, 18, 17, 23, layout=last), **settings, "levels": 4, "p": "charbonnier", "eps": 0.25}
        yield {**pair(1, 1, 34, 131), **settings, "levels": 5, "p": 3}
        yield {**pair(0, 3, 8, 8), **settings, "levels": 3, "reduction": "none"}
    one = pair(4, 3, 20, 12)
    yield {
        "input": one["input"][::2, 1:, ::2, ::3],
        "target": one["target"][1::2, :2, 1::2, 1::3],
        "levels": 3,
    }
    yield {
        **pair(2, 3, 9, 12),
        "target": one["target"][:1, :1, :1].expand(2, 3, 9, 12),
        "p": 1.5,
        "levels": 2,
    }
    yield {
        "input": pair(2, 3, 8, 8, layout=last)["input"],
        "target": pair(2, 3, 8, 8)["target"],
        "levels": 2,
        "reduction": "none",
    }


def cost(backward: bool, input: Tensor, target: Tensor, **settings: Any) -> _registry.Cost:
    """Input and target are read once, and the gradient of each that wants one is written once."""
    gradients = (input.requires_grad + target.requires_grad) if backward else 0
    return _registry.Cost((2 + gradients) * input.numel() * input.element_size(), 0, 0)


OP = _registry.register(_registry.Op("pyramid_loss", pyramid_loss, reference, samples, cost))
