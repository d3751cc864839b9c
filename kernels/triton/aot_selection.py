"""What the kernel of selection.py is compiled to ahead of time; aot.py says what that means."""

from ..workload import Workload
from . import selection
from .aot import TARGETS, TORCH_DTYPES, signature

# The pre-activations that are estimated: the largest 32 of 16384 latents.
ROWS, COLUMNS, K = 16384, 16384, 32


def largest(dtype, k, targets=(90,), is_aligned=True):
    """Both passes over a row count as the second, which gathers and takes three times the instructions of the first. Of
    the bisection between them there is one step. A chunk's column is stored by one of its lanes in any case."""
    size, tile = TORCH_DTYPES[dtype].itemsize, selection.TILE.value
    moved = ROWS * (COLUMNS * size + K * (size + 8))
    return signature(
        f"largest {k} {dtype}{'' if is_aligned else ' odd'}",
        selection.largest_kernel,
        {
            "elements": f"*{dtype}",
            "chunks": "*i32",
            "keys": "*i64",
            "values": f"*{dtype}",
            "indices": "*i64",
            "columns": "i32",
            "k": "i32",
        },
        selection.sizes(k),
        {"k"} if is_aligned else {"k", "columns"},
        warps=selection.WARPS,
        targets=targets,
        programs_per_sm=4,
        options={**selection.COMPILE, **selection.REGISTERS},
        load_bits=128 if is_aligned else 8 * size,
        workload=Workload(
            f"{ROWS}×{COLUMNS}",
            dtype,
            ROWS,
            selection.WARPS,
            ROWS * COLUMNS,
            bytes=moved,
            passes=2 * COLUMNS // tile,
            pass_bytes=tile * size + tile // selection.CHUNK.value * 4,
            distinct_bytes=moved,
        )
        if k == K
        else None,
    )


def signatures():
    return [
        largest("bf16", K, TARGETS),
        largest("fp16", K),
        largest("fp32", K, TARGETS),
        largest("bf16", K, is_aligned=False),
        largest("bf16", selection.MOST),
        largest("fp32", selection.MOST),
    ]
