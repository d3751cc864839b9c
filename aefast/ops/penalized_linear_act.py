"""A dense layer, its activation, and a sparsity penalty of what it gives, in one op."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.kernels.activation import NEED_BIAS, NEED_WEIGHT, NEED_X, STORES_DERIVATIVE, specification
from aefast.kernels.penalty import EPS, PENALTIES
from aefast.ops import _arguments, _registry, linear_act
from aefast.ops._flops import counted, of_layer, wanted
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    *,
    penalty: str = "l1",
    rate: float = 0.05,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`penalized_linear_act` in plain PyTorch."""
    specified = specification(activation, negative_slope, alpha)
    return _reference(x, weight, bias, specified, penalty, rate)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, penalty: str, rate: float
) -> tuple[Tensor, Tensor]:
    h = linear_act.specified_reference(x, weight, bias, activation)
    wide = h.to(_arguments.accumulator(h.dtype))
    rows = math.prod(h.shape[:-1])
    if penalty == "l1":
        return h, wide.abs().sum() / rows
    q = (wide.reshape(rows, h.shape[-1]).sum(0) / rows).clamp(EPS, 1.0 - EPS)
    return h, (rate * (rate / q).log() + (1.0 - rate) * ((1.0 - rate) / (1.0 - q)).log()).sum()


