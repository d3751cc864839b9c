"""Machine code of GPU kernels: compiled for a GPU that need not be there, disassembled, and how often it runs.

Triton brings the disassembler; no CUDA toolkit is needed.
"""

from __future__ import annotations

import bisect
import collections
import functools
import graphlib
import importlib.util
import math
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aefast.errors import InputError

# The tensor cores' instructions by compute capability.
MATRIX = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA", "UTCOMMA", "UTCIMMA")}
# What nvdisasm calls the GPU that Triton compiles for.
TARGETS = {80: "SM80", 90: "SM90a", 100: "SM100a"}

GLOBAL = ("LDG", "STG", "LDGSTS", "RED", "ATOMG")
# Copies to shared memory that a later instruction waits for.
ASYNCHRONOUS = ("LDGSTS", "UTMALDG")
# Bits of each lane's access; without one of these it has 32.
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
ENDS_BLOCK = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "BSYNC")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "@!UP1", or "" for always
    name: str  # opcode and modifiers, "LDG.E.128"
    operands: str
    targets: tuple[int, ...] = ()  # addresses that a branch goes to

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.name.split(".")[1:]

    @property
    def access_bytes(self) -> int:
        """Bytes that one lane reads or writes."""
        return max((WIDTHS[m] for m in self.modifiers if m in WIDTHS), default=32) // 8

    @property
    def global_bytes(self) -> int:
        """Bytes of global memory that one lane reads or writes; 0 for a tensor descriptor, which does not say."""
        return self.access_bytes if self.opcode in GLOBAL else 0


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, without the padding behind them."""

    instructions: tuple[Instruction, ...]
    registers: int = 0
    stack: int = 0  # bytes
    shared: int = 0  # bytes, as launched

    def count(self, *opcodes: str) -> int:
        return sum(instruction.opcode in opcodes for instruction in self.instructions)

    @property
    def spills(self) -> int:
        return self.count("STL", "LDL")

    @property
    def load_bits(self) -> int:
        """The widest load from global memory."""
        widths = [8 * i.access_bytes for i in self.instructions if i.opcode in ("LDG", "LDGSTS")]
        return max([0, *widths, *([128] if self.count("UTMALDG") else [])])

    def matrix(self, capability: int) -> int:
        return self.count(*MATRIX[capability])

    @functools.cached_property
    def flow(self) -> Flow:
        return Flow(self.instructions)

    def executed(
        self,
        passes: int = 1,
        step_bytes: int | None = None,
        nested: tuple[int, ...] = (),
        edge: str | None = None,
    ) -> list[tuple[Instruction, int]]:
        """The instructions that a warp issues, and how often, if its hot loop takes `passes` passes.

        `step_bytes`: what a lane moves to or from global memory in one of `passes`, of which the compiler may have
        made several one pass of the machine code. `nested`: passes of the hot loop in one of the loop around it, of
        that loop in one of the next, and so on; what these do beside the hot loop counts as often. `edge`: an opcode
        that loops over edges of the data have, and the hot one has not.

        Of two ways the one is taken that a warp inside the data takes: no call of a slow path and no waiting; the
        most bytes of global memory, in the fewest accesses; the most instructions. Remainders of the hot loop are
        not run: shapes are of whole passes.

        Raises:
            ValueError: `passes` is not 1 and there is no loop, or there are fewer loops around it than `nested` says.
        """
        flow = self.flow
        hot = flow.hottest(edge)
        if hot is None and passes != 1:
            raise ValueError(f"{passes} passes of a kernel without a loop")
        times = [1] * len(flow.blocks)
        in_loop = frozenset() if hot is None else hot.blocks
        if hot is not None:
            if step_bytes is not None:
                moved = sum(i.global_bytes for block in in_loop for i in flow.blocks[block])
                passes = -(-passes * step_bytes // moved)
            around = sorted(
                (loop for loop in flow.loops if hot.blocks < loop.blocks), key=lambda loop: -len(loop.blocks)
            )
            if len(around) < len(nested):
                raise ValueError(f"{len(nested)} loops around the hot one, which has {len(around)}")
            # From the outermost that is asked for inwards.
            outward = [passes // math.prod(nested[: depth + 1]) for depth in range(len(nested))]
            for loop, its_passes in zip(around[len(around) - len(nested) :], reversed(outward), strict=True):
                for block in loop.blocks:
                    times[block] = its_passes
            for block in flow.remainders(hot):
                times[block] = 0
            if edge is not None:
                for loop in flow.loops:
                    if not loop.blocks & hot.blocks and any(
                        i.opcode == edge for block in loop.blocks for i in flow.blocks[block]
                    ):
                        for block in loop.blocks:
                            times[block] = 0
            for block in in_loop:
                times[block] = passes
        counted = []
        # A pipelined loop's last passes skip the copies that its prologue made: in all there is one a pass.
        pipelined = {i.opcode for block in in_loop for i in flow.blocks[block] if i.opcode in ASYNCHRONOUS}
        for block in flow.path(times):
            for instruction in flow.blocks[block]:
                if times[block] and (block in in_loop or instruction.opcode not in pipelined):
                    counted.append((instruction, times[block]))
        return counted


class Flow:
    """Basic blocks of a kernel, in order of address, and the loops among them.

    Blocks that nothing leads to have no part in it, such as the slow paths that are called.
    """

    def __init__(self, instructions: tuple[Instruction, ...]):
        leaders = {instructions[0].address}
        for instruction, following in zip(instructions, [*instructions[1:], None], strict=True):
            leaders.update(instruction.targets)
            if following is not None and instruction.opcode in ENDS_BLOCK:
                leaders.add(following.address)
        self.blocks: list[list[Instruction]] = []
        for instruction in instructions:
            if instruction.address in leaders:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        starts = {block[0].address: number for number, block in enumerate(self.blocks)}
        joins: dict[str, int] = {}
        self.successors: list[set[int]] = []
        for number, block in enumerate(self.blocks):
            joins |= {i.operands.split(",")[0]: i.targets[0] for i in block if i.opcode == "BSSY"}
            addresses, falls_through = leads_to(block[-1], joins)
            following = {number + 1} if falls_through and number + 1 < len(self.blocks) else set()
            self.successors.append({starts[address] for address in addresses} | following)
        self.reachable = sorted(self._reachable_from(0))
        self.loops = self._loops()
        self.waiting = {block for loop in self.loops if self._waits(loop) for block in loop.blocks}

    def _reachable_from(self, start: int, without: int | None = None) -> set[int]:
        found, waiting = {start}, [start]
        while waiting:
            new = self.successors[waiting.pop()] - found - {without}
            found |= new
            waiting += new
        return found

    def _predecessors(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {block: set() for block in self.reachable}
        for block in self.reachable:
            for successor in self.successors[block]:
                found[successor].add(block)
        return found

    def _loops(self) -> list[Loop]:
        """The natural loops, those of one header as one."""
        predecessors = self._predecessors()
        everything = set(self.reachable)
        dominators = {block: {0} if block == 0 else everything for block in self.reachable}
        changed = True
        while changed:
            changed = False
            for block in self.reachable[1:]:
                found = {block} | set.intersection(*(dominators[p] for p in predecessors[block]))
                changed |= found != dominators[block]
                dominators[block] = found
        bodies: dict[int, set[int]] = {}
        for latch in self.reachable:
            for header in self.successors[latch] & dominators[latch]:
                body = bodies.setdefault(header, {header})
                waiting = [latch]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting += predecessors[block]
        return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]

    def _waits(self, loop: Loop) -> bool:
        """Whether the loop does nothing but ask a barrier again."""
        instructions = [i for block in loop.blocks for i in self.blocks[block]]
        return any(is_wait(i) for i in instructions) and not any(
            i.global_bytes or i.opcode in (*MATRIX[90], "UTMALDG") for i in instructions
        )

    @functools.cached_property
    def hot_loop(self) -> Loop | None:
        return self.hottest()

    def hottest(self, edge: str | None = None) -> Loop | None:
        """Of the innermost loops without the opcode `edge` the one with the most bytes of global memory, then
        instructions, a pass."""
        loops = [loop for loop in self.loops if not loop.blocks <= self.waiting]
        innermost = [loop for loop in loops if not any(other.blocks < loop.blocks for other in loops)]
        innermost = [
            loop
            for loop in innermost
            if not any(i.opcode == edge for block in loop.blocks for i in self.blocks[block])
        ]

        def work(loop: Loop) -> tuple[int, int]:
            instructions = [i for block in loop.blocks for i in self.blocks[block]]
            return sum(i.global_bytes for i in instructions), len(instructions)

        return max(innermost, key=work, default=None)

    def remainders(self, hot: Loop) -> set[int]:
        """Blocks that do what whole passes of the hot loop leave over: further loops over global memory, and whatever
        repeats its loads before or behind it and can be passed by."""
        found: set[int] = set()
        for loop in self.loops:
            if not loop.blocks & hot.blocks and self._global(loop.blocks):
                found |= loop.blocks
        loads = {i.name for i in self._global(hot.blocks) if i.opcode == "LDG"}
        ends = {block for block in self.reachable if not self.successors[block]}
        behind = self._reachable_from(hot.header)
        for block in set(self.reachable) - hot.blocks - {0}:
            start, goals = (hot.header, ends - {block}) if block in behind else (0, {hot.header})
            repeats = loads & {i.name for i in self._global({block})}
            if repeats and goals & self._reachable_from(start, without=block):
                found.add(block)
        return found

    def _global(self, blocks: Iterable[int]) -> list[Instruction]:
        return [i for block in blocks for i in self.blocks[block] if i.global_bytes]

    def path(self, times: list[int]) -> list[int]:
        """The blocks of the way that `Code.executed` describes, each loop's in one pass."""
        edges = {block: set(self.successors[block]) for block in self.reachable}
        for loop in self.loops:
            exits = {after for block in loop.blocks for after in self.successors[block]} - loop.blocks
            for block in loop.blocks:
                if loop.header in edges[block]:
                    # After its last pass a loop is left, from wherever it tests that.
                    edges[block] = (edges[block] - {loop.header}) | exits
        best: dict[int, tuple[tuple[int, ...], int | None]] = {}
        for block in graphlib.TopologicalSorter(edges).static_order():  # successors first
            weight = self._weight(block, times[block])
            ways = [(best[after][0], after) for after in edges[block]]
            beyond, after = max(ways, default=((0,) * len(weight), None))
            best[block] = tuple(map(sum, zip(weight, beyond, strict=True))), after
        way: list[int] = []
        block: int | None = 0
        while block is not None:
            way.append(block)
            block = best[block][1]
        return way

    def _weight(self, block: int, times: int) -> tuple[int, ...]:
        instructions = self.blocks[block]
        slow = sum(i.opcode == "CALL" for i in instructions)
        slow += block in self.waiting
        # What a descriptor loads is not known here; that it is loaded counts.
        moved = sum(i.global_bytes or 16 * (i.opcode == "UTMALDG") for i in instructions)
        accesses = sum(i.opcode in (*GLOBAL, "UTMALDG") for i in instructions)
        return (-slow, moved * times, -accesses * times, len(instructions) * times)


