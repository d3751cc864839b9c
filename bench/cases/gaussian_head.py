"""`gaussian_head` beside a dense layer and what PyTorch has for the rest, in few passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes, training_inputs
from aefast.bench.cases.reparameterize import SEED, in_few_passes
from aefast.ops import _philox

# (batch, hidden, latent size)
SHAPES = ((256, 512, 16), (4096, 512, 16), (4096, 512, 256), (16384, 256, 64))
QUICK_SHAPES = SHAPES[1:2]


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for batch, inputs, size in QUICK_SHAPES if quick else SHAPES:
            yield case(batch, inputs, size, dtype, device, not quick and batch == 4096)


def case(
    batch: int,
    inputs: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    def aefast(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return AF.gaussian_head(h, weight, bias)[:2]

    def eager(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = F.linear(h, weight, bias).chunk(2, dim=1)
        return in_few_passes(mu, logvar, torch.randn_like(mu))

    def given_noise() -> tuple[Callable[..., Any], Callable[..., Any]]:
        noise = _philox.normals(torch.tensor(SEED, device=device), torch.Size((batch, size)), torch.float64)

        def given_aefast(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return AF.gaussian_head(h, weight, bias, seed=SEED)[:2]

        def given_eager(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            mu, logvar = F.linear(h, weight, bias).chunk(2, dim=1)
            return in_few_passes(mu, logvar, noise.to(mu.dtype))

        return given_aefast, given_eager

    return OpCase(
        "gaussian_head",
        "",
        f"b{batch}-{inputs}x{size}",
        {"batch": batch, "inputs": inputs, "features": size},
        dtype,
        device,
        make=lambda: training_inputs(
            device,
            dtype,
            (batch, inputs),
            (2 * size, inputs),
            (2 * size,),
            scales=(1.0, 0.5 * inputs**-0.5, 0.1),
        ),
        aefast=aefast,
        eager=eager,
        arguments=lambda h, weight, bias: {"h": h, "weight": weight, "bias": bias},
        given_noise=given_noise,
        is_compiled=is_compiled,
    )
