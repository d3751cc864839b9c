"""What nvcc made of the CUDA kernels: registers, spills, shared memory, widths of memory accesses.

Read from the installed library, which needs no GPU. Triton brings the disassembler.
"""

import re
from collections import Counter, defaultdict

import pytest

from aefast.bench import sass, static

pytestmark = pytest.mark.aot

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
ELEMENT = {"f": "float32", "d": "float64", "N3c104HalfE": "float16", "N3c108BFloat16E": "bfloat16"}

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
    "largest 2": 40,
    "largest 8": 40,
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


def kernel_and_element(symbol: str) -> tuple[str, str]:
    match = re.search(r"\d+([a-z_]+)_kernelI(N3c108BFloat16E|N3c104HalfE|f|d|(?=LNS))", symbol)
    kernel = match[1]
    if kernel in ("pairs", "tiles", "largest"):
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
def compiled():
    """{(architecture, symbol): code}."""
    pytest.importorskip("triton")
    if not static.LIBRARY.exists():
        pytest.skip(f"{static.LIBRARY.name} is not built")
    return {
        (architecture, symbol): code
        for architecture in ARCHITECTURES
        for symbol, code in sass.library_kernels(static.LIBRARY, architecture).items()
    }


def accesses_of(code: sass.Code) -> Counter:
    """How many instructions have each opcode and width in bits; of local memory too, which spills are in."""
    return Counter(
        (one.opcode, 8 * one.access_bytes)
        for one in code.instructions
        if one.opcode in ("LDG", "STG", "LDL", "STL")
    )


def products_of(code: sass.Code) -> int:
    return sum(one.name == "HMMA.1688.F32.TF32" for one in code.instructions)


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    symbols = {architecture: {s for a, s in compiled if a == architecture} for architecture in ARCHITECTURES}
    assert all(symbols.values())
    assert symbols["sm_80"] == symbols["sm_90a"] == symbols["sm_100"]
    # What goes through pairs and behind them has what it computes in as its type.
    computed = {kernel: ("float32", "float64") for kernel in ("gather", "pairs 16", "pairs 16 value")}
    computed |= dict.fromkeys(("largest 2", "largest 8"), ("float32", "float16", "bfloat16"))
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
    for (architecture, symbol), code in compiled.items():
        groups[(*kernel_and_element(symbol), architecture)].append(code)
    with capsys.disabled():
        row = "{:<36}{:<10}{:<8}{:>8}{:>10}{:>8}{:>8}  {}".format
        print(
            "\n" + row("kernel", "element", "target", "kernels", "registers", "spills", "shared", "accesses")
        )
        for group, members in sorted(groups.items()):
            widths = sorted({f"{name}.{bits}" for code in members for name, bits in accesses_of(code)})
            worst = (max(getattr(code, key) for code in members) for key in ("registers", "spills", "shared"))
            print(row(*group, len(members), *worst, " ".join(widths)))
    over = [
        (*key, code.registers, code.stack, code.spills)
        for key, code in compiled.items()
        if code.spills or code.stack or code.registers > registers_of(*kernel_and_element(key[1]))
    ]
    assert not over


def test_the_tensor_cores_multiply(compiled):
    kernels = {kernel_and_element(symbol)[0] for (_, symbol), code in compiled.items() if products_of(code)}
    assert kernels == {"tiles", "tiles value"}
    for (_, symbol), code in compiled.items():
        if kernel_and_element(symbol)[0] == "tiles":
            # Three products of TF32 numbers for each of float32: of distances, of the rows' sums and of the columns'.
            assert products_of(code) >= 3 * (4 + 4 + 4), symbol


def test_vector_accesses_are_16_bytes_wide(compiled):
    for (_, symbol), code in compiled.items():
        kernel, _ = kernel_and_element(symbol)
        accesses = accesses_of(code)
        if kernel == "activation":  # its last vector may be partial
            assert accesses["LDG", 128] and accesses["STG", 128], symbol
        if kernel == "activation_gradient vectorised":  # the narrower store is a column's partial sum
            assert accesses["LDG", 128] and accesses["STG", 128], symbol
            assert {bits for name, bits in accesses if name == "LDG"} == {128}, symbol
        if kernel.startswith("largest"):  # beside those of rows that are not aligned
            assert accesses["LDG", 128], symbol
        if kernel.startswith("reparameterize") and kernel.endswith("vectorised"):
            # The narrower loads are the seed and a row's gradient.
            assert accesses["LDG", 128] >= 2, symbol
            assert {bits for name, bits in accesses if name == "LDG"} <= {128, 64, 32}, symbol
            is_divergence_alone = re.search(r"reparameterize_kernelI\w+?Lb0ELb1EEEv", symbol)
            assert is_divergence_alone or accesses["STG", 128], symbol
