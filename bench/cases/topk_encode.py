"""`topk_encode` beside the dense layer and ``torch.topk`` of all its outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import KINK_WIDTH, OpCase, dtypes, training_inputs

# (batch, inputs, latents, k): activations of a language model, and four to 32 times as many latents.
SHAPES = ((4096, 512, 8192, 32), (1024, 768, 24576, 32), (4096, 256, 1024, 16), (256, 512, 8192, 64))
QUICK_SHAPES = SHAPES[:1]
# Of the bias, where products have the standard deviation 1.
BIAS = 0.1


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for index, shape in enumerate(QUICK_SHAPES if quick else SHAPES):
            yield case(*shape, dtype, device, not quick and index == 0)


def case(
    batch: int,
    inputs: int,
    latents: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias).topk(k).values

    def kinks(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Values that have another beside them, whose order, or which of them is chosen, rounding decides."""
        first = F.linear(x, weight, bias).topk(min(k + 1, latents)).values
        apart = first[:, :-1] - first[:, 1:]
        ends = torch.full_like(apart[:, :1], torch.inf)
        below = torch.cat((apart, ends), 1)[:, :k]
        above = torch.cat((ends, apart), 1)[:, :k]
        return torch.minimum(below, above) < KINK_WIDTH

    return OpCase(
        "topk_encode",
        "",
        f"b{batch}-{inputs}-{latents}-k{k}",
        {"batch": batch, "inputs": inputs, "latents": latents, "k": k},
        dtype,
        device,
        make=lambda: operands(batch, inputs, latents, dtype, device),
        aefast=lambda x, weight, bias: AF.topk_encode(x, weight, bias, k)[0],
        eager=eager,
        arguments=lambda x, weight, bias: {"x": x, "weight": weight, "bias": bias, "k": k},
        kinks=kinks,
        is_compiled=is_compiled,
    )


def operands(batch: int, inputs: int, latents: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Data, of which no gradient is wanted, and the parameters of a layer."""
    layer = training_inputs(device, dtype, (latents, inputs), (latents,), scales=(inputs**-0.5, BIAS))
    return [torch.randn(batch, inputs, device=device).to(dtype), *layer]
