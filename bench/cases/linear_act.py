"""`linear_act` beside ``F.linear`` and the activation, over batch sizes and widths."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import KINK_WIDTH, Case, training_inputs

BATCHES = (1, 16, 128, 1024, 4096, 16384)
# (inputs, features): bottlenecks, square layers, and the ends of the usual image and gene-expression models.
WIDTHS = (
    (8, 8),
    (64, 64),
    (64, 784),
    (256, 64),
    (256, 256),
    (256, 1024),
    (784, 512),
    (1024, 1024),
    (4096, 4096),
)
QUICK_BATCHES = (1, 128, 4096)
QUICK_WIDTHS = ((8, 8), (64, 784), (256, 256), (784, 512))
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
# The largest layer at the largest batch would alone take longer than all the rest.
MOST_FLOPS = 6e10

EAGER = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for inputs, features in QUICK_WIDTHS if quick else WIDTHS:
        for batch in QUICK_BATCHES if quick else BATCHES:
            if 2.0 * batch * inputs * features > MOST_FLOPS:
                continue
            for activation in ACTIVATIONS:
                yield case(batch, inputs, features, activation, device)


def case(batch: int, inputs: int, features: int, activation: str, device: torch.device) -> Case:
    activate = EAGER[activation]

    def aefast(x, weight, bias):
        return AF.linear_act(x, weight, bias, activation)

    def eager(x, weight, bias):
        return activate(F.linear(x, weight, bias))

    def kinks(x, weight, bias):
        return F.linear(x, weight, bias).abs() < KINK_WIDTH

    return Case(
        op="linear_act",
        id=f"linear_act/{activation}-b{batch}-{inputs}x{features}-fp32",
        labels={"activation": activation, "batch": batch, "inputs": inputs, "features": features},
        make=lambda: training_inputs(
            device, (batch, inputs), (features, inputs), (features,), scales=(1.0, inputs**-0.5, 1.0)
        ),
        output_shape=(batch, features),
        arguments=lambda x, weight, bias: {"x": x, "weight": weight, "bias": bias, "activation": activation},
        variants={"aefast": aefast, "eager": eager},
        kinks=kinks if activation == "relu" else None,
    )
