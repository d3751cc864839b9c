"""The decoder of a sparse autoencoder: sums of those rows of a weight that a code's indices name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function

from aefast.errors import InputError
from aefast.kernels.activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from aefast.ops import _arguments, _registry
from aefast.ops._flops import counted, wanted
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement


def reference(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`sparse_decode` in plain PyTorch."""
    # Padding takes a row of zeros, whatever others hold. Widened first: the gradient of a row is summed as wide.
    wide = _arguments.accumulator(values.dtype)
    rows = torch.cat((weight.to(wide), weight.new_zeros((1, weight.shape[1]), dtype=wide)))
    is_padding = indices < 0
    taken = F.embedding(torch.where(is_padding, weight.shape[0], indices), rows)
    # No matrix product, which autocast would make in half precision.
    out = (torch.where(is_padding, 0.0, values.to(wide)).unsqueeze(-1) * taken).sum(-2)
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(values.dtype)


# values and indices (N, k), int64, weight (F, D) and bias (D,) of any strides -> (N, D). `needs` says which gradients
# are wanted, of values as of x in kernels/activation.py; they come in that order.
define("sparse_decode(Tensor values, Tensor indices, Tensor weight, Tensor? bias, str backend) -> Tensor")
define(
    "sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor weight, int needs, str backend)"
    " -> Tensor[]"
)


@implement("sparse_decode")
def _(values, indices, weight, bias, backend):
    return _registry.kernels(backend, "sparse_decode").sparse_decode(values, indices, weight, bias)


@implement("sparse_decode_backward")
def _(grad, values, indices, weight, needs, backend):
    launch = _registry.kernels(backend, "sparse_decode").sparse_decode_backward
    gradients = launch(grad, values, indices, weight, needs)
    return [gradient for gradient in gradients if gradient is not None]


@torch.library.register_fake("aefast::sparse_decode", lib=LIBRARY)
def _(values, indices, weight, bias, backend):
    return values.new_empty(values.shape[0], weight.shape[1])


@torch.library.register_fake("aefast::sparse_decode_backward", lib=LIBRARY)
def _(grad, values, indices, weight, needs, backend):
    shapes = {NEED_X: values.shape, NEED_WEIGHT: weight.shape, NEED_BIAS: weight.shape[1:]}
    return [values.new_empty(shape) for need, shape in shapes.items() if needs & need]


# Those of the entries of a code: PyTorch has no product of matrices here, in which others would count.
@counted("sparse_decode")
def _(values, indices, weight, bias, backend):
    return 2 * math.prod(values) * weight[1]


@counted("sparse_decode_backward")
def _(grad, values, indices, weight, needs, backend):
    return wanted(needs) * 2 * math.prod(values) * weight[1]


