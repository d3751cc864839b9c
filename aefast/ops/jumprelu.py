"""The activation of JumpReLU sparse autoencoders, and how many latents are active, with straight-through gradients."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.kernels.jumprelu import NEED_THRESHOLD, NEED_X
from aefast.ops import _arguments, _registry
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement


def reference(x: Tensor, threshold: Tensor, bandwidth: float = 1e-3) -> tuple[Tensor, Tensor]:
    """`jumprelu` in plain PyTorch.

    The threshold's pseudo-derivatives are those of terms that are 0: K times the difference of θ²/2 or θ and the same
    detached. They hold for second derivatives too.
    """
    dtype = _arguments.accumulator(x.dtype)
    wide, limit = x.to(dtype), threshold.to(dtype)
    is_off = wide <= limit
    inside = (wide - limit).abs() < 0.5 * bandwidth
    kernel = inside.to(dtype) / bandwidth
    squares = 0.5 * limit.square()
    h = x.masked_fill(is_off, 0.0) - (kernel * (squares - squares.detach())).to(x.dtype)
    l0 = (~is_off).to(dtype) - kernel * (limit - limit.detach())
    return h, l0.sum(-1)


# x (B, F), threshold (F,) in x's accumulator: h (B, F), and how many of a row are active (B,), in the accumulator.
define("jumprelu(Tensor x, Tensor threshold, float bandwidth, str backend) -> (Tensor, Tensor)")
# The gradients of x and threshold that `needs` asks for, as in kernels/jumprelu.py; of those of the outputs one may be
# absent, which stands for zeros.
define(
    "jumprelu_backward(Tensor? grad_h, Tensor? grad_l0, Tensor x, Tensor threshold, float bandwidth, int needs,"
    " str backend) -> Tensor[]"
)


@implement("jumprelu")
def _(x, threshold, bandwidth, backend):
    return _registry.kernels(backend, "jumprelu").jumprelu(x, threshold)


@implement("jumprelu_backward")
def _(grad_h, grad_l0, x, threshold, bandwidth, needs, backend):
    launch = _registry.kernels(backend, "jumprelu").jumprelu_backward
    gradients = launch(grad_h, grad_l0, x, threshold, bandwidth, needs)
    return [gradient for gradient in gradients if gradient is not None]


@torch.library.register_fake("aefast::jumprelu", lib=LIBRARY)
def _(x, threshold, bandwidth, backend):
    return x.new_empty(x.shape), threshold.new_empty(x.shape[0])


@torch.library.register_fake("aefast::jumprelu_backward", lib=LIBRARY)
def _(grad_h, grad_l0, x, threshold, bandwidth, needs, backend):
    return [
        one.new_empty(one.shape) for one, need in ((x, NEED_X), (threshold, NEED_THRESHOLD)) if needs & need
    ]


class _JumpReLU(torch.autograd.Function):
    """`call` is (bandwidth, backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, x, threshold, call):
        bandwidth, backend, launchers = call
        ctx.save_for_backward(x, threshold)
        ctx.set_materialize_grads(False)
        ctx.call = call
        if launchers is not None:
            h, l0 = launchers.jumprelu(x, threshold)
        else:
            with below_autograd():
                h, l0 = torch.ops.aefast.jumprelu.default(x, threshold, bandwidth, backend)
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(l0)
        return h, l0

    @staticmethod
    def backward(ctx, *grads):
        bandwidth, backend, _ = ctx.call
        x, threshold = ctx.saved_tensors
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None, None, None
        needs = ctx.needs_input_grad[:2]
        if _registry.wants_reference(some):
            gradients = _registry.differentiate(
                lambda x, threshold: reference(x, threshold, bandwidth), (x, threshold), needs, grads
            )
            return *gradients, None
        bits = NEED_X * needs[0] + NEED_THRESHOLD * needs[1]
        tensors = *grads, x, threshold
        return *_registry.gradients("jumprelu", backend, tensors, (bandwidth, bits), needs), None


_apply = direct_apply(_JumpReLU)


@torch.library.impl(LIBRARY, "jumprelu", "Autograd")
def _(x, threshold, bandwidth, backend):
    if _registry.is_transformed():
        return reference(x, threshold, bandwidth)
    if _registry.needs_gradient(x, threshold):
        return _JumpReLU.apply(x, threshold, (bandwidth, backend, None))
    with below_autograd():
        return torch.ops.aefast.jumprelu.default(x, threshold, bandwidth, backend)


