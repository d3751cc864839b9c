"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, widths of memory accesses.

Needs nvcc but no GPU. Triton brings the disassembler.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.aot

REPOSITORY = Path(__file__).parents[2]
ARCHITECTURES = {"sm_80": "80", "sm_90a": "90a", "sm_100": "100"}
ELEMENT = {"f": "float32", "d": "float64", "N3c104HalfE": "float16", "N3c108BFloat16E": "bfloat16"}

# As kernels/cuda/CMakeLists.txt compiles them.
SOURCES = {
    "linear_act.cu": ["--fmad=false"],
    "mmd.cu": [],
    "reparameterize.cu": ["--fmad=false", "--prec-sqrt=false"],
}

# Registers a thread. Blocks of 256 threads that fit on a multiprocessor: eight with 32, six with 40, five with 48,
# three with 80, two with 128, one with 255. Of the 128 threads of "pairs" five fit with 96, four with 128, three with
# 168 and two with 255.
REGISTERS = {
    "activation": 40,
    "activation_gradient vectorised": 80,
    "activation_gradient one by one": 128,
    "column_sum": 32,
    "mean": 48,
    "centre": 32,
    "gather": 48,
    "values": 64,
    "pairs 2": 96,
    "pairs 4": 168,
    "pairs 8": 255,
    "pairs 16": 255,
    "pairs 2 value": 96,
    "pairs 4 value": 96,
    "pairs 8 value": 128,
    "pairs 16 value": 168,
    "tiles": 255,
    "tiles value": 128,
    "reparameterize vectorised": 48,
    "reparameterize any strides": 128,
    "reparameterize_gradient vectorised": 48,
    "reparameterize_gradient any strides": 128,
}
FLOAT64_REGISTERS = REGISTERS | {
    "pairs 16 value": 128,
    "reparameterize vectorised": 128,
    "reparameterize_gradient vectorised": 128,
}
# Four blocks of 256 threads, each with chunks of eight elements.
HALF_REGISTERS = REGISTERS | {"reparameterize vectorised": 64, "reparameterize_gradient vectorised": 64}


def disassembler() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is not None:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        if bundled.exists():
            return str(bundled)
    return shutil.which("cuobjdump")


