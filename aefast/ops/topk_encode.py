"""The encoder of a TopK sparse autoencoder: the k largest pre-activations of each row, of which no matrix is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.kernels.activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from aefast.kernels.selection import largest
from aefast.ops import _arguments, _registry
from aefast.ops._flops import counted, of_layer, wanted
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement
from aefast.ops.linear_act import check_layer


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor]:
    """`topk_encode` in plain PyTorch."""
    pre = F.linear(x, weight, bias)
    indices = largest(pre.detach(), k)
    return pre.gather(-1, indices), indices


def values_at(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> Tensor:
    """The pre-activations of given indices (*, k)."""
    return F.linear(x, weight, bias).gather(-1, indices)


# x (N, D), weight (F, D), bias (F,) of any strides, 1 <= k <= F -> values and indices (N, k), int64.
define("topk_encode(Tensor x, Tensor weight, Tensor? bias, int k, str backend) -> (Tensor, Tensor)")
# For the gradient of the values (N, k) those that `needs` asks for, as in kernels/activation.py.
define(
    "topk_encode_backward(Tensor grad, Tensor indices, Tensor x, Tensor weight, int needs, str backend) -> Tensor[]"
)


@implement("topk_encode")
def _(x, weight, bias, k, backend):
    return _registry.kernels(backend, "topk_encode").topk_encode(x, weight, bias, k)


@implement("topk_encode_backward")
def _(grad, indices, x, weight, needs, backend):
    launch = _registry.kernels(backend, "topk_encode").topk_encode_backward
    gradients = launch(grad, indices, x, weight, needs)
    return [gradient for gradient in gradients if gradient is not None]


@torch.library.register_fake("aefast::topk_encode", lib=LIBRARY)
def _(x, weight, bias, k, backend):
    return x.new_empty(x.shape[0], k), x.new_empty((x.shape[0], k), dtype=torch.int64)


@torch.library.register_fake("aefast::topk_encode_backward", lib=LIBRARY)
def _(grad, indices, x, weight, needs, backend):
    shapes = {NEED_X: x.shape, NEED_WEIGHT: weight.shape, NEED_BIAS: weight.shape[:1]}
    return [x.new_empty(shape) for need, shape in shapes.items() if needs & need]


@counted("topk_encode")
def _(x, weight, bias, k, backend):
    return of_layer(x, weight)


@counted("topk_encode_backward")
def _(grad, indices, x, weight, needs, backend):
    # PyTorch multiplies by a gradient of all latents, of which it knows no zeros.
    return wanted(needs) * of_layer(x, weight)


class _TopkEncode(torch.autograd.Function):
    """`call` is (k, backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, x, weight, bias, call):
        k, backend, launchers = call
        if launchers is not None:
            values, indices = launchers.topk_encode(x, weight, bias, k)
        else:
            with below_autograd():
                values, indices = torch.ops.aefast.topk_encode.default(x, weight, bias, k, backend)
        ctx.save_for_backward(x, weight, bias, indices)
        ctx.mark_non_differentiable(indices)
        ctx.call = call
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        _, backend, _ = ctx.call
        x, weight, bias, indices = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if _registry.wants_reference(grad):
            gradients = _registry.differentiate(
                lambda x, weight, bias: values_at(x, weight, bias, indices), (x, weight, bias), needs, grad
            )
        else:
            bits = NEED_X * needs[0] + NEED_WEIGHT * needs[1] + NEED_BIAS * needs[2]
            tensors = grad, indices, x, weight
            gradients = _registry.gradients("topk_encode", backend, tensors, (bits,), needs)
        return *gradients, None


_apply = direct_apply(_TopkEncode)


