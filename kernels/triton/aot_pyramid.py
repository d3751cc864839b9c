"""What the kernels of image pyramids are compiled to ahead of time; aot.py says what that means."""

import triton

from . import pyramid_loss
from .aot import TARGETS, TORCH_DTYPES, signature, streaming
from .pyramid_loss import DEEPEST, WARPS, average_tiling, level_tiling
from .rows import unit_of

IMAGES, CHANNELS, SIDE = 1024, 3, 128


def of_images(
    name,
    kernel,
    dtype,
    pointers,
    constants,
    tiles,
    *,
    moved,
    side=SIDE,
    channels=1,
    floats=("factor", "parameter"),
    targets=(90,),
    programs_per_sm,
    load_bits,
    stated=True,
):
    """A launch over (IMAGES, CHANNELS, side, side), in channels_last with `channels` of CHANNELS. `pointers` has the
    type of each, None for what is absent; a pixel moves `moved` bytes."""
    size = TORCH_DTYPES[dtype].itemsize
    unit = unit_of(size, side)
    planes, pixels = IMAGES * CHANNELS, IMAGES * CHANNELS * side * side
    units = planes * tiles.blocks
    sizes = {
        "units": units,
        "channels": channels,
        "blocks": tiles.blocks,
        "bands": tiles.bands,
        "H": side,
        "W": side // unit,
    }
    ones = {name: 1 for name, value in sizes.items() if value == 1}
    types = {
        **{name: kind and f"*{kind}" for name, kind in pointers.items()},
        **{name: "i32" for name in sizes if name not in ones},
        **dict.fromkeys(floats, "fp64"),
    }
    unaligned = {name for name, value in sizes.items() if value % 16} | set(floats)
    programs = triton.cdiv(units * tiles.splits, tiles.units) * tiles.bands
    return signature(
        f"{name} {dtype}",
        kernel,
        types,
        {
            **constants,
            **ones,
            "UNIT": unit,
            "ROWS": tiles.rows,
            "UNITS": tiles.units,
            "COLUMNS": tiles.columns,
        },
        unaligned,
        warps=WARPS,
        targets=targets,
        programs_per_sm=programs_per_sm,
        load_bits=load_bits,
        workload=streaming(
            f"{IMAGES}×{CHANNELS}×{side}×{side}",
            dtype,
            programs,
            pixels,
            int(moved * pixels),
            warps=WARPS,
            # Of rows that programs share, L2 has what the first of them read.
            distinct_bytes=int(moved * pixels),
        )
        if stated
        else None,
    )


