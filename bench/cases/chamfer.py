"""`chamfer` beside code in PyTorch, whose distances are a matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, training_inputs
from aefast.bench.cases.nearest import to_nearest

# (clouds, points of x, points of y, dimensions): clouds of points in space.
SHAPES = ((4, 1024, 1024, 3), (32, 1024, 1024, 3), (8, 2048, 2048, 3))
QUICK_SHAPES = ((4, 1024, 1024, 3),)


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for index, shape in enumerate(QUICK_SHAPES if quick else SHAPES):
        yield case(*shape, device, not quick and index == 0)


def case(
    clouds: int, rows: int, columns: int, size: int, device: torch.device, is_compiled: bool = False
) -> OpCase:
    return OpCase(
        "chamfer",
        "",
        f"{clouds}x{rows}x{columns}-d{size}",
        {"clouds": clouds, "rows": rows, "columns": columns, "dimensions": size},
        torch.float32,
        device,
        make=lambda: training_inputs(
            device, torch.float32, (clouds, rows, size), (clouds, columns, size), scales=(1.0, 1.0)
        ),
        aefast=AF.chamfer,
        eager=eager,
        eager_forward=eager_forward,
        arguments=lambda x, y: {"x": x, "y": y},
        is_compiled=is_compiled,
    )


def eager(x: Tensor, y: Tensor) -> Tensor:
    # A minimum along the rows and one along the columns of the same matrix take longer.
    there, back = (to_nearest(*pair).square().sum(-1).mean(-1) for pair in ((x, y), (y, x)))
    return (there + back).mean()


def eager_forward(x: Tensor, y: Tensor) -> Tensor:
    distances = torch.cdist(x, y)
    there, back = (distances.amin(dim).square().mean(-1) for dim in (-1, -2))
    return (there + back).mean()
