"""The kernel maximum mean discrepancy of two samples, without a matrix of kernel values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.ops import _arguments, _pairwise, _registry
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement
from aefast.ops._pairwise import Kernel, kernel_sum


def reference(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    estimator: str = "unbiased",
    alpha: float = 1.0,
) -> Tensor:
    """`mmd` in plain PyTorch, of a single process."""
    spec = _pairwise.kernel_of("mmd", kernel, bandwidth, alpha)
    unit = unit_of(spec, bandwidth, x, y)
    return estimate(x, y, unit, spec, estimator)


def estimate(x: Tensor, y: Tensor, unit: Tensor | None, kernel: Kernel, estimator: str) -> Tensor:
    """`weighted_sum` in plain PyTorch."""
    return sum_reference(x, y, unit, kernel, weights_of(estimator, kernel, x.shape[0], y.shape[0]))


def unit_of(kernel: Kernel, bandwidth: Any, x: Tensor, y: Tensor) -> Tensor | None:
    """What squared distances are divided by: a scalar, or None for 1."""
    if bandwidth is not None or not kernel.rates:
        return None
    return _pairwise.mean_squared_distance(torch.cat((x, y)))


def weights_of(estimator: str, kernel: Kernel, x_count: int, y_count: int) -> tuple[float, ...]:
    """Of the sums over pairs of two rows of x, of two rows of y, and of one of each; and a number to be added.

    Pairs of a row with itself are in none of the sums. There may be no y, for `mmd_to_normal`. Where there are too few
    rows for an estimate, as an exported graph may be given, all is NaN.
    """
    if estimator == "unbiased":
        of_x, of_y = (1.0 / (count * (count - 1)) if count > 1 else math.nan for count in (x_count, y_count))
        constant = 0.0
    else:
        of_x, of_y = (1.0 / count**2 if count > 0 else math.nan for count in (x_count, y_count))
        constant = kernel.at_zero * sum(1.0 / count for count in (x_count, y_count) if count > 0)
    if y_count == 0:
        return of_x, 0.0, 0.0, constant
    return of_x, of_y, -2.0 / (x_count * y_count) if x_count > 0 else math.nan, constant


def sum_reference(
    x: Tensor, y: Tensor, unit: Tensor | None, kernel: Kernel, weights: Sequence[float]
) -> Tensor:
    wide = _arguments.accumulator(x.dtype)
    x, y = x.to(wide), y.to(wide)
    of_x, of_y, across, constant = weights
    total = constant + of_x * kernel_sum(kernel, x, None, unit)
    if y.shape[0] > 0:
        total = total + of_y * kernel_sum(kernel, y, None, unit) + across * kernel_sum(kernel, x, y, unit)
    return total


def rows_reference(
    x: Tensor,
    y: Tensor,
    all_x: Tensor,
    all_y: Tensor,
    firsts: Sequence[int],
    unit: Tensor | None,
    kernel: Kernel,
    weights: Sequence[float],
) -> Tensor:
    """What rows firsts[0], ... of all_x, which are x, and rows firsts[1], ... of all_y, which are y, have in the sum of
    all. A pair of two parts counts for either of them with a half. The gradient is that of the sum of all."""
    wide = _arguments.accumulator(x.dtype)
    x, y, all_x, all_y = (one.to(wide) for one in (x, y, all_x.detach(), all_y.detach()))

    def of(rows: Tensor, columns: Tensor, first: int) -> Tensor:
        u = _pairwise.squared_distances(rows, columns)
        values = kernel.values(u if unit is None else u / unit)
        return values.sum() - values.diagonal(first).sum() if first >= 0 else values.sum()

    of_x, of_y, across, _ = weights
    total = of_x * of(x, all_x, firsts[0]) + of_y * of(y, all_y, firsts[1])
    total = total + 0.5 * across * (of(x, all_y, -1) + of(y, all_x, -1))
    # Whoever moves a row moves it in both of the places it has among the pairs.
    return 2.0 * total - total.detach()


# x (N, D) and y (M, D) of any strides, M possibly 0; unit a scalar in their accumulator, or absent for 1; the kernel as
# in _pairwise.Kernel; `needs` has bit 0 set if x's gradient is wanted, bit 1 y's. The value is a scalar and the
# gradients are contiguous, all in the accumulator; a gradient that is not wanted is of no rows.
_KERNEL = "Tensor? unit, str kernel, float[] rates, float alpha, str estimator, int needs"
define(f"mmd(Tensor x, Tensor y, {_KERNEL}, str backend) -> (Tensor, Tensor, Tensor)")


@implement("mmd")
def _sum(x, y, unit, kernel, rates, alpha, estimator, needs, backend):
    weights = weights_of(estimator, Kernel(kernel, rates, alpha), x.shape[0], y.shape[0])
    return _registry.kernels(backend, "mmd").mmd(x, y, unit, kernel, rates, alpha, weights, needs)


@torch.library.register_fake("aefast::mmd", lib=LIBRARY)
def _(x, y, unit, kernel, rates, alpha, estimator, needs, backend):
    wide = _arguments.accumulator(x.dtype)
    rows = (x.shape[0] if needs & 1 else 0, y.shape[0] if needs & 2 else 0)
    return x.new_empty((), dtype=wide), *(x.new_empty((count, x.shape[1]), dtype=wide) for count in rows)


class _MMD(torch.autograd.Function):
    """`call` is (kernel, estimator, backend, whether launchers may be called at once)."""

    @staticmethod
    def forward(ctx, x, y, unit, call):
        kernel, estimator, backend, is_direct = call
        needs = int(ctx.needs_input_grad[0]) + 2 * int(ctx.needs_input_grad[1])
        arguments = (x, y, unit, kernel.name, kernel.rates, kernel.alpha, estimator, needs, backend)
        if is_direct:
            value, of_x, of_y = _sum(*arguments)
        else:
            with below_autograd():
                value, of_x, of_y = torch.ops.aefast.mmd.default(*arguments)
        ctx.save_for_backward(x, y, unit, of_x, of_y)
        ctx.call = call
        return value

    @staticmethod
    def backward(ctx, grad):
        kernel, estimator, _, _ = ctx.call
        x, y, unit, of_x, of_y = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if _registry.wants_reference(grad):
            gradients = _registry.differentiate(
                lambda x, y: estimate(x, y, unit, kernel, estimator), (x, y), needs, grad
            )
        else:
            gradients = [
                (of_one * grad).to(x.dtype) if need else None
                for of_one, need in zip((of_x, of_y), needs, strict=True)
            ]
        return *gradients, None, None


_apply = direct_apply(_MMD)


@torch.library.impl(LIBRARY, "mmd", "Autograd")
def _(x, y, unit, kernel, rates, alpha, estimator, needs, backend):
    """The value's gradients are autograd's, and none are returned beside it."""
    spec = Kernel(kernel, tuple(rates), alpha)
    wide = _arguments.accumulator(x.dtype)
    if _registry.is_transformed():
        value = estimate(x, y, unit, spec, estimator)
    elif _registry.needs_gradient(x, y):
        value = _MMD.apply(x, y, unit, (spec, estimator, backend, False))
    else:
        with below_autograd():
            return torch.ops.aefast.mmd.default(x, y, unit, kernel, rates, alpha, estimator, needs, backend)
    return value, *(x.new_empty((0, x.shape[1]), dtype=wide) for _ in range(2))


CUDA_DIMENSIONS = 16
"""Of points for which mmd's CUDA kernels are: they hold them in registers. Beyond, Triton's tiles are."""


def backend_of(x: Tensor, y: Tensor) -> str:
    """The one that serves x (N, D) and y (M, D)."""
    unfit = None
    if x.shape[1] > CUDA_DIMENSIONS:
        unfit = "cuda", f"its kernels of mmd are for points of up to {CUDA_DIMENSIONS} dimensions"
    return _registry.choose("mmd", x, y, unfit=unfit)


def weighted_sum(x: Tensor, y: Tensor, unit: Tensor | None, kernel: Kernel, estimator: str) -> Tensor:
    """`sum_reference` with the weights of the estimator, on the backend that serves it."""
    backend = backend_of(x, y)
    if backend == "eager":
        return estimate(x, y, unit, kernel, estimator)
    arguments = (x, y, unit, kernel.name, kernel.rates, kernel.alpha, estimator, 0, backend)
    if not _registry.is_direct(backend, x, y):
        return torch.ops.aefast.mmd.default(*arguments)[0]
    if _registry.needs_gradient(x, y):
        return _apply(x, y, unit, (kernel, estimator, backend, True))
    return _sum(*arguments)[0]


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    estimator: str = "unbiased",
    alpha: float = 1.0,
    group: Any = None,
) -> Tensor:
    """The squared maximum mean discrepancy of two samples, MMD².

    ``E k(x, x') + E k(y, y') - 2 E k(x, y)``: Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012; "unbiased" is
    the U-statistic of its equation 3, and "biased" the V-statistic of equation 5. No matrix of kernel values exists:
    memory grows with N + M, and value and gradients come out of one pass over the pairs.

    With u = ‖x - y‖² and bandwidth b the kernels are

    - "rbf": exp(-u / (2 b²));
    - "laplacian": exp(-√u / b);
    - "imq", inverse multiquadratic: b² / (b² + u);
    - "rational_quadratic": (1 + u / (2 alpha b²))^-alpha;
    - "energy": -√u, of which MMD² is the energy distance (Székely, Rizzo 2013); no bandwidth.

    The gradient of "laplacian" and "energy" is 0 where points coincide.

    Args:
        x: (N, D), one point a row: float32, bfloat16, float16 or float64, any strides. Half precision is computed in
            float32, and so is everything under autocast.
        y: (M, D), of the dtype and device of x.
        kernel: one of the names above.
        bandwidth: b, a number above 0 in the units of x; several make the sum of their kernels. None takes multiples of
            what the data say, which count as constants in the gradient. With m the mean squared distance of all pairs
            of points of x and y: 2 b² = m / 4, m / 2, m, 2 m and 4 m for rbf and rational_quadratic, b² = m / 4 to 4 m
            likewise for laplacian, and b² = m times 0.1, 0.2, 0.5, 1, 2, 5 and 10 for imq.
        estimator: "unbiased", which leaves out the pairs of a point with itself and can be negative, or "biased".
        alpha: of rational_quadratic, above 0, from 1e-6 to 1e6.
        group: a torch.distributed process group, of which x and y are this rank's rows: the MMD² is that of all ranks'
            rows, whose numbers may differ from rank to rank. Every rank must call it. Each gets the value, and as
            gradient that of its own rows times the number of ranks, so that the mean that DistributedDataParallel
            takes of the parameters' gradients is the gradient for all rows. There are no second derivatives, and on a
            GPU the host waits for the ranks' numbers of rows.

    Returns:
        A scalar, in float32, or float64 for float64.

    Raises:
        InputError: a shape, dtype, device, name or number is not as above, there are no points, or but one for
            "unbiased", or, on the CPU in eager mode, x or y is not finite; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(x, y) and _arguments.are_stand_ins(x, y):
        return _arguments.deferred(mmd, locals())
    spec = _pairwise.kernel_of("mmd", kernel, bandwidth, alpha)
    _pairwise.check_points("mmd", "x", x)
    _pairwise.check_points("mmd", "y", y)
    x, y = _pairwise.without_autocast(x, y)
    _pairwise.check_dimensions("mmd", "y", y, "x", x)
    _pairwise.check_estimator("mmd", estimator)
    if group is not None:
        return _of_group(x, y, spec, bandwidth, estimator, group)
    _pairwise.check_counts("mmd", estimator, x=x.shape[0], y=y.shape[0])
    unit = unit_of(spec, bandwidth, x, y)
    value = weighted_sum(x, y, unit, spec, estimator)
    _pairwise.check_finite("mmd", value, x=x, y=y)
    return value


