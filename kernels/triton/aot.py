"""What every kernel is compiled to ahead of time, and what the machine code may cost: tests/aot reads this.

A signature stands for one specialisation that a launcher asks for: argument types, compile-time constants,
which arguments 16 divides (pointers; sizes and strides in elements), warps and stages.

Every kernel, and what of it makes other code, has a signature for each of TARGETS; so has what leaves no register of
its budget there. Further dtypes and options are for sm_90.

Budgets. No spill and no stack, ever. `registers` keeps `programs_per_sm` programs resident in an SM's 65536.
`load_bits`: the widest global load must be at least this wide; a TMA load counts as 128. `matrix`: the
tensor cores' instruction of the target must be there.

`workload` is one launch at a stated shape, for the estimate of bench/static.py; tiles that differ from others in
nothing but their size have none.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from ..activation import EXPS, STORES_DERIVATIVE
from ..workload import BATCH, FEATURES, Workload
from . import linear_act as dense
from .tuning import BLOCK_K, TILES_FMA, TILES_ODD, TILES_TENSOR, Tile

TARGETS = (80, 90, 100)  # compute capabilities
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
LARGE, SMALL, WIDE = Tile(128, 128, 8, 3), Tile(64, 64, 4, 4), Tile(128, 256, 8, 3)


@dataclass(frozen=True)
class Signature:
    name: str
    kernel: Any
    types: dict  # argument -> "*bf16", "i32", "tensordesc<...>"
    constants: dict  # the other arguments
    aligned: frozenset  # arguments that 16 divides
    warps: int
    stages: int
    targets: tuple
    programs_per_sm: int
    load_bits: int
    matrix: bool = False
    workload: Workload | None = None
    options: dict = field(default_factory=lambda: dict(dense.COMPILE))

    @property
    def registers(self):
        """The most a thread may use, in the allocation's steps of 8, and below 255, where spills begin."""
        return min(255, 65536 // (self.programs_per_sm * self.warps * 32) // 8 * 8)


def signature(name, kernel, types, constants, unaligned=(), *, warps=4, stages=3, **budget):
    """`types` of None make a constant None; i32 and pointers are aligned unless named in `unaligned`. A tuple of
    arguments has a tuple of types."""
    absent = {argument: None for argument, kind in types.items() if kind is None}
    types = {argument: kind for argument, kind in types.items() if kind is not None}
    aligned = {
        argument
        for argument, kind in types.items()
        if isinstance(kind, str) and not kind.startswith("tensordesc")
    }
    constants = {**constants, **absent}
    missing = set(kernel.arg_names) - set(types) - set(constants)
    if missing:
        raise ValueError(f"{name}: no type for {sorted(missing)}")
    return Signature(
        name, kernel, types, constants, frozenset(aligned - set(unaligned)), warps, stages, **budget
    )


def gemm_workload(tile, dtype, kind, activation, loads, precision):
    """One product of a layer of BATCH rows, with FEATURES features, or where tiles are narrow those of one tile.
    Odd rows are one element short."""
    size = TORCH_DTYPES[dtype].itemsize
    features = tile.block_n if tile.block_n <= 64 else FEATURES
    M, N, K = (features, FEATURES, BATCH) if kind == "wgrad" else (BATCH, features, FEATURES)
    K -= loads == "odd"
    splits, k_per_split = dense.split_count(M, N, K, size) if kind == "wgrad" else (1, K)
    # Results of the product's shape, and what else its epilogue reads there.
    outputs = 2 if kind in ("derivative", "dgrad") else 1
    parameters = N if kind in ("forward", "derivative") else 0
    least = (M * K + K * N + outputs * M * N + parameters) * size
    moved = least
    if kind == "dgrad":
        moved += 4 * triton.cdiv(M, dense.SUM_ROWS.value) * N
    if kind == "wgrad":
        moved += 4 * splits * M * N - size * M * N
    block_k = BLOCK_K[size]
    described = (tile.block_m + tile.block_n) * block_k * size
    return Workload(
        shape=f"{M}×{N}×{K}",
        dtype="tf32" if precision == "tf32" else dtype,
        programs=triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n) * splits,
        warps=tile.warps,
        elements=M * N,
        bytes=least,
        flops=2 * M * N * K,
        exps=M * N * EXPS[activation] if parameters else 0,
        passes=triton.cdiv(k_per_split, block_k),
        descriptor_bytes=described if loads == "descriptors" else 0,
        distinct_bytes=moved,
    )


