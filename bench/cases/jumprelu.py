"""`jumprelu` beside the same as an autograd function in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes

# (batch, features)
SHAPES = ((256, 2048), (4096, 1024), (4096, 8192), (16384, 4096))
QUICK_SHAPES = SHAPES[1:2]
BANDWIDTH = 1e-3


class StraightThrough(torch.autograd.Function):
    """As few passes as PyTorch's operators allow: no mask is stored, and temporaries are written over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, threshold)
        return gated(x, threshold)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_l0: Tensor) -> tuple[Tensor, Tensor]:
        x, threshold = ctx.saved_tensors
        to_x = torch.where(x > threshold, grad_h, 0)
        is_far = (x - threshold).abs_() >= 0.5 * BANDWIDTH
        slopes = torch.addcmul(grad_l0[:, None], grad_h, threshold).masked_fill_(is_far, 0)
        return to_x, slopes.sum(0).mul_(-1 / BANDWIDTH).to(threshold.dtype)


def gated(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """What is above the threshold (N, F), and how many of each row are (N,); no gradient flows."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # PyTorch adds up and multiplies by booleans one at a time.
        active = torch.gt(x, threshold, out=torch.empty_like(x))
        count = active.sum(-1, dtype=wide)
        return active.mul_(x), count
    active = x > threshold
    return x * active, active.sum(-1, dtype=wide)


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for batch, size in QUICK_SHAPES if quick else SHAPES:
            yield case(batch, size, dtype, device, not quick and batch == 4096)


def case(
    batch: int, size: int, dtype: torch.dtype, device: torch.device, is_compiled: bool = False
) -> OpCase:
    def make() -> list[Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.randn(batch, size, device=device).to(dtype)
        threshold = (0.01 + torch.rand(size, device=device)).to(wide)
        return [x.requires_grad_(), threshold.requires_grad_()]

    return OpCase(
        "jumprelu",
        "",
        f"b{batch}-f{size}",
        {"batch": batch, "features": size},
        dtype,
        device,
        make=make,
        aefast=lambda x, threshold: AF.jumprelu(x, threshold, BANDWIDTH),
        eager=StraightThrough.apply,
        eager_forward=gated,
        arguments=lambda x, threshold: {"x": x, "threshold": threshold, "bandwidth": BANDWIDTH},
        is_compiled=is_compiled,
    )