class _SparseDecode(torch.autograd.Function):
    """`call` is (backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, values, indices, weight, bias, call):
        backend, launchers = call
        if launchers is not None:
            out = launchers.sparse_decode(values, indices, weight, bias)
        else:
            with below_autograd():
                out = torch.ops.aefast.sparse_decode.default(values, indices, weight, bias, backend)
        ctx.save_for_backward(values, indices, weight, bias)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, grad):
        backend, _ = ctx.call
        values, indices, weight, bias = ctx.saved_tensors
        of_values, _, of_weight, of_bias, _ = ctx.needs_input_grad
        needs = of_values, of_weight, of_bias
        if _registry.wants_reference(grad):
            gradients = _registry.differentiate(
                lambda values, weight, bias: reference(values, indices, weight, bias),
                (values, weight, bias),
                needs,
                grad,
            )
        else:
            bits = NEED_X * of_values + NEED_WEIGHT * of_weight + NEED_BIAS * of_bias
            tensors = grad, values, indices, weight
            gradients = _registry.gradients("sparse_decode", backend, tensors, (bits,), needs)
        return gradients[0], None, gradients[1], gradients[2], None


_apply = direct_apply(_SparseDecode)


@torch.library.impl(LIBRARY, "sparse_decode", "Autograd")
def _(values, indices, weight, bias, backend):
    if _registry.is_transformed():
        return reference(values, indices, weight, bias)
    if _registry.needs_gradient(values, weight, bias):
        return _SparseDecode.apply(values, indices, weight, bias, (backend, None))
    with below_autograd():
        return torch.ops.aefast.sparse_decode.default(values, indices, weight, bias, backend)


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``bias + Σ_j values[..., j] weight[indices[..., j]]``: what a code of k entries is decoded to, of F latents.

    Only the rows of weight that a code names are read, and no matrix of F columns is made, but on the CPU where a row
    has an entry for every eighth latent or more, in bfloat16 for every 32nd: there dense products are faster, and rows
    of weight that are not finite reach every result. The gradient of values[..., j] is the product of the result's with
    the row of weight; that of a row of weight is summed by latent, its entries in their order, in float32 at least: it
    is the same whatever the number of threads, and no two of them add to one sum. An index that stands in a row more
    than once counts as often. A negative index is padding: it adds nothing, and its value gets the gradient 0.

    values, indices and weight are saved, and must not be modified in place before the backward.

    Args:
        values: (*, k), float32, bfloat16, float16 or float64, any strides.
        indices: (*, k), int64 or int32, less than F.
        weight: (F, D), whose row f is latent f's direction, the dtype and device of values.
        bias: (D,) or None.

    Returns:
        (*, D), contiguous, in the dtype of values; in autocast's dtype under autocast.

    Raises:
        InputError: a shape, dtype or device is not as above, or, on the CPU in eager mode, an index is not less than F;
            the message names it. Compiled for the CPU that is a RuntimeError. On a GPU, where nobody waits for the
            device, the result is NaN in that row, and so is the gradient of that value.
        BackendError: the backend asked for cannot serve the call.
    """
    operands = (values, indices, weight, bias)
    if has_torch_function(operands) and _arguments.are_stand_ins(*operands):
        return _arguments.deferred(sparse_decode, locals())
    values, weight, bias = _arguments.autocast(values, weight, bias)
    _check(values, indices, weight, bias)
    indices = indices.long()
    backend = _registry.choose("sparse_decode", values, weight, bias)
    if backend == "eager":
        return reference(values, indices, weight, bias)
    shape = values.shape
    if values.dim() != 2:
        values, indices = (one.reshape(math.prod(shape[:-1]), shape[-1]) for one in (values, indices))
    if not _registry.is_direct(backend, values, indices, weight, bias):
        out = torch.ops.aefast.sparse_decode.default(values, indices, weight, bias, backend)
    else:
        launchers = _registry.kernels(backend, "sparse_decode")
        if _registry.needs_gradient(values, weight, bias):
            out = _apply(values, indices, weight, bias, (backend, launchers))
        else:
            out = launchers.sparse_decode(values, indices, weight, bias)
    return out if len(shape) == 2 else out.reshape(*shape[:-1], weight.shape[1])