def gemm(
    tile,
    dtype,
    kind,
    activation,
    *,
    targets=TARGETS,
    loads="descriptors",
    precision="ieee",
    programs_per_sm=1,
):
    """`kind`: forward, derivative (forward that stores it), dgrad or wgrad, whose operands lie differently.

    `loads`: "descriptors", "pointers" (16-byte) or "odd" (rows of no alignment).
    """
    element = TORCH_DTYPES[dtype].itemsize
    block_k = BLOCK_K[element]
    trans_a, trans_b = kind == "wgrad", kind in ("forward", "derivative")
    descriptors = loads == "descriptors"
    pointer, i32 = f"*{dtype}", "i32"

    def operand(rows, columns, transposed):
        shape = f"{columns},{rows}" if transposed else f"{rows},{columns}"
        return f"tensordesc<{dtype}[{shape}]>" if descriptors else pointer

    types = {
        "a": operand(tile.block_m, block_k, trans_a),
        "b": operand(block_k, tile.block_n, trans_b),
        "bias": pointer if trans_b else None,
        "saved": pointer if kind == "dgrad" else None,
        "out": "*fp32" if kind == "wgrad" else pointer,
        "derivative": pointer if kind == "derivative" else None,
        "partials": "*fp32" if kind == "dgrad" else None,
    }
    types |= {name: i32 for name in ("M", "N", "K", "stride_am", "stride_ak", "stride_bk", "stride_bn")}
    types["k_per_split"] = i32
    unit = {"stride_bias": 1, "stride_am" if trans_a else "stride_ak": 1}
    unit["stride_bk" if trans_b else "stride_bn"] = 1
    types = {name: kind for name, kind in types.items() if name not in unit}
    constants = {
        **unit,
        **dense.constants(activation),
        "DESCRIPTORS": descriptors,
        "TRANS_A": descriptors and trans_a,
        "TRANS_B": descriptors and trans_b,
        "INPUT_PRECISION": precision,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
    }
    odd = ("M", "N", "K", "stride_am", "stride_bk", "stride_bn") if loads == "odd" else ()
    fma = dtype == "fp32" and precision == "ieee"
    is_stated = fma or loads == "odd" or tile in (LARGE, SMALL, WIDE)
    return signature(
        f"gemm {kind} {activation} {dtype}{'-' + precision if dtype == 'fp32' else ''} {tile} {loads}",
        dense.gemm_kernel,
        types,
        constants,
        odd,
        warps=tile.warps,
        stages=tile.stages,
        targets=targets,
        programs_per_sm=programs_per_sm,
        load_bits=8 * element if loads == "odd" else 128,
        matrix=not fma,
        workload=gemm_workload(tile, dtype, kind, activation, loads, precision) if is_stated else None,
    )


def gemms():
    """Every tile with the heaviest forward and backward epilogue, and of the rest what differs in kind."""
    for tile in TILES_TENSOR:
        # Four 64x64 tiles on an SM at once, one of 128x256.
        resident = {64 * 32: 4, 64 * 64: 3, 128 * 32: 3, 128 * 64: 2}.get(tile.block_m * tile.block_n, 1)
        for kind, activation in (("derivative", "gelu"), ("dgrad", "tanh")):
            # A derivative takes more registers of a tile than a dgrad.
            targets = (90, 100) if kind == "derivative" or tile in (LARGE, SMALL, WIDE) else (90,)
            yield gemm(tile, "bf16", kind, activation, targets=targets, programs_per_sm=resident)
            if kind == "derivative" or tile in (LARGE, SMALL):
                yield gemm(
                    tile, "bf16", kind, activation, targets=(80,), loads="pointers", programs_per_sm=resident
                )
    for tile in (SMALL, LARGE):
        yield gemm(tile, "bf16", "wgrad", "identity", targets=(90, 100))
        yield gemm(tile, "bf16", "wgrad", "identity", targets=(80,), loads="pointers")
    yield gemm(LARGE, "fp16", "derivative", "silu", targets=(90,), loads="pointers")
    yield gemm(LARGE, "fp16", "derivative", "gelu_tanh", targets=(90,))
    for tile in TILES_ODD:
        yield gemm(tile, "fp16", "derivative", "gelu", targets=(80, 90), loads="odd")
        yield gemm(tile, "fp16", "dgrad", "tanh", targets=(80, 90), loads="odd")
    for activation in ("relu", "elu", "softplus"):
        yield gemm(LARGE, "fp16", "forward", activation, targets=(90,))
    for tile in (SMALL, LARGE, WIDE):
        targets = (90, 100) if tile == WIDE else (90,)
        yield gemm(tile, "fp32", "derivative", "gelu", targets=targets, precision="tf32")
    yield gemm(LARGE, "fp32", "derivative", "gelu", targets=(80,), precision="tf32", loads="pointers")
    yield gemm(LARGE, "fp32", "dgrad", "tanh", targets=(90,), precision="tf32")
    for tile in TILES_FMA:
        yield gemm(tile, "fp32", "derivative", "gelu", targets=(80,), loads="pointers")
        yield gemm(tile, "fp32", "dgrad", "tanh", targets=(90,))


