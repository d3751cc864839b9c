"""`mmd` beside the kernel values of all pairs in PyTorch, a block at a time, and libraries that do without them.

Of the rbf kernel eager's backward is written by hand: with the values of a block come its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, training_inputs
from aefast.bench.variants import Rival
from aefast.nn import MMDLoss
from aefast.nn.mmd_loss import next_exponential, rows_at_once, squarings

# (points of either sample, dimensions): batches of latents.
SHAPES = ((256, 16), (1024, 16), (4096, 2), (4096, 16), (4096, 64))
QUICK_SHAPES = ((1024, 16),)
# In addition where there is a GPU, quick or not.
QUICK_SHAPES_OF_GPU = ((4096, 16),)
LARGE_SHAPES = ((8192, 16), (8192, 64))
# Bandwidths times the root of the dimensions, about the distance of two points: as in Li et al., MMD GAN, NeurIPS 2017,
# each twice the one before.
BANDWIDTHS = {
    "rbf5": (0.25, 0.5, 1.0, 2.0, 4.0),
    "imq7": (0.45, 0.63, 1.0, 1.41, 2.0, 3.16, 4.47),
    "laplacian": (1.0,),
}
KERNELS = {"rbf5": "rbf", "imq7": "imq", "laplacian": "laplacian", "energy": "energy"}


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    shapes, of_gpu = (QUICK_SHAPES, QUICK_SHAPES_OF_GPU) if quick else (SHAPES, LARGE_SHAPES)
    if device.type == "cuda":
        shapes += of_gpu
    for points, dimensions in shapes:
        yield case("rbf5", points, dimensions, device, not quick and points >= 1024)
    if not quick:
        for kind in ("imq7", "laplacian", "energy"):
            yield case(kind, 4096, 16, device)


class RBFAcross(torch.autograd.Function):
    """Σ exp(-c u) over the rates c and all pairs of a row of x (N, D) and one of y (M, D), with its gradients on the
    way: a block of exponentials is in the caches but once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rates: Sequence[float]) -> Tensor:
        rows = rows_at_once(x, y.shape[0])
        total, to_x, to_y = x.new_zeros(()), [], torch.zeros_like(y)
        for part in x.split(rows):
            values, slopes = _block(part, y, rates)
            total += values.sum()
            to_x.append(_pull(slopes, part, y))
            to_y += _pull(slopes.t(), y, part)
        ctx.save_for_backward(torch.cat(to_x), to_y)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        to_x, to_y = ctx.saved_tensors
        return grad * to_x, grad * to_y, None


class RBFWithin(torch.autograd.Function):
    """The same of all pairs of two different rows of x, of which each is formed in one of its orders, but for those
    within a block of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rates: Sequence[float]) -> Tensor:
        rows = rows_at_once(x, x.shape[0])
        total, to_x = x.new_zeros(()), torch.zeros_like(x)
        for start in range(0, x.shape[0], rows):
            part, later = x[start : start + rows], x[start + rows :]
            values, slopes = _block(part, part, rates)
            total += values.fill_diagonal_(0.0).sum()
            to_x[start : start + rows] += 2.0 * _pull(slopes.fill_diagonal_(0.0), part, part)
            if later.shape[0] > 0:
                values, slopes = _block(part, later, rates)
                total += 2.0 * values.sum()
                slopes *= 2.0
                to_x[start : start + rows] += _pull(slopes, part, later)
                to_x[start + rows :] += _pull(slopes.t(), later, part)
        ctx.save_for_backward(to_x)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (to_x,) = ctx.saved_tensors
        return grad * to_x, None


def _block(x: Tensor, y: Tensor, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Kernel values (N, M), and their derivatives in u."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    u = torch.addmm(norms, x, y.t(), alpha=-2.0).clamp_(min=0.0)
    (least, _), *others = squarings(rates)
    term = torch.mul(u, -least).exp_()
    values, slopes = term.clone(), term * -least
    for rate, squares in others:
        term = next_exponential(term, u, rate, squares)
        values += term
        slopes.add_(term, alpha=-rate)
    return values, slopes


def _pull(slopes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of x (N, D), slopes (N, M) being that of u."""
    return 2.0 * torch.addmm(slopes.sum(1)[:, None] * x, slopes, y, alpha=-1.0)


def case(kind: str, points: int, dimensions: int, device: torch.device, is_compiled: bool = False) -> OpCase:
    kernel = KERNELS[kind]
    bandwidths = tuple(factor * math.sqrt(dimensions) for factor in BANDWIDTHS.get(kind, ()))

    def aefast(x: Tensor, y: Tensor) -> Tensor:
        return AF.mmd(x, y, kernel=kernel, bandwidth=bandwidths or None)

    module = MMDLoss(kernel, bandwidths or None).eager()
    rates = [0.5 / (b * b) for b in bandwidths]

    def by_hand(x: Tensor, y: Tensor) -> Tensor:
        n, m = x.shape[0], y.shape[0]
        within = RBFWithin.apply(x, rates) / (n * (n - 1)) + RBFWithin.apply(y, rates) / (m * (m - 1))
        return within - 2 * RBFAcross.apply(x, y, rates) / (n * m)

    def keops() -> Callable[..., Tensor]:
        from pykeops.torch import LazyTensor

        def total(x: Tensor, y: Tensor) -> Tensor:
            u = LazyTensor(x[:, None].contiguous()).sqdist(LazyTensor(y[None].contiguous()))
            return sum((u * (-0.5 / (b * b))).exp() for b in bandwidths).sum(1).sum()

        def discrepancy(x: Tensor, y: Tensor) -> Tensor:
            n, m = x.shape[0], y.shape[0]
            itself = len(bandwidths)
            within = (total(x, x) / n - itself) / (n - 1) + (total(y, y) / m - itself) / (m - 1)
            return within - 2 * total(x, y) / (n * m)

        return discrepancy

    def arguments(x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"x": x, "y": y, "kernel": kernel, "bandwidth": bandwidths or None}

    def make() -> list[Tensor]:
        x, y = training_inputs(device, torch.float32, *[(points, dimensions)] * 2, scales=(1.0, 1.0))
        # Far enough apart that the discrepancy is more than the rounding errors of its terms.
        return [x, (y.detach() * 1.25).requires_grad_()]

    return OpCase(
        "mmd",
        kind,
        f"d{dimensions}-n{points}",
        {"batch": points, "features": dimensions},
        torch.float32,
        device,
        make=make,
        aefast=aefast,
        eager=by_hand if kernel == "rbf" else module,
        eager_forward=module,
        compilable=module,
        arguments=arguments,
        is_compiled=is_compiled,
        rivals={"keops": Rival("pykeops", keops)}
        if kind == "rbf5" and (points, dimensions) == (4096, 16)
        else {},
    )
