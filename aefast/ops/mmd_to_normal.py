"""The kernel maximum mean discrepancy of a sample and N(0, I), whose expectations are not sampled.

With y and y' ~ N(0, I_d)

    E exp(-p ‖x - y‖²)  = (1 + 2p)^(-d/2) exp(-p ‖x‖² / (1 + 2p)),
    E exp(-p ‖y - y'‖²) = (1 + 4p)^(-d/2),

which serves every kernel k(u) = Σ_j w_j exp(-p_j u). "rbf" is one. "imq" and "rational_quadratic" are Gamma mixtures of
such exponentials, of which a trapezoidal rule leaves about a hundred: see `_gamma_mixture`. "energy" has an integral of
its own: see `_minus_mean_distance`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.ops import _arguments, _pairwise, _registry, mmd
from aefast.ops._pairwise import Kernel

KERNELS = tuple(name for name in _pairwise.KERNELS if name != "laplacian")

# Sums of exponentials stand for kernels with errors of some exp(-28), 7e-13.
_NATS = 28.0
# Kernels of alpha < 1 fall so slowly that exp(-28 / alpha), where the nodes of their mixture would begin, has no lower
# limit. These serve all u up to 1e17 at least, and cu up to 1e28.
_LEAST_RATE = -40.0
_WIDEST = 75.0


def reference(
    x: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    estimator: str = "unbiased",
    alpha: float = 1.0,
) -> Tensor:
    """`mmd_to_normal` in plain PyTorch."""
    spec = kernel_of(kernel, bandwidth, alpha)
    return _discrepancy(x, spec, unit_of(spec, bandwidth, x.shape[1]), estimator, mmd.estimate)


def unit_of(kernel: Kernel, bandwidth: Any, dimensions: int) -> float | None:
    """What squared distances are divided by, or None for 1: where no bandwidth is given, their mean over the prior."""
    return 2.0 * dimensions if bandwidth is None and kernel.rates else None


def kernel_of(kernel: Any, bandwidth: Any, alpha: Any) -> Kernel:
    """What the arguments of the public function say.

    Raises:
        InputError: as `_pairwise.kernel_of`, or the kernel is laplacian.
    """
    spec = _pairwise.kernel_of("mmd_to_normal", kernel, bandwidth, alpha)
    if kernel not in KERNELS:
        raise InputError(
            f"mmd_to_normal: kernel must be one of {', '.join(KERNELS)}, got {kernel!r}; for its expectation over the "
            f"prior draw y = torch.randn_like(x), or more points than x has, and call mmd(x, y, kernel={kernel!r})"
        )
    return spec


def _discrepancy(
    x: Tensor, kernel: Kernel, unit: float | None, estimator: str, weighted_sum: Callable[..., Tensor]
) -> Tensor:
    # Both parts of a gradient come in float32 at least: what is left of them is less than either.
    x = x.to(_arguments.accumulator(x.dtype))
    of_pairs = weighted_sum(
        x,
        x.new_empty((0, x.shape[1])),
        None if unit is None else x.new_full((), unit),
        kernel,
        estimator,
    )
    of_points, of_prior = expectations(x, kernel, unit)
    return (of_pairs.to(torch.float64) + (of_prior - 2.0 * of_points.mean())).to(x.dtype)


def expectations(x: Tensor, kernel: Kernel, unit: float | None) -> tuple[Tensor, Tensor | float]:
    """E k(x, y) of each row x of (N, D), (N,), and E k(y, y'), both in float64."""
    dimensions = x.shape[1]
    if _registry.is_watched():
        table, constant = _table(kernel, unit, dimensions, x.device)
    else:
        table, constant = _table_at(kernel, unit, dimensions, x.device)
    # In float64 throughout: it costs as many exponentials a point as the table has columns, where pairs cost N.
    squares = x.to(torch.float64).square().sum(-1)
    expectation = _minus_mean_distance if kernel.name == "energy" else _mixture_expectation
    return expectation(squares, table, dimensions), constant


def _table(
    kernel: Kernel, unit: float | None, dimensions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What the function of ‖x‖² that is E k(x, y) is made of, (2, J), and E k(y, y'), a scalar.

    It is made where it is used, without a copy from the host, which a graph could not capture.
    """
    if kernel.name == "energy":
        table = _distance_nodes(device)
        origin = torch.zeros(1, dtype=torch.float64, device=device)
        # y - y' has the distribution of √2 y.
        return table, math.sqrt(2.0) * _minus_mean_distance(origin, table, dimensions)[0]
    rates, log_weights = _mixture(kernel, device)
    if unit is not None:
        rates = rates / unit
    table = torch.stack(
        (rates / (1.0 + 2.0 * rates), log_weights - 0.5 * dimensions * torch.log1p(2.0 * rates))
    )
    return table, torch.exp(log_weights - 0.5 * dimensions * torch.log1p(4.0 * rates)).sum()


# By kernel, unit, dimensions and device. Graphs read them where they are, so that none is ever dropped: once there are
# so many, others are copied at each call.
_ON_DEVICES: dict[tuple[Kernel, float | None, int, torch.device], tuple[Tensor, float]] = {}
_MOST_ON_DEVICES = 64


def _table_at(
    kernel: Kernel, unit: float | None, dimensions: int, device: torch.device
) -> tuple[Tensor, Tensor | float]:
    """`_table` as one copy on the device, which calls before a graph is recorded leave for it.

    Within a recording that meets it first it is made there, of kernels that the graph makes again at each replay.
    """
    key = (kernel, unit, dimensions, device)
    found = _ON_DEVICES.get(key)
    if found is not None:
        return found
    if _is_capturing(device):
        return _table(kernel, unit, dimensions, device)
    table, constant = _table_on_host(kernel, unit, dimensions)
    if device.type == "cpu":
        return table, constant
    if len(_ON_DEVICES) >= _MOST_ON_DEVICES:
        return table.to(device, non_blocking=True), constant
    with torch.inference_mode(False), torch.no_grad():
        # Copied by the time that another stream may read it.
        return _ON_DEVICES.setdefault(key, (table.to(device), constant))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=64)
def _table_on_host(kernel: Kernel, unit: float | None, dimensions: int) -> tuple[Tensor, float]:
    # Whoever calls first, it serves calls that differentiate too.
    with torch.inference_mode(False), torch.no_grad():
        table, constant = _table(kernel, unit, dimensions, torch.device("cpu"))
        return table, constant.item()


def _numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """Filled in where they are; torch.tensor would copy them there."""
    return torch.stack([torch.full((), value, dtype=torch.float64, device=device) for value in values])


def _mixture_expectation(squares: Tensor, table: Tensor, dimensions: int) -> Tensor:
    """E k(x, y) for ‖x‖² (N,); the table has rates and logarithms of weights, of E k(x, y) as a mixture."""
    rates, log_weights = table
    return torch.exp(log_weights - squares[:, None] * rates).sum(-1)


def _mixture(kernel: Kernel, device: torch.device) -> tuple[Tensor, Tensor]:
    """p_j and log w_j, (J,) each, of k(u) = Σ_j w_j exp(-p_j u)."""
    if kernel.name == "rbf":
        rates = _numbers(kernel.rates, device)
        return rates, torch.zeros_like(rates)
    alpha = kernel.alpha if kernel.name == "rational_quadratic" else 1.0
    grids = [_gamma_mixture(rates, alpha, *grid, device) for rates, *grid in _grids(kernel.rates, alpha)]
    rates, weights = (torch.cat(parts) for parts in zip(*grids, strict=True))
    return rates, weights.log()


def _gamma_mixture(
    scales: Sequence[float], alpha: float, first: float, step: float, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """p_j and w_j of Σ_c (1 + c u)^-alpha = Σ_j w_j exp(-p_j u), for the c in `scales`.

    With t = e^τ, (1 + c u)^-alpha = 1/Γ(alpha) ∫ exp(alpha τ - e^τ) exp(-c e^τ u) dτ, whose integrand decays on both
    sides: the trapezoidal rule of step h errs, relative to the integral and at every u, by 2 |Γ(alpha + iω) / Γ(alpha)|
    at most and some terms far smaller, with ω = 2π/h. (Beylkin, Monzón, Approximation by exponential sums revisited,
    ACHA 28, 2010; the ratio of Gamma functions is the integral's Fourier transform, up to a phase (1 + c u)^iω.) An
    expectation over u of positive functions keeps that bound, and so do all dimensions and norms of x. A Gauss-Laguerre
    rule has no such bound: its error grows where c, ‖x‖² or the dimensions do.

    The nodes are those in `first`, `step` and `count`, in log p = τ + log c, so that all scales share them.
    """
    alpha, shape = _exponent_and_shape(alpha)
    log_rates = first + step * torch.arange(count, dtype=torch.float64, device=device)
    # From the mean of the Gamma distribution on, where the exponent has its maximum.
    offsets = log_rates - _numbers([math.log(scale) + math.log(shape) for scale in scales], device)[:, None]
    weights = torch.exp(alpha * offsets - shape * torch.expm1(offsets))
    # On the left of the first node they are a geometric series, for which stands one node at its mean rate.
    rest = math.exp(-alpha * step) / -math.expm1(-alpha * step)
    weights = torch.cat((rest * weights[:, :1], weights), 1)
    shrink = math.exp(-step) * math.expm1(-alpha * step) / math.expm1(-(alpha + 1.0) * step)
    rates = log_rates.exp()
    # 1/Γ(alpha) is what makes k(0) = 1.
    return torch.cat((shrink * rates[:1], rates)), (weights / weights.sum(1, keepdim=True)).sum(0)


def _exponent_and_shape(alpha: float) -> tuple[float, float]:
    """alpha, and what stands for it in the choice of nodes. A kernel of an alpha below the first limit is 1."""
    return max(alpha, 1e-30), max(alpha, 1e-2)


def _grids(scales: tuple[float, ...], alpha: float) -> list[tuple[tuple[float, ...], float, float, int]]:
    """(scales, first, step, count) of the nodes of `_gamma_mixture`: one grid for all scales, or one for each where
    they are too far apart to share it."""
    _, shape = _exponent_and_shape(alpha)
    ratio = _NATS / shape
    # Of a Gamma variable t = shape e^τ: log P(τ < -l) and log P(τ > r) <= -shape (e^τ - 1 - τ) (Chernoff), which is at
    # most -_NATS for these ends.
    right = math.log1p(ratio + math.sqrt(2.0 * ratio))
    left = ratio + min(1.0, math.sqrt(2.0 * ratio))
    # |Γ(a + iay) / Γ(a)| <= exp(-a (y atan(y) - log(1 + y²) / 2)), by the product of the Gamma function; for this y
    # that is at most exp(-_NATS).
    more = min(0.5 * math.pi * math.sqrt(2.0 * ratio), 1.0 + math.log1p(ratio))
    y = 2.0 / math.pi * (ratio + more)
    step = 2.0 * math.pi / (shape * y)
    logs = [math.log(scale) + math.log(shape) for scale in scales]
    left = min(left, max(_WIDEST - right, min(logs) - _LEAST_RATE))
    spread = max(logs) - min(logs)
    if spread > (len(scales) - 1) * (left + right):
        return [grid for scale in scales for grid in _grids((scale,), alpha)]
    return [(scales, min(logs) - left, step, math.ceil((spread + left + right) / step) + 1)]


def _distance_nodes(device: torch.device) -> Tensor:
    """r_j² and w_j, (2, J), of ∫ g(r²) dr from 0 to infinity = Σ_j w_j g(r_j²), for the g of `_minus_mean_distance`.

    A trapezoidal rule for t, with r = sinh(λ sinh t) / λ: equidistant to about 8, where exp(-r²/2) ends, and doubly
    exponential beyond, for what falls off like r^-3. The step leaves errors of 1e-15, and of 1e-12 in second
    derivatives, for all dimensions and norms.
    """
    bend, step, count = 0.15, 0.11, 49
    t = step * torch.arange(count, dtype=torch.float64, device=device)
    inner = bend * t.sinh()
    weights = step * inner.cosh() * t.cosh()
    # The integrand is even, and the rule goes from minus to plus infinity.
    weights = torch.where(t == 0, 0.5 * weights, weights)
    return torch.stack(((inner.sinh() / bend).square(), weights))


def _minus_mean_distance(squares: Tensor, table: Tensor, dimensions: int) -> Tensor:
    """-E ‖x - y‖ for ‖x‖² (N,), which is -√2 Γ((d+1)/2) / Γ(d/2) ₁F₁(-1/2; d/2; -‖x‖²/2).

    √u = 1/(2√π) ∫ (1 - exp(-t u)) t^(-3/2) dt, of which the expectation is integrated by parts, with v² = 2t:

        E ‖x - y‖ = √(2/π) ∫ (d + s C) C^(d/2 + 1) exp(-s v² C / 2) dv from 0 to infinity,
        C = 1 / (1 + v²), s = ‖x‖².

    All is positive, and a Gaussian of width (d + s)^(-1/2) where d + s is large: v = r (d + s)^(-1/2).
    """
    nodes, weights = table
    # The integral does not depend on the scale of r.
    scale = dimensions + squares.detach()
    v2 = nodes / scale[:, None]
    c = 1.0 / (1.0 + v2)
    s = squares[:, None]
    exponent = -(0.5 * dimensions + 1.0) * torch.log1p(v2) - 0.5 * s * (v2 * c)
    integral = (weights * (dimensions + s * c) * exponent.exp()).sum(-1)
    return -math.sqrt(2.0 / math.pi) * integral * scale.rsqrt()


def mmd_to_normal(
    x: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    estimator: str = "unbiased",
    alpha: float = 1.0,
) -> Tensor:
    """The squared maximum mean discrepancy of a sample and N(0, I), MMD², without a sample of the latter.

    ``E k(x, x') - 2 E k(x, y) + E k(y, y')`` with y, y' ~ N(0, I_D): what `mmd` of x and y estimates for a sample y of
    the prior, without the noise of that sample, and with a quarter of its pairs. The expectations over y are closed
    forms, or sums of about a hundred exponentials that have relative errors below 1e-11. They are computed in float64,
    and take memory for as many numbers a point.

    For "rbf": E k(x, y) = (b² / (b² + 1))^(D/2) exp(-‖x‖² / (2 (b² + 1))) and E k(y, y') = (b² / (b² + 2))^(D/2).
    For "energy": E ‖x - y‖ = √2 Γ((D+1)/2) / Γ(D/2) ₁F₁(-1/2; D/2; -‖x‖²/2). "imq" and "rational_quadratic" are
    Gamma mixtures of "rbf".

    Args:
        x: (N, D), one point a row: float32, bfloat16, float16 or float64, any strides. Half precision is computed in
            float32, and so is everything under autocast.
        kernel: "rbf", "imq", "rational_quadratic" or "energy", as `mmd` defines them.
        bandwidth: as for `mmd`; None takes the same multiples of the mean squared distance of two points of the prior,
            2 D, whatever x is.
        estimator: of E k(x, x'): "unbiased", which leaves out the pairs of a point with itself, so that the result can
            be negative, or "biased".
        alpha: of rational_quadratic, above 0.

    Returns:
        A scalar, in float32, or float64 for float64.

    Raises:
        InputError: a shape, dtype, name or number is not as above, there are no points, or but one for "unbiased", or,
            on the CPU in eager mode, x is not finite; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(x) and _arguments.are_stand_ins(x):
        return _arguments.deferred(mmd_to_normal, locals())
    _pairwise.check_points("mmd_to_normal", "x", x)
    spec = kernel_of(kernel, bandwidth, alpha)
    _pairwise.check_estimator("mmd_to_normal", estimator)
    _pairwise.check_counts("mmd_to_normal", estimator, x=x.shape[0])
    (x,) = _pairwise.without_autocast(x)
    value = _discrepancy(x, spec, unit_of(spec, bandwidth, x.shape[1]), estimator, mmd.weighted_sum)
    _pairwise.check_finite("mmd_to_normal", value, x=x)
    return value


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every kernel and estimator over shapes and strides: one and two points, one dimension, primes, more points and
    dimensions than a tile has, points that coincide, and points far from the prior."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    # x lies apart from the prior: of a sample of it nothing but rounding errors would be left to compare.
    for index, kernel in enumerate(KERNELS):
        yield {"x": 0.5 * draw(31, 3) + 1, "kernel": kernel}
        yield {"x": draw(150, 16) + 0.5, "kernel": kernel, "bandwidth": 3.0 + index}
        yield {
            "x": draw(5, 1) + 1,
            "kernel": kernel,
            "bandwidth": (0.5, 1.0, 2.0, 4.0, 8.0),
            "estimator": "biased",
        }
        yield {
            "x": draw(9, 80).t()[::2] + 0.25,
            "kernel": kernel,
            "bandwidth": [2.0, 1.0, 5.5],
            "alpha": 0.7,
            "estimator": "biased",
        }
    yield {"x": draw(2, 5), "bandwidth": 2.0}
    yield {"x": draw(1, 5), "estimator": "biased"}
    yield {"x": draw(1, 4).expand(6, 4), "kernel": "energy"}
    yield {"x": draw(23, 67) + 0.5, "kernel": "imq"}
    yield {"x": draw(13, 257) + 8, "kernel": "rational_quadratic", "alpha": 2.5}


def terms(
    x: Tensor,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    estimator: str = "unbiased",
    alpha: float = 1.0,
) -> list[float]:
    """As `mmd.terms`: of the value the three expectations, of the gradient its pairs and its part of the prior."""
    spec = kernel_of(kernel, bandwidth, alpha)
    unit = unit_of(spec, bandwidth, x.shape[1])
    x = x.detach().double().requires_grad_()
    of_points, of_prior = expectations(x, spec, unit)
    (of_prior_gradient,) = torch.autograd.grad(2.0 * of_points.mean(), x)
    points = (x - x.mean(0)).detach()
    weight = mmd.weights_of(estimator, spec, x.shape[0], 0)[0]
    u = _pairwise.squared_distances(points, points).requires_grad_()
    values = spec.values(u if unit is None else u / unit)
    (slopes,) = torch.autograd.grad(values.sum(), u)
    sizes = 4 * weight * slopes.abs().fill_diagonal_(0)
    magnitudes = sizes.sum(1, keepdim=True) * points.abs() + sizes @ points.abs()
    total = weight * values.abs().sum() + 2.0 * of_points.abs().mean() + abs(of_prior)
    return [total.item(), (magnitudes + of_prior_gradient.abs()).max().item()]


def cost(
    backward: bool,
    x: Tensor,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    alpha: float = 1.0,
    **settings: Any,
) -> _registry.Cost:
    """x is read once and its gradient written once; pairs take what those of one operand of `mmd` take, and a point an
    exponential for each Gaussian that the expectation over the prior is made of, with a logarithm for energy."""
    points, dimensions = x.shape
    pairs = points * (points - 1) // 2
    spec = kernel_of(kernel, bandwidth, alpha)
    table, _ = _table_on_host(spec, unit_of(spec, bandwidth, dimensions), dimensions)
    of_pair = _pairwise.exponentials(spec.rates) if kernel == "rbf" else max(1, len(spec.rates))
    return _registry.Cost(
        points * dimensions * (x.element_size() + backward * _arguments.accumulator(x.dtype).itemsize),
        pairs * dimensions * (2 + 4 * backward),
        pairs * of_pair + points * table.shape[1] * (2 if kernel == "energy" else 1),
    )


OP = _registry.register(_registry.Op("mmd_to_normal", mmd_to_normal, reference, samples, cost, terms, "mmd"))