def averages():
    factors = tuple(f"factor_{level}" for level in range(DEEPEST))
    for dtype, levels, kind, options in (
        ("bf16", 4, "l1", {"targets": TARGETS, "programs_per_sm": 2}),
        ("fp32", 4, "l1", {"targets": TARGETS, "programs_per_sm": 4}),
        ("bf16", 1, "mse", {"programs_per_sm": 8}),
        ("bf16", 6, "charbonnier", {"programs_per_sm": 2}),
        ("fp32", 6, "lp", {"programs_per_sm": 2}),
        ("fp64", 4, "lp", {"programs_per_sm": 2, "stated": False}),
    ):
        size = TORCH_DTYPES[dtype].itemsize
        wide = "fp64" if dtype == "fp64" else "fp32"
        tiles = average_tiling(SIDE, SIDE, 16 // size, levels)
        yield of_images(
            f"pyramid average {levels} {kind}",
            pyramid_loss.average_kernel,
            dtype,
            {
                **dict.fromkeys(("input", "target", "gradient"), dtype),
                "coarse": None,
                "coarse_gradient": None,
                "partials": wide,
            },
            {"KIND": kind, "LEVELS": levels, "SPLITS": tiles.splits},
            tiles,
            moved=3 * size,
            floats=(*factors, "parameter"),
            load_bits=128,
            **options,
        )
    # What only some launches do: no gradient, channels side by side, and both passes of a deeper pyramid.
    for name, pointers, channels, moved in (
        ("value", {"partials": "fp32"}, 1, 8),
        ("channels_last", {"gradient": "fp32", "partials": "fp32"}, CHANNELS, 12),
        ("deeper", {"coarse": "fp32", "partials": "fp32"}, 1, 8),
        ("deeper gradient", {"gradient": "fp32", "coarse_gradient": "fp32"}, 1, 12),
    ):
        tiles = average_tiling(SIDE, SIDE, 4 if channels == 1 else 1, DEEPEST)
        absent = dict.fromkeys(("gradient", "coarse", "coarse_gradient", "partials"))
        yield of_images(
            f"pyramid average {DEEPEST} l1 {name}",
            pyramid_loss.average_kernel,
            "fp32",
            {"input": "fp32", "target": "fp32", **absent, **pointers},
            {"KIND": "l1", "LEVELS": DEEPEST, "SPLITS": tiles.splits},
            tiles,
            moved=moved,
            channels=channels,
            floats=(*factors, "parameter"),
            programs_per_sm=4,
            load_bits=128 if channels == 1 else 32,
        )


def five_taps():
    """Level 0 of each, and of each that level 0 has none of level 1."""
    for dtype, targets in (("bf16", TARGETS), ("fp32", (90,)), ("fp64", (90,))):
        size = TORCH_DTYPES[dtype].itemsize
        wide = "fp64" if dtype == "fp64" else "fp32"
        quarter = max(4, size) / 4
        tiles = level_tiling(SIDE, SIDE, size)
        pair = {"input": dtype, "target": dtype}
        options = {"targets": targets, "programs_per_sm": 4, "stated": dtype != "fp64"}
        for name, pointers, kind, expand, moved in (
            ("gaussian", {"base": None, "partials": wide}, "l1", False, 2 * size + quarter),
            ("laplacian", {"base": None, "partials": None}, None, False, 2 * size + quarter),
        ):
            yield of_images(
                f"pyramid reduce {name}",
                pyramid_loss.reduce_kernel,
                dtype,
                {**pair, **pointers, "out": wide},
                {"KIND": kind, "EXPAND": expand},
                tiles,
                moved=moved,
                load_bits=8 * size,
                **options,
            )
        yield of_images(
            "pyramid reduce transposed",
            pyramid_loss.reduce_kernel,
            dtype,
            {"input": dtype, "target": None, "base": wide, "out": wide, "partials": None},
            {"KIND": None, "EXPAND": True},
            tiles,
            moved=size + 2 * quarter,
            load_bits=8 * size,
            **options,
        )
        for name, pointers, kind, expand, moved in (
            ("gaussian", {**pair, "coarse": wide, "partials": None}, "l1", False, 3 * size + quarter),
            ("laplacian", {**pair, "coarse": wide, "partials": wide}, "l1", True, 3 * size + quarter),
            (
                "gradient",
                {"input": dtype, "target": None, "coarse": wide, "partials": None},
                None,
                False,
                2 * size + quarter,
            ),
        ):
            yield of_images(
                f"pyramid level {name}",
                pyramid_loss.level_kernel,
                dtype,
                {**pointers, "gradient": dtype},
                {"KIND": kind, "EXPAND": expand},
                tiles,
                moved=moved,
                load_bits=64,
                **options,
            )
    # The coarsest level.
    side = SIDE // 8
    yield of_images(
        "pyramid level coarsest",
        pyramid_loss.level_kernel,
        "fp32",
        {"input": "fp32", "target": None, "coarse": None, "gradient": "fp32", "partials": "fp32"},
        {"KIND": "l1", "EXPAND": False},
        level_tiling(side, side, 4),
        moved=8,
        side=side,
        programs_per_sm=4,
        load_bits=64,
    )


def signatures():
    yield from averages()
    yield from five_taps()
