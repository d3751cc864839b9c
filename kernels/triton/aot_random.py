"""What the kernels of noise and of sums along rows are compiled to ahead of time; aot.py says what that means.

float64 stands here only where no normal value is made: those take a library's sine, whose reduction of large angles,
which there are none of, keeps a table on the stack.
"""

import triton

from ..workload import BATCH, FEATURES, Workload
from . import corrupt, gaussian_head, kl_discrete, reparameterize, rows
from .aot import TARGETS, TORCH_DTYPES, signature, streaming
from .tuning import BLOCK_K, TILES_FMA, TILES_HEAD, TILES_ODD, Tile

LATENT = 256  # columns of most launches; their rows are BATCH


def of_rows(
    name,
    kernel,
    dtype,
    D,
    operands,
    types,
    constants,
    *,
    moved,
    exps,
    targets=(90,),
    programs_per_sm,
    looped=False,
    shift=False,
):
    """A launch over matrices (BATCH, D), contiguous. `operands` have strides of their own; `types` are those of
    pointers, and for absent ones None. An element moves `moved` elements and takes `exps` exponentials. A program of a
    `looped` kernel takes several tiles."""
    size = TORCH_DTYPES[dtype].itemsize
    tiles = rows.tiling(BATCH, D + 3 * shift, size, *(() if looped else (1,)))
    unit = rows.unit_of(size, D)
    strides = [f"stride_{operand}_row" for operand in operands]
    columns = {f"stride_{operand}_col": 1 for operand in operands}
    if looped:
        constants = {**constants, "STEPS": tiles.steps}
    sizes = dict.fromkeys(("B", "D" if "D" in kernel.arg_names else "C", *strides), "i32")
    if tiles.chunks == 1:
        columns["chunks"] = 1
    else:
        sizes["chunks"] = "i32"
    types = {**types, **sizes}
    unaligned = {"B", "chunks", "low", "high"}
    if D // unit % 16:
        unaligned |= {name for name in types if name.startswith("stride_") or name in ("D", "C")}
    count = BATCH * D
    least = moved * count * size + BATCH * max(4, size)
    return signature(
        f"{name} {D} {dtype}",
        kernel,
        types,
        {**constants, **columns, "UNIT": unit, "ROWS": tiles.rows, "COLUMNS": tiles.columns},
        unaligned,
        warps=tiles.warps,
        targets=targets,
        programs_per_sm=programs_per_sm,
        load_bits=min(128, 8 * unit * size),
        workload=streaming(
            f"{BATCH}×{D}",
            dtype,
            triton.cdiv(BATCH, tiles.rows) * tiles.chunks,
            count,
            least,
            warps=tiles.warps,
            exps=int(exps * count),
            passes=tiles.steps,
            pass_bytes=moved * tiles.rows * tiles.columns * size if tiles.steps > 1 else None,
            # Lanes that share a row store its sum together, and all load the seed.
            distinct_bytes=least,
        ),
    )


def pointers(kind, names):
    return dict.fromkeys(names.split(), f"*{kind}")


def reparameterizations():
    limits = {"low": "fp64", "high": "fp64"}
    sampled, plain = {**limits, "seed": "*i64"}, {**limits, "seed": None}
    for dtype, D, targets in (
        ("bf16", LATENT, TARGETS),
        ("bf16", 16, (90,)),
        ("bf16", FEATURES, (90,)),
        ("fp32", LATENT, (90,)),
        ("fp32", 1031, (90,)),
    ):
        shift = D % 4 != 0
        noise = {"targets": targets, "shift": shift}
        constants = {"CLAMP": True, "SHIFT": shift}
        yield of_rows(
            "reparameterize",
            reparameterize.reparameterize_kernel,
            dtype,
            D,
            ("mu", "logvar"),
            {**pointers(dtype, "mu logvar z"), "kl": "*fp32", **sampled},
            constants,
            moved=3,
            exps=2.5,
            programs_per_sm=6 if D <= LATENT else 4,
            looped=True,
            **noise,
        )
        yield of_rows(
            "reparameterize_backward",
            reparameterize.reparameterize_backward_kernel,
            dtype,
            D,
            ("z", "mu", "logvar"),
            {
                **pointers(dtype, "grad_z mu logvar mu_gradient logvar_gradient"),
                "grad_kl": "*fp32",
                "grad_mu": None,
                "grad_logvar": None,
                "stride_kl": "i32",
                "stride_out": "i32",
                **sampled,
            },
            {**constants, "stride_grad_row": 0, "stride_grad_col": 0},
            moved=5,
            exps=2.5,
            programs_per_sm=6 if D <= LATENT else 4,
            **noise,
        )
    for dtype in ("bf16", "fp32", "fp64"):
        wide = "fp64" if dtype == "fp64" else "fp32"
        targets = TARGETS if dtype == "bf16" else (90,)
        yield of_rows(
            "kl_normal",
            reparameterize.reparameterize_kernel,
            dtype,
            LATENT,
            ("mu", "logvar"),
            {**pointers(dtype, "mu logvar"), "z": None, "kl": f"*{wide}", **plain},
            {"CLAMP": False, "SHIFT": False},
            moved=2,
            exps=1,
            targets=targets,
            programs_per_sm=8,
            looped=True,
        )
        yield of_rows(
            "kl_normal_backward",
            reparameterize.reparameterize_backward_kernel,
            dtype,
            LATENT,
            ("mu", "logvar"),
            {
                **pointers(dtype, "mu logvar mu_gradient logvar_gradient"),
                "grad_kl": f"*{wide}",
                **dict.fromkeys(("grad_z", "grad_mu", "grad_logvar")),
                "stride_kl": "i32",
                "stride_out": "i32",
                **plain,
            },
            {
                **{"CLAMP": False, "SHIFT": False},
                **dict.fromkeys(("stride_z_row", "stride_z_col", "stride_grad_row", "stride_grad_col"), 0),
            },
            moved=4,
            exps=1,
            targets=targets,
            programs_per_sm=8,
        )


