"""The kernel two-sample test: whether two samples come from one distribution, by their MMD²."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.ops import _arguments, _pairwise, _registry, mmd
from aefast.ops._pairwise import Kernel

# Points whose kernel values with as many others are held at once: 4 MB of float32 on a CPU, in reach of its caches.
_BLOCK = {"cpu": 1024, "cuda": 4096}
# Spacings of a mean of kernel values by which statistics that count as equal may differ. Of float64's, in which they
# are summed: rounding a sum of 1024 equal values may cost half a spacing for each. Of their own dtype's, where those of
# equal points are not the same: so few that statistics of data without ties seldom differ by less.
_SPACINGS_OF_SUMS, _SPACINGS_OF_VALUES = 1024.0, 8.0
# Points up to which everything is computed in float64: of so few, permutations may well be the same.
_FEW = 1024
# Backends with kernels for the values of a block. The value of a pair depends on its two points alone, not on where
# they are, as it may in a product.
_WITH_KERNELS = ("cpu", "cuda")


@dataclass(frozen=True, eq=False)
class MMDTest:
    """What `mmd_test` found.

    ``statistic`` is the MMD² of the samples, and ``permuted`` (permutations,), float64 on the CPU, that of each
    permutation. ``p_value`` is the probability of an MMD² as large if both samples come from one distribution.
    ``bandwidths`` are those of the kernels that are summed, in the units of x; energy has none. The rest is what the
    test was asked for.
    """

    statistic: float
    p_value: float
    permuted: Tensor = field(repr=False)
    x_count: int
    y_count: int
    kernel: str
    bandwidths: tuple[float, ...]
    alpha: float
    estimator: str
    permutations: int
    seed: int | None


def kernel_block(x_rows: Tensor, x_columns: Tensor, kernel: Kernel, unit: Tensor | None) -> Tensor:
    """The kernel values of all pairs of rows of (R, D) and (C, D), (R, C), the caller's own. Points are centred; `unit`
    is what squared distances are divided by, a scalar, or None for 1."""
    backend = mmd.backend_of(x_rows, x_columns)
    if backend in _WITH_KERNELS:
        launch = _registry.kernels(backend, "mmd").kernel_values
        return launch(x_rows, x_columns, unit, kernel.name, kernel.rates, kernel.alpha)
    if not kernel.is_smooth:
        distance = _distances(x_rows, x_columns, unit)
        return distance.neg_() if kernel.name == "energy" else _sum_of_exponentials(distance, kernel.rates)
    u = _squared_distances(x_rows, x_columns, unit)
    if kernel.name == "rbf":
        return _sum_of_exponentials(u, kernel.rates)
    power = -1.0 if kernel.name == "imq" else -kernel.alpha
    total = torch.zeros_like(u)
    for rate in kernel.rates:
        value = torch.mul(u, rate).add_(1.0)
        total += value.reciprocal_() if power == -1.0 else value.pow_(power)
    return total


def _squared_distances(x_rows: Tensor, x_columns: Tensor, unit: Tensor | None) -> Tensor:
    """From products, in that unit."""
    scaled = x_rows if unit is None else x_rows / unit
    row_norms, column_norms = (scaled * x_rows).sum(1, keepdim=True), x_columns.square().sum(1)
    if unit is not None:
        column_norms /= unit
    return torch.addmm(column_norms, scaled, x_columns.t(), alpha=-2.0).add_(row_norms).clamp_(min=0.0)


# Dimensions up to which distances are computed from differences.
_DIFFERENCES = 64


def _distances(x_rows: Tensor, x_columns: Tensor, unit: Tensor | None) -> Tensor:
    """In that unit's root. With few dimensions many points are close, and the root would make a large error of the
    small one that products leave there; with many few are, and differences take too long."""
    if x_rows.shape[1] > _DIFFERENCES:
        return _squared_distances(x_rows, x_columns, unit).sqrt_()
    distance = torch.cdist(x_rows, x_columns, compute_mode="donot_use_mm_for_euclid_dist")
    return distance if unit is None else distance.div_(unit.sqrt())


def _sum_of_exponentials(v: Tensor, rates: Sequence[float]) -> Tensor:
    """Σ exp(-c v) over the rates c, from the largest to the smallest; v is overwritten.

    Where a rate is up to 16 times another in powers of 2, squares of its exponential stand for one of their own."""
    if len(rates) == 1:
        return v.mul_(-rates[0]).exp_()
    total, value, last = torch.zeros_like(v), torch.empty_like(v), 0.0
    for rate in reversed(rates):
        doublings = round(math.log2(rate / last)) if last else -1
        if 0 <= doublings <= 4 and math.isclose(rate, last * 2.0**doublings, rel_tol=1e-14):
            for _ in range(doublings):
                value.mul_(value)
        else:
            torch.mul(v, -rate, out=value).exp_()
        total += value
        last = rate
    return total


def _draw(count: int, of_x: int, permutations: int, generator: torch.Generator | None) -> Tensor:
    """(1 + permutations, count), true where a point is one of x's: as it is, and under each permutation."""
    member = torch.zeros((1 + permutations, count), dtype=torch.bool)
    member[0, :of_x] = True
    device = torch.device("cpu") if generator is None else generator.device
    for row in member[1:]:
        row[torch.randperm(count, generator=generator, device=device)[:of_x].cpu()] = True
    return member


