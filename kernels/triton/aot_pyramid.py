"""What the kernels of image pyramids are compiled to ahead of time; aot.py says what that means."""

import triton

from . import pyramid_loss
from .aot import TARGETS, TORCH_DTYPES, signature, streaming
from .pyramid_loss import DEEPEST, WARPS, average_tiling, level_tiling, reduce_tiling
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
        ("bf16", 4, "l1", {"targets": TARGETS, "programs_per_sm": 4}),
        ("fp32", 4, "l1", {"programs_per_sm": 4}),
        ("bf16", 1, "mse", {"programs_per_sm": 8}),
        ("bf16", 6, "charbonnier", {"programs_per_sm": 3}),
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


def vector_of(size, side, options):
    """Pixels of a load."""
    return min(unit_of(size, side), 16 // size) if options.get("channels", 1) == 1 else 1


def reduction(name, dtype, pointers, kind, expand, moved, **options):
    side = options.get("side", SIDE)
    size = TORCH_DTYPES[dtype].itemsize
    return of_images(
        f"pyramid reduce {name}",
        pyramid_loss.reduce_kernel,
        dtype,
        {"target": None, "base": None, "partials": None, **pointers},
        {"KIND": kind, "EXPAND": expand},
        reduce_tiling(side, side, vector_of(size, side, options)),
        moved=moved,
        **{"load_bits": min(128, 32 * size), "programs_per_sm": 4, **options},
    )


def level(name, dtype, pointers, kind, expand, moved, **options):
    side = options.get("side", SIDE)
    size = TORCH_DTYPES[dtype].itemsize
    return of_images(
        f"pyramid level {name}",
        pyramid_loss.level_kernel,
        dtype,
        {"target": None, "coarse": None, "partials": None, **pointers, "gradient": dtype},
        {"KIND": kind, "EXPAND": expand},
        level_tiling(side, side, vector_of(size, side, options)),
        moved=moved,
        **{"load_bits": 128, "programs_per_sm": 4, **options},
    )


def five_taps():
    """What is launched for level 0, and as if for it what is so for others alone."""
    for dtype in ("bf16", "fp32", "fp64"):
        size = TORCH_DTYPES[dtype].itemsize
        wide = "fp64" if dtype == "fp64" else "fp32"
        quarter = max(4, size) / 4
        pair = {"input": dtype, "target": dtype}
        options = {"stated": dtype != "fp64"}
        if dtype == "fp64":
            options["programs_per_sm"] = 3
        # Every target compiles what the other launches are a part of.
        whole = options | {"targets": TARGETS if dtype == "bf16" else (90,)}
        # In float32 it has no register to spare.
        bands = whole | ({"targets": (90, 100)} if dtype == "fp32" else {})
        reduced = {**pair, "out": wide}
        yield reduction(
            "gaussian", dtype, {**reduced, "partials": wide}, "l1", False, 2 * size + quarter, **whole
        )
        yield reduction("laplacian", dtype, reduced, None, False, 2 * size + quarter, **options)
        transposed = {"input": dtype, "base": wide, "out": wide}
        yield reduction("transposed", dtype, transposed, None, True, size + 2 * quarter, **whole)
        both = {**pair, "coarse": wide}
        yield level("gaussian", dtype, both, "l1", False, 3 * size + quarter, **options)
        yield level("laplacian", dtype, {**both, "partials": wide}, "l1", True, 3 * size + quarter, **bands)
        yield level(
            "gradient", dtype, {"input": dtype, "coarse": wide}, None, False, 2 * size + quarter, **options
        )
    # The coarsest level; pixels that are loaded one by one.
    yield level(
        "coarsest",
        "fp32",
        {"input": "fp32", "partials": "fp32"},
        "l1",
        False,
        8,
        side=SIDE // 8,
        load_bits=64,
    )
    pair = {"input": "bf16", "target": "bf16"}
    for name, options in (
        ("channels_last", {"channels": CHANNELS}),
        ("odd", {"side": SIDE - 1}),
    ):
        options |= {"load_bits": 16, "programs_per_sm": 3}
        reduced = {**pair, "out": "fp32", "partials": "fp32"}
        yield reduction(f"charbonnier {name}", "bf16", reduced, "charbonnier", False, 5, **options)
        both = {**pair, "coarse": "fp32", "partials": "fp32"}
        yield level(f"charbonnier {name}", "bf16", both, "charbonnier", True, 7, **options)


def signatures():
    yield from averages()
    yield from five_taps()
