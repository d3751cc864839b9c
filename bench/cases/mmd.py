"""`mmd` beside the kernel values of all pairs in PyTorch, a block at a time, and libraries that do without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, training_inputs
from aefast.bench.variants import Rival
from aefast.nn import MMDLoss

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


def case(kind: str, points: int, dimensions: int, device: torch.device, is_compiled: bool = False) -> OpCase:
    kernel = KERNELS[kind]
    bandwidths = tuple(factor * math.sqrt(dimensions) for factor in BANDWIDTHS.get(kind, ()))

    def aefast(x: Tensor, y: Tensor) -> Tensor:
        return AF.mmd(x, y, kernel=kernel, bandwidth=bandwidths or None)

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
        eager=MMDLoss(kernel, bandwidths or None).eager(),
        arguments=arguments,
        is_compiled=is_compiled,
        rivals={"keops": Rival("pykeops", keops)}
        if kind == "rbf5" and (points, dimensions) == (4096, 16)
        else {},
    )
