"""`batch_topk_encode` beside code in PyTorch that has all pre-activations and picks the largest of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import KINK_WIDTH, OpCase, dtypes
from aefast.bench.cases.topk_encode import BIAS, operands

# (batch, inputs, latents, k): activations of a language model, and patches.
SHAPES = ((4096, 512, 8192, 32), (4096, 256, 1024, 16), (256, 512, 8192, 64))
QUICK_SHAPES = SHAPES[1:2]


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for shape in QUICK_SHAPES if quick else SHAPES:
            yield case(*shape, dtype, device)


def case(batch: int, inputs: int, latents: int, k: int, dtype: torch.dtype, device: torch.device) -> OpCase:
    # Pre-activations have this standard deviation. Their least that is chosen varies from batch to batch by less than
    # what is added.
    level = math.hypot(1.0, BIAS) * NormalDist().inv_cdf(1.0 - k / latents) + 0.05

    def above(values: Tensor) -> Tensor:
        """Of each row (N, width) one number (N,): which of two about equal entries is the batch's last, and how wide
        the rows are, is decided by rounding, and entries below the level count nothing."""
        return (values - level).clamp_min_(0.0).sum(1)

    def aefast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return above(AF.batch_topk_encode(x, weight, bias, k)[0])

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        made = F.linear(x, weight, bias)
        # A row has rarely as many of the batch's largest as three times its share.
        largest = made.topk(min(latents, 3 * k)).values
        least = least_chosen(largest)
        if largest.shape[1] < latents and (largest[:, -1] >= least).any():
            largest = made.topk(latents).values
            least = least_chosen(largest)
        values = largest[:, : int((largest >= least).sum(1).max())]
        return above(values.masked_fill(values < least, -math.inf))

    def least_chosen(values: Tensor) -> Tensor:
        return values.detach().flatten().topk(k * batch, sorted=False).values.min()

    def kinks(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ((F.linear(x, weight, bias) - level).abs() < KINK_WIDTH).any(1)

    return OpCase(
        "batch_topk_encode",
        "",
        f"b{batch}-{inputs}-{latents}-k{k}",
        {"batch": batch, "inputs": inputs, "latents": latents, "k": k},
        dtype,
        device,
        make=lambda: operands(batch, inputs, latents, dtype, device),
        aefast=aefast,
        eager=eager,
        arguments=lambda x, weight, bias: {"x": x, "weight": weight, "bias": bias, "k": k},
        kinks=kinks,
    )
