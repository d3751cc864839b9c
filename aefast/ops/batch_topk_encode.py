"""The encoder of a BatchTopK sparse autoencoder: the largest pre-activations of a whole batch, k a row on average. It
runs on the kernels of `topk_encode`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.kernels.activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from aefast.kernels.selection import is_largest
from aefast.ops import _arguments, _registry, topk_encode
from aefast.ops._library import below_autograd

# Entries of a row, in units of k, that are looked at first: a batch has few rows with more.
_FIRST = 4


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor]:
    """`batch_topk_encode` in plain PyTorch."""
    with torch.no_grad():
        indices = _chosen(lambda count: topk_encode.reference(x, weight, bias, count), k, weight.shape[0])
    return _values_at(x, weight, bias, indices), indices


def _values_at(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> Tensor:
    """The pre-activations of given indices (*, width), and 0 where these are padding."""
    is_padding = indices < 0
    values = F.linear(x, weight, bias).gather(-1, indices.masked_fill(is_padding, 0))
    return values.masked_fill(is_padding, 0.0)


def _chosen(encode, k: int, latents: int) -> Tensor:
    """The indices (*, width) of the batch's largest, `encode(count)` giving a row's `count` largest of all latents."""
    count = min(latents, _FIRST * k)
    while True:
        values, indices = encode(count)
        rows = math.prod(values.shape[:-1])
        if rows == 0:
            return indices[..., :0]
        # Row by row, and of equals in a row the lower index first: their order is that of their places in the batch.
        mask = is_largest(values.reshape(-1), rows * k).reshape(values.shape)
        width = int(mask.sum(-1).max())
        if width < count or count == latents:
            return indices[..., :width].masked_fill(~mask[..., :width], -1)
        # What a row has beyond its last one here may be as large.
        count = min(latents, 2 * count)


class _BatchTopkEncode(torch.autograd.Function):
    """The pre-activations of given indices (N, width), which `values` are. `backend` is that of `topk_encode`."""

    @staticmethod
    def forward(ctx, x, weight, bias, values, indices, backend):
        ctx.save_for_backward(x, weight, bias, indices)
        ctx.backend = backend
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, indices = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if _registry.wants_reference(grad):
            gradients = _registry.differentiate(
                lambda x, weight, bias: _values_at(x, weight, bias, indices), (x, weight, bias), needs, grad
            )
        else:
            bits = NEED_X * needs[0] + NEED_WEIGHT * needs[1] + NEED_BIAS * needs[2]
            tensors = grad, indices, x, weight
            gradients = _registry.gradients("topk_encode", ctx.backend, tensors, (bits,), needs)
        return *gradients, None, None, None


def batch_topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, k: int | None = None
) -> tuple[Tensor, Tensor]:
    """The N k largest elements of ``x @ weight.T + bias``, N being its rows: k of a row on average.

    The encoder of Bussmann et al., BatchTopK Sparse Autoencoders, arXiv:2412.06410, before its relu. A row has as many
    as are among the largest of the whole batch, in descending order; the rows are padded to the longest by the value 0
    and the index -1, which `sparse_decode` skips. Of equal elements those of the lower row are taken, and in a row
    those of the lower index; NaN counts as larger than any number. The pre-activations exist in parts alone.

    Differentiable as `topk_encode` is; padding has no gradient. x, weight and the indices are saved, and must not be
    modified in place before the backward. How wide the results are depends on the values, so that a GPU is waited for,
    and ``torch.compile(fullgraph=True)``, ``torch.jit.trace`` and torch.func's vmap have to go without.

    Args:
        x: (*, D), float32, bfloat16, float16 or float64, any strides.
        weight: (F, D), one row a latent, the dtype and device of x.
        bias: (F,) or None.
        k: from 1 to F; it must be given.

    Returns:
        The values (*, width), contiguous, in x's dtype, in autocast's under autocast; and the indices (*, width),
        int64, width being the most that a row has, from k to F, or 0 if there are no rows.

    Raises:
        InputError: a shape, dtype, device or k is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(x, weight, bias) and _arguments.are_stand_ins(x, weight, bias):
        return _arguments.deferred(batch_topk_encode, locals())
    x, weight, bias = _arguments.autocast(x, weight, bias)
    k = topk_encode.checked(x, weight, bias, k, "batch_topk_encode")
    if torch.jit.is_tracing():
        raise InputError(
            "batch_topk_encode: torch.jit.trace takes no result whose shape depends on the values; "
            "topk_encode can be traced"
        )
    backend = _registry.choose("topk_encode", x, weight, bias)
    if backend == "eager":
        return reference(x, weight, bias, k)
    shape = x.shape[:-1]
    flat = x if x.dim() == 2 else x.reshape(math.prod(shape), x.shape[-1])
    its_bias = None if bias is None else bias.detach()
    found = None

    def encode(count: int) -> tuple[Tensor, Tensor]:
        nonlocal found
        found = torch.ops.aefast.topk_encode.default(flat.detach(), weight.detach(), its_bias, count, backend)
        return found

    with below_autograd():
        indices = _chosen(encode, k, weight.shape[0])
    # A row's are the first of those that were looked at.
    values = found[0][:, : indices.shape[1]].masked_fill(indices < 0, 0.0)
    if _registry.needs_gradient(x, weight, bias):
        values = _BatchTopkEncode.apply(flat, weight, bias, values, indices, backend)
    width = indices.shape[1]
    return values.reshape(*shape, width), indices.reshape(*shape, width)


OP = _registry.register(
    _registry.Op(
        "batch_topk_encode",
        batch_topk_encode,
        reference,
        topk_encode.samples,
        topk_encode.cost,
        launchers="topk_encode",
    )
)