def head(tile, D, dtype, targets, loads, *, programs_per_sm, precision="ieee", stated=True):
    """gaussian_head of h (BATCH, FEATURES), with a bias; `loads` as for aot.gemm."""
    size, M, K = TORCH_DTYPES[dtype].itemsize, BATCH, FEATURES - (loads == "odd")
    block_k, columns, pointer = BLOCK_K[size], tile.block_n // 2, f"*{dtype}"
    chunks = triton.cdiv(D, columns)
    unit = rows.unit_of(size, D, K)
    described = loads == "descriptors"
    types = {
        "h": f"tensordesc<{dtype}[{tile.block_m},{block_k}]>" if described else pointer,
        "weight": f"tensordesc<{dtype}[{columns},{block_k}]>" if described else pointer,
        **pointers(dtype, "bias z moments"),
        **{"seed": "*i64", "kl": "*fp32", "low": "fp64", "high": "fp64"},
        **dict.fromkeys(("M", "D", "K", "stride_h", "stride_weight"), "i32"),
        **({"chunks": "i32"} if chunks > 1 else {}),
    }
    constants = {
        **({"chunks": 1} if chunks == 1 else {}),
        **{"stride_bias": 1, "CLAMP": True, "DESCRIPTORS": described, "INPUT_PRECISION": precision},
        **{"UNIT": unit, "BLOCK_M": tile.block_m, "BLOCK_N": columns, "BLOCK_K": block_k},
    }
    unaligned = {"M", "chunks", "low", "high"}
    if D // unit % 16:
        unaligned.add("D")
    if K // unit % 16:
        unaligned |= {"K", "stride_h", "stride_weight"}
    programs = triton.cdiv(M, tile.block_m) * chunks
    least = (M * K + 2 * D * K + 2 * D + 3 * M * D) * size + 4 * M
    workload = Workload(
        shape=f"{M}×{2 * D}×{K}",
        dtype="tf32" if precision == "tf32" else dtype,
        programs=programs,
        warps=tile.warps,
        elements=M * D,
        bytes=least,
        flops=4 * M * D * K,
        exps=5 * M * D // 2,
        passes=triton.cdiv(K, block_k),
        descriptor_bytes=(tile.block_m + 2 * columns) * block_k * size if described else 0,
        distinct_bytes=least + 4 * M * (chunks - 1),
    )
    fma = dtype == "fp32" and precision == "ieee"
    return signature(
        f"gaussian_head {D} {dtype}{'-' + precision if dtype == 'fp32' else ''} {tile} {loads}",
        gaussian_head.gaussian_head_kernel,
        types,
        constants,
        unaligned,
        warps=tile.warps,
        stages=tile.stages,
        targets=targets,
        programs_per_sm=programs_per_sm,
        load_bits=8 * size if loads == "odd" else 128,
        matrix=not fma,
        workload=workload if stated else None,
    )


