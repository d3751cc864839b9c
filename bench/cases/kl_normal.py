"""`kl_normal` beside the textbook's line."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes, training_inputs

SHAPES = ((256, 16), (8192, 256))


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for batch, size in SHAPES[1:] if quick else SHAPES:
            yield case(batch, size, dtype, device, not quick)


def case(
    batch: int, size: int, dtype: torch.dtype, device: torch.device, is_compiled: bool = False
) -> OpCase:
    def eager(mu: Tensor, logvar: Tensor) -> Tensor:
        wide_mu, wide_logvar = (mu, logvar) if mu.dtype == torch.float64 else (mu.float(), logvar.float())
        return (-0.5 * torch.sum(1 + wide_logvar - wide_mu.pow(2) - wide_logvar.exp(), dim=1)).mean()

    return OpCase(
        "kl_normal",
        "",
        f"b{batch}-d{size}",
        {"batch": batch, "features": size},
        dtype,
        device,
        make=lambda: training_inputs(device, dtype, (batch, size), (batch, size), scales=(1.0, 0.5)),
        aefast=AF.kl_normal,
        eager=eager,
        arguments=lambda mu, logvar: {"mu": mu, "logvar": logvar},
        is_compiled=is_compiled,
    )
