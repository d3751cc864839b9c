"""`mlp` beside the same stack of ``F.linear`` and activations."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import KINK_WIDTH, OpCase, dtypes, training_inputs

BATCHES = (1, 16, 128, 1024, 4096, 16384)
WIDTHS = ((8, 8, 8, 8), (64, 256, 64), (256, 128, 32, 128, 256), (784, 512, 16, 512, 784))
QUICK_BATCHES = (1, 128, 4096)
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
# (batch, activation) with torch.compile; at the widest stack only where time is short, as it is on CUDA.
COMPILED = {(batch, activation) for batch in (128, 4096) for activation in ("relu", "gelu")}
QUICK_COMPILED = {(4096, "gelu", 784)}

EAGER = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
# Without a graph to record, the fastest write over their argument; PyTorch has no such gelu.
EAGER_IN_PLACE = {
    "relu": torch.relu_,
    "gelu": F.gelu,
    "silu": lambda x: F.silu(x, inplace=True),
    "tanh": torch.tanh_,
}


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for widths in WIDTHS:
            for batch in QUICK_BATCHES if quick else BATCHES:
                for activation in ACTIVATIONS:
                    compiled = (
                        (batch, activation, widths[0]) in QUICK_COMPILED
                        if quick or device.type == "cuda"
                        else (batch, activation) in COMPILED
                    )
                    yield case(batch, widths, activation, dtype, device, compiled)


def case(
    batch: int,
    widths: tuple[int, ...],
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    activate = EAGER[activation]
    layers = len(widths) - 1
    activations = [activation] * (layers - 1) + ["identity"]

    def aefast(x: Tensor, *parameters: Tensor) -> Tensor:
        return AF.mlp(x, parameters[:layers], parameters[layers:], activations)

    def eager(x: Tensor, *parameters: Tensor) -> Tensor:
        for layer in range(layers):
            x = F.linear(x, parameters[layer], parameters[layers + layer])
            if layer < layers - 1:
                x = activate(x)
        return x

    def eager_forward(x: Tensor, *parameters: Tensor) -> Tensor:
        for layer in range(layers):
            x = F.linear(x, parameters[layer], parameters[layers + layer])
            if layer < layers - 1:
                x = EAGER_IN_PLACE[activation](x)
        return x

    def kinks(x: Tensor, *parameters: Tensor) -> Tensor:
        found = torch.zeros(batch, 1, dtype=torch.bool, device=x.device)
        for layer in range(layers - 1):
            x = F.linear(x, parameters[layer], parameters[layers + layer])
            found |= (x.abs() < KINK_WIDTH).any(dim=1, keepdim=True)
            x = activate(x)
        return found

    shapes = [(batch, widths[0]), *((n, k) for k, n in pairwise(widths)), *((n,) for n in widths[1:])]
    scales = [1.0, *(k**-0.5 for k in widths[:-1]), *(1.0 for _ in widths[1:])]
    return OpCase(
        "mlp",
        activation,
        f"b{batch}-{'x'.join(map(str, widths))}",
        {"batch": batch, "inputs": widths[0], "features": widths[-1]},
        dtype,
        device,
        make=lambda: training_inputs(device, dtype, *shapes, scales=scales),
        aefast=aefast,
        eager=eager,
        eager_forward=eager_forward,
        arguments=lambda x, *parameters: {
            "x": x,
            "weights": parameters[:layers],
            "biases": parameters[layers:],
            "activations": activations,
        },
        kinks=kinks if activation == "relu" else None,
        is_compiled=is_compiled,
    )
