"""`topk_encode` beside the dense layer and ``torch.topk`` of all its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


class LargestOfLinear(torch.autograd.Function):
    """The k largest of each row, with gradients of weight and bias from these alone: autograd's are those of all,
    nearly all of them 0. Of each latent the rows of x are added up that have chosen it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
        values, indices = F.linear(x, weight, bias).topk(k)
        ctx.save_for_backward(x, indices.flatten(), bias)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        x, indices, bias = ctx.saved_tensors
        order = indices.argsort(stable=True)
        ends = torch.bincount(indices, minlength=len(bias)).cumsum(0)
        starts = torch.cat((ends.new_zeros(1), ends[:-1]))
        weights, rows = grad.flatten()[order], order // grad.shape[1]
        to_weight = F.embedding_bag(rows, x, starts, mode="sum", per_sample_weights=weights)
        return None, to_weight, torch.zeros_like(bias).index_add_(0, indices, grad.flatten()), None


def case(
    batch: int,
    inputs: int,
    latents: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias).topk(k).values

    def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return LargestOfLinear.apply(x, weight, bias, k)

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
        eager=by_hand if device.type == "cpu" else dense,
        eager_forward=dense,
        compilable=dense,
        arguments=lambda x, weight, bias: {"x": x, "weight": weight, "bias": bias, "k": k},
        kinks=kinks,
        is_compiled=is_compiled,
    )


def operands(batch: int, inputs: int, latents: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Data, of which no gradient is wanted, and the parameters of a layer."""
    layer = training_inputs(device, dtype, (latents, inputs), (latents,), scales=(inputs**-0.5, BIAS))
    return [torch.randn(batch, inputs, device=device).to(dtype), *layer]