# x (M, K), weight (N, K), bias (N,): h (M, N) and the penalty, a scalar in the accumulator. `activation` is a
# specification, and `needs` says which gradients are wanted, as in kernels/activation.py.
define(
    "penalized_linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, str penalty, float rate,"
    " str backend) -> (Tensor, Tensor)"
)
# The same, and what the backward reads beside h: for "kl" the sums of h's columns (N,), in the accumulator, and act'
# where it is stored; else no elements.
define(
    "penalized_linear_act_saving(Tensor x, Tensor weight, Tensor? bias, str activation, str penalty, float rate,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
# Of the gradients of both outputs one may be absent, which stands for zeros. h is read for "l1", sums for "kl" alone.
define(
    "penalized_linear_act_backward(Tensor? grad, Tensor? grad_penalty, Tensor x, Tensor weight, Tensor? saved,"
    " Tensor? h, Tensor? sums, str activation, str penalty, float rate, int needs, str backend) -> Tensor[]"
)


@implement("penalized_linear_act")
def _(x, weight, bias, activation, penalty, rate, backend):
    launch = _registry.kernels(backend, "penalized_linear_act").penalized_linear_act
    return launch(x, weight, bias, activation, penalty, rate, False)[:2]


@implement("penalized_linear_act_saving")
def _(x, weight, bias, activation, penalty, rate, backend):
    launch = _registry.kernels(backend, "penalized_linear_act").penalized_linear_act
    h, value, *saved = launch(x, weight, bias, activation, penalty, rate, True)
    return h, value, *(x.new_empty(0) if one is None else one for one in saved)


@implement("penalized_linear_act_backward")
def _(grad, grad_penalty, x, weight, saved, h, sums, activation, penalty, rate, needs, backend):
    launch = _registry.kernels(backend, "penalized_linear_act").penalized_linear_act_backward
    gradients = launch(grad, grad_penalty, x, weight, saved, h, sums, activation, penalty, rate, needs)
    return [gradient for gradient in gradients if gradient is not None]


@torch.library.register_fake("aefast::penalized_linear_act", lib=LIBRARY)
def _(x, weight, bias, activation, penalty, rate, backend):
    value = x.new_empty((), dtype=_arguments.accumulator(x.dtype))
    return x.new_empty(x.shape[0], weight.shape[0]), value


@torch.library.register_fake("aefast::penalized_linear_act_saving", lib=LIBRARY)
def _(x, weight, bias, activation, penalty, rate, backend):
    wide = _arguments.accumulator(x.dtype)
    shape = x.shape[0], weight.shape[0]
    sums = x.new_empty(weight.shape[0], dtype=wide) if penalty == "kl" else x.new_empty(0)
    derivative = x.new_empty(shape if activation in STORES_DERIVATIVE else 0)
    return x.new_empty(shape), x.new_empty((), dtype=wide), sums, derivative


@torch.library.register_fake("aefast::penalized_linear_act_backward", lib=LIBRARY)
def _(grad, grad_penalty, x, weight, saved, h, sums, activation, penalty, rate, needs, backend):
    shapes = {NEED_X: x.shape, NEED_WEIGHT: weight.shape, NEED_BIAS: weight.shape[:1]}
    return [x.new_empty(shape) for need, shape in shapes.items() if needs & need]


@counted("penalized_linear_act", "penalized_linear_act_saving")
def _(x, weight, bias, activation, penalty, rate, backend):
    return of_layer(x, weight)


@counted("penalized_linear_act_backward")
def _(grad, grad_penalty, x, weight, saved, h, sums, activation, penalty, rate, needs, backend):
    return wanted(needs) * of_layer(x, weight)


class _PenalizedLinearAct(torch.autograd.Function):
    """`call` is (activation, penalty, rate, backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, x, weight, bias, call):
        *settings, backend, launchers = call
        activation, penalty, _ = settings
        if launchers is not None:
            h, value, sums, derivative = launchers.penalized_linear_act(x, weight, bias, *settings, True)
        else:
            with below_autograd():
                forward = torch.ops.aefast.penalized_linear_act_saving.default
                h, value, sums, derivative = forward(x, weight, bias, *settings, backend)
        saved = derivative if activation in STORES_DERIVATIVE else None if activation == "identity" else h
        kept = (h, None) if penalty == "l1" else (None, sums)
        ctx.save_for_backward(x, weight, bias, saved, *kept)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return h, value

    @staticmethod
    def backward(ctx, *grads):
        *settings, backend, _ = ctx.call
        x, weight, bias, *saved = ctx.saved_tensors
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None, None, None, None
        needs = ctx.needs_input_grad[:3]
        if _registry.wants_reference(some):
            gradients = _registry.differentiate(
                lambda x, weight, bias: _reference(x, weight, bias, *settings),
                (x, weight, bias),
                needs,
                grads,
            )
            return *gradients, None
        bits = NEED_X * needs[0] + NEED_WEIGHT * needs[1] + NEED_BIAS * needs[2]
        tensors, settings = (*grads, x, weight, *saved), (*settings, bits)
        return *_registry.gradients("penalized_linear_act", backend, tensors, settings, needs), None


_apply = direct_apply(_PenalizedLinearAct)


@torch.library.impl(LIBRARY, "penalized_linear_act", "Autograd")
def _(x, weight, bias, activation, penalty, rate, backend):
    settings = (activation, penalty, rate)
    if _registry.is_transformed():
        return _reference(x, weight, bias, *settings)
    if _registry.needs_gradient(x, weight, bias):
        return _PenalizedLinearAct.apply(x, weight, bias, (*settings, backend, None))
    with below_autograd():
        return torch.ops.aefast.penalized_linear_act.default(x, weight, bias, *settings, backend)


def penalized_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    *,
    penalty: str = "l1",
    rate: float = 0.05,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`linear_act`, and a penalty of its output's activity, without another pass over the output.

    The forward sums the output while it is in the cache, and the backward adds the penalty's gradient to that of the
    output where it multiplies it by the activation's derivative. Sums are in float32 at least, in an order that depends
    on the shape alone. What is summed is the output as it is stored, rounded to its dtype.

    Args:
        x, weight, bias, activation, negative_slope, alpha: as `linear_act` takes them.
        penalty: "l1", the mean over the batch of Σ_f abs(h_f); or "kl", Σ_f KL(rate ‖ q_f) =
            Σ_f rate log(rate / q_f) + (1 - rate) log((1 - rate) / (1 - q_f)), with q_f the mean of h_f over the
            batch (Ng, Sparse autoencoder, CS294A lecture notes). Being a divergence of Bernoulli distributions it
            makes sense for activations from 0 to 1, as sigmoid's. q_f counts as its nearest value in
            [1e-6, 1 - 1e-6], and has no gradient outside.
        rate: the mean activation that "kl" draws towards, above 0 and below 1; "l1" does not look at it.

    Returns:
        h (*, N), as from `linear_act`, and the penalty, a scalar in float32, or float64 for float64; of an empty batch,
        which has no mean, NaN. The backward reads h, which must not be modified in place before it.

    Raises:
        InputError: a shape, dtype, device, name or value is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(x, weight, bias) and _arguments.are_stand_ins(x, weight, bias):
        return _arguments.deferred(penalized_linear_act, locals())
    x, weight, bias = _arguments.autocast(x, weight, bias)
    _check(x, weight, bias, activation, penalty, rate, negative_slope, alpha)
    backend = _registry.choose("penalized_linear_act", x, weight, bias)
    if backend == "eager":
        settings = {"penalty": penalty, "rate": rate, "negative_slope": negative_slope, "alpha": alpha}
        return reference(x, weight, bias, activation, **settings)
    leading = x.shape[:-1]
    flat = x if x.dim() == 2 else x.reshape(math.prod(leading), x.shape[-1])
    specified = specification(activation, negative_slope, alpha)
    settings = (specified, penalty, float(rate) if penalty == "kl" else 0.0)
    if _registry.is_direct(backend, x, weight, bias):
        launchers = _registry.kernels(backend, "penalized_linear_act")
        if _registry.needs_gradient(flat, weight, bias):
            h, value = _apply(flat, weight, bias, (*settings, backend, launchers))
        else:
            h, value, *_ = launchers.penalized_linear_act(flat, weight, bias, *settings, False)
    else:
        h, value = torch.ops.aefast.penalized_linear_act.default(flat, weight, bias, *settings, backend)
    return (h if x.dim() == 2 else h.reshape(*leading, weight.shape[0])), value


def _check(
    x: Any,
    weight: Any,
    bias: Any,
    activation: Any,
    penalty: Any,
    rate: Any,
    negative_slope: Any,
    alpha: Any,
) -> None:
    op = "penalized_linear_act"
    linear_act.check_layer(x, weight, bias, op, "weight", "bias")
    _arguments.check_activation("activation", activation, op)
    _arguments.check_activation_parameter(activation, negative_slope, alpha, op)
    _arguments.check_name("penalty", penalty, PENALTIES, op)
    if penalty == "kl":
        _arguments.check_number("rate", rate, op, 0.0, 1.0)
        if rate in (0, 1):
            raise InputError(f"{op}: rate must be above 0 and below 1, got {rate!r}")


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Both penalties over shapes and strides: empty, one-wide, prime, multiples of a vector, transposed, sliced."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    kinds: tuple[dict[str, Any], ...] = (
        {"penalty": "l1"},
        {"activation": "sigmoid", "penalty": "kl", "rate": 0.1},
    )
    for kind in kinds:
        for rows, inputs, features in (
            (4, 0, 3), (4, 5, 0), (1, 1, 1), (7, 1, 1), (1, 13, 7), (31, 17, 29), (64, 32, 48), (257, 67, 131),
            (130, 8, 1030), (1100, 5, 3),
        ):  # fmt: skip
            scale = max(1, inputs) ** -0.5
            layer = {"weight": draw(features, inputs) * scale, "bias": draw(features)}
            yield {"x": draw(rows, inputs), **layer, **kind}
        yield {"x": draw(6, 5, 24), "weight": draw(16, 24) * 0.2, "bias": draw(16), **kind}
        yield {"x": draw(24), "weight": draw(16, 24) * 0.2, "bias": None, **kind}
        yield {"x": draw(24, 66).t(), "weight": draw(24, 40).t() * 0.2, "bias": draw(80)[::2], **kind}
    yield {"x": draw(40, 12), "weight": draw(9, 12) * 0.3, "bias": None, "activation": "identity"}
    yield {"x": draw(40, 12), "weight": draw(9, 12) * 0.3, "bias": draw(9), "activation": "silu"}


def cost(
    backward: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    **settings: Any,
) -> _registry.Cost:
    """That of the layer: the penalty needs no pass of its own."""
    return linear_act.cost(backward, x, weight, bias, activation)


OP = _registry.register(_registry.Op("penalized_linear_act", penalized_linear_act, reference, samples, cost))