def is_wait(instruction: Instruction) -> bool:
    return instruction.opcode == "SYNCS" and "TRYWAIT" in instruction.modifiers


def leads_to(last: Instruction, joins: dict[str, int]) -> tuple[tuple[int, ...], bool]:
    """Addresses that the last instruction of a block may branch to, and whether it may go on to the next.

    `joins`: where each convergence barrier's threads go on together.
    """
    if last.opcode == "BRA":
        if "DIV" in last.modifiers:  # taken by a warp whose lanes have parted where they must not
            return (), True
        return last.targets, bool(last.predicate) or "," in last.operands
    if last.opcode in ("BRX", "JMP", "JMX"):
        return last.targets, bool(last.predicate)
    if last.opcode in ("EXIT", "RET"):
        return (), bool(last.predicate)
    if last.opcode == "BSYNC" and last.operands in joins:
        return (joins[last.operands],), bool(last.predicate)
    return (), True


# --- reading a listing ------------------------------------------------------------------------------------

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"(\S+):\s*$")
# "        /*0110*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# A label, or, of instructions that are no file's, the address itself.
_TARGET = re.compile(r"`\(([^)\s]+)\)|\b(0x[0-9a-f]+)$")
_TARGETS = re.compile(r'BRANCH_TARGETS ([^"]*)"')
# " Function first_kernel:\n  REG:24 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:576"
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")

_Line = tuple[int, str, str, str]  # address, predicate, name, operands


def parse(listing: str) -> dict[str, Code]:
    """Symbol → code, of what `nvdisasm -c` prints."""
    found: dict[str, list[_Line]] = {}
    labels: dict[str, int] = {}
    pending: list[str] = []
    current = None
    for line in listing.splitlines():
        if match := _SECTION.match(line):
            current, pending = found.setdefault(match[1], []), []
        elif match := _LABEL.match(line):
            pending.append(match[1])
        elif current is not None and (instruction := _instruction(line)):
            labels |= dict.fromkeys(pending, instruction[0])
            pending = []
            current.append(instruction)
    return {symbol: Code(_trimmed(lines, labels)) for symbol, lines in found.items() if lines}


def parse_image(listing: str, sizes: Sequence[int]) -> list[Code]:
    """The code of kernels of so many bytes each, of what `nvdisasm -b` prints of them one behind the other.

    Raises:
        ValueError: a kernel branches by a table, of which such a listing does not say where it leads.
    """
    lines = [instruction for line in listing.splitlines() if (instruction := _instruction(line))]
    addresses = [line[0] for line in lines]
    codes = []
    end = 0
    for size in sizes:
        begin, end = end, end + size
        its = lines[bisect.bisect_left(addresses, begin) : bisect.bisect_left(addresses, end)]
        if tables := {name for _, _, name, _ in its if name.partition(".")[0] in ("BRX", "JMX")}:
            raise ValueError(f"{', '.join(tables)}: where a table of branches leads is not in the listing")
        labels = {f"{address:#x}": address - begin for address, *_ in its}
        codes.append(Code(_trimmed([(address - begin, *rest) for address, *rest in its], labels)))
    return codes