def _check(values: Any, indices: Any, weight: Any, bias: Any) -> None:
    op = "sparse_decode"
    for name, value in (("values", values), ("indices", indices), ("weight", weight)):
        _arguments.check_tensor(name, value, op)
        _arguments.check_dense(name, value, op)
    _arguments.check_floating("values", values, op)
    if values.dim() < 1:
        raise InputError(f"{op}: values must have at least one dimension, (*, k), got a scalar")
    if indices.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{op}: indices must be int64 or int32, got {str(indices.dtype).removeprefix('torch.')}"
        )
    if indices.shape != values.shape:
        raise InputError(
            f"{op}: indices must have the shape of values, {_arguments.shape_of(values)}, "
            f"got shape {_arguments.shape_of(indices)}"
        )
    if indices.device != values.device:
        raise InputError(
            f"{op}: indices must be on the device of values, {values.device}, got {indices.device}"
        )
    if weight.dim() != 2:
        raise InputError(
            f"{op}: weight must have two dimensions, (F, D), got shape {_arguments.shape_of(weight)}"
        )
    _arguments.check_like("weight", weight, "values", values, op)
    if bias is not None:
        _arguments.check_tensor("bias", bias, op)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[1]:
            raise InputError(
                f"{op}: bias must be ({weight.shape[1]},) to match weight, got shape {_arguments.shape_of(bias)}"
            )
        _arguments.check_like("bias", bias, "values", values, op)
    if indices.is_cpu and indices.numel() and not _registry.is_watched():
        greatest = int(indices.max())
        if greatest >= weight.shape[0]:
            raise InputError(
                f"{op}: indices must be less than the rows of weight, {weight.shape[0]}, got {greatest}"
            )


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Codes over shapes and strides: no rows, no entries, no latents, no columns, one of each, primes, multiples of a
    vector, padding in between and at the end, whole rows of it, repeated indices, a latent in every row."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def choose(latents: int, *shape: int) -> Tensor:
        return torch.randint(latents, shape, generator=generator).to(device)

    for rows, entries, latents, columns in (
        (0, 3, 5, 4), (4, 0, 5, 3), (4, 2, 5, 0), (1, 1, 1, 1), (7, 1, 13, 1), (31, 5, 17, 29), (13, 7, 64, 131),
        (257, 3, 41, 64), (19, 16, 300, 256),
    ):  # fmt: skip
        yield {
            "values": draw(rows, entries),
            "indices": choose(latents, rows, entries),
            "weight": draw(latents, columns),
            "bias": draw(columns),
        }
    yield {"values": draw(3, 2), "indices": choose(1, 3, 2) - 1, "weight": draw(0, 5), "bias": draw(5)}
    # Few latents beside the entries of a row, and many.
    for latents in (23, 223):
        padded = choose(latents, 12, 6)
        padded[:, 4:], padded[3], padded[7, 1] = -1, -1, -2
        yield {"values": draw(12, 6), "indices": padded, "weight": draw(latents, 40), "bias": None}
        # One latent of many entries, and one that a row has twice.
        crowded = choose(9, 600, 4)
        crowded[:, 1], crowded[::2, 3] = 5, crowded[::2, 0]
        yield {"values": draw(600, 4), "indices": crowded, "weight": draw(latents, 48), "bias": draw(48)}
    yield {"values": draw(2, 3, 5), "indices": choose(11, 2, 3, 5), "weight": draw(11, 33), "bias": draw(33)}
    yield {"values": draw(5), "indices": choose(11, 5), "weight": draw(11, 7), "bias": None}
    yield {
        "values": draw(4, 20).t(),
        "indices": choose(14, 40, 8)[::2, ::2],
        "weight": draw(24, 14).t(),
        "bias": draw(48)[::2],
    }
    yield {
        "values": draw(1, 4).expand(30, 4),
        "indices": choose(14, 1, 4).expand(30, 4),
        "weight": draw(28, 50)[::2, 3:37],
        "bias": draw(1).expand(34),
    }


def cost(
    backward: bool, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None
) -> _registry.Cost:
    """The code, and each row of weight that it can name, are read once and the result is written once; the backward
    reads these and the result's gradient, and writes the gradients. Each entry takes a product with a column in the
    forward and for either gradient."""
    entries, columns = values.numel(), weight.shape[1]
    out = math.prod(values.shape[:-1]) * columns
    named = min(entries, weight.shape[0]) * columns
    parameters = 0 if bias is None else columns
    elements = entries + named + parameters + out
    if backward:
        elements += 2 * entries + named + weight.numel() + parameters + out
    moved = elements * values.element_size() + entries * indices.element_size() * (1 + backward)
    return _registry.Cost(moved, 2 * entries * columns * (1 + 2 * backward), 0)


OP = _registry.register(_registry.Op("sparse_decode", sparse_decode, reference, samples, cost))
