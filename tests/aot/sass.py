"""Compiles a kernel's signature for a GPU that need not be there, and reads the machine code."""

import collections
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# The tensor cores' instructions by compute capability.
MATRIX = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA", "UTCOMMA", "UTCIMMA")}


@dataclass(frozen=True)
class Code:
    registers: int
    stack: int  # bytes
    shared: int  # bytes, as launched
    instructions: collections.Counter  # opcode with modifiers -> count

    def count(self, *opcodes):
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] in opcodes)

    @property
    def spills(self):
        return self.count("STL", "LDL")

    @property
    def load_bits(self):
        """The widest load from global memory."""
        widths = [0]
        for name in self.instructions:
            opcode, *modifiers = name.split(".")
            if opcode == "UTMALDG":
                widths.append(128)
            elif opcode in ("LDG", "LDGSTS"):
                sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
                widths.append(max([sizes[m] for m in modifiers if m in sizes], default=32))
        return max(widths)

    def matrix(self, capability):
        return self.count(*MATRIX[capability])


def compile_signature(signature, capability, folder):
    names = signature.kernel.arg_names
    types = {name: signature.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in signature.aligned}
    compiled = triton.compile(
        ASTSource(signature.kernel, types, signature.constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": signature.warps, "num_stages": signature.stages, **signature.options},
    )
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = run("cuobjdump", "-res-usage", cubin)
    (registers, stack), *others = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    assert not others, usage
    listing = run("nvdisasm", "-c", cubin)
    # "/*0010*/   @!P0 LDG.E.128 R4, [R2.64] ;"
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE)
    assert found, f"no instruction recognised in\n{listing[:2000]}"
    return Code(int(registers), int(stack), compiled.metadata.shared, collections.Counter(found))


def run(tool, *arguments):
    return subprocess.run(
        [TOOLS / tool, *arguments], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout
