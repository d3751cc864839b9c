"""What the machine code of every GPU kernel costs on an H200 at a stated shape, estimated without one.

Each pipe of a multiprocessor, and the memory behind them, is taken to run at its rate all the time; the slowest is
the prediction. Latency, launching and how well pipes overlap are left out, and so are bank conflicts and what matrix
instructions read from shared memory: these make a real kernel slower. Of a fork the longer side counts, whether lanes
take both or none does, and each lane's access counts, though lanes that want the same word share it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aefast
from aefast.bench import sass
from aefast.bench.ceilings import Ceilings
from aefast.kernels.activation import ACTIVATIONS, EXPS, STORES_DERIVATIVE
from aefast.kernels.workload import BATCH, FEATURES, Workload
from aefast.ops._registry import Cost

ARCHITECTURE = "sm_90"

# --- the H200 ---------------------------------------------------------------------------------------------

MULTIPROCESSORS = 132
CLOCK = 1.98e9
WARP = 32
# Warp instructions that a multiprocessor's four schedulers issue a clock.
ISSUED = 4
# Through the load/store units to registers, a clock and multiprocessor: 32 banks of shared memory of 4 bytes, and
# global memory's through the same units (CUDA C++ Programming Guide, compute capability 9.x).
ACCESSED_BYTES = 128
# A second. An assumption: what a copy reaches of the data sheet's 4.8e12.
DRAM_BYTES = 4.3e12
# An assumption. The A100's whitepaper gives its L2 5120 bytes a clock; of the H100's and H200's nothing is said.
L2_BYTES = 5120 * CLOCK
# Operations of dense products a second: tensor cores by the data sheet, which assumes a lower clock under their load,
# FMA and FP64 units by their lanes.
FLOPS = {
    "bf16": 989.4e12,
    "fp16": 989.4e12,
    "tf32": 494.7e12,
    "fp32": 2 * 128 * MULTIPROCESSORS * CLOCK,
    "fp64": 2 * 64 * MULTIPROCESSORS * CLOCK,
}
EXPS_PER_SECOND = 16 * MULTIPROCESSORS * CLOCK

PIPES = ("fma", "alu", "xu", "fp64", "lsu", "tensor")


def _table(pipe: str, lanes: int, opcodes: str) -> dict[str, tuple[str, int]]:
    return dict.fromkeys(opcodes.split(), (pipe, lanes))


# Opcode → pipe, and its lanes a clock and multiprocessor. The lanes are the CUDA C++ Programming Guide's table of
# arithmetic throughput for compute capability 9.0; which pipe they belong to, the Nsight Compute guide's list of
# pipelines: the FMA pipe has two halves, of which one multiplies integers, and conversions from float32 to 16 bits run
# on the ALU, all others on the transcendental unit. Moves are not in the table, and taken to be the ALU's.
#
# "other" costs its issue alone: control flow, barriers, constants, and the uniform datapath and the copy engine, which
# work beside the lanes. Opcodes of these two start with U.
LANES = {
    **_table("fma", 128, "FFMA FADD FMUL HFMA2 HADD2 HMUL2 HSETP2 HMNMX2"),
    **_table("fma", 64, "IMAD IDP"),
    **_table(
        "alu",
        64,
        "IADD3 VIADD VIADDMNMX VIMNMX VIMNMX3 IMNMX IABS ISETP LEA LOP3 PLOP3 SHF SGXT BMSK PRMT SEL",
    ),
    **_table("alu", 64, "FSET FSETP FMNMX FSEL FCHK F2FP I2FP I2IP P2R R2P VOTE MOV CS2R"),
    **_table("xu", 64, "F2F F2I I2F FRND"),
    **_table("xu", 16, "MUFU POPC FLO BREV REDUX"),
    **_table("fp64", 64, "DFMA DADD DMUL DSETP DMNMX"),
    **_table("lsu", 32, "LDG STG LDS STS LDSM STSM LDGSTS LDL STL SHFL ATOMS"),
    **_table(
        "other",
        0,
        "BAR BRA BREAK BRX BSSY BSYNC CALL DEPBAR ELECT EXIT FENCE LDC LDGDEPBAR MEMBAR NOP R2UR RET S2R",
    ),
    **_table("other", 0, "S2UR SYNCS VOTEU WARPGROUP WARPSYNC"),
}
TENSOR = ("HGMMA", "HMMA")


def pipe_of(instruction: sass.Instruction) -> str | None:
    """Its pipe, or None if this table does not know the opcode."""
    opcode = instruction.opcode
    if opcode in LANES:
        return LANES[opcode][0]
    if opcode in TENSOR:
        return "tensor"
    return "other" if opcode.startswith("U") else None


def seconds_of(instruction: sass.Instruction) -> float:
    """How long one of a warp's instructions keeps its pipe of a multiprocessor busy."""
    pipe = pipe_of(instruction)
    if pipe == "tensor":
        operations, dtype = _product(instruction)
        return operations * MULTIPROCESSORS / FLOPS[dtype]
    if pipe in (None, "other"):
        return 0.0
    lanes = LANES[instruction.opcode][1]
    modifiers = instruction.modifiers
    if instruction.opcode in ("F2F", "F2I", "I2F", "FRND") and {"F64", "S64", "U64"} & set(modifiers):
        lanes = 16
    if instruction.name.startswith("HADD2.F32"):  # a conversion, and the Guide gives these half the lanes
        lanes = 64
    clocks = WARP / lanes
    if pipe == "lsu" and instruction.opcode != "SHFL":
        clocks = max(clocks, _accessed(instruction) / ACCESSED_BYTES)
    return clocks / CLOCK


