"""What the kernels of latents.py are compiled to ahead of time; aot.py says what that means."""

import triton

from ..workload import Workload
from . import latents
from .aot import TARGETS, TORCH_DTYPES, signature

# The code that is estimated: an autoencoder of 16 times as many latents as inputs, 32 of them at a time.
ROWS, ENTRIES, LATENTS, COLUMNS = 16384, 32, 16384, 1024


def workload(dtype, programs, warps, elements, passes, *read_and_written):
    """Rows that are named again come from L2 as far as they fit it; `distinct_bytes` has them once."""
    size = TORCH_DTYPES[dtype].itemsize
    moved = sum(read_and_written) * size + ROWS * ENTRIES * (8 + size)
    return Workload(
        f"{ROWS}×{ENTRIES} of {LATENTS}×{COLUMNS}",
        dtype,
        programs,
        warps,
        elements,
        bytes=moved,
        flops=2 * ROWS * ENTRIES * COLUMNS,
        passes=passes,
        distinct_bytes=moved,
    )


def weighted_sum(dtype, targets=(90,), has_bias=True):
    size = TORCH_DTYPES[dtype].itemsize
    columns, warps = latents.tiling(COLUMNS, size)
    pointer = f"*{dtype}"
    return signature(
        f"weighted_sum {dtype}{'' if has_bias else ' no bias'}",
        latents.weighted_sum_kernel,
        {
            "values": pointer,
            "indices": "*i64",
            "weight": pointer,
            "bias": pointer if has_bias else None,
            "out": pointer,
            **dict.fromkeys(("K", "D", "F", "stride_weight"), "i32"),
        },
        {"stride_bias": 1, "AT_ONCE": latents.AT_ONCE, "COLUMNS": columns},
        {"K", "F"},
        warps=warps,
        targets=targets,
        programs_per_sm=8,
        load_bits=128,
        workload=workload(
            dtype,
            ROWS * triton.cdiv(COLUMNS, columns),
            warps,
            ROWS * ENTRIES * COLUMNS,
            ENTRIES // latents.AT_ONCE,
            LATENTS * COLUMNS,
            ROWS * COLUMNS,
        ),
    )


def dots(dtype, targets=(90,)):
    pointer = f"*{dtype}"
    return signature(
        f"dots {dtype}",
        latents.dots_kernel,
        {
            "grad": pointer,
            "indices": "*i64",
            "weight": pointer,
            "out": pointer,
            **dict.fromkeys(("K", "D", "F", "stride_grad", "stride_weight"), "i32"),
        },
        {"ENTRIES": latents.DOTS, "COLUMNS": 256},
        {"K", "F"},
        targets=targets,
        programs_per_sm=4,
        load_bits=128,
        workload=workload(
            dtype,
            ROWS * triton.cdiv(ENTRIES, latents.DOTS),
            4,
            ROWS * ENTRIES * COLUMNS,
            COLUMNS // 256,
            LATENTS * COLUMNS,
            ROWS * COLUMNS,
            ROWS * ENTRIES,
        ),
    )


def latent(dtype, targets=(90,), has_sums=True):
    size = TORCH_DTYPES[dtype].itemsize
    columns, warps = latents.tiling(COLUMNS, size)
    pointer = f"*{dtype}"
    return signature(
        f"latent {dtype}{'' if has_sums else ' no sums'}",
        latents.latent_kernel,
        {
            "values": pointer,
            "places": "*i64",
            "starts": "*i64",
            "rows": pointer,
            "out": pointer,
            "sums": pointer if has_sums else None,
            **dict.fromkeys(("K", "D", "stride_rows"), "i32"),
        },
        {"AT_ONCE": latents.AT_ONCE, "COLUMNS": columns},
        {"K"},
        warps=warps,
        targets=targets,
        programs_per_sm=8,
        load_bits=128,
        workload=workload(
            dtype,
            LATENTS * triton.cdiv(COLUMNS, columns),
            warps,
            ROWS * ENTRIES * COLUMNS,
            ROWS * ENTRIES // LATENTS // latents.AT_ONCE,
            LATENTS * COLUMNS,
            ROWS * COLUMNS,
        ),
    )


def signatures():
    for dtype in ("fp32", "bf16", "fp64"):
        targets = TARGETS if dtype == "bf16" else (90,)
        yield weighted_sum(dtype, targets)
        yield dots(dtype, targets)
        yield latent(dtype, targets)
    yield weighted_sum("bf16", has_bias=False)
    yield latent("bf16", has_sums=False)
