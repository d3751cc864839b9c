"""`nearest` beside code in PyTorch, whose distances are a matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, training_inputs

# (clouds, points of x, points of y, dimensions): clouds of points in space, and latents beside those of a data set.
SHAPES = ((4, 1024, 1024, 3), (32, 1024, 1024, 3), (1, 1024, 4096, 16), (1, 1024, 8192, 64))
QUICK_SHAPES = ((4, 1024, 1024, 3), (1, 1024, 4096, 16))


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for index, shape in enumerate(QUICK_SHAPES if quick else SHAPES):
        yield case(*shape, device, not quick and index == 0)


def case(
    clouds: int, rows: int, columns: int, size: int, device: torch.device, is_compiled: bool = False
) -> OpCase:
    return OpCase(
        "nearest",
        "",
        f"{clouds}x{rows}x{columns}-d{size}",
        {"clouds": clouds, "rows": rows, "columns": columns, "dimensions": size},
        torch.float32,
        device,
        make=lambda: training_inputs(
            device, torch.float32, (clouds, rows, size), (clouds, columns, size), scales=(1.0, 1.0)
        ),
        aefast=lambda x, y: AF.nearest(x, y)[0],
        eager=eager,
        eager_forward=lambda x, y: torch.cdist(x, y).amin(-1),
        arguments=lambda x, y: {"x": x, "y": y},
        is_compiled=is_compiled,
    )


def eager(x: Tensor, y: Tensor) -> Tensor:
    return to_nearest(x, y).norm(dim=-1)


def to_nearest(x: Tensor, y: Tensor) -> Tensor:
    """The differences (*, N, D) of rows of x (*, N, D) and the nearest of y (*, M, D): gradients need no matrix."""
    with torch.no_grad():
        squares = y.square().sum(-1).unsqueeze(-2)
        index = torch.baddbmm(squares, x, y.mT, alpha=-2.0).argmin(-1, keepdim=True)
    return x - y.gather(-2, index.expand_as(x))