def heads():
    stated = (Tile(64, 32, 4, 4), Tile(64, 128, 4, 4))
    for tile in TILES_HEAD:
        resident = {64 * 32: 4, 64 * 64: 3, 128 * 32: 3, 128 * 64: 2}.get(tile.block_m * tile.block_n, 1)
        settings = {"programs_per_sm": resident, "stated": tile in stated}
        # The next has this tile too, and takes more registers.
        targets = (90,) if tile == Tile(128, 128, 8, 3) else (90, 100)
        yield head(tile, tile.block_n // 2, "bf16", targets, "descriptors", **settings)
    # A row in two tiles.
    yield head(Tile(128, 128, 8, 3), 128, "bf16", (90, 100), "descriptors", programs_per_sm=1)
    for D, resident in ((16, 4), (64, 2)):
        tile = Tile(64, 2 * D, 4, 4)
        settings = {"programs_per_sm": resident, "stated": False}
        # In TF32 the large tile takes the most registers, and the small one few.
        bf16, tf32 = (TARGETS, (90,)) if D == 16 else ((80, 90), TARGETS)
        yield head(tile, D, "bf16", bf16, "pointers", **settings)
        yield head(tile, D, "fp32", tf32[-2:], "descriptors", precision="tf32", **settings | {"stated": True})
        yield head(tile, D, "fp32", tf32, "pointers", precision="tf32", **settings)
    for tile in TILES_ODD:
        yield head(tile, 16, "bf16", (80, 90), "odd", programs_per_sm=1, stated=False)
    for tile in TILES_FMA:
        yield head(tile, 16, "fp32", (80,), "pointers", programs_per_sm=1, stated=False)


def discrete_divergences():
    for dtype in ("bf16", "fp32", "fp64"):
        wide = "fp64" if dtype == "fp64" else "fp32"
        targets = TARGETS if dtype == "bf16" else (90,)
        yield of_rows(
            "kl_discrete",
            kl_discrete.kl_discrete_kernel,
            dtype,
            LATENT,
            ("p", "q"),
            {**pointers(dtype, "p q"), "kl": f"*{wide}"},
            {},
            moved=2,
            exps=2,
            targets=targets,
            programs_per_sm=6,
            looped=True,
        )
        yield of_rows(
            "kl_discrete_backward",
            kl_discrete.kl_discrete_backward_kernel,
            dtype,
            LATENT,
            ("p", "q"),
            {
                **pointers(dtype, "p q p_gradient q_gradient"),
                "grad": f"*{wide}",
                "stride_grad": "i32",
            },
            {},
            moved=4,
            exps=2,
            targets=targets,
            programs_per_sm=6,
        )


def row_sums():
    for wide, size, chunks in (("fp32", 4, 64), ("fp64", 8, 64)):
        tiles = rows.tiling(BATCH, chunks, size)
        yield signature(
            f"row_sum {wide}",
            rows.row_sum_kernel,
            {**pointers(wide, "partials out"), "B": "i32", "D": "i32"},
            {"ROWS": tiles.rows, "COLUMNS": tiles.columns},
            ("B",),
            warps=tiles.warps,
            targets=TARGETS if wide == "fp32" else (90,),
            programs_per_sm=8,
            load_bits=128,
            workload=streaming(
                f"{BATCH}×{chunks}",
                wide,
                triton.cdiv(BATCH, tiles.rows),
                BATCH * chunks,
                BATCH * (chunks + 1) * size,
                warps=tiles.warps,
                distinct_bytes=BATCH * (chunks + 1) * size,
            ),
        )


def corruptions():
    count = BATCH * FEATURES
    for dtype, kind, targets, resident in (
        ("bf16", "gaussian", TARGETS, 5),
        ("fp32", "gaussian", (90,), 6),
        ("bf16", "salt_and_pepper", TARGETS, 6),
        ("bf16", "masking", (90,), 6),
        ("bf16", "dropout", (90,), 6),
        ("fp32", "dropout", (90,), 8),
        ("fp64", "dropout", (90,), 8),
    ):
        size = TORCH_DTYPES[dtype].itemsize
        block = corrupt.BLOCK_BYTES // size
        yield signature(
            f"corrupt {kind} {dtype}",
            corrupt.corrupt_kernel,
            {
                **pointers(dtype, "x out"),
                "seed": "*i64",
                **{"n": "i32", "first": "fp64", "second": "fp64", "last": "i32", "half": "i32"},
            },
            {"KIND": kind, "BLOCK": block},
            ("n", "first", "second", "last", "half"),
            targets=targets,
            programs_per_sm=resident,
            load_bits=128,
            workload=streaming(
                f"{BATCH}×{FEATURES}",
                dtype,
                count // block,
                count,
                2 * count * size,
                exps=3 * count // 2 if kind == "gaussian" else 0,
                distinct_bytes=2 * count * size,
            ),
        )
    # Images of 64 × 64 in three channels: a large part of a program's work is in finding its place.
    for dtype, side, targets in (("bf16", 8, TARGETS), ("bf16", 3, (90,)), ("fp32", 8, (90,))):
        size, edge, images = TORCH_DTYPES[dtype].itemsize, 64, 8192
        tile_rows = corrupt.SQUARES_TILE // edge
        count = images * 3 * edge * edge
        yield signature(
            f"mask_squares {side} {dtype}",
            corrupt.mask_squares_kernel,
            {
                **pointers(dtype, "x out"),
                "seed": "*i64",
                **{"channels": "i32", "height": "i32", "width": "i32", "last": "i32"},
            },
            {"UNIT": rows.unit_of(size, edge), "SIDE": side, "ROWS": tile_rows, "COLUMNS": edge},
            ("channels", "width", "last"),
            targets=targets,
            programs_per_sm=6,
            load_bits=128,
            workload=streaming(
                f"{images}×3×{edge}×{edge}",
                dtype,
                count // corrupt.SQUARES_TILE,
                count,
                2 * count * size,
                distinct_bytes=2 * count * size,
            ),
        )


def signatures():
    yield from reparameterizations()
    yield from heads()
    yield from discrete_divergences()
    yield from row_sums()
    yield from corruptions()