def streaming(shape, dtype, programs, elements, least, warps=4, **rest):
    """The workload of a kernel that reads and writes everything once."""
    return Workload(shape, dtype, programs, warps, elements, least, **rest)


def pointwise():
    shape, count = f"{BATCH}×{FEATURES}", BATCH * FEATURES
    rows = dense.SUM_ROWS.value
    for dtype, targets, resident in (("bf16", TARGETS, 6), ("fp32", (90,), 8), ("fp64", (90,), 4)):
        size = TORCH_DTYPES[dtype].itemsize
        pointer, block, columns = f"*{dtype}", 4096 // size, 128 // size
        wide = "*fp64" if dtype == "fp64" else "*fp32"
        for activation, derivative in (("gelu", pointer), ("tanh", None)):
            yield signature(
                f"activation {activation} {dtype}",
                dense.activation_kernel,
                {"x": pointer, "derivative": derivative, "n": "i32"},
                {**dense.constants(activation), "BLOCK": block},
                unaligned=("n",),
                targets=targets,
                programs_per_sm=resident,
                load_bits=128,
                workload=streaming(
                    shape,
                    dtype,
                    count // block,
                    count,
                    (2 + (derivative is not None)) * count * size,
                    exps=count * EXPS[activation],
                ),
            )
        for activation in ("softplus", "silu"):
            yield signature(
                f"activation_backward {activation} {dtype}",
                dense.activation_backward_kernel,
                {
                    "grad": pointer,
                    "saved": pointer,
                    "g": pointer,
                    "partials": wide,
                    "M": "i32",
                    "N": "i32",
                    "stride_gm": "i32",
                },
                {
                    **dense.constants(activation),
                    "stride_gn": 1,
                    "ROWS": rows,
                    "COLUMNS": columns,
                },
                targets=targets,
                programs_per_sm=4,
                load_bits=128,
                workload=streaming(
                    shape,
                    dtype,
                    BATCH // rows * (FEATURES // columns),
                    count,
                    (3 * count + FEATURES) * size,
                    exps=0 if activation in STORES_DERIVATIVE else count,
                ),
            )
    blocks, columns = BATCH // rows, 64
    for wide, size in (("fp32", 4), ("fp64", 8)):
        yield signature(
            f"column_sum {wide}",
            dense.column_sum_kernel,
            {"partials": f"*{wide}", "out": f"*{wide}", "R": "i32", "N": "i32"},
            {"COLUMNS": columns},
            targets=TARGETS if wide == "fp32" else (90,),
            programs_per_sm=2,
            load_bits=128,
            workload=streaming(
                f"{blocks}×{FEATURES}",
                wide,
                triton.cdiv(blocks, dense.SUM_FAN_IN.value) * (FEATURES // columns),
                blocks * FEATURES,
                (blocks + 1) * FEATURES * size,
                passes=min(blocks, dense.SUM_FAN_IN.value) // dense.SUM_STEP.value,
                pass_bytes=dense.SUM_STEP.value * columns * size,
            ),
        )
    splits, block, products = 4, 1024, FEATURES * FEATURES
    yield signature(
        "split_sum bf16",
        dense.split_sum_kernel,
        {"partials": "*fp32", "out": "*bf16", "splits": "i32", "n": "i32"},
        {"BLOCK": block},
        unaligned=("splits",),
        targets=TARGETS,
        programs_per_sm=8,
        load_bits=128,
        workload=streaming(
            f"{splits}×{FEATURES}×{FEATURES}",
            "bf16",
            products // block,
            splits * products,
            (4 * splits + 2) * products,
            passes=splits,
            pass_bytes=4 * block,
        ),
    )


def signatures():
    # Not above: it is made of what this file defines.
    from . import (
        aot_latents,
        aot_loss,
        aot_nearest,
        aot_pairwise,
        aot_penalty,
        aot_pyramid,
        aot_random,
        aot_selection,
    )

    return [
        *gemms(),
        *pointwise(),
        *aot_random.signatures(),
        *aot_latents.signatures(),
        *aot_selection.signatures(),
        *aot_nearest.signatures(),
        *aot_pairwise.signatures(),
        *aot_loss.signatures(),
        *aot_pyramid.signatures(),
        *aot_penalty.signatures(),
    ]
