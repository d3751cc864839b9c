"""What the kernels of sparsity penalties and of JumpReLU are compiled to ahead of time; aot.py says what that means."""

import triton

from ..activation import STORES_DERIVATIVE
from ..workload import BATCH, FEATURES
from . import jumprelu, penalized_linear_act, rows
from . import linear_act as dense
from .aot import TARGETS, TORCH_DTYPES, signature, streaming
from .aot_random import pointers

COUNT = BATCH * FEATURES
SHAPE = f"{BATCH}×{FEATURES}"
TILE_ROWS = dense.SUM_ROWS.value


def wide(dtype):
    return "fp64" if dtype == "fp64" else "fp32"


def tiles(columns):
    """Programs of a kernel that sums columns over 64 rows."""
    return BATCH // TILE_ROWS * (FEATURES // columns)


def partials_bytes(dtype):
    return BATCH // TILE_ROWS * FEATURES * TORCH_DTYPES[wide(dtype)].itemsize


def activities():
    for dtype, magnitudes, targets in (
        ("bf16", True, TARGETS),
        ("bf16", False, (90,)),
        ("fp32", True, (90,)),
        ("fp64", True, (90,)),
    ):
        size = TORCH_DTYPES[dtype].itemsize
        columns = penalized_linear_act.columns_of(FEATURES, size)
        yield signature(
            f"activity {'l1' if magnitudes else 'kl'} {dtype}",
            penalized_linear_act.activity_kernel,
            {**pointers(dtype, "h"), "partials": f"*{wide(dtype)}", "M": "i32", "N": "i32"},
            {"MAGNITUDES": magnitudes, "ROWS": TILE_ROWS, "COLUMNS": columns},
            targets=targets,
            programs_per_sm=8,
            load_bits=128,
            workload=streaming(
                SHAPE,
                dtype,
                tiles(columns),
                COUNT,
                COUNT * size,
                distinct_bytes=COUNT * size + partials_bytes(dtype),
            ),
        )


def penalties():
    for dtype, is_kl, targets in (("fp32", False, (90,)), ("fp32", True, TARGETS), ("fp64", True, (90,))):
        size = TORCH_DTYPES[dtype].itemsize
        columns = penalized_linear_act.VALUE_COLUMNS
        yield signature(
            f"penalty {'kl' if is_kl else 'l1'} {dtype}",
            penalized_linear_act.penalty_kernel,
            {**pointers(dtype, "sums value"), "M": "i32", "N": "i32", "rate": "fp64"},
            {"KL": is_kl, "COLUMNS": columns},
            ("rate",),
            targets=targets,
            programs_per_sm=4,
            load_bits=128,
            workload=streaming(
                f"{FEATURES}",
                dtype,
                1,
                FEATURES,
                (FEATURES + 1) * size,
                exps=2 * FEATURES * is_kl,
                passes=triton.cdiv(FEATURES, columns),
                pass_bytes=columns * size,
                # All lanes store the value together.
                distinct_bytes=(FEATURES + 1) * size,
            ),
        )


def gradients():
    for dtype, activation, is_kl, targets in (
        ("bf16", "relu", False, TARGETS),
        ("bf16", "sigmoid", True, TARGETS),
        ("bf16", "silu", False, (90,)),
        ("fp32", "softplus", False, (90,)),
        ("fp64", "sigmoid", True, (90,)),
    ):
        size = TORCH_DTYPES[dtype].itemsize
        columns = penalized_linear_act.columns_of(FEATURES, size)
        accumulated = f"*{wide(dtype)}"
        # For l1 the output is read beside a derivative that is stored.
        reads_output = not is_kl and activation in STORES_DERIVATIVE
        least = ((3 + reads_output) * COUNT + FEATURES) * size
        yield signature(
            f"penalized_backward {'kl' if is_kl else 'l1'} {activation} {dtype}",
            penalized_linear_act.penalized_backward_kernel,
            {
                **pointers(dtype, "grad saved g"),
                "grad_penalty": accumulated,
                "h": f"*{dtype}" if reads_output else None,
                "sums": accumulated if is_kl else None,
                "partials": accumulated,
                **dict.fromkeys(("M", "N", "stride_gm"), "i32"),
                "rate": "fp64",
            },
            {**dense.constants(activation), "stride_gn": 1, "ROWS": TILE_ROWS, "COLUMNS": columns},
            ("rate",),
            targets=targets,
            programs_per_sm=4,
            load_bits=128,
            workload=streaming(
                SHAPE,
                dtype,
                tiles(columns),
                COUNT,
                least,
                exps=COUNT * (activation == "softplus"),
                distinct_bytes=least + partials_bytes(dtype),
            ),
        )


def jumps():
    for dtype, targets in (("bf16", TARGETS), ("fp32", (90,)), ("fp64", (90,))):
        size = TORCH_DTYPES[dtype].itemsize
        shares = rows.tiling(BATCH, FEATURES, size)
        unit = rows.unit_of(size, FEATURES)
        accumulated = f"*{wide(dtype)}"
        least = 2 * COUNT * size + BATCH * max(4, size)
        chunked = {} if shares.chunks == 1 else {"chunks": "i32"}
        yield signature(
            f"jumprelu {dtype}",
            jumprelu.jumprelu_kernel,
            {
                **pointers(dtype, "x h"),
                "threshold": accumulated,
                "l0": accumulated,
                **chunked,
                **dict.fromkeys(("B", "D", "stride_x_row"), "i32"),
            },
            {
                **({"chunks": 1} if shares.chunks == 1 else {}),
                **{"stride_x_col": 1, "UNIT": unit},
                **{"ROWS": shares.rows, "COLUMNS": shares.columns, "STEPS": shares.steps},
            },
            ("chunks", "B"),
            warps=shares.warps,
            targets=targets,
            programs_per_sm=6,
            load_bits=128,
            workload=streaming(
                SHAPE,
                dtype,
                triton.cdiv(BATCH, shares.rows) * shares.chunks,
                COUNT,
                least,
                warps=shares.warps,
                passes=shares.steps,
                pass_bytes=2 * shares.rows * shares.columns * size,
                distinct_bytes=least,
            ),
        )
        columns = dense.power_of_two(FEATURES, 16, 128 // size)
        least = 3 * COUNT * size
        yield signature(
            f"jumprelu_backward {dtype}",
            jumprelu.jumprelu_backward_kernel,
            {
                **pointers(dtype, "grad_h x x_gradient"),
                **dict.fromkeys(("grad_l0", "threshold", "partials"), accumulated),
                **dict.fromkeys(("B", "D", "stride_h_row", "stride_x_row"), "i32"),
                "bandwidth": "fp64",
            },
            {
                **{"stride_h_col": 1, "stride_l0": 1, "stride_x_col": 1},
                **{"ROWS": TILE_ROWS, "COLUMNS": columns},
            },
            ("bandwidth",),
            targets=targets,
            programs_per_sm=4,
            load_bits=128,
            workload=streaming(
                SHAPE,
                dtype,
                tiles(columns),
                COUNT,
                least,
                distinct_bytes=least + partials_bytes(dtype),
            ),
        )


def signatures():
    yield from activities()
    yield from penalties()
    yield from gradients()
    yield from jumps()
