"""`kl_normal` beside code in PyTorch of few passes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes, training_inputs
from aefast.bench.cases.reparameterize import divergence, widened

SHAPES = ((256, 16), (8192, 256))


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for batch, size in SHAPES[1:] if quick else SHAPES:
            yield case(batch, size, dtype, device, not quick)


def case(
    batch: int, size: int, dtype: torch.dtype, device: torch.device, is_compiled: bool = False
) -> OpCase:
    def eager(mu: Tensor, logvar: Tensor) -> Tensor:
        wide_mu, wide_logvar = widened(mu, logvar)
        return divergence(wide_mu, wide_logvar.exp().sum(), wide_logvar)

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
