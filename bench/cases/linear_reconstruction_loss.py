"""`linear_reconstruction_loss` beside the dense layer and the loss one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes

# (batch, inputs, features): images of 28 × 28 from a hidden layer, and the genes of a cell.
SHAPES = ((256, 512, 784), (4096, 512, 784), (4096, 512, 30000))
QUICK_SHAPES = ((4096, 512, 784),)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for shape in QUICK_SHAPES if quick else SHAPES:
            for kind in LOSSES:
                if kind == "mse" or shape[2] < 10000:
                    yield case(kind, *shape, dtype, device, not quick and shape == (4096, 512, 784))


def case(
    kind: str,
    batch: int,
    inputs: int,
    features: int,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    def make() -> list[Tensor]:
        h = torch.randn(batch, inputs, device=device)
        weight = torch.randn(features, inputs, device=device) * inputs**-0.5
        layer = [one.to(dtype).requires_grad_() for one in (h, weight, torch.zeros(features, device=device))]
        # Data, of which no gradient is wanted.
        return [*layer, torch.rand(batch, features, device=device).to(dtype)]

    def eager(h: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        output = F.linear(h, weight, bias)
        wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        return LOSSES[kind](output.to(wide), target.to(wide))

    def aefast(h: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return AF.linear_reconstruction_loss(h, weight, bias, target, kind)

    return OpCase(
        "linear_reconstruction_loss",
        kind,
        f"b{batch}-{inputs}-{features}",
        {"batch": batch, "inputs": inputs, "features": features},
        dtype,
        device,
        make=make,
        aefast=aefast,
        eager=eager,
        arguments=lambda h, weight, bias, target: {
            "h": h,
            "weight": weight,
            "bias": bias,
            "target": target,
            "kind": kind,
        },
        is_compiled=is_compiled,
    )
