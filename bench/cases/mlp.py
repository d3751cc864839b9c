"""`mlp` beside the same stack of ``F.linear`` and activations."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import KINK_WIDTH, Case, training_inputs

BATCHES = (1, 16, 128, 1024, 4096, 16384)
WIDTHS = ((8, 8, 8, 8), (64, 256, 64), (256, 128, 32, 128, 256), (784, 512, 16, 512, 784))
QUICK_BATCHES = (1, 128, 4096)
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")

EAGER = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for widths in WIDTHS:
        for batch in QUICK_BATCHES if quick else BATCHES:
            for activation in ACTIVATIONS:
                yield case(batch, widths, activation, device)


def case(batch: int, widths: tuple[int, ...], activation: str, device: torch.device) -> Case:
    activate = EAGER[activation]
    layers = len(widths) - 1
    activations = [activation] * (layers - 1) + ["identity"]

    def aefast(x, *parameters):
        return AF.mlp(x, parameters[:layers], parameters[layers:], activations)

    def eager(x, *parameters):
        for layer in range(layers):
            x = F.linear(x, parameters[layer], parameters[layers + layer])
            if layer < layers - 1:
                x = activate(x)
        return x

    def kinks(x, *parameters):
        found = torch.zeros(batch, 1, dtype=torch.bool, device=x.device)
        for layer in range(layers - 1):
            x = F.linear(x, parameters[layer], parameters[layers + layer])
            found |= (x.abs() < KINK_WIDTH).any(dim=1, keepdim=True)
            x = activate(x)
        return found

    shapes = [(batch, widths[0]), *((n, k) for k, n in pairwise(widths)), *((n,) for n in widths[1:])]
    scales = [1.0, *(k**-0.5 for k in widths[:-1]), *(1.0 for _ in widths[1:])]
    return Case(
        op="mlp",
        id=f"mlp/{activation}-b{batch}-{'x'.join(map(str, widths))}-fp32",
        labels={"activation": activation, "batch": batch, "inputs": widths[0], "features": widths[-1]},
        make=lambda: training_inputs(device, *shapes, scales=scales),
        output_shape=(batch, widths[-1]),
        arguments=lambda x, *parameters: {
            "x": x,
            "weights": parameters[:layers],
            "biases": parameters[layers:],
            "activations": activations,
        },
        variants={"aefast": aefast, "eager": eager},
        kinks=kinks if activation == "relu" else None,
    )