def _instruction(line: str) -> _Line | None:
    match = _INSTRUCTION.match(line)
    return match and (int(match[1], 16), match[2] or "", match[3], match[4])


def _trimmed(lines: list[_Line], labels: dict[str, int]) -> tuple[Instruction, ...]:
    """Without what keeps the processor's prefetching harmless: a branch to itself, and NOPs."""
    instructions = []
    for address, predicate, name, operands in lines:
        targets: list[str] = []
        if name.partition(".")[0] in ("BRA", "JMP", "BSSY"):
            targets = [label or place for label, place in _TARGET.findall(operands)]
        elif match := _TARGETS.search(operands):
            targets = match[1].split(",")
        instructions.append(
            Instruction(address, predicate, name, operands, tuple(labels[target] for target in targets))
        )
    while instructions[-1].opcode == "NOP" or instructions[-1].targets == (instructions[-1].address,):
        instructions.pop()
    return tuple(instructions)


# --- tools ------------------------------------------------------------------------------------------------


def tools() -> Path:
    """The folder of Triton's cuobjdump and nvdisasm.

    Raises:
        InputError: they are not there, or Triton is set to interpret and compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError(
            "bench: --static needs compiled kernels, and TRITON_INTERPRET=1 asks for none; unset it"
        )
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise InputError('bench: --static needs Triton, which is not installed; pip install "aefast[triton]"')
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if not (folder / tool).is_file()]
    if missing:
        raise InputError(
            f"bench: --static needs {' and '.join(missing)} of Triton's NVIDIA backend, and {folder} has none;"
            " install Triton from PyPI"
        )
    return folder


def run(tool: str, *arguments: str | Path, folder: Path | None = None) -> str:
    return subprocess.run(
        [tools() / tool, *arguments], check=True, capture_output=True, text=True, cwd=folder
    ).stdout


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    capability: int
    shared: int  # bytes, as launched


def compiled(signature: Any, capability: int) -> Compiled:
    """A signature of kernels/triton/aot.py as a file for the disassembler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = signature.kernel.arg_names
    types = {name: signature.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in signature.aligned}
    made = triton.compile(
        ASTSource(signature.kernel, types, signature.constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": signature.warps, "num_stages": signature.stages, **signature.options},
    )
    return Compiled(made.asm["cubin"], capability, made.metadata.shared)


def disassembled(kernels: Sequence[Compiled]) -> list[Code]:
    """The code of each kernel. Those for one GPU are disassembled together: nvdisasm takes 0.3 s to begin, whatever
    there is to do."""
    codes: dict[int, Code] = {}
    with tempfile.TemporaryDirectory() as folder:
        image, cubin = Path(folder) / "image", Path(folder) / "kernel.cubin"
        for capability in sorted({kernel.capability for kernel in kernels}):
            places = [place for place, kernel in enumerate(kernels) if kernel.capability == capability]
            texts = [_text(kernels[place].cubin) for place in places]
            image.write_bytes(b"".join(texts))
            listing = run("nvdisasm", "-b", TARGETS[capability], image)
            codes |= zip(places, parse_image(listing, [len(text) for text in texts]), strict=True)
        found = []
        for place, kernel in enumerate(kernels):
            cubin.write_bytes(kernel.cubin)
            ((_, registers, stack, _),) = _USAGE.findall(run("cuobjdump", "-res-usage", cubin))
            found.append(Code(codes[place].instructions, int(registers), int(stack), kernel.shared))
    return found


def _text(cubin: bytes) -> bytes:
    """The instructions of the only kernel in a file, a 64-bit ELF."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, index_of_names = struct.unpack_from("<HHH", cubin, 58)
    # Of each section its name, kind, flags, address, offset and size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + index * size) for index in range(count)]
    names = sections[index_of_names][4]
    ((*_, offset, length),) = (one for one in sections if cubin.startswith(b".text.", names + one[0]))
    return cubin[offset : offset + length]


def library_kernels(library: Path, architecture: str) -> dict[str, Code]:
    """Symbol → code of every kernel that a shared library holds for an architecture, none if it holds no such. Its
    shared memory is what the kernel declares."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        # cuobjdump 12.8 calls sm_90a sm_90; what it is asked for is part of a name.
        run("cuobjdump", "-xelf", architecture.removesuffix("a"), library.resolve(), folder=Path(folder))
        for cubin in sorted(Path(folder).iterdir()):
            codes = parse(run("nvdisasm", "-c", cubin))
            for symbol, *usage in _USAGE.findall(run("cuobjdump", "-res-usage", cubin)):
                found[symbol] = Code(codes[symbol].instructions, *map(int, usage))
    return found


def histogram(executed: list[tuple[Instruction, int]]) -> collections.Counter[str]:
    """Opcode with modifiers → how often a warp issues it."""
    counted: collections.Counter[str] = collections.Counter()
    for instruction, times in executed:
        counted[instruction.name] += times
    return counted