def _block_sums(
    points: Tensor, member: Tensor, kernel: Kernel, unit: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of `member`, the sums of kernel values over pairs of two different points of x, of two of y, and of
    one of each. Float64.

    K being the matrix of kernel values, with zeros for its diagonal, r = K 1 and a a row of `member`, the sums are
    aᵀ K a, 1ᵀ r - 2 aᵀ r + aᵀ K a and aᵀ r - aᵀ K a; K is symmetric, and half of its blocks are enough. x should be the
    smaller sample: the sum of a small y would be what is left of much larger ones.
    """
    count, device = len(points), points.device
    block = _BLOCK["cpu" if device.type == "cpu" else "cuda"]
    within = torch.zeros(len(member), dtype=torch.float64, device=device)
    sums = torch.zeros(count, dtype=torch.float64, device=device)
    for first in range(0, count, block):
        rows = slice(first, first + block)
        of_rows = member[:, rows].double()
        for start in range(first, count, block):
            columns = slice(start, start + block)
            values = kernel_block(points[rows], points[columns], kernel, unit).double()
            if start == first:
                values.diagonal().zero_()
            sums[rows] += values.sum(1)
            if start > first:
                sums[columns] += values.sum(0)
            products = torch.mm(of_rows, values).mul_(member[:, columns])
            within += (1.0 if start == first else 2.0) * products.sum(1)
    of_x = torch.zeros_like(within)
    for first in range(0, count, block):
        of_x += member[:, first : first + block].double() @ sums[first : first + block]
    return within, sums.sum() - 2.0 * of_x + within, of_x - within


def _bandwidths(kernel: Kernel, unit: Tensor | None) -> tuple[float, ...]:
    """What rates on squared distances in that unit are in the units of the points."""
    scale = 1.0 if unit is None else math.sqrt(unit.item())
    of_one = _pairwise.rate_of(kernel.name, 1.0, kernel.alpha) if kernel.rates else 0.0
    if kernel.name == "laplacian":
        return tuple(scale * of_one / rate for rate in kernel.rates)
    return tuple(scale * math.sqrt(of_one / rate) for rate in kernel.rates)


def _generator(seed: Any, generator: Any) -> torch.Generator | None:
    if seed is not None and generator is not None:
        raise InputError("mmd_test: give either seed or generator, not both")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"mmd_test: generator must be a torch.Generator, got {type(generator).__name__}")
    if seed is None:
        return generator
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise InputError(f"mmd_test: seed must be an int from -2**63 to 2**63 - 1, got {seed!r}")
    return torch.Generator().manual_seed(int(seed))


@torch.no_grad()
def mmd_test(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    permutations: int = 500,
    estimator: str = "unbiased",
    alpha: float = 1.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> MMDTest:
    """Tests whether x and y are samples of one distribution, by the MMD² of `mmd` and its permutations.

    Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012. Under the hypothesis that the distributions are the same,
    the labels x and y are exchangeable: with B permutations of them, b of which have an MMD² at least as large as that
    of the samples, the p-value is (1 + b) / (1 + B). To reject at p ≤ level is then wrong with a probability of at most
    `level`, however few the permutations (Phipson and Smyth, Permutation P-values Should Never Be Zero, 2010). What
    differs from the samples' MMD² by no more than rounding errors counts as at least as large: data with ties, of which
    many permutations have the same MMD², have the p-values of exact arithmetic. Where no compiled kernel serves float32
    points, what counts so may differ by more, and p-values of large samples are rather too large.

    All permutations are evaluated in one pass over the pairs of points, and the matrix of kernel values is never
    stored: memory grows with (N + M) · permutations. Samples of up to 1024 points together are computed in float64,
    larger ones in float32 with sums in float64, and float64 ones in float64. No gradients.

    Args:
        x: (N, D), one point a row: float32, bfloat16, float16 or float64, any strides, on any device.
        y: (M, D), of the dtype and device of x.
        kernel: "rbf", "laplacian", "imq", "rational_quadratic" or "energy", as `mmd` has them.
        bandwidth: as `mmd` has it. None takes multiples of the root of the mean squared distance of the points of both
            samples together, which no permutation changes.
        permutations: how many, at least 1. The smallest p-value there can be is 1 / (1 + permutations).
        estimator: "unbiased" or "biased", as `mmd` has them.
        alpha: of rational_quadratic, above 0.
        seed: of the permutations, an int: the same gives the same ones on every device. None, with no generator, draws
            them from torch's.
        generator: the generator to draw them from instead.

    Returns:
        An `MMDTest`.

    Raises:
        InputError: a shape, dtype, device, name or number is not as above, there are no points, or but one for
            "unbiased", or x or y is not finite; the message names it.
    """
    op = "mmd_test"
    spec = _pairwise.kernel_of(op, kernel, bandwidth, alpha)
    _pairwise.check_points(op, "x", x)
    _pairwise.check_points(op, "y", y)
    _pairwise.check_dimensions(op, "y", y, "x", x)
    _pairwise.check_estimator(op, estimator)
    if isinstance(permutations, bool) or not isinstance(permutations, Integral) or permutations < 1:
        raise InputError(f"{op}: permutations must be an int of at least 1, got {permutations!r}")
    _pairwise.check_counts(op, estimator, x=len(x), y=len(y))
    for name, value in (("x", x), ("y", y)):
        if not value.isfinite().all():
            raise InputError(
                f"{op}: {name} must be finite, got {int((~value.isfinite()).sum())} elements that are not"
            )
    generator = _generator(seed, generator)

    x_count, y_count = len(x), len(y)
    count = x_count + y_count
    dtype = torch.float64 if count <= _FEW else _arguments.accumulator(x.dtype)
    member = _draw(count, x_count, int(permutations), generator).to(x.device)
    with torch.autocast(x.device.type, enabled=False):
        points = torch.cat((x.to(dtype), y.to(dtype)))
        points -= points.mean(0)
        unit = mmd.unit_of(spec, bandwidth, points[:x_count], points[x_count:])
        if x_count <= y_count:
            of_x, of_y, across = _block_sums(points, member, spec, unit)
        else:
            of_y, of_x, across = _block_sums(points, ~member, spec, unit)
    weights = mmd.weights_of(estimator, spec, x_count, y_count)
    statistics = weights[3] + weights[0] * of_x + weights[1] * of_y + weights[2] * across
    statistics = statistics.cpu()
    # The same partition of the points in another column of a product may be rounded otherwise. Four means of kernel
    # values make a statistic. Errors of equal values do not average out: each of the means may be off by some spacings.
    size = 4.0 * abs((of_x + of_y + 2.0 * across)[0].item()) / (count * (count - 1))
    spacings = _SPACINGS_OF_SUMS * torch.finfo(torch.float64).eps
    if mmd.backend_of(points, points) not in _WITH_KERNELS:
        spacings = max(spacings, _SPACINGS_OF_VALUES * torch.finfo(dtype).eps)
    slack = spacings * size
    as_large = int((statistics[1:] >= statistics[0] - slack).sum())
    return MMDTest(
        statistic=statistics[0].item(),
        p_value=(1 + as_large) / (1 + int(permutations)),
        permuted=statistics[1:].clone(),
        x_count=x_count,
        y_count=y_count,
        kernel=spec.name,
        bandwidths=_bandwidths(spec, unit),
        alpha=spec.alpha,
        estimator=estimator,
        permutations=int(permutations),
        seed=None if seed is None else int(seed),
    )
