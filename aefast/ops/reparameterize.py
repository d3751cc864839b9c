"""Reparameterised sampling and its KL divergence in one op: ``z = mu + exp(logvar / 2) * eps``, eps made in place."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.ops import _arguments, _philox, _registry, kl_normal
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement


def reference(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    logvar_range: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """`reparameterize` in plain PyTorch."""
    seed = _philox.seed_of(seed, generator, mu, "reparameterize")
    z, kl = rows_reference(mu, logvar, seed, *range_of(logvar_range, "reparameterize"))
    return z, _arguments.reduce(kl, reduction)


def rows_reference(
    mu: Tensor, logvar: Tensor, seed: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """z, and the divergence of each row."""
    wide = _arguments.accumulator(mu.dtype)
    logvar = logvar.to(wide)
    if low > -math.inf or high < math.inf:
        # As clamp has it, but for NaN, whose gradient is NaN.
        is_out = (logvar < low) | (logvar > high)
        logvar = torch.where(is_out, logvar.detach().clamp(low, high), logvar)
    noise = _philox.normals(seed, mu.shape, wide)
    z = mu.to(wide) + torch.exp(0.5 * logvar) * noise
    return z.to(mu.dtype), kl_normal.divergence(mu.to(wide), logvar)


def range_of(logvar_range: Any, op: str) -> tuple[float, float]:
    """The limits of a logvar_range, infinite for None."""
    if logvar_range is None:
        return -math.inf, math.inf
    if not isinstance(logvar_range, Sequence) or isinstance(logvar_range, str) or len(logvar_range) != 2:
        raise InputError(f"{op}: logvar_range must be a pair (low, high) or None, got {logvar_range!r}")
    low, high = logvar_range
    _arguments.check_number("logvar_range[0]", low, op, -math.inf, math.inf)
    _arguments.check_number("logvar_range[1]", high, op, -math.inf, math.inf)
    if low > high:
        raise InputError(f"{op}: logvar_range must be (low, high) with low <= high, got {logvar_range!r}")
    return float(low), float(high)


# mu and logvar (B, D) of any strides, seed an int64 scalar; logvar counts as its nearest value in [low, high].
_OPERANDS = "Tensor mu, Tensor logvar, Tensor seed, float low, float high, str backend"
# z (B, D), and the KL divergence of each row (B,).
define(f"reparameterize({_OPERANDS}) -> (Tensor, Tensor)")
# The gradients of mu and logvar; of grad_z (B, D) and grad_kl (B,) one may be absent, which stands for zeros.
define(f"reparameterize_backward(Tensor? grad_z, Tensor? grad_kl, {_OPERANDS}) -> (Tensor, Tensor)")


@implement("reparameterize")
def _(mu, logvar, seed, low, high, backend):
    return _registry.kernels(backend, "reparameterize").reparameterize(mu, logvar, seed, low, high)


@implement("reparameterize_backward")
def _(grad_z, grad_kl, mu, logvar, seed, low, high, backend):
    launch = _registry.kernels(backend, "reparameterize").reparameterize_backward
    return launch(grad_z, grad_kl, mu, logvar, seed, low, high)


@torch.library.register_fake("aefast::reparameterize", lib=LIBRARY)
def _(mu, logvar, seed, low, high, backend):
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape[0], dtype=_arguments.accumulator(mu.dtype))


@torch.library.register_fake("aefast::reparameterize_backward", lib=LIBRARY)
def _(grad_z, grad_kl, mu, logvar, seed, low, high, backend):
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


class _Reparameterize(torch.autograd.Function):
    """`call` is (low, high, reduction of the divergence, backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, mu, logvar, seed, call):
        low, high, reduction, backend, launchers = call
        ctx.save_for_backward(mu, logvar, seed)
        ctx.set_materialize_grads(False)
        ctx.call = call
        if launchers is not None:
            z, kl = launchers.reparameterize(mu, logvar, seed, low, high)
        else:
            with below_autograd():
                z, kl = torch.ops.aefast.reparameterize.default(mu, logvar, seed, low, high, backend)
        return z, _arguments.reduce(kl, reduction)

    @staticmethod
    def backward(ctx, grad_z, grad_kl):
        low, high, reduction, backend, _ = ctx.call
        mu, logvar, seed = ctx.saved_tensors
        grad_kl = _arguments.reduce_backward(grad_kl, reduction, mu.shape[0])
        some = grad_z if grad_z is not None else grad_kl
        if some is None:
            return None, None, None, None
        if _registry.wants_reference(some):
            gradients = _registry.differentiate(
                lambda mu, logvar: rows_reference(mu, logvar, seed, low, high),
                (mu, logvar),
                ctx.needs_input_grad[:2],
                (grad_z, grad_kl),
            )
        else:
            tensors = grad_z, grad_kl, mu, logvar, seed
            gradients = _registry.gradients("reparameterize", backend, tensors, (low, high), (True, True))
        return *gradients, None, None


_apply = direct_apply(_Reparameterize)