def jumprelu(x: Tensor, threshold: Tensor, bandwidth: float = 1e-3) -> tuple[Tensor, Tensor]:
    """x where it is above its feature's threshold, else 0; and how many of each row are, in one pass.

    Neither output has a derivative by the threshold θ that could train it. Its gradients are the straight-through ones
    of Rajamanoharan et al., Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders
    (arXiv:2407.14435), with the rectangle as kernel, K(u) = 1 for abs(u) < 1/2, else 0, and the bandwidth ε:
    dh/dθ = -(θ/ε) K((x - θ)/ε) and dl0/dθ = -(1/ε) K((x - θ)/ε). To x the gradient is that of h alone,
    dh/dx = 1 where x > θ, else 0. The backward reads x again, in one pass, and no mask is stored; sums over the batch
    are in float32 at least, in an order that depends on the shape alone.

    Args:
        x: (*, F), the pre-activations: float32, bfloat16, float16 or float64, any strides.
        threshold: (F,), above 0, as exp of what a model learns; of x's device, and of its dtype or, for half
            precision, float32, in which it is compared. Its values are not looked at: with one of 0 or below, what is
            negative and above it passes too.
        bandwidth: ε, above 0, in x's units.

    Returns:
        h (*, F), contiguous, in x's dtype, NaN where x is; and the number of active features (*) in float32, or
        float64 for float64.

    Raises:
        InputError: a shape, dtype, device or value is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(x, threshold) and _arguments.are_stand_ins(x, threshold):
        return _arguments.deferred(jumprelu, locals())
    _check(x, threshold, bandwidth)
    backend = _registry.choose("jumprelu", x, threshold)
    threshold = threshold.to(_arguments.accumulator(x.dtype))
    bandwidth = float(bandwidth)
    if backend == "eager":
        return reference(x, threshold, bandwidth)
    leading = x.shape[:-1]
    flat = x if x.dim() == 2 else x.reshape(math.prod(leading), x.shape[-1])
    if _registry.is_direct(backend, flat, threshold):
        launchers = _registry.kernels(backend, "jumprelu")
        if _registry.needs_gradient(flat, threshold):
            h, l0 = _apply(flat, threshold, (bandwidth, backend, launchers))
        else:
            h, l0 = launchers.jumprelu(flat, threshold)
    else:
        h, l0 = torch.ops.aefast.jumprelu.default(flat, threshold, bandwidth, backend)
    return (h, l0) if x.dim() == 2 else (h.reshape(x.shape), l0.reshape(leading))


def _check(x: Any, threshold: Any, bandwidth: Any) -> None:
    op = "jumprelu"
    _arguments.check_tensor("x", x, op)
    _arguments.check_tensor("threshold", threshold, op)
    _arguments.check_floating("x", x, op)
    _arguments.check_dense("x", x, op)
    _arguments.check_dense("threshold", threshold, op)
    if x.dim() < 1:
        raise InputError(f"{op}: x must have at least one dimension, (*, F), got a scalar")
    if threshold.shape != x.shape[-1:]:
        raise InputError(
            f"{op}: threshold must be ({x.shape[-1]},) to match x of shape {_arguments.shape_of(x)}, "
            f"got shape {_arguments.shape_of(threshold)}"
        )
    if threshold.dtype != _arguments.accumulator(x.dtype):
        _arguments.check_like("threshold", threshold, "x", x, op)
    elif threshold.device != x.device:
        raise InputError(f"{op}: threshold must be on the device of x, {x.device}, got {threshold.device}")
    _arguments.check_positive("bandwidth", bandwidth, op)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Pre-activations over shapes and strides: empty, one-wide, prime, narrow, long, leading dimensions, halves of one
    matrix; with thresholds of x's dtype and of its accumulator. Bandwidths are wide: of few rows some are inside."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def thresholds(size: int) -> Tensor:
        return (torch.rand(size, generator=generator, dtype=torch.float64) + 0.05).to(device, dtype)

    for rows, size in (
        (0, 5), (4, 0), (1, 1), (7, 1), (31, 17), (64, 16), (3, 1031), (130, 2100), (1100, 3), (70, 257),
    ):  # fmt: skip
        yield {"x": draw(rows, size), "threshold": thresholds(size), "bandwidth": 0.4}
    yield {"x": draw(2, 5, 24), "threshold": thresholds(24), "bandwidth": 2.0}
    yield {"x": draw(24), "threshold": thresholds(24), "bandwidth": 0.75}
    wide = thresholds(20).to(_arguments.accumulator(dtype))
    yield {"x": draw(37, 40)[:, 20:], "threshold": wide, "bandwidth": 0.3}
    yield {"x": draw(18, 33).t(), "threshold": thresholds(36)[::2]}
    yield {"x": draw(1, 12).expand(9, 12), "threshold": thresholds(1).expand(12), "bandwidth": 1.0}


def cost(backward: bool, x: Tensor, threshold: Tensor, bandwidth: float = 1e-3) -> _registry.Cost:
    """x is read and h written; the backward reads x and h's gradient and writes x's. All else is small."""
    rows = math.prod(x.shape[:-1])
    wide = _arguments.accumulator(x.dtype).itemsize
    small = (1 + backward) * (rows * wide + threshold.numel() * threshold.element_size())
    return _registry.Cost((2 + 3 * backward) * x.numel() * x.element_size() + small, 0, 0)


OP = _registry.register(_registry.Op("jumprelu", jumprelu, reference, samples, cost))
