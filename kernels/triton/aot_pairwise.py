"""What the kernels over pairs of points are compiled to ahead of time; aot.py says what that means."""

import triton

from ..workload import Workload
from . import mmd
from .aot import TARGETS, TORCH_DTYPES, signature, streaming

POINTS = 8192  # of each of two samples
# As many as the default bandwidths make, and for "rbf" with their ratios.
RATES = {
    "rbf": (4.0, 2.0, 1.0, 0.5, 0.25),
    "laplacian": (2.0, 1.4, 1.0, 0.7, 0.5),
    "imq": (10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1),
    "rational_quadratic": (4.0, 2.0, 1.0, 0.5, 0.25),
    "energy": (1.0,),
}
SIZES = [
    "count",
    "x_first",
    "x_rows",
    "y_first",
    "y_rows",
    "x_columns",
    "y_start",
    "y_columns",
    "splits",
    "split",
]
NUMBERS = ["alpha", "of_x", "of_y", "of_both", "across"]


def pairs(kernel, D, dtype, targets, *, programs_per_sm, gradient=True, stated=True):
    """All pairs of two samples' points; without a gradient, those that the first sample's points are in."""
    size, points = TORCH_DTYPES[dtype].itemsize, 2 * POINTS
    tiles = mmd.tiling(D, TORCH_DTYPES[dtype], kernel, POINTS, divmod(targets[0], 10))
    rows = points if gradient else POINTS
    blocks = rows // tiles.rows
    splits, split = mmd.splits_of(blocks, POINTS, POINTS, gradient * rows * tiles.width * size)
    rates, ladder = (
        mmd.rates_of(kernel, RATES[kernel], TORCH_DTYPES[dtype]),
        mmd.ladder_of(kernel, RATES[kernel]),
    )
    types = {
        **dict.fromkeys(("points", "unit"), f"*{dtype}"),
        "sums": f"*{dtype}" if gradient else None,
        "transposed": f"*{dtype}" if tiles.direct else None,
        "values": "*fp64",
        "rates": ("fp32",) * len(rates),
        **dict.fromkeys(SIZES, "i32"),
        **dict.fromkeys(NUMBERS, "fp64"),
    }
    constants = {"KERNEL": kernel, "LADDER": ladder, "SYMMETRIC": not gradient, "ROWS": tiles.rows}
    constants["DIMENSIONS"] = tiles.dimensions
    if not tiles.scan:
        types |= {"squares": None if tiles.direct else f"*{dtype}", "width": "i32"}
        constants |= {"DIRECT": tiles.direct, "PARTS": tiles.width > tiles.dimensions}
        constants |= {"PRECISION": tiles.precision, "COLUMNS": tiles.columns}
    on_tensor_cores = tiles.precision == "tf32"
    distinct = points * (points - 1) // 2
    return signature(
        f"mmd {kernel} {D} {dtype}{'' if gradient else ' value'}",
        mmd.scan_kernel if tiles.scan else mmd.tile_kernel,
        types,
        constants,
        {*mmd.COUNTS, *NUMBERS},
        warps=tiles.warps,
        stages=1,
        targets=targets,
        programs_per_sm=programs_per_sm,
        load_bits=128,
        matrix=on_tensor_cores,
        workload=Workload(
            f"{points}×{points}×{D}",
            "tf32" if on_tensor_cores else dtype,
            blocks * splits,
            tiles.warps,
            rows * points,
            bytes=2 * points * D * size,
            # Of each two points once; of float32's accuracy a product is three of TF32's.
            flops=distinct * 6 * D * (3 if on_tensor_cores else 1),
            exps=distinct * mmd.exponentials_of(kernel, ladder),
            passes=split // tiles.columns,
            distinct_bytes=(2 * points + splits * rows) * tiles.width * size,
        )
        if stated
        else None,
    )


