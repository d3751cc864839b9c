"""`linear_act` beside ``F.linear`` and the activation, over batch sizes and widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import KINK_WIDTH, OpCase, dtypes, multiplies_bfloat16, training_inputs
from aefast.bench.variants import Rival

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
# On a CPU the largest layer at the largest batch would alone take longer than all the rest.
MOST_FLOPS = 6e10
# (batch, activation) with torch.compile; at the widest of the quick layers only where time is short, as it is on CUDA,
# where a single search for the fastest code takes as long as all other measurements of a case.
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
        for inputs, features in QUICK_WIDTHS if quick else WIDTHS:
            for batch in QUICK_BATCHES if quick else BATCHES:
                if device.type == "cpu" and 2.0 * batch * inputs * features > MOST_FLOPS:
                    continue
                for activation in ACTIVATIONS:
                    compiled = (
                        (batch, activation, inputs) in QUICK_COMPILED
                        if quick or device.type == "cuda"
                        else (batch, activation) in COMPILED
                    )
                    yield case(batch, inputs, features, activation, dtype, device, compiled)
    if device.type == "cpu" and not quick and multiplies_bfloat16():
        for inputs, features in QUICK_WIDTHS:
            for batch in QUICK_BATCHES:
                for activation in ("relu", "gelu"):
                    yield case(batch, inputs, features, activation, torch.bfloat16, device)


def case(
    batch: int,
    inputs: int,
    features: int,
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    activate = EAGER[activation]

    def aefast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return AF.linear_act(x, weight, bias, activation)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return activate(F.linear(x, weight, bias))

    def eager_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return EAGER_IN_PLACE[activation](F.linear(x, weight, bias))

    def quack() -> Callable[..., Tensor]:
        from quack.gemm_interface import gemm_act

        def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return gemm_act(x, weight.T, bias=bias, activation=activation, store_preact=False)[1]

        return product

    def kinks(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias).abs() < KINK_WIDTH

    return OpCase(
        "linear_act",
        activation,
        f"b{batch}-{inputs}x{features}",
        {"batch": batch, "inputs": inputs, "features": features},
        dtype,
        device,
        make=lambda: training_inputs(
            device, dtype, (batch, inputs), (features, inputs), (features,), scales=(1.0, inputs**-0.5, 1.0)
        ),
        aefast=aefast,
        eager=eager,
        eager_forward=eager_forward,
        arguments=lambda x, weight, bias: {"x": x, "weight": weight, "bias": bias, "activation": activation},
        kinks=kinks if activation == "relu" else None,
        is_compiled=is_compiled,
        # Its gelu is the tanh approximation, and a layer with its activation alone has no backward.
        rivals={"quack": Rival("quack", quack, ("fwd",), _quack_refuses)} if activation == "relu" else {},
    )


def _quack_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "quack needs a CUDA device of compute capability 9.0 or later"
    return "quack has no float32 products" if dtype is torch.float32 else None