class _RowsOfMMD(torch.autograd.Function):
    """`rows_reference`; `call` is (all_x, all_y, firsts, unit, kernel, weights, launchers or None for eager)."""

    @staticmethod
    def forward(ctx, x, y, call):
        all_x, all_y, firsts, unit, kernel, weights, launchers = call
        needs = ctx.needs_input_grad[:2]
        if launchers is not None:
            settings = (unit, kernel.name, kernel.rates, kernel.alpha, weights, needs[0] + 2 * needs[1])
            value, *gradients = launchers.mmd_rows(x, y, all_x, all_y, *firsts, *settings)
        else:
            with torch.enable_grad():
                rows = [one.detach().requires_grad_(need) for one, need in zip((x, y), needs, strict=True)]
                value = rows_reference(*rows, all_x, all_y, firsts, unit, kernel, weights)
            gradients = [
                torch.autograd.grad(value, one, retain_graph=True)[0] if one.requires_grad else one
                for one in rows
            ]
        ctx.save_for_backward(*gradients)
        ctx.dtype = x.dtype
        return value.detach()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "mmd: with a group it has no second derivatives, for which create_graph=True asks"
            )
        return *(
            (of_one * grad).to(ctx.dtype) if need else None
            for of_one, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        ), None


def _of_group(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    bandwidth: Any,
    estimator: str,
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    distributed = torch.distributed
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    if rank < 0:
        raise InputError("mmd: group must have this process among its ranks")
    counts = torch.tensor([*x.shape, y.shape[0], _arguments.DTYPES.index(x.dtype)], device=x.device)
    gathered = [torch.empty_like(counts) for _ in range(ranks)]
    distributed.all_gather(gathered, counts, group=group)
    x_counts, dimensions, y_counts, dtypes = zip(*(one.tolist() for one in gathered), strict=True)
    # What follows would never end on some ranks if others stopped here: all of them see the same numbers.
    for name, found in (("as many dimensions", dimensions), ("one dtype", dtypes)):
        if len(set(found)) > 1:
            raise InputError(f"mmd: x and y must have {name} on every rank of the group")
    _pairwise.check_counts("mmd", estimator, x=sum(x_counts), y=sum(y_counts))
    all_x, all_y = _gather(x, x_counts, group), _gather(y, y_counts, group)
    firsts = sum(x_counts[:rank]), sum(y_counts[:rank])
    unit = unit_of(kernel, bandwidth, all_x, all_y)
    weights = weights_of(estimator, kernel, all_x.shape[0], all_y.shape[0])
    backend = backend_of(x, y)
    launchers = None if backend == "eager" else _registry.kernels(backend, "mmd")
    part = _RowsOfMMD.apply(x, y, (all_x, all_y, firsts, unit, kernel, weights, launchers))
    # The ranks' parts have no gradient with respect to the rows of other ranks, and each has all of its own.
    total = part.detach().clone()
    distributed.all_reduce(total, group=group)
    total += weights[-1]
    _pairwise.check_finite("mmd", total, x=all_x, y=all_y)
    return total + ranks * (part - part.detach()) if part.requires_grad else total


def _gather(rows: Tensor, counts: Sequence[int], group: torch.distributed.ProcessGroup) -> Tensor:
    """The rows of all ranks, of which each has so many, in the order of the ranks."""
    # Collectives want the same shape of every rank.
    padded = rows.new_zeros((max(counts), rows.shape[1]))
    padded[: rows.shape[0]] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every kernel and estimator over shapes and strides: one and two points, one dimension, primes, more points and
    dimensions than a tile has, points that coincide, and data far from 0."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    # y lies apart from x: of two samples of one distribution nothing but rounding errors would be left to compare.
    for index, kernel in enumerate(_pairwise.KERNELS):
        yield {"x": draw(31, 3), "y": 0.5 * draw(17, 3) + 1, "kernel": kernel}
        yield {"x": draw(150, 16), "y": draw(67, 16) + 0.5, "kernel": kernel, "bandwidth": 3.0 + index}
        yield {
            "x": draw(5, 1),
            "y": draw(3, 1) + 1,
            "kernel": kernel,
            "bandwidth": (0.5, 1.0, 2.0, 4.0, 8.0),
            "estimator": "biased",
        }
        yield {
            "x": draw(9, 40).t(),
            "y": draw(22, 9)[::2] + 0.25,
            "kernel": kernel,
            "bandwidth": [2.0, 1.0, 5.5],
            "alpha": 0.7,
            "estimator": "biased",
        }
    yield {"x": draw(2, 5), "y": draw(2, 5), "bandwidth": 2.0}
    yield {"x": draw(1, 5), "y": draw(1, 5) + 1, "estimator": "biased"}
    yield {"x": draw(7, 4), "y": draw(1, 4).expand(6, 4), "kernel": "laplacian"}
    yield {"x": draw(23, 67), "y": draw(29, 67) + 0.25, "kernel": "imq"}
    yield {"x": draw(13, 257) + 8, "y": draw(5, 257) + 8.5, "kernel": "rational_quadratic", "alpha": 2.5}


def terms(
    x: Tensor,
    y: Tensor,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    estimator: str = "unbiased",
    alpha: float = 1.0,
) -> list[float]:
    """Of the value, Σ |weight k|; of the gradients, Σ |weight k'| (|x| + |y|) over the pairs of a point, x and y less
    the mean of all: `weight k' (x - y)` is summed as two products."""
    spec = _pairwise.kernel_of("mmd", kernel, bandwidth, alpha)
    unit = unit_of(spec, bandwidth, x, y)
    of_x, of_y, across, constant = weights_of(estimator, spec, x.shape[0], y.shape[0])
    points = torch.cat((x, y)).double()
    points = (points - points.mean(0)).detach()
    split = (x.shape[0], y.shape[0])
    weights = torch.cat([x.new_full((count,), float(index)) for index, count in enumerate(split)]).double()
    is_same = weights[:, None] == weights
    weights = torch.where(is_same, torch.where(weights > 0, of_y, of_x)[:, None], across / 2).fill_diagonal_(
        0
    )
    u = _pairwise.squared_distances(points, points).requires_grad_()
    values = spec.values(u if unit is None else u / unit)
    (slopes,) = torch.autograd.grad(values.sum(), u)
    sizes = 4 * (weights * slopes).abs()
    magnitudes = sizes.sum(1, keepdim=True) * points.abs() + sizes @ points.abs()
    total = (weights * values).abs().sum().item() + abs(constant)
    return [total, *(part.max().item() for part in magnitudes.split(split))]


def cost(
    backward: bool,
    x: Tensor,
    y: Tensor,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    alpha: float = 1.0,
    **settings: Any,
) -> _registry.Cost:
    """Each operand is read once and each gradient written once. A pair takes a product for its distance, two for its
    gradients, and an exponential, or what stands for it, for each bandwidth; bandwidths whose rates are powers of two
    of each other take one together."""
    points, dimensions = x.shape[0] + y.shape[0], x.shape[1]
    pairs = points * (points - 1) // 2
    rates = _pairwise.kernel_of("mmd", kernel, bandwidth, alpha).rates or (1.0,)
    return _registry.Cost(
        points * dimensions * (x.element_size() + backward * _arguments.accumulator(x.dtype).itemsize),
        pairs * dimensions * (2 + 4 * backward),
        pairs * (len(rates) if kernel != "rbf" else _pairwise.exponentials(rates)),
    )


OP = _registry.register(_registry.Op("mmd", mmd, reference, samples, cost, terms))