def all_pairs():
    for D, resident in ((2, 8), (8, 3)):
        yield pairs("rbf", D, "fp32", TARGETS, programs_per_sm=resident)
    yield pairs("rbf", 16, "fp32", (90, 80), programs_per_sm=3)
    yield pairs("rbf", 16, "fp32", (100,), programs_per_sm=2)
    yield pairs("rbf", 64, "fp32", (90,), programs_per_sm=2)
    yield pairs("rbf", 64, "fp32", (80,), programs_per_sm=3)
    yield pairs("rbf", 64, "fp32", (100,), programs_per_sm=3)
    yield pairs("imq", 16, "fp32", (90,), programs_per_sm=3)
    yield pairs("imq", 16, "fp32", (80, 100), programs_per_sm=2)
    yield pairs("rational_quadratic", 16, "fp32", TARGETS[::-1], programs_per_sm=2)
    yield pairs("laplacian", 16, "fp32", TARGETS, programs_per_sm=2)
    yield pairs("energy", 2, "fp32", (90,), programs_per_sm=8)
    # A loop in a loop, of which the estimate sees one.
    yield pairs("laplacian", 64, "fp32", (90,), programs_per_sm=3, stated=False)
    yield pairs("laplacian", 64, "fp32", (80, 100), programs_per_sm=3, stated=False)
    yield pairs("rbf", 1031, "fp32", (90,), programs_per_sm=2, stated=False)
    yield pairs("rbf", 1031, "fp32", (80, 100), programs_per_sm=3, stated=False)
    # Of the pairs of one sample some programs have half, and some none.
    yield pairs("rbf", 16, "fp32", (90, 80), programs_per_sm=4, gradient=False, stated=False)
    yield pairs("rbf", 16, "fp32", (100,), programs_per_sm=3, gradient=False, stated=False)
    yield pairs("rbf", 4, "fp64", TARGETS, programs_per_sm=5)
    # On the tensor cores too, by an instruction that the estimate does not know.
    yield pairs("rbf", 16, "fp64", TARGETS, programs_per_sm=4, stated=False)


def ends():
    """What comes before the pairs and after them."""
    points = 2 * POINTS
    for dtype, D, targets in (("fp32", 16, TARGETS), ("fp64", 64, (90,))):
        size = TORCH_DTYPES[dtype].itemsize
        tiles = mmd.tiling(D, TORCH_DTYPES[dtype], "rbf", POINTS, (9, 0))
        height, columns = mmd.strip(tiles.width)
        pointer, count = f"*{dtype}", points + mmd.PADDING
        yield signature(
            f"mmd centre {D} {dtype}",
            mmd.centre_kernel,
            {
                **dict.fromkeys(("data", "centre", "points", "squares"), pointer),
                **dict.fromkeys(("x_count", "y_count", "y_start", "count", "D", "WIDTH"), "i32"),
                "transposed": None,
            },
            {"ROWS": height, "COLUMNS": columns},
            ("x_count", "y_count"),
            targets=targets,
            programs_per_sm=6,
            load_bits=128,
            workload=streaming(
                f"{points}×{D}",
                dtype,
                triton.cdiv(count, height),
                points * D,
                points * (2 * D + 1) * size,
                passes=tiles.width // columns,
                distinct_bytes=points * (2 * D + 1) * size,
            ),
        )
        splits, _ = mmd.splits_of(points // tiles.rows, POINTS, POINTS, points * tiles.width * size)
        yield signature(
            f"mmd gather {D} {dtype}",
            mmd.gather_kernel,
            {
                "values": "*fp64",
                **dict.fromkeys(("value", "sums", "gradient"), pointer),
                **dict.fromkeys(("programs", "splits", "rows", "D", "width"), "i32"),
                "constant": "fp64",
            },
            {"VALUES": mmd.VALUES, "ROWS": height, "COLUMNS": columns},
            ("programs", "splits", "rows", "constant"),
            targets=targets,
            programs_per_sm=6,
            load_bits=128,
            workload=streaming(
                f"{splits}×{points}×{D}",
                dtype,
                1 + points * D // (height * columns),
                splits * points * D,
                (splits + 1) * points * D * size,
                passes=splits,
                distinct_bytes=(splits + 1) * points * D * size,
            ),
        )


def signatures():
    yield from all_pairs()
    yield from ends()
