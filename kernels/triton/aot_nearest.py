"""What the kernels of nearest.py are compiled to ahead of time; aot.py says what that means."""

from ..workload import Workload
from . import nearest
from .aot import TARGETS, TORCH_DTYPES, signature

POINTS = 8192  # of either side in the launches that are estimated


def workload(dtype, D, rows, columns, warps, step, on_tensor_cores=False):
    """Every distance once, from each point once; passes are those of the loop over the dimensions. Of float32's
    accuracy a product is three of TF32's."""
    size = TORCH_DTYPES[dtype].itemsize
    moved = 2 * POINTS * D * size + POINTS * 12
    return Workload(
        f"{POINTS}×{POINTS}×{D}",
        "tf32" if on_tensor_cores else dtype,
        POINTS // rows,
        warps,
        POINTS * POINTS,
        bytes=moved,
        flops=2 * POINTS * POINTS * D * (3 if on_tensor_cores else 1),
        passes=POINTS // columns * (D // step),
        distinct_bytes=moved,
    )


def differences(dtype, D, targets=(90,)):
    wide = "fp64" if dtype == "fp64" else "fp32"
    types = {"x": f"*{dtype}", "y": f"*{dtype}", "squared": f"*{wide}", "index": "*i64"}
    types |= dict.fromkeys(("B", "N", "M", "D", "per_split", "stride_x_batch", "stride_x_row"), "i32")
    element = TORCH_DTYPES[dtype].itemsize
    return signature(
        f"nearest {D} {dtype}",
        nearest.nearest_kernel,
        types,
        {
            "stride_x_col": 1,
            "STEP": nearest.step_of(D),
            "GROUPS": 16 // TORCH_DTYPES[wide].itemsize,
            "ROWS": nearest.ROWS,
            "LANES": nearest.LANES,
        },
        # Clouds of any size.
        {"B", "N", "M", "D", "stride_x_batch", "stride_x_row"},
        warps=nearest.WARPS,
        targets=targets,
        programs_per_sm=2,
        load_bits=8 * element,  # a warp's loads lie side by side, or are one
        workload=workload(
            dtype,
            D,
            nearest.ROWS,
            nearest.LANES * (16 // TORCH_DTYPES[wide].itemsize),
            nearest.WARPS,
            nearest.step_of(D),
        ),
        options={**nearest.COMPILE, **nearest.REGISTERS},
    )


def products(rows, targets=(90,)):
    types = {"x": "*fp32", "y": "*fp32", "half_norms": "*fp32", "scores": "*fp32", "index": "*i64"}
    types |= dict.fromkeys(("B", "N", "M", "D", "per_split"), "i32")
    return signature(
        f"nearest product {rows}",
        nearest.nearest_product_kernel,
        types,
        {"PRECISION": "tf32x3", "ROWS": rows, "COLUMNS": 128, "DEPTH": nearest.DEPTH},
        {"B", "N", "M"},
        targets=targets,
        programs_per_sm=2,
        load_bits=128,
        workload=workload("fp32", 64, rows, 128, 4, nearest.DEPTH, on_tensor_cores=True),
        # Of a tile of fewer rows Hopper's and Blackwell's instructions for whole warpgroups make nothing.
        matrix=True,
    )


def signatures():
    for dtype in ("fp32", "bf16", "fp64"):
        targets = TARGETS if dtype == "fp32" else (90,)
        yield differences(dtype, 3, targets)
        yield differences(dtype, 16, targets)
    yield products(64, TARGETS)
    yield products(32, (80,))
    yield products(16, (80,))
