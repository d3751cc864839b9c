"""`kl_discrete` beside its formula in PyTorch, which is faster than ``F.kl_div``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes

SHAPES = ((256, 16), (8192, 256))


class Divergence(torch.autograd.Function):
    """The mean over the rows of p and q (N, D) of Σ p log(p / q), of probabilities above 0, as those of `case` are."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(p, q)
        return divergence(p, q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        p, q = ctx.saved_tensors
        ratio, scale = p / q, grad / p.shape[0]
        return ratio.log().add_(1.0).mul_(scale), ratio.mul_(-scale)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The same, of which no gradient is wanted."""
    return (p / q).log_().mul_(p).sum() / p.shape[0]


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for batch, size in SHAPES[1:] if quick else SHAPES:
            yield case(batch, size, dtype, device, not quick)


def case(
    batch: int, size: int, dtype: torch.dtype, device: torch.device, is_compiled: bool = False
) -> OpCase:
    def eager(p: Tensor, q: Tensor) -> Tensor:
        return Divergence.apply(wide(p), wide(q))

    def eager_forward(p: Tensor, q: Tensor) -> Tensor:
        return divergence(wide(p), wide(q))

    def compilable(p: Tensor, q: Tensor) -> Tensor:
        p, q = wide(p), wide(q)
        return (p * (p.log() - q.log())).sum() / batch

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
        compilable=compilable,
        arguments=lambda p, q: {"p": p, "q": q},
        is_compiled=is_compiled,
    )