def _accessed(instruction: sass.Instruction) -> int:
    """Bytes that a warp moves to or from its registers."""
    if instruction.opcode in ("LDSM", "STSM"):  # 8×8 matrices of 16 bits
        return 128 * next((int(m) for m in instruction.modifiers if m in ("2", "4")), 1)
    return WARP * instruction.access_bytes


def _product(instruction: sass.Instruction) -> tuple[float, str]:
    """Operations of a warp's matrix instruction, and the dtype of their rate."""
    dtype = "tf32" if "TF32" in instruction.modifiers else "bf16"
    if match := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.name):
        # One product of the four warps of a group, each of which issues it.
        return 2 * math.prod(map(int, match.groups())) / 4, dtype
    shape = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
    (sides,) = (shape[m] for m in instruction.modifiers if m in shape)
    return 2 * math.prod(sides), dtype


# --- an estimate ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    language: str  # triton or cuda
    kernel: str  # the function
    name: str  # and what it is specialised for
    architecture: str
    workload: Workload
    opcodes: dict[str, float]  # executed for an element
    instructions: dict[str, float]  # those by pipe
    requested_bytes: int  # of global memory, by all lanes; what several ask for counts each time
    seconds: dict[str, float]  # by pipe, schedulers and memory too, each as if alone
    floor: float  # seconds that any kernel for this task takes
    floor_kind: str
    unknown: tuple[str, ...]  # opcodes that were counted as costing their issue alone

    @property
    def pipe(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def predicted(self) -> float:
        return self.seconds[self.pipe]

    @property
    def share(self) -> float:
        """Of the floor in the predicted time."""
        return self.floor / self.predicted


@dataclass(frozen=True)
class Missing:
    """A kernel that could not be estimated, and why."""

    language: str
    name: str
    reason: str


def estimate(language: str, kernel: str, name: str, code: sass.Code, workload: Workload) -> Estimate:
    """The cost of a launch. Multiprocessors get whole programs: the busiest decides."""
    step = None if workload.pass_bytes is None else workload.pass_bytes // (WARP * workload.warps)
    executed = code.executed(workload.passes, step, workload.nested, workload.edge)
    per_element = WARP * workload.warps * workload.programs / workload.elements
    rounds = math.ceil(workload.programs / MULTIPROCESSORS)
    counts: Counter[str] = Counter()
    seconds = dict.fromkeys(("issue", *PIPES), 0.0)
    unknown = set()
    lane_bytes = 0
    for instruction, times in executed:
        pipe = pipe_of(instruction)
        if pipe is None:
            unknown.add(instruction.opcode)
            pipe = "other"
        counts[pipe] += times
        issued = rounds * workload.warps * times
        seconds["issue"] += issued / ISSUED / CLOCK
        if pipe != "other":
            seconds[pipe] += issued * seconds_of(instruction)
        lane_bytes += times * instruction.global_bytes
    # A descriptor's block is requested by one of a program's warps for all.
    program_bytes = WARP * workload.warps * lane_bytes + workload.passes * workload.descriptor_bytes
    requested = workload.programs * program_bytes
    seconds["l2"] = requested / L2_BYTES
    distinct = requested if workload.distinct_bytes is None else workload.distinct_bytes
    seconds["dram"] = distinct / DRAM_BYTES
    limits = Ceilings(bytes=DRAM_BYTES, flops=FLOPS[workload.dtype], exps=EXPS_PER_SECOND)
    floor, floor_kind = limits.floor(Cost(workload.bytes, workload.flops, workload.exps))
    return Estimate(
        language,
        kernel,
        name,
        ARCHITECTURE,
        workload,
        {opcode: times * per_element for opcode, times in sass.histogram(executed).items()},
        {pipe: counts[pipe] * per_element for pipe in (*PIPES, "other")},
        requested,
        seconds,
        floor,
        floor_kind,
        tuple(sorted(unknown)),
    )


def estimates() -> list[Estimate | Missing]:
    """One of every kernel and dtype, of the kinds that differ.

    Raises:
        InputError: Triton or its disassembler is missing.
    """
    sass.tools()
    return [*triton_estimates(stated_signatures()), *cuda_estimates(LIBRARY)]


def stated_signatures() -> list[Any]:
    """Those of kernels/triton/aot.py that say what a launch is asked to do."""
    from aefast.kernels.triton import aot

    return [one for one in aot.signatures() if one.workload is not None and 90 in one.targets]


def triton_estimates(signatures: list[Any]) -> list[Estimate]:
    codes = sass.disassembled([sass.compiled(one, 90) for one in signatures])
    return [
        estimate("triton", one.kernel.__name__, one.name, code, one.workload)
        for one, code in zip(signatures, codes, strict=True)
    ]


# --- the CUDA C++ kernels ---------------------------------------------------------------------------------

LIBRARY = Path(aefast.__file__).parent / "lib" / "libaefast_cuda.so"
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
MANGLED = {"N3c108BFloat16E": "bf16", "N3c104HalfE": "fp16", "f": "fp32", "d": "fp64"}

# What a kernel's flags say, beyond its name; nothing for those that are not here.
SPECIALISED = {
    ("pairs", "0"): ("value",),
    ("tiles", "0"): ("value",),
    ("activation", "1"): ("with derivative",),
    ("activation_gradient", "0"): ("one by one",),
    ("reparameterize", "10"): ("any strides",),
    ("reparameterize", "01"): ("divergence alone",),
    ("reparameterize", "00"): ("divergence alone", "any strides"),
    ("reparameterize_gradient", "110"): ("any strides",),
    ("reparameterize_gradient", "101"): ("sample alone",),
    ("reparameterize_gradient", "100"): ("sample alone", "any strides"),
    ("reparameterize_gradient", "011"): ("divergence alone",),
    ("reparameterize_gradient", "010"): ("divergence alone", "any strides"),
}

# As mmd_kernels.cuh has them: the kernel functions, and of its kernels by the dimensions that they have room for the
# name, a block's warps and rows, the columns of a pass of the hot loop, and such passes in one of the loops around it.
FORMS = ("rbf", "laplacian", "imq", "rational_quadratic", "energy", "octaves", "seven")
PAIRS = {
    2: ("pairs", 4, 512, 2, (16, 4)),
    8: ("pairs", 4, 512, 2, (16, 4)),
    16: ("tiles", 8, 256, 8, (4,)),
}
PAIR_SPLITS = 32
POINTS = 8192  # of each of two samples

# As linear_act_kernels.cuh has them.
WARPS = 8
GRADIENT_BLOCKS = 4 * 3 * MULTIPROCESSORS
ROWS_PER_STEP = 4
SUM_COLUMNS = 8
# As reparameterize_kernels.cuh has it.
CHUNKS_PER_THREAD = 4
# As selection_kernels.cuh has them: a thread's groups, and the elements that it takes at a time. The code of a sparse
# autoencoder has LATENTS columns and a few of them a row.
GROUPS = 2
CHUNK = 8
LATENTS, LATENTS_OF_A_ROW = 16384, 32


def cuda_estimates(library: Path) -> list[Estimate | Missing]:
    codes = {}
    missing = f"{library.name} was not built into this installation; reinstall where nvcc is on PATH"
    if library.exists():
        missing = f"{library.name} holds no code for {ARCHITECTURE}"
        found = sass.library_kernels(library, f"{ARCHITECTURE}a")
        codes = {readable(symbol): code for symbol, code in found.items()}
    return [
        estimate("cuda", f"{name.split()[0]}_kernel", name, codes[name], workload)
        if name in codes
        else Missing("cuda", name, missing)
        for name, workload in cuda_workloads().items()
    ]


def readable(symbol: str) -> str:
    """A mangled kernel as "activation gelu with derivative bf16"; any other symbol as it is."""
    match = re.search(rf"\d+([a-z_]+)_kernelI({'|'.join(MANGLED)}|(?=LNS))", symbol)
    if match is None:
        return symbol
    words = [match[1]]
    if form := re.search(r"FormE(\d+)E", symbol):
        words.append(FORMS[int(form[1])])
    words += re.findall(r"Li(\d+)E", symbol)
    if activation := re.search(r"ActivationE(\d+)E", symbol):
        words.append(ACTIVATIONS[int(activation[1])])
    elif "GradientOfAny" in symbol:
        words.append("any")
    flags = "".join(re.findall(r"Lb([01])E", symbol))
    words += SPECIALISED.get((match[1], flags), ())
    # Without an element type it is the tensor cores' one.
    return " ".join([*words, MANGLED.get(match[2], "fp32")])


def cuda_workloads() -> dict[str, Workload]:
    """By readable name."""
    found = {}
    for dtype in ITEMSIZE:
        found |= _activation("gelu", dtype) | _activation("tanh", dtype)
        found |= _gradient("silu", dtype) | _gradient("softplus", dtype)
        found |= _column_sum(dtype) | _reparameterize(dtype)
    for dtype in ("bf16", "fp16", "fp32"):
        found |= _largest(dtype)
    for activation in ("relu", "silu", "softplus"):
        found |= _activation(activation, "bf16")
    for dimensions in PAIRS:
        found |= _pairs("octaves", dimensions, exps=1) | _pairs("seven", dimensions, exps=7)
    return found | _around_pairs() | _gradient("any", "bf16") | _gradient("any", "fp32")


def _pairs(form: str, dimensions: int, exps: int) -> dict[str, Workload]:
    """Value and both gradients of two samples, each pair of whose points is met once; counts are of such a pair.
    `exps`: a pair's exponentials, or what takes as long."""
    kernel, warps, rows, columns, nested = PAIRS[dimensions]
    points = 2 * POINTS
    tiles, split = points // rows, points // PAIR_SPLITS
    # A tile of rows begins with its own columns.
    programs = sum(PAIR_SPLITS - tile * rows // split for tile in range(tiles))
    pairs = points * (points - 1) // 2
    is_tf32 = kernel == "tiles"
    room = "" if is_tf32 else f" {dimensions}"
    partial_sums = points * dimensions * 4 * (tiles + PAIR_SPLITS) // 2
    return {
        f"{kernel} {form}{room} fp32": Workload(
            f"{points}×{points}×{dimensions}",
            "tf32" if is_tf32 else "fp32",
            programs=programs,
            warps=warps,
            elements=pairs,
            bytes=2 * points * dimensions * 4,
            # As accurate as in float32, a product is three of TF32's.
            flops=pairs * 6 * dimensions * (3 if is_tf32 else 1),
            exps=pairs * exps,
            passes=split // columns,
            nested=nested,
            edge="FSEL",  # where places hold no pair
            distinct_bytes=points * dimensions * 4 + partial_sums,
        )
    }


def _around_pairs() -> dict[str, Workload]:
    """What comes before the pairs of 16 dimensions and behind them, and kernel values of a block of mmd_test."""
    points, dimensions, block = 2 * POINTS, 16, 4096
    elements = points * dimensions
    parts = (points // PAIRS[dimensions][2] + PAIR_SPLITS) // 2
    shape = f"{points}×{dimensions}"
    return {
        "mean fp32": Workload(
            shape,
            "fp32",
            programs=64,
            warps=WARPS,
            elements=elements,
            bytes=elements * 4,
            passes=elements // (64 * WARP * WARPS),
            distinct_bytes=elements * 4,
        ),
        "centre fp32": Workload(
            shape,
            "fp32",
            programs=points // (WARP * WARPS),
            warps=WARPS,
            elements=elements,
            bytes=(2 * dimensions + 1) * points * 4,
            passes=dimensions,
            distinct_bytes=(2 * dimensions + 1) * points * 4,
        ),
        "gather fp32": Workload(
            f"{parts}×{shape}",
            "fp32",
            programs=1 + elements // (WARP * WARPS),
            warps=WARPS,
            elements=parts * elements,
            bytes=(parts + 1) * elements * 4,
            passes=parts,
            pass_bytes=4 * WARP * WARPS,
            distinct_bytes=(parts + 1) * elements * 4,
        ),
        "values rbf fp32": Workload(
            f"{block}×{block}×{dimensions}",
            "fp32",
            programs=block * block // (WARP * WARPS),
            warps=WARPS,
            elements=block * block,
            bytes=(block + 2 * dimensions) * block * 4,
            exps=block * block,
            passes=dimensions,
            pass_bytes=8 * WARP * WARPS,
            distinct_bytes=(block + 2 * dimensions) * block * 4,
        ),
    }


def _activation(activation: str, dtype: str) -> dict[str, Workload]:
    count, size = BATCH * FEATURES, ITEMSIZE[dtype]
    stored = activation in STORES_DERIVATIVE
    name = f"activation {activation}{' with derivative' if stored else ''} {dtype}"
    return {
        name: Workload(
            f"{BATCH}×{FEATURES}",
            dtype,
            programs=count * size // (16 * WARP * WARPS),
            warps=WARPS,
            elements=count,
            bytes=(2 + stored) * count * size,
            exps=count * EXPS[activation],
        )
    }


def _gradient(activation: str, dtype: str) -> dict[str, Workload]:
    """`activation` "any": of rows that 16 bytes do not divide, one element at a time."""
    size = ITEMSIZE[dtype]
    vector = 16 // size
    is_odd = activation == "any"
    columns = FEATURES - is_odd
    column_tiles = math.ceil(columns / (WARP * vector))
    # A thread has a row, or ROWS_PER_STEP of them a step, and a warp one row of its block's columns.
    steps = math.ceil(BATCH / (WARPS * ROWS_PER_STEP))
    steps_per_block = math.ceil(steps / math.ceil(GRADIENT_BLOCKS / column_tiles))
    return {
        f"activation_gradient {activation}{' one by one' if is_odd else ''} {dtype}": Workload(
            f"{BATCH}×{columns}",
            dtype,
            programs=math.ceil(steps / steps_per_block) * column_tiles,
            warps=WARPS,
            elements=BATCH * columns,
            bytes=(3 * BATCH + 1) * columns * size,
            exps=BATCH * columns if activation == "softplus" else 0,
            passes=steps_per_block * ROWS_PER_STEP,
            pass_bytes=3 * 16 * WARP * WARPS,
        )
    }


def _column_sum(dtype: str) -> dict[str, Workload]:
    rows, size = 384, max(4, ITEMSIZE[dtype])
    return {
        f"column_sum {dtype}": Workload(
            f"{rows}×{FEATURES}",
            dtype,
            programs=FEATURES // SUM_COLUMNS,
            warps=WARPS,
            elements=rows * FEATURES,
            bytes=(rows * size + ITEMSIZE[dtype]) * FEATURES,
            passes=rows * SUM_COLUMNS // (WARP * WARPS),
            pass_bytes=size * WARP * WARPS,
        )
    }


def _reparameterize(dtype: str) -> dict[str, Workload]:
    """The kernels of aligned rows of whole vectors."""
    count, size = BATCH * FEATURES, ITEMSIZE[dtype]
    wide = max(4, size)
    chunk = max(4, 16 // size)
    chunks = FEATURES // chunk
    lanes = chunks // CHUNKS_PER_THREAD
    found = {}
    # The matrices that a launch reads and writes, and its exponentials of an element: half of a logarithm, of a sine
    # and of a cosine for the noise, and one of logvar.
    for name, matrices, exps in (
        ("reparameterize", 3, 2.5),
        ("reparameterize divergence alone", 2, 1),
        ("reparameterize_gradient", 5, 2.5),
        ("reparameterize_gradient sample alone", 4, 2.5),
        ("reparameterize_gradient divergence alone", 4, 1),
    ):
        least = matrices * count * size + (0 if name.endswith("sample alone") else BATCH * wide)
        found[f"{name} {dtype}"] = Workload(
            f"{BATCH}×{FEATURES}",
            dtype,
            programs=BATCH * lanes // (WARP * WARPS),
            warps=WARPS,
            elements=count,
            bytes=least,
            exps=int(exps * count),
            passes=chunks // lanes,
            pass_bytes=matrices * chunk * size * WARP * WARPS,
            distinct_bytes=least,  # all threads read the same seed, and those of a row its divergence's gradient
        )
    return found


def _largest(dtype: str) -> dict[str, Workload]:
    """Both passes over a row count as the first, which finds the maxima. Of the bisection between them, and of the sort
    behind them, there is one step."""
    rows, size = LATENTS, ITEMSIZE[dtype]
    least = rows * (LATENTS * size + LATENTS_OF_A_ROW * (size + 8))
    return {
        f"largest {GROUPS} {dtype}": Workload(
            f"{rows}×{LATENTS}",
            dtype,
            programs=rows,
            warps=WARPS,
            elements=rows * LATENTS,
            bytes=least,
            passes=2 * LATENTS // (CHUNK * WARP * WARPS),
            pass_bytes=CHUNK * size * WARP * WARPS,
            distinct_bytes=least,
        )
    }


# --- showing them -----------------------------------------------------------------------------------------

HEADINGS = ("kernel", "shape", *PIPES, "all", "µs", "by", "floor µs", "by", "of floor")


def caption() -> str:
    return (
        "Instructions of each pipe per element, and how long the busiest pipe of an H200 takes at its full rate\n"
        f"({ARCHITECTURE}, {MULTIPROCESSORS} multiprocessors, {CLOCK / 1e9:.2f} GHz, memory "
        f"{DRAM_BYTES / 1e12:.1f} TB/s, L2 {L2_BYTES / 1e12:.1f} TB/s, "
        f"16-bit products {FLOPS['bf16'] / 1e12:.0f} TFLOP/s).\n"
        "floor: what the bytes, products and exponentials of the task take at least"
    )


def _cells(one: Estimate) -> list[str]:
    counts = [one.instructions[pipe] for pipe in PIPES]
    return [
        f"{one.language} {one.name}",
        one.workload.shape,
        *(_count(count) for count in [*counts, sum(one.instructions.values())]),
        _microseconds(one.predicted),
        one.pipe,
        _microseconds(one.floor),
        one.floor_kind,
        f"{one.share:.0%}",
    ]


def _count(count: float) -> str:
    return "" if count == 0 else f"{count:.2f}" if count < 10 else f"{count:.0f}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _notes(found: list[Estimate | Missing]) -> list[str]:
    missing: dict[str, list[str]] = {}
    for one in found:
        if isinstance(one, Missing):
            missing.setdefault(one.reason, []).append(f"{one.language} {one.name}")
    lines = [f"not estimated, as {reason}: {', '.join(names)}" for reason, names in missing.items()]
    unknown = sorted({opcode for one in found if isinstance(one, Estimate) for opcode in one.unknown})
    if unknown:
        lines.append(f"opcodes of no known pipe, counted as costing their issue alone: {', '.join(unknown)}")
    return lines


def print_table(found: list[Estimate | Missing]) -> None:
    """Prints the counts and the prediction, then the time of every pipe."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    rows = [one for one in found if isinstance(one, Estimate)]
    pipes = ("issue", *PIPES, "l2", "dram")
    style = {"box": SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    table = Table(title="Every GPU kernel on an H200, by its machine code", caption=caption(), **style)
    times = Table(title="Each pipe's time as if it were alone, µs", **style)
    for one, headings in ((table, HEADINGS), (times, ("kernel", *pipes))):
        for heading in headings:
            left = heading in ("kernel", "shape", "by")
            one.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
        times.add_row(f"{row.language} {row.name}", *(_microseconds(row.seconds[pipe]) for pipe in pipes))
    # A terminal that is narrower breaks lines: figures cut short would be none.
    needed = max(Console(width=1000).measure(one).maximum for one in (table, times))
    console = Console(width=max(Console().width, needed))
    console.print(table)
    console.print(times)
    for line in _notes(found):
        console.print(line, highlight=False)


def markdown(found: list[Estimate | Missing]) -> str:
    """The table as text for a report."""
    rows = [_cells(one) for one in found if isinstance(one, Estimate)]
    marks = ["---" if heading in ("kernel", "shape", "by") else "---:" for heading in HEADINGS]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (HEADINGS, marks, *rows))
    return "\n\n".join([table, f"{caption()}.", *_notes(found)]) + "\n"
