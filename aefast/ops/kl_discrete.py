"""The KL divergence of discrete distributions."""

import math
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.ops import _arguments, _registry
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply


def reference(p: Tensor, q: Tensor, *, dim: int = -1, reduction: str = "mean") -> Tensor:
    """`kl_discrete` in plain PyTorch."""
    return _arguments.reduce(_divergence(p.movedim(dim, -1), q.movedim(dim, -1)), reduction)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Of each row: (*, C) to (*)."""
    wide = _arguments.accumulator(p.dtype)
    p, q = p.to(wide), q.to(wide)
    # Neither value nor gradient of what p = 0 leaves out may reach the others.
    is_out = p == 0
    p, q = p.masked_fill(is_out, 1.0), q.masked_fill(is_out, 1.0)
    return (p * (p.log() - q.log())).sum(-1)


# p and q (B, C) of any strides: the divergence of each row, (B,), and the gradients of both for grad (B,).
define("kl_discrete(Tensor p, Tensor q, str backend) -> Tensor")
define("kl_discrete_backward(Tensor grad, Tensor p, Tensor q, str backend) -> (Tensor, Tensor)")


@torch.library.impl(LIBRARY, "kl_discrete", "CompositeExplicitAutograd")
def _(p, q, backend):
    return _registry.kernels(backend, "kl_discrete").kl_discrete(p, q)


@torch.library.impl(LIBRARY, "kl_discrete_backward", "CompositeExplicitAutograd")
def _(grad, p, q, backend):
    return _registry.kernels(backend, "kl_discrete").kl_discrete_backward(grad, p, q)


@torch.library.register_fake("aefast::kl_discrete", lib=LIBRARY)
def _(p, q, backend):
    return p.new_empty(p.shape[0], dtype=_arguments.accumulator(p.dtype))


@torch.library.register_fake("aefast::kl_discrete_backward", lib=LIBRARY)
def _(grad, p, q, backend):
    return p.new_empty(p.shape), p.new_empty(p.shape)


class _KLDiscrete(torch.autograd.Function):
    """`call` is (backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, p, q, call):
        backend, launchers = call
        ctx.save_for_backward(p, q)
        ctx.backend = backend
        if launchers is not None:
            return launchers.kl_discrete(p, q)
        with below_autograd():
            return torch.ops.aefast.kl_discrete.default(p, q, backend)

    @staticmethod
    def backward(ctx, grad):
        p, q = ctx.saved_tensors
        if _registry.wants_reference(grad):
            gradients = _registry.differentiate(_divergence, (p, q), ctx.needs_input_grad[:2], grad)
        elif _registry.is_direct(ctx.backend, grad, p, q):
            gradients = _registry.kernels(ctx.backend, "kl_discrete").kl_discrete_backward(grad, p, q)
        else:
            gradients = torch.ops.aefast.kl_discrete_backward.default(grad, p, q, ctx.backend)
        return *gradients, None


_apply = direct_apply(_KLDiscrete)


@torch.library.impl(LIBRARY, "kl_discrete", "Autograd")
def _(p, q, backend):
    if _registry.is_transformed():
        return _divergence(p, q)
    if torch.is_grad_enabled() and (p.requires_grad or q.requires_grad):
        return _KLDiscrete.apply(p, q, (backend, None))
    with below_autograd():
        return torch.ops.aefast.kl_discrete.default(p, q, backend)


def kl_discrete(p: Tensor, q: Tensor, *, dim: int = -1, reduction: str = "mean") -> Tensor:
    """KL(p ‖ q) = Σ p log(p / q) over `dim` (Kullback and Leibler, Annals of Mathematical Statistics 22, 1951).

    Where p is 0 the term is 0 and has no gradient; where p is not, and q is 0, it is infinite. Neither p nor q is
    checked or made to sum to 1.

    Args:
        p: probabilities of any shape with at least one dimension: float32, bfloat16, float16 or float64, any strides.
        q: the shape, dtype and device of p.
        dim: the dimension that a distribution lies along.
        reduction: over the other dimensions: "mean", "sum" or "none".

    Returns:
        The divergence in nats: a scalar, or for "none" the shape of p without `dim`; in float32 for half precision.

    Raises:
        InputError: a shape, dtype, device, name or value is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    _check(p, q, dim, reduction)
    backend = _registry.choose("kl_discrete", p, q)
    if backend == "eager":
        return reference(p, q, dim=dim, reduction=reduction)
    p, q = p.movedim(dim, -1), q.movedim(dim, -1)
    leading = p.shape[:-1]
    if p.dim() != 2:
        shape = (math.prod(leading), p.shape[-1])
        p, q = p.reshape(shape), q.reshape(shape)
    if _registry.is_direct(backend, p, q):
        launchers = _registry.kernels(backend, "kl_discrete")
        if torch.is_grad_enabled() and (p.requires_grad or q.requires_grad):
            kl = _apply(p, q, (backend, launchers))
        else:
            kl = launchers.kl_discrete(p, q)
    else:
        kl = torch.ops.aefast.kl_discrete.default(p, q, backend)
    return _arguments.reduce(kl.reshape(leading), reduction)


def _check(p: Any, q: Any, dim: Any, reduction: Any) -> None:
    op = "kl_discrete"
    _arguments.check_tensor("p", p, op)
    _arguments.check_tensor("q", q, op)
    _arguments.check_floating("p", p, op)
    _arguments.check_dense("p", p, op)
    if p.dim() < 1:
        raise InputError(f"{op}: p must have at least one dimension, got a scalar")
    if q.shape != p.shape:
        raise InputError(
            f"{op}: q must have the shape of p, {_arguments.shape_of(p)}, got {_arguments.shape_of(q)}"
        )
    _arguments.check_like("q", q, "p", p, op)
    if isinstance(dim, bool) or not isinstance(dim, Integral) or not -p.dim() <= dim < p.dim():
        raise InputError(f"{op}: dim must be from {-p.dim()} to {p.dim() - 1}, got {dim!r}")
    _arguments.check_reduction(reduction, op)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Distributions over shapes and strides, some with zeros in p or in both."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).add(0.01).to(device, dtype)

    for shape in ((0, 5), (4, 0), (1, 1), (7, 1), (31, 17), (64, 16), (3, 1031), (2, 5, 24), (24,)):
        yield {"p": draw(*shape), "q": draw(*shape), "reduction": "none"}
    sparse = draw(9, 20)
    sparse[:, ::3] = 0.0
    both = draw(9, 20)
    both[:, ::6] = 0.0
    yield {"p": sparse, "q": both, "reduction": "mean"}
    yield {"p": draw(18, 33).t(), "q": draw(66, 18)[::2], "reduction": "sum"}
    yield {"p": draw(4, 11, 6), "q": draw(4, 11, 6), "dim": 1, "reduction": "none"}
    yield {"p": draw(1, 12).expand(9, 12), "q": draw(9, 1).expand(9, 12), "dim": -2, "reduction": "mean"}


def cost(backward: bool, p: Tensor, q: Tensor, dim: int = -1, **settings: Any) -> _registry.Cost:
    """Each operand is read once and each result written once."""
    elements = (2 + 4 * backward) * p.numel()
    rows = p.numel() // max(1, p.shape[dim])
    wide = _arguments.accumulator(p.dtype).itemsize
    return _registry.Cost(
        elements * p.element_size() + (1 + backward) * rows * wide, 0, (1 + backward) * 2 * p.numel()
    )


OP = _registry.register(_registry.Op("kl_discrete", kl_discrete, reference, samples, cost))
