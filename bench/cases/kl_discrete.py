"""`kl_discrete` beside its formula in PyTorch, which is faster than ``F.kl_div``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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
    # Of probabilities above 0, as those of `make` are.
    def eager(p: Tensor, q: Tensor) -> Tensor:
        p, q = wide(p), wide(q)
        return (p * (p.log() - q.log())).sum() / batch

    def eager_forward(p: Tensor, q: Tensor) -> Tensor:
        p, q = wide(p), wide(q)
        return (p / q).log_().mul_(p).sum() / batch

    def wide(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

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
        eager_forward=eager_forward,
        arguments=lambda p, q: {"p": p, "q": q},
        is_compiled=is_compiled,
    )
