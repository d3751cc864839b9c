"""Kernel functions of pairs of points, which `mmd` and what is built on it have in common."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.ops import _arguments, _registry

KERNELS = ("rbf", "laplacian", "imq", "rational_quadratic", "energy")
ESTIMATORS = ("unbiased", "biased")

WAE_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""What the kernels of the Wasserstein autoencoder multiply 2 D σ² by."""

# Bandwidths of bandwidth=None, in units of the root of the mean squared distance m. Those of the rbf kernel are
# 2 b² = m / 4 to 4 m in octaves (Long et al., Learning Transferable Features with Deep Adaptation Networks, ICML 2015,
# section 4); those of imq are b² = s m, the scales s of Tolstikhin et al., Wasserstein Auto-Encoders, ICLR 2018, whose
# C = 2 d σ² s has the mean squared distance of N(0, σ² I) in it.
_OCTAVES = tuple(2.0 ** (0.5 * octave) for octave in range(-2, 3))
DEFAULT_BANDWIDTHS = {
    "rbf": tuple(math.sqrt(0.5) * factor for factor in _OCTAVES),
    "laplacian": _OCTAVES,
    "imq": tuple(math.sqrt(scale) for scale in WAE_SCALES),
    "rational_quadratic": tuple(math.sqrt(0.5) * factor for factor in _OCTAVES),
    "energy": (),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A sum of kernels of one kind, as launchers are told of it; u is a squared distance, in units of its own.

    "rbf": Σ exp(-c u); "laplacian": Σ exp(-c √u); "imq": Σ 1 / (1 + c u); "rational_quadratic":
    Σ (1 + c u)^-alpha; over the c in `rates`. "energy": -√u, and no rates. The alpha of others is 1.
    """

    name: str
    rates: tuple[float, ...]
    alpha: float

    @property
    def at_zero(self) -> float:
        """The value for points that coincide."""
        return float(len(self.rates))

    @property
    def is_smooth(self) -> bool:
        """Whether it is differentiable in u at 0."""
        return self.name not in ("laplacian", "energy")

    def values(self, u: Tensor) -> Tensor:
        """Of squared distances of any shape. Where u is 0, the gradient of kernels of √u is 0."""
        if not self.is_smooth:
            is_apart = u > 0
            u = torch.where(is_apart, torch.where(is_apart, u, 1.0).sqrt(), u)
        if self.name == "energy":
            return -u
        if self.name in ("rbf", "laplacian"):
            return sum((torch.exp(-rate * u) for rate in self.rates), torch.zeros_like(u))
        if self.name == "imq":
            return sum((1.0 / (1.0 + rate * u) for rate in self.rates), torch.zeros_like(u))
        return sum(((1.0 + rate * u).pow(-self.alpha) for rate in self.rates), torch.zeros_like(u))


def rate_of(kernel: str, bandwidth: float, alpha: float) -> float:
    if kernel == "laplacian":
        return 1.0 / bandwidth
    return 1.0 / (bandwidth * bandwidth * {"rbf": 2.0, "imq": 1.0, "rational_quadratic": 2.0 * alpha}[kernel])


# With their types, lest a True that equals a 1 seen before goes unchecked.
@functools.lru_cache(maxsize=256, typed=True)
def _known_kernel(
    op: str, kernel: Any, bandwidths: tuple[Any, ...] | None, alpha: Any, types: tuple[type, ...]
) -> Kernel:
    _arguments.check_name("kernel", kernel, KERNELS, op)
    if kernel != "rational_quadratic":
        alpha = 1.0
    elif not isinstance(alpha, Real) or isinstance(alpha, bool) or not 1e-6 <= alpha <= 1e6:
        raise InputError(f"{op}: alpha must be a number above 0, from 1e-6 to 1e6, got {alpha!r}")
    if bandwidths is None or kernel == "energy":
        bandwidths = DEFAULT_BANDWIDTHS[kernel]
    if not bandwidths and kernel != "energy":
        raise InputError(f"{op}: bandwidth must have at least one number, got an empty sequence")
    for one in bandwidths:
        # Squares and their reciprocals are to be finite, in float32 too.
        if not isinstance(one, Real) or isinstance(one, bool) or not 1e-18 <= one <= 1e18:
            raise InputError(f"{op}: bandwidth must be a number above 0, from 1e-18 to 1e18, got {one!r}")
    rates = [rate_of(kernel, float(one), float(alpha)) for one in bandwidths]
    if not torch.compiler.is_compiling():
        # Whatever order they were given in, the sum is the same to the last bit. A compiler's numbers have no order.
        rates.sort(reverse=True)
    return Kernel(kernel, tuple(rates), float(alpha))


def kernel_of(op: str, kernel: Any, bandwidth: Any, alpha: Any) -> Kernel:
    """What the arguments of a public function say.

    Raises:
        InputError: an unknown kernel, or a bandwidth or alpha that it reads and that is not a number above 0.
    """
    # NumPy's scalars have a tolist too, and are numbers.
    if not isinstance(bandwidth, (Real, Sequence)) and hasattr(bandwidth, "tolist"):
        kind = "a tensor" if isinstance(bandwidth, Tensor) else "an array"
        raise InputError(
            f"{op}: bandwidth must be a number, a sequence of numbers, or None, got {kind}; "
            "its .item() or .tolist() is one"
        )
    if (bandwidth is not None and not isinstance(bandwidth, Sequence)) or isinstance(bandwidth, str):
        bandwidth = (bandwidth,)
    bandwidths = None if bandwidth is None else tuple(bandwidth)
    types = tuple(type(one) for one in bandwidths or ())
    if torch.compiler.is_compiling():
        return _known_kernel.__wrapped__(op, kernel, bandwidths, alpha, types)
    try:
        return _known_kernel(op, kernel, bandwidths, alpha, types)
    except TypeError:
        # What cannot be a key is no option either.
        return _known_kernel.__wrapped__(op, kernel, bandwidths, alpha, types)


def mean_squared_distance(points: Tensor) -> Tensor:
    """Of all pairs of rows (N, D), a detached scalar; 1 where it is 0 or there is no pair."""
    points = points.detach().to(_arguments.accumulator(points.dtype))
    if points.shape[0] < 2:
        return points.new_ones(())
    # Each pair is counted twice in Σ_ij ‖x_i - x_j‖² = 2 N Σ ‖x_i - mean‖².
    mean = 2.0 * points.var(0).sum()
    return torch.where(mean == 0, 1.0, mean)


# Squared distances by differences hold (N, M, D) numbers: up to so many.
_DIFFERENCES = 1 << 24


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, D) and (M, D) to (N, M), by differences, or for large sizes from centred products."""
    if x.shape[0] * y.shape[0] * x.shape[1] <= _DIFFERENCES:
        return (x[:, None] - y[None]).square().sum(-1)
    centre = x.detach().mean(0)
    x, y = x - centre, y - centre
    squares = x.square().sum(-1)[:, None] + y.square().sum(-1)
    return (squares - 2.0 * (x @ y.t())).clamp(min=0.0)


def kernel_sum(kernel: Kernel, x: Tensor, y: Tensor | None, unit: Tensor | None) -> Tensor:
    """Of all pairs of rows of x and y, or of all pairs of two different rows of x; a scalar."""
    u = squared_distances(x, x if y is None else y)
    if unit is not None:
        u = u / unit
    values = kernel.values(u)
    return values.sum() if y is not None else values.sum() - values.diagonal().sum()


def check_estimator(op: str, estimator: Any) -> None:
    _arguments.check_name("estimator", estimator, ESTIMATORS, op)


def fewest_points(estimator: str) -> int:
    """Of which there is an estimate."""
    return 2 if estimator == "unbiased" else 1


def check_counts(op: str, estimator: str, **counts: int) -> None:
    """That there are enough points, by the names of the arguments."""
    least = fewest_points(estimator)
    for name, count in counts.items():
        if count < least:
            raise InputError(f"{op}: {name} must have at least {least} rows for {estimator!r}, got {count}")


def check_points(op: str, name: str, value: Any) -> None:
    """That `value` is a dense floating-point matrix with columns."""
    _arguments.check_tensor(name, value, op)
    _arguments.check_floating(name, value, op)
    _arguments.check_dense(name, value, op)
    if value.dim() != 2 or value.shape[1] < 1:
        raise InputError(
            f"{op}: {name} must be a matrix (points, dimensions) of at least one dimension, "
            f"got shape {_arguments.shape_of(value)}"
        )


def check_dimensions(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """That `value` has as many columns as `other`, its dtype and its device."""
    if value.shape[-1] != other.shape[-1]:
        raise InputError(
            f"{op}: {name} must have as many dimensions as {other_name}, {other.shape[-1]}, "
            f"got shape {_arguments.shape_of(value)}"
        )
    _arguments.check_like(name, value, other_name, other, op)


def without_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the tensors in float32, but float64 ones as they are."""
    if not _arguments.is_autocast(tensors[0].device.type):
        return tensors
    return tuple(one if one.dtype == torch.float64 else one.float() for one in tensors)


def check_finite(op: str, result: Tensor, **operands: Tensor) -> None:
    """That no operand is what made `result` NaN, where looking costs no wait for a device and no compiler looks on."""
    if result.device.type != "cpu" or _registry.is_watched() or not result.isnan().any():
        return
    for name, value in operands.items():
        if not value.isfinite().all():
            raise InputError(
                f"{op}: {name} must be finite, got {int((~value.isfinite()).sum())} elements that are not"
            )


def exponentials(rates: Sequence[float]) -> int:
    """How many exponentials Σ exp(-c u) takes, if powers of two of each other need but one between them."""
    return len({round(math.log2(rate) % 1.0, 9) % 1.0 for rate in rates})
