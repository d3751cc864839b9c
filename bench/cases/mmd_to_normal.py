"""`mmd_to_normal` beside the same closed form in PyTorch, with the kernel values of the sample's own pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, training_inputs
from aefast.bench.cases.mmd import RBFWithin
from aefast.nn import MMDLoss

# (points, dimensions): batches of latents.
SHAPES = ((256, 16), (4096, 16), (4096, 64))
QUICK_SHAPES = ((256, 16),)
# Times the root of the dimensions, each twice the one before.
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for points, dimensions in QUICK_SHAPES if quick else SHAPES:
        yield case(points, dimensions, device, not quick and points == 4096)


def case(points: int, dimensions: int, device: torch.device, is_compiled: bool = False) -> OpCase:
    bandwidths = tuple(factor * math.sqrt(dimensions) for factor in FACTORS)

    pairs = MMDLoss("rbf", bandwidths).eager()
    rates = [0.5 / (b * b) for b in bandwidths]

    def aefast(x: Tensor) -> Tensor:
        return AF.mmd_to_normal(x, bandwidth=bandwidths)

    def eager(x: Tensor) -> Tensor:
        return discrepancy(x, RBFWithin.apply(x, rates))

    def eager_forward(x: Tensor) -> Tensor:
        return discrepancy(x, pairs.within(x, True))

    def discrepancy(x: Tensor, of_pairs: Tensor) -> Tensor:
        """With the sum of the kernel values of the pairs of different rows."""
        n, d = x.shape
        norms = x.square().sum(1)
        within = of_pairs / (n * (n - 1))
        across = sum(
            (b * b / (b * b + 1)) ** (d / 2) * torch.exp(norms * (-0.5 / (b * b + 1))).mean()
            for b in bandwidths
        )
        return within - 2 * across + sum((b * b / (b * b + 2)) ** (d / 2) for b in bandwidths)

    def arguments(x: Tensor) -> dict[str, Any]:
        return {"x": x, "bandwidth": bandwidths}

    return OpCase(
        "mmd_to_normal",
        "rbf5",
        f"d{dimensions}-n{points}",
        {"batch": points, "features": dimensions},
        torch.float32,
        device,
        # Wide enough that the discrepancy is more than the rounding errors of its terms.
        make=lambda: training_inputs(device, torch.float32, (points, dimensions), scales=(1.25,)),
        aefast=aefast,
        eager=eager,
        eager_forward=eager_forward,
        compilable=eager_forward,
        arguments=arguments,
        is_compiled=is_compiled,
    )
