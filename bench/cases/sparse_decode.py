"""`sparse_decode` beside ``torch.nn.functional.embedding_bag``, and beside the product of the whole code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes, training_inputs
from aefast.bench.variants import Rival

# (batch, entries, latents, columns)
SHAPES = ((4096, 32, 8192, 512), (1024, 32, 24576, 768), (4096, 16, 1024, 256), (256, 64, 8192, 512))
QUICK_SHAPES = SHAPES[:1]


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for index, shape in enumerate(QUICK_SHAPES if quick else SHAPES):
            yield case(*shape, dtype, device, not quick and index == 0)


def case(
    batch: int,
    entries: int,
    latents: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
) -> OpCase:
    def make() -> list[Tensor]:
        values, weight, bias = training_inputs(
            device,
            dtype,
            (batch, entries),
            (latents, columns),
            (columns,),
            scales=(1.0, entries**-0.5, 0.1),
        )
        # Different ones in a row, as an encoder chooses them.
        indices = torch.rand(batch, latents, device=device).topk(entries).indices
        return [values, indices, weight, bias]

    return OpCase(
        "sparse_decode",
        "",
        f"b{batch}-k{entries}-{latents}-{columns}",
        {"batch": batch, "entries": entries, "latents": latents, "columns": columns},
        dtype,
        device,
        make=make,
        aefast=AF.sparse_decode,
        eager=eager,
        arguments=lambda values, indices, weight, bias: {
            "values": values,
            "indices": indices,
            "weight": weight,
            "bias": bias,
        },
        is_compiled=is_compiled,
        rivals={"dense": Rival("torch", lambda: dense)},
    )


# Their truth is computed on inputs of which all are float64.
def eager(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.embedding_bag(indices.long(), weight, per_sample_weights=values, mode="sum") + bias


def dense(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    code = values.new_zeros(values.shape[0], weight.shape[0]).scatter(1, indices, values)
    return torch.addmm(bias, code, weight)