@torch.library.impl(LIBRARY, "reparameterize", "Autograd")
def _(mu, logvar, seed, low, high, backend):
    if _registry.is_transformed():
        return rows_reference(mu, logvar, seed, low, high)
    if _registry.needs_gradient(mu, logvar):
        return _Reparameterize.apply(mu, logvar, seed, (low, high, "none", backend, None))
    with below_autograd():
        return torch.ops.aefast.reparameterize.default(mu, logvar, seed, low, high, backend)


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    logvar_range: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """A sample of N(mu, exp(logvar)) and the KL divergence of that distribution to N(0, I), in one pass.

    ``z = mu + exp(logvar / 2) * eps`` and ``kl = 1/2 Σ (mu² + exp(logvar) - 1 - logvar)`` over the last dimension:
    Kingma and Welling, Auto-Encoding Variational Bayes (arXiv:1312.6114), section 2.4 and appendix B. The noise eps
    is made in registers by Philox4x32-10 and made again in the backward; it is never stored. The same seed gives the
    same noise on every backend, up to the rounding of a logarithm, a sine and a cosine.

    Where exp(logvar) overflows, above 88.7 in float32, the divergence is infinite, and z where exp(logvar / 2) does,
    as in PyTorch. ``logvar_range`` prevents that: logvar counts as its nearest value in that range, and has no gradient
    outside of it, as with ``logvar.clamp``; NaN stays NaN. The models set it.

    mu, logvar and a seed that is a tensor are saved, and must not be modified in place before the backward.

    Args:
        mu: (*, D), the means: float32, bfloat16, float16 or float64, any strides.
        logvar: (*, D), the logarithms of the variances: the shape, dtype and device of mu.
        seed: an int, or an int64 tensor of one element on mu's device. None draws one from torch's generator, so
            that ``torch.manual_seed`` makes a run repeatable; captured CUDA graphs draw anew at each replay. Calls with
            one seed draw the same noise, of this op or another: give each its own.
        generator: the generator to draw the seed from instead; not under torch.compile.
        reduction: of the divergence over the leading dimensions: "mean", "sum" or "none".
        logvar_range: (low, high), or None for no limits.

    Returns:
        z (*, D), contiguous, in mu's dtype, and the divergence in nats: a scalar, or (*) for "none"; in float32 for
        half precision.

    Raises:
        InputError: a shape, dtype, device, name or value is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(mu, logvar, seed) and _arguments.are_stand_ins(mu, logvar, seed):
        return _arguments.deferred(reparameterize, locals())
    kl_normal.check(mu, logvar, reduction, "reparameterize")
    low, high = range_of(logvar_range, "reparameterize")
    seed = _philox.seed_of(seed, generator, mu, "reparameterize")
    backend = _registry.choose("reparameterize", mu, logvar)
    if backend == "eager":
        z, kl = rows_reference(mu, logvar, seed, low, high)
        return z, _arguments.reduce(kl, reduction)
    shape = mu.shape
    if mu.dim() != 2:
        rows = math.prod(shape[:-1])
        mu, logvar = mu.reshape(rows, shape[-1]), logvar.reshape(rows, shape[-1])
    is_direct = _registry.is_direct(backend, mu, logvar, seed)
    launchers = _registry.kernels(backend, "reparameterize") if is_direct else None
    if is_direct and _registry.needs_gradient(mu, logvar):
        z, kl = _apply(mu, logvar, seed, (low, high, reduction, backend, launchers))
    else:
        if is_direct:
            z, kl = launchers.reparameterize(mu, logvar, seed, low, high)
        else:
            z, kl = torch.ops.aefast.reparameterize.default(mu, logvar, seed, low, high, backend)
        kl = _arguments.reduce(kl, reduction)
    if len(shape) != 2:
        z = z.reshape(shape)
        kl = kl.reshape(shape[:-1]) if reduction == "none" else kl
    return z, kl


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The operands of `kl_normal.samples`, each with a seed; one seed is a tensor, and one has high bits."""
    for index, sample in enumerate(kl_normal.samples(device, dtype)):
        yield {**sample, "seed": index + (2**40 if index % 2 else 0)}
    seed = torch.tensor([-7], device=device)
    yield {**sample, "seed": seed, "logvar_range": (-0.5, 0.75)}


def cost(backward: bool, mu: Tensor, logvar: Tensor, **settings: Any) -> _registry.Cost:
    """Each operand is read once and each result written once. A normal value takes half of a logarithm, of a sine and
    of a cosine, which count as exponentials do."""
    elements, exps = 3 * mu.numel(), 2.5 * mu.numel()
    if backward:
        elements += 5 * mu.numel()
        exps *= 2
    rows = mu.numel() // max(1, mu.shape[-1])
    wide = _arguments.accumulator(mu.dtype).itemsize
    return _registry.Cost(elements * mu.element_size() + (1 + backward) * rows * wide, 0, int(exps))


OP = _registry.register(_registry.Op("reparameterize", reparameterize, reference, samples, cost))
