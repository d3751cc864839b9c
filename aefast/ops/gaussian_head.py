"""The head of a variational encoder in one op: a dense layer to [mu | logvar], a sample, and its KL divergence."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.kernels.activation import NEED_BIAS, NEED_WEIGHT, NEED_X
from aefast.ops import _arguments, _philox, _registry, linear_act, reparameterize
from aefast.ops._flops import counted, of_layer, wanted
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement


def reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    logvar_range: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gaussian_head` in plain PyTorch."""
    seed = _philox.seed_of(seed, generator, h, "gaussian_head")
    limits = reparameterize.range_of(logvar_range, "gaussian_head")
    z, kl, moments = _reference(h, weight, bias, seed, *limits)
    return z, _arguments.reduce(kl, reduction), *moments.chunk(2, -1)


def _reference(
    h: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    moments = F.linear(h, weight, bias)
    mu, logvar = moments.chunk(2, -1)
    return *reparameterize.rows_reference(mu, logvar, seed, low, high), moments


# h (M, K), weight (2 D, K), bias (2 D,), seed an int64 scalar: z (M, D), the KL divergence of each row (M,), and
# [mu | logvar] (M, 2 D). logvar counts as its nearest value in [low, high].
define(
    "gaussian_head(Tensor h, Tensor weight, Tensor? bias, Tensor seed, float low, float high, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
# The gradients of h, weight and bias that `needs` asks for, as in kernels/activation.py; of those of the three outputs
# each may be absent, which stands for zeros.
define(
    "gaussian_head_backward(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_moments, Tensor h, Tensor weight,"
    " Tensor moments, Tensor seed, float low, float high, int needs, str backend) -> Tensor[]"
)


@implement("gaussian_head")
def _(h, weight, bias, seed, low, high, backend):
    return _registry.kernels(backend, "gaussian_head").gaussian_head(h, weight, bias, seed, low, high)


@implement("gaussian_head_backward")
def _(grad_z, grad_kl, grad_moments, h, weight, moments, seed, low, high, needs, backend):
    launch = _registry.kernels(backend, "gaussian_head").gaussian_head_backward
    gradients = launch(grad_z, grad_kl, grad_moments, h, weight, moments, seed, low, high, needs)
    return [gradient for gradient in gradients if gradient is not None]


@torch.library.register_fake("aefast::gaussian_head", lib=LIBRARY)
def _(h, weight, bias, seed, low, high, backend):
    rows, columns = h.shape[0], weight.shape[0]
    kl = h.new_empty(rows, dtype=_arguments.accumulator(h.dtype))
    return h.new_empty(rows, columns // 2), kl, h.new_empty(rows, columns)


@torch.library.register_fake("aefast::gaussian_head_backward", lib=LIBRARY)
def _(grad_z, grad_kl, grad_moments, h, weight, moments, seed, low, high, needs, backend):
    shapes = {NEED_X: h.shape, NEED_WEIGHT: weight.shape, NEED_BIAS: weight.shape[:1]}
    return [h.new_empty(shape) for need, shape in shapes.items() if needs & need]


@counted("gaussian_head")
def _(h, weight, bias, seed, low, high, backend):
    return of_layer(h, weight)


@counted("gaussian_head_backward")
def _(grad_z, grad_kl, grad_moments, h, weight, moments, seed, low, high, needs, backend):
    return wanted(needs) * of_layer(h, weight)


class _GaussianHead(torch.autograd.Function):
    """`call` is (low, high, reduction of the divergence, backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, h, weight, bias, seed, call):
        low, high, reduction, backend, launchers = call
        if launchers is not None:
            z, kl, moments = launchers.gaussian_head(h, weight, bias, seed, low, high)
        else:
            with below_autograd():
                z, kl, moments = torch.ops.aefast.gaussian_head.default(
                    h, weight, bias, seed, low, high, backend
                )
        ctx.save_for_backward(h, weight, bias, moments, seed)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return z, _arguments.reduce(kl, reduction), moments

    @staticmethod
    def backward(ctx, *grads):
        low, high, reduction, backend, _ = ctx.call
        h, weight, bias, moments, seed = ctx.saved_tensors
        grads = grads[0], _arguments.reduce_backward(grads[1], reduction, h.shape[0]), grads[2]
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None, None, None, None, None
        needs = ctx.needs_input_grad[:3]
        if _registry.wants_reference(some):
            gradients = _registry.differentiate(
                lambda h, weight, bias: _reference(h, weight, bias, seed, low, high),
                (h, weight, bias),
                needs,
                grads,
            )
            return *gradients, None, None
        bits = NEED_X * needs[0] + NEED_WEIGHT * needs[1] + NEED_BIAS * needs[2]
        tensors, settings = (*grads, h, weight, moments, seed), (low, high, bits)
        return *_registry.gradients("gaussian_head", backend, tensors, settings, needs), None, None


_apply = direct_apply(_GaussianHead)


@torch.library.impl(LIBRARY, "gaussian_head", "Autograd")
def _(h, weight, bias, seed, low, high, backend):
    if _registry.is_transformed():
        return _reference(h, weight, bias, seed, low, high)
    if _registry.needs_gradient(h, weight, bias):
        return _GaussianHead.apply(h, weight, bias, seed, (low, high, "none", backend, None))
    with below_autograd():
        return torch.ops.aefast.gaussian_head.default(h, weight, bias, seed, low, high, backend)


def gaussian_head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    logvar_range: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reparameterize` of ``[mu | logvar] = h @ weight.T + bias``, with a backward of one op.

    Args:
        h: (*, K), the encoder's last hidden layer: float32, bfloat16, float16 or float64, any strides.
        weight: (2 D, K), the rows of mu and then those of logvar; the dtype and device of h.
        bias: (2 D,) or None.
        seed, generator, reduction, logvar_range: as `reparameterize` takes them.

    Returns:
        z (*, D), the divergence as from `reparameterize`, and mu and logvar (*, D), which are the halves of one tensor;
        logvar as the layer gives it, outside of logvar_range too. The backward reads them: neither may be modified in
        place before it. In autocast's dtype under autocast.

    Raises:
        InputError: a shape, dtype, device, name or value is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(h, weight, bias, seed) and _arguments.are_stand_ins(h, weight, bias, seed):
        return _arguments.deferred(gaussian_head, locals())
    h, weight, bias = _arguments.autocast(h, weight, bias)
    linear_act.check_layer(h, weight, bias, "gaussian_head", "weight", "bias", "h")
    if weight.shape[0] % 2:
        raise InputError(
            f"gaussian_head: weight must be (2 D, {h.shape[-1]}), with an even number of rows, "
            f"got shape {_arguments.shape_of(weight)}"
        )
    _arguments.check_reduction(reduction, "gaussian_head")
    low, high = reparameterize.range_of(logvar_range, "gaussian_head")
    seed = _philox.seed_of(seed, generator, h, "gaussian_head")
    backend = _registry.choose("gaussian_head", h, weight, bias)
    leading = h.shape[:-1]
    if backend == "eager":
        z, kl, moments = _reference(h, weight, bias, seed, low, high)
        return z, _arguments.reduce(kl, reduction), *moments.chunk(2, -1)
    if h.dim() != 2:
        h = h.reshape(math.prod(leading), h.shape[-1])
    is_direct = _registry.is_direct(backend, h, weight, bias, seed)
    launchers = _registry.kernels(backend, "gaussian_head") if is_direct else None
    if is_direct and _registry.needs_gradient(h, weight, bias):
        z, kl, moments = _apply(h, weight, bias, seed, (low, high, reduction, backend, launchers))
    else:
        if is_direct:
            z, kl, moments = launchers.gaussian_head(h, weight, bias, seed, low, high)
        else:
            z, kl, moments = torch.ops.aefast.gaussian_head.default(h, weight, bias, seed, low, high, backend)
        kl = _arguments.reduce(kl, reduction)
    size = weight.shape[0] // 2
    if len(leading) != 1:
        z, moments = z.reshape(*leading, size), moments.reshape(*leading, 2 * size)
        kl = kl.reshape(leading) if reduction == "none" else kl
    return z, kl, moments[..., :size], moments[..., size:]


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Operands over shapes and strides: empty, one-wide, prime, multiples of a vector, transposed, sliced."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    for index, (rows, inputs, size) in enumerate(
        ((0, 5, 3), (4, 0, 3), (4, 5, 0), (1, 1, 1), (31, 17, 13), (64, 32, 16), (130, 8, 257))
    ):
        scale = max(1, inputs) ** -0.5
        layer = {"weight": draw(2 * size, inputs) * scale, "bias": draw(2 * size)}
        yield {"h": draw(rows, inputs), **layer, "seed": index, "reduction": "none"}
    yield {"h": draw(6, 5, 24), "weight": draw(16, 24) * 0.2, "bias": None, "seed": 2**40}
    yield {"h": draw(24), "weight": draw(16, 24) * 0.2, "bias": draw(16), "seed": -3, "reduction": "sum"}
    layer = {"weight": draw(24, 40).t() * 0.2, "bias": draw(80)[::2]}
    yield {"h": draw(24, 66).t(), **layer, "seed": 1, "logvar_range": (-0.5, 0.75)}


def cost(
    backward: bool, h: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: Any
) -> _registry.Cost:
    """Each operand is read once and each result written once, and the backward reads mu and logvar again."""
    rows, (columns, inputs) = math.prod(h.shape[:-1]), weight.shape
    parameters = columns * inputs + (0 if bias is None else columns)
    elements = h.numel() + parameters + rows * columns * 3 // 2
    flops, exps = 2 * rows * columns * inputs, 5 * rows * columns // 4
    if backward:
        elements += rows * columns * 3 // 2 + 2 * h.numel() + columns * inputs + parameters
        flops, exps = 3 * flops, 2 * exps
    wide = _arguments.accumulator(h.dtype).itemsize
    return _registry.Cost(elements * h.element_size() + (1 + backward) * rows * wide, flops, exps)


OP = _registry.register(_registry.Op("gaussian_head", gaussian_head, reference, samples, cost))