@torch.library.impl(LIBRARY, "topk_encode", "Autograd")
def _(x, weight, bias, k, backend):
    if _registry.is_transformed():
        return reference(x, weight, bias, k=k)
    if _registry.needs_gradient(x, weight, bias):
        return _TopkEncode.apply(x, weight, bias, (k, backend, None))
    with below_autograd():
        return torch.ops.aefast.topk_encode.default(x, weight, bias, k, backend)


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, k: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest elements of each row of ``x @ weight.T + bias``, the largest first, and which they are.

    The encoder of Gao et al., Scaling and evaluating sparse autoencoders, arXiv:2406.04093, before its relu. The
    pre-activations exist in parts alone. Of equal ones the one of the lower index comes first, and is taken where there
    is no room for both; NaN counts as larger than any number. Products are those of `linear_act`, and are compared
    as they are in x's dtype.

    Differentiable in x, weight and bias through the values, whose gradient reaches the k chosen latents of a row alone;
    it is summed by latent, in float32 at least, in an order that depends on nothing but the indices. The indices have
    none. x, weight and the indices are saved, and must not be modified in place before the backward.

    Args:
        x: (*, D), float32, bfloat16, float16 or float64, any strides.
        weight: (F, D), one row a latent, the dtype and device of x.
        bias: (F,) or None.
        k: from 1 to F; it must be given.

    Returns:
        The values (*, k), contiguous, in x's dtype, in autocast's under autocast; and the indices (*, k), int64.

    Raises:
        InputError: a shape, dtype, device or k is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(x, weight, bias) and _arguments.are_stand_ins(x, weight, bias):
        return _arguments.deferred(topk_encode, locals())
    x, weight, bias = _arguments.autocast(x, weight, bias)
    k = checked(x, weight, bias, k, "topk_encode")
    backend = _registry.choose("topk_encode", x, weight, bias)
    if backend == "eager":
        return reference(x, weight, bias, k=k)
    shape = x.shape[:-1]
    if x.dim() != 2:
        x = x.reshape(math.prod(shape), x.shape[-1])
    if not _registry.is_direct(backend, x, weight, bias):
        values, indices = torch.ops.aefast.topk_encode.default(x, weight, bias, k, backend)
    else:
        launchers = _registry.kernels(backend, "topk_encode")
        if _registry.needs_gradient(x, weight, bias):
            values, indices = _apply(x, weight, bias, (k, backend, launchers))
        else:
            values, indices = launchers.topk_encode(x, weight, bias, k)
    if len(shape) != 1:
        values, indices = values.reshape(*shape, k), indices.reshape(*shape, k)
    return values, indices


def checked(x: Any, weight: Any, bias: Any, k: Any, op: str) -> int:
    """k, if that and the operands are as `topk_encode` says."""
    check_layer(x, weight, bias, op, "weight", "bias")
    if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k <= weight.shape[0]:
        raise InputError(f"{op}: k must be a whole number from 1 to {weight.shape[0]}, got {k!r}")
    return int(k)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Operands over shapes and strides: no rows, no inputs, one of each, primes, k from 1 to all latents, more latents
    than are multiplied at once.

    No rounding decides what is chosen: operands are small whole numbers, of which sums are exact in every dtype and
    many are equal, or, in float32 and float64, pre-activations that are apart."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)

    for rows, inputs, latents, k in (
        (0, 5, 3, 2), (4, 0, 7, 3), (1, 1, 1, 1), (7, 1, 5, 5), (31, 17, 29, 4), (20, 24, 64, 64), (13, 31, 259, 7),
        (67, 16, 523, 40), (5, 12, 4111, 3),
    ):  # fmt: skip
        yield {"x": whole(rows, inputs), "weight": whole(latents, inputs), "bias": whole(latents), "k": k}
    yield {"x": whole(6, 5, 24), "weight": whole(36, 24), "bias": whole(36), "k": 5}
    yield {"x": whole(24), "weight": whole(36, 24), "bias": None, "k": 36}
    yield {"x": whole(24, 66).t(), "weight": whole(24, 40).t(), "bias": whole(80)[::2], "k": 11}
    yield {
        "x": whole(50, 96)[3::2, 1::3],
        "weight": whole(33, 64)[:, ::2],
        "bias": whole(1).expand(33),
        "k": 6,
    }
    yield {"x": whole(1, 12).expand(40, 12), "weight": whole(9, 12), "bias": None, "k": 2}
    if torch.finfo(dtype).eps < 1e-6:
        for rows, inputs, latents, k in ((9, 19, 53, 6), (16, 40, 200, 16)):
            yield {
                "x": draw(rows, inputs),
                "weight": draw(latents, inputs) * inputs**-0.5,
                "bias": draw(latents),
                "k": k,
            }


def cost(backward: bool, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int) -> _registry.Cost:
    """Each operand is read once and each result written once; every pre-activation takes a product. The backward reads
    operands, indices and the gradient of the values, and writes the gradients, each of a product an entry and input."""
    rows, (latents, inputs) = math.prod(x.shape[:-1]), weight.shape
    parameters = weight.numel() + (0 if bias is None else latents)
    elements = (x.numel() + parameters) * (1 + 2 * backward) + rows * k * (1 + backward)
    flops = 2 * rows * latents * inputs + backward * 4 * rows * k * inputs
    return _registry.Cost(elements * x.element_size() + 8 * rows * k * (1 + backward), flops, 0)


OP = _registry.register(_registry.Op("topk_encode", topk_encode, reference, samples, cost))
