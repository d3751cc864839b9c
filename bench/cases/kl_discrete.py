"""`kl_discrete` beside ``F.kl_div``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes

SHAPES = ((256, 16), (8192, 256))


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for batch, size in SHAPES[1:] if quick else SHAPES:
            yield case(batch, size, dtype, device, not quick)


def case(
    batch: int, size: int, dtype: torch.dtype, device: torch.device, is_compiled: bool = False
) -> OpCase:
    def eager(p: Tensor, q: Tensor) -> Tensor:
        wide_p, wide_q = (p, q) if p.dtype == torch.float64 else (p.float(), q.float())
        return F.kl_div(wide_q.log(), wide_p, reduction="batchmean")

    def make() -> list[Tensor]:
        return [
            torch.randn(batch, size, device=device).softmax(-1).to(dtype).requires_grad_() for _ in range(2)
        ]

    return OpCase(
        "kl_discrete",
        "",
        f"b{batch}-d{size}",
        {"batch": batch, "features": size},
        dtype,
        device,
        make=make,
        aefast=AF.kl_discrete,
        eager=eager,
        arguments=lambda p, q: {"p": p, "q": q},
        is_compiled=is_compiled,
    )
