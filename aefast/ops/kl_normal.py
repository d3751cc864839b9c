"""The KL divergence of normal distributions with diagonal covariance to N(0, I)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.ops import _arguments, _registry
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply


def reference(mu: Tensor, logvar: Tensor, *, reduction: str = "mean") -> Tensor:
    """`kl_normal` in plain PyTorch."""
    return _arguments.reduce(divergence(mu, logvar), reduction)


def divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """Of each row: (*, D) to (*)."""
    wide = _arguments.accumulator(mu.dtype)
    mu, logvar = mu.to(wide), logvar.to(wide)
    return 0.5 * (mu * mu + (logvar.exp() - 1.0 - logvar)).sum(-1)


# mu and logvar (B, D) of any strides: the divergence of each row, (B,), and the gradients of both for grad (B,).
define("kl_normal(Tensor mu, Tensor logvar, str backend) -> Tensor")
define("kl_normal_backward(Tensor grad, Tensor mu, Tensor logvar, str backend) -> (Tensor, Tensor)")


@torch.library.impl(LIBRARY, "kl_normal", "CompositeExplicitAutograd")
def _(mu, logvar, backend):
    return _registry.kernels(backend, "kl_normal").kl_normal(mu, logvar)


@torch.library.impl(LIBRARY, "kl_normal_backward", "CompositeExplicitAutograd")
def _(grad, mu, logvar, backend):
    return _registry.kernels(backend, "kl_normal").kl_normal_backward(grad, mu, logvar)


@torch.library.register_fake("aefast::kl_normal", lib=LIBRARY)
def _(mu, logvar, backend):
    return mu.new_empty(mu.shape[0], dtype=_arguments.accumulator(mu.dtype))


@torch.library.register_fake("aefast::kl_normal_backward", lib=LIBRARY)
def _(grad, mu, logvar, backend):
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


class _KLNormal(torch.autograd.Function):
    """`call` is (backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, mu, logvar, call):
        backend, launchers = call
        ctx.save_for_backward(mu, logvar)
        ctx.backend = backend
        if launchers is not None:
            return launchers.kl_normal(mu, logvar)
        with below_autograd():
            return torch.ops.aefast.kl_normal.default(mu, logvar, backend)

    @staticmethod
    def backward(ctx, grad):
        mu, logvar = ctx.saved_tensors
        if _registry.wants_reference(grad):
            gradients = _registry.differentiate(divergence, (mu, logvar), ctx.needs_input_grad[:2], grad)
        elif _registry.is_direct(ctx.backend, grad, mu, logvar):
            gradients = _registry.kernels(ctx.backend, "kl_normal").kl_normal_backward(grad, mu, logvar)
        else:
            gradients = torch.ops.aefast.kl_normal_backward.default(grad, mu, logvar, ctx.backend)
        return *gradients, None


_apply = direct_apply(_KLNormal)


@torch.library.impl(LIBRARY, "kl_normal", "Autograd")
def _(mu, logvar, backend):
    if _registry.is_transformed():
        return divergence(mu, logvar)
    if torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad):
        return _KLNormal.apply(mu, logvar, (backend, None))
    with below_autograd():
        return torch.ops.aefast.kl_normal.default(mu, logvar, backend)


def kl_normal(mu: Tensor, logvar: Tensor, *, reduction: str = "mean") -> Tensor:
    """KL(N(mu, diag(exp(logvar))) ‖ N(0, I)) = 1/2 Σ (mu² + exp(logvar) - 1 - logvar), over the last dimension.

    Kingma and Welling, Auto-Encoding Variational Bayes (arXiv:1312.6114), appendix B. `reparameterize` gives the same
    with a sample, in the same pass. It is infinite where exp(logvar) overflows, above 88.7 in float32.

    Args:
        mu: (*, D), the means: float32, bfloat16, float16 or float64, any strides.
        logvar: (*, D), the logarithms of the variances: the shape, dtype and device of mu.
        reduction: over the leading dimensions: "mean", "sum" or "none".

    Returns:
        The divergence in nats: a scalar, or (*) for "none"; in float32 for half precision.

    Raises:
        InputError: a shape, dtype, device or name is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    check(mu, logvar, reduction, "kl_normal")
    backend = _registry.choose("kl_normal", mu, logvar)
    if backend == "eager":
        return reference(mu, logvar, reduction=reduction)
    leading = mu.shape[:-1]
    if mu.dim() != 2:
        shape = (math.prod(leading), mu.shape[-1])
        mu, logvar = mu.reshape(shape), logvar.reshape(shape)
    if _registry.is_direct(backend, mu, logvar):
        launchers = _registry.kernels(backend, "kl_normal")
        if torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad):
            kl = _apply(mu, logvar, (backend, launchers))
        else:
            kl = launchers.kl_normal(mu, logvar)
    else:
        kl = torch.ops.aefast.kl_normal.default(mu, logvar, backend)
    return _arguments.reduce(kl.reshape(leading), reduction)


def check(mu: Any, logvar: Any, reduction: Any, op: str) -> None:
    """That (mu, logvar) are the parameters of normal distributions, and `reduction` is one."""
    _arguments.check_tensor("mu", mu, op)
    _arguments.check_tensor("logvar", logvar, op)
    _arguments.check_floating("mu", mu, op)
    _arguments.check_dense("mu", mu, op)
    if mu.dim() < 1:
        raise InputError(f"{op}: mu must have at least one dimension, (*, D), got a scalar")
    if logvar.shape != mu.shape:
        raise InputError(
            f"{op}: logvar must have the shape of mu, {_arguments.shape_of(mu)}, got {_arguments.shape_of(logvar)}"
        )
    _arguments.check_like("logvar", logvar, "mu", mu, op)
    _arguments.check_reduction(reduction, op)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Means and log-variances over shapes and strides: empty, one-wide, prime, long rows, halves of one matrix."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    for shape in ((0, 5), (4, 0), (1, 1), (7, 1), (31, 17), (64, 16), (3, 1031), (2, 5, 24), (24,)):
        yield {"mu": draw(*shape), "logvar": draw(*shape), "reduction": "none"}
    head = draw(37, 40)
    yield {"mu": head[:, :20], "logvar": head[:, 20:], "reduction": "mean"}
    yield {"mu": draw(18, 33).t(), "logvar": draw(66, 18)[::2], "reduction": "sum"}
    yield {"mu": draw(1, 12).expand(9, 12), "logvar": draw(9, 1).expand(9, 12), "reduction": "mean"}


def cost(backward: bool, mu: Tensor, logvar: Tensor, **settings: Any) -> _registry.Cost:
    """Each operand is read once and each result written once."""
    elements = (2 + 4 * backward) * mu.numel()
    rows = mu.numel() // max(1, mu.shape[-1])
    wide = _arguments.accumulator(mu.dtype).itemsize
    return _registry.Cost(
        elements * mu.element_size() + (1 + backward) * rows * wide, 0, (1 + backward) * mu.numel()
    )


OP = _registry.register(_registry.Op("kl_normal", kl_normal, reference, samples, cost))