def kernel_and_element(symbol: str) -> tuple[str, str]:
    match = re.search(r"\d+([a-z_]+)_kernelI(N3c108BFloat16E|N3c104HalfE|f|d|(?=LNS))", symbol)
    kernel = match[1]
    if kernel in ("pairs", "tiles"):
        kernel = " ".join(
            [kernel, *re.findall(r"Li(\d+)E", symbol), *(["value"] if "Lb0E" in symbol else [])]
        )
    if kernel == "activation_gradient":
        kernel += " vectorised" if re.search(r"Lb1EEEv", symbol) else " one by one"
    if kernel.startswith("reparameterize"):
        kernel += " vectorised" if re.search(r"Lb1EEEv", symbol) else " any strides"
    # The tensor cores have kernels of one type.
    return kernel, ELEMENT.get(match[2], "float32")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(architecture, symbol): {"registers", "spills", "shared", "accesses"}}."""
    nvcc, cuobjdump = shutil.which("nvcc"), disassembler()
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    if cuobjdump is None:
        pytest.skip("no cuobjdump: neither Triton nor the CUDA toolkit brings one")
    folder = tmp_path_factory.mktemp("budgets")
    facts = {}
    for source, options in SOURCES.items():
        facts |= facts_of(nvcc, cuobjdump, source, options, folder / f"{source}.fatbin")
    return facts


def facts_of(nvcc, cuobjdump, source, options, fatbin):
    command = [nvcc, "-fatbin", "-std=c++17", "-O3", "--threads=0", "-Xptxas=-v", *options]
    command += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES.values()]
    command += ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{REPOSITORY / 'kernels/include'}", f"-isystem={Path(torch.__file__).parent / 'include'}"]
    command += [str(REPOSITORY / "kernels/cuda" / source), "-o", str(fatbin)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    facts = defaultdict(dict)
    entries = re.split(r"Compiling entry function '(\S+)' for '(\S+)'", report)[1:]
    for symbol, architecture, text in zip(entries[::3], entries[1::3], entries[2::3], strict=True):
        shared = re.search(r"(\d+) bytes smem", text)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        facts[architecture, symbol] |= {
            "registers": int(re.search(r"Used (\d+) registers", text)[1]),
            "spills": int(spills[1]) + int(spills[2]),
            "shared": int(shared[1]) if shared else 0,
        }

    listing = subprocess.run([cuobjdump, "-sass", fatbin], check=True, capture_output=True, text=True).stdout
    architecture = symbol = None
    for line in listing.splitlines():
        if match := re.search(r"code for (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            symbol = match[1]
            facts[architecture, symbol] |= {"accesses": Counter(), "products": 0}
        elif re.search(r"\bHMMA\.1688\.F32\.TF32", line):
            facts[architecture, symbol]["products"] += 1
        elif match := re.search(r"\b(LDG|STG|LDL|STL)\.(\S+)", line):
            width = re.search(r"\b(?:128|64|U16|U8|S16|S8)\b", match[2])
            facts[architecture, symbol]["accesses"][match[1], width[0] if width else "32"] += 1
    return facts


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    symbols = {architecture: {s for a, s in compiled if a == architecture} for architecture in ARCHITECTURES}
    assert all(symbols.values())
    assert symbols["sm_80"] == symbols["sm_90a"] == symbols["sm_100"]
    # What goes through pairs and behind them has what it computes in as its type.
    computed = {kernel: ("float32", "float64") for kernel in ("gather", "pairs 16", "pairs 16 value")}
    for kernel in REGISTERS.keys() - computed.keys():
        of_floats = kernel.startswith(("pairs", "tiles"))
        computed[kernel] = ("float32",) if of_floats else tuple(ELEMENT.values())
    assert {kernel_and_element(symbol) for _, symbol in compiled} == {
        (kernel, element) for kernel, elements in computed.items() for element in elements
    }


def registers_of(kernel: str, element: str) -> int:
    by_element = {"float64": FLOAT64_REGISTERS, "float16": HALF_REGISTERS, "bfloat16": HALF_REGISTERS}
    return by_element.get(element, REGISTERS)[kernel]


def test_registers_and_spills(compiled, capsys):
    groups = defaultdict(list)
    for (architecture, symbol), facts in compiled.items():
        groups[(*kernel_and_element(symbol), architecture)].append(facts)
    with capsys.disabled():
        row = "{:<36}{:<10}{:<8}{:>8}{:>10}{:>8}{:>8}  {}".format
        print(
            "\n" + row("kernel", "element", "target", "kernels", "registers", "spills", "shared", "accesses")
        )
        for group, members in sorted(groups.items()):
            widths = sorted({f"{name}.{width}" for facts in members for name, width in facts["accesses"]})
            worst = (max(facts[key] for facts in members) for key in ("registers", "spills", "shared"))
            print(row(*group, len(members), *worst, " ".join(widths)))
    over = {
        key: facts
        for key, facts in compiled.items()
        if facts["spills"] > 0 or facts["registers"] > registers_of(*kernel_and_element(key[1]))
    }
    assert not over


def test_the_tensor_cores_multiply(compiled):
    products = {kernel_and_element(symbol)[0] for (_, symbol), facts in compiled.items() if facts["products"]}
    assert products == {"tiles", "tiles value"}
    for (_, symbol), facts in compiled.items():
        if kernel_and_element(symbol)[0] == "tiles":
            # Three products of TF32 numbers for each of float32: of distances, of the rows' sums and of the columns'.
            assert facts["products"] >= 3 * (4 + 4 + 4), symbol


def test_vector_accesses_are_16_bytes_wide(compiled):
    for (_, symbol), facts in compiled.items():
        kernel, _ = kernel_and_element(symbol)
        accesses = facts["accesses"]
        assert not any(name in ("LDL", "STL") for name, _ in accesses), f"{symbol} uses local memory"
        if kernel == "activation":  # its last vector may be partial
            assert accesses["LDG", "128"] and accesses["STG", "128"], symbol
        if kernel == "activation_gradient vectorised":  # the narrower store is a column's partial sum
            assert accesses["LDG", "128"] and accesses["STG", "128"], symbol
            assert {width for name, width in accesses if name == "LDG"} == {"128"}, symbol
        if kernel.startswith("reparameterize") and kernel.endswith("vectorised"):
            # The narrower loads are the seed and a row's gradient.
            assert accesses["LDG", "128"] >= 2, symbol
            loads = {width for name, width in accesses if name == "LDG"}
            assert loads <= {"128", "64", "32"}, symbol
            is_divergence_alone = re.search(r"reparameterize_kernelI\w+?Lb0ELb1EEEv", symbol)
            assert is_divergence_alone or accesses["STG", "128"], symbol
