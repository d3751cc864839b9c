"""`penalized_linear_act` beside a dense layer and the penalty's formula."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes

# (batch, inputs, features)
SHAPES = ((256, 784, 256), (4096, 784, 1024), (4096, 256, 64), (16384, 256, 2048))
QUICK_SHAPES = SHAPES[1:2]
# Each penalty with the activation that goes with it.
KINDS = (("l1", "relu"), ("kl", "sigmoid"))
RATE, EPS = 0.05, 1e-6


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for penalty, activation in KINDS:
            for batch, inputs, features in QUICK_SHAPES if quick else SHAPES:
                is_compiled = not quick and (batch, inputs, features) == SHAPES[1]
                yield case(batch, inputs, features, penalty, activation, dtype, device, is_compiled)


def case(
    batch: int,
    inputs: int,
    features: int,
    penalty: str,
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    activate = {"relu": F.relu, "sigmoid": torch.sigmoid}[activation]

    def aefast(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return AF.penalized_linear_act(x, weight, bias, activation, penalty=penalty, rate=RATE)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = activate(F.linear(x, weight, bias))
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        if penalty == "l1":
            # Outputs of relu are their own magnitudes.
            return h, h.sum(dtype=wide) / batch
        q = h.mean(0, dtype=wide).clamp(EPS, 1 - EPS)
        return h, (RATE * (RATE / q).log() + (1 - RATE) * ((1 - RATE) / (1 - q)).log()).sum()

    def make() -> list[Tensor]:
        # Products and their sums are multiples of 2^-12, which every dtype adds up exactly, and with the bias none of
        # them is 0: rounding puts no pre-activation on the other side of relu's kink.
        x = (torch.randn(batch, inputs, device=device) * 8).round() / 8
        weight = (torch.randn(features, inputs, device=device) * 512 * inputs**-0.5).round() / 512
        bias = (2 * torch.randint(-100, 100, (features,), device=device) + 1) * 2.0**-13
        return [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]

    return OpCase(
        "penalized_linear_act",
        penalty,
        f"b{batch}-{inputs}x{features}",
        {"batch": batch, "inputs": inputs, "features": features},
        dtype,
        device,
        make=make,
        aefast=aefast,
        eager=eager,
        arguments=lambda x, weight, bias: {"x": x, "weight": weight, "bias": bias, "activation": activation},
        is_compiled=is_compiled,
    )
