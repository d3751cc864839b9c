"""`corrupt` beside the lines that draw each noise in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes, training_inputs
from aefast.ops import _philox

# (batch, features): digits of 28 × 28, and patches of 16 × 16 pixels.
SHAPES = ((256, 784), (4096, 784), (4096, 256))
QUICK_SHAPES = ((4096, 784),)
STD, P = 0.2, 0.2
OPTIONS = {"gaussian": {"std": STD}, "salt_and_pepper": {"p": P}, "masking": {"p": P}, "dropout": {"p": P}}
SEED = 11


# Each takes x and what it draws: normal values for the gaussian, and values uniform in [0, 1) for the others, which
# it may write over.
EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gaussian": lambda x, drawn: torch.add(x, drawn, alpha=STD),
    "salt_and_pepper": lambda x, drawn: torch.where(drawn < P, drawn.ge_(P / 2).to(x.dtype), x),
    "masking": lambda x, drawn: x * drawn.ge_(P).to(x.dtype),
    "dropout": lambda x, drawn: x * drawn.ge_(P).mul_(1 / (1 - P)).to(x.dtype),
}


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for batch, features in QUICK_SHAPES if quick else SHAPES:
            for noise in OPTIONS:
                is_compiled = not quick and batch == 4096 and features == 784
                yield case(noise, batch, features, dtype, device, is_compiled)


def case(
    noise: str,
    batch: int,
    features: int,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    draw = torch.randn_like if noise == "gaussian" else torch.rand_like

    def aefast(x: Tensor) -> Tensor:
        return AF.corrupt(x, noise, **OPTIONS[noise])

    def eager(x: Tensor) -> Tensor:
        # PyTorch has this one in an op of its own, which on the CPU is slower.
        if noise == "dropout" and device.type == "cuda":
            return F.dropout(x, P)
        return EAGER[noise](x, draw(x))

    def given_noise() -> tuple[Callable[..., Any], Callable[..., Any]]:
        seed, shape = torch.tensor(SEED, device=device), torch.Size((batch, features))
        if noise == "gaussian":
            drawn = _philox.normals(seed, shape, torch.float64)
        else:
            drawn = (_philox.words(seed, shape.numel()).double() * 2.0**-32).reshape(shape)

        def given_aefast(x: Tensor) -> Tensor:
            return AF.corrupt(x, noise, seed=SEED, **OPTIONS[noise])

        def given_eager(x: Tensor) -> Tensor:
            # A uniform value in half precision could come to lie on the other side of p.
            return EAGER[noise](x, drawn.to(x.dtype) if noise == "gaussian" else drawn.clone())

        return given_aefast, given_eager

    return OpCase(
        "corrupt",
        noise,
        f"b{batch}-d{features}",
        {"batch": batch, "features": features},
        dtype,
        device,
        make=lambda: training_inputs(device, dtype, (batch, features), scales=(1.0,)),
        aefast=aefast,
        eager=eager,
        arguments=lambda x: {"x": x, "noise": noise},
        given_noise=given_noise,
        is_compiled=is_compiled,
    )
