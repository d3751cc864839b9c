"""`reconstruction_loss` beside PyTorch's own losses, and beside its operators for the kinds that it has none of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes
from aefast.nn import ReconstructionLoss

# (batch, features): flat images of 28 × 28, a wide batch of small samples, and 64 images of 3 × 128 × 128.
SHAPES = ((256, 784), (4096, 784), (16384, 64), (64, 49152))
QUICK_SHAPES = ((4096, 784),)
KINDS: dict[str, dict[str, Any]] = {
    "mse": {},
    "l1": {},
    "bce_with_logits": {},
    "huber": {"delta": 0.5},
    "charbonnier": {"eps": 1e-3},
    "bce": {},
    "lp": {"p": 1.5},
    "rmse": {},
}
# The kinds measured at every shape, and those measured at the main shape alone.
MAIN_KINDS = ("mse", "l1", "bce_with_logits", "huber")
MAIN_SHAPE = (4096, 784)


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for shape in QUICK_SHAPES if quick else SHAPES:
            for kind in KINDS:
                if kind in MAIN_KINDS or (shape == MAIN_SHAPE and not quick):
                    yield case(kind, *shape, dtype, device, not quick and shape == MAIN_SHAPE)


def case(
    kind: str,
    batch: int,
    features: int,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    options = KINDS[kind]

    def make() -> list[Tensor]:
        input = torch.randn(batch, features, device=device)
        if kind == "bce":
            input = input.sigmoid()
        # Pixels, of which no gradient is wanted.
        target = torch.rand(batch, features, device=device)
        return [input.to(dtype).requires_grad_(), target.to(dtype)]

    def aefast(input: Tensor, target: Tensor) -> Tensor:
        return AF.reconstruction_loss(input, target, kind, **options)

    return OpCase(
        "reconstruction_loss",
        kind,
        f"b{batch}-d{features}",
        {"batch": batch, "features": features},
        dtype,
        device,
        make=make,
        aefast=aefast,
        eager=ReconstructionLoss(kind, **options).eager(),
        arguments=lambda input, target: {"input": input, "target": target, "kind": kind},
        is_compiled=is_compiled,
    )
