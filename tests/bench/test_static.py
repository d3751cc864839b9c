"""The estimate from machine code: what is counted, what it predicts, and that no kernel is left out."""

import importlib
import inspect
import os
import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import pytest

from aefast.bench import sass, static
from aefast.kernels.workload import Workload

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
aot = importlib.import_module("aefast.kernels.triton.aot")

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("compiled_once")]

REPOSITORY = Path(__file__).parents[2]
BLOCK, PROGRAMS, WARPS = 1024, 1320, 4
ELEMENTS = BLOCK * PROGRAMS


@triton.jit
def pointwise_kernel(x, out, a, b, FMAS: tl.constexpr, EXPS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    for _ in tl.static_range(FMAS):
        value = value * a + b
    for _ in tl.static_range(EXPS):
        value = tl.exp2(value)
    tl.store(out + offsets, value)


@triton.jit
def copy_kernel(x, out, n, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for copy in tl.static_range(COPIES):
        tl.store(out + copy * n + offsets, tl.load(x + copy * n + offsets))


@triton.jit
def sum_kernel(x, out, n, steps, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(steps):
        total += tl.load(x + step * n + offsets)
    tl.store(out + offsets, total)


@triton.jit
def product_kernel(x, out, steps, BLOCK: tl.constexpr):
    sides = tl.arange(0, BLOCK)
    offsets = sides[:, None] * BLOCK + sides[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        tile = tl.load(x + step * BLOCK * BLOCK + offsets)
        total = tl.dot(tile, tile, total)
    tl.store(out + offsets, total)


TYPES = {"x": "*fp32", "out": "*fp32", "a": "fp32", "b": "fp32", "n": "i32", "steps": "i32"}
WORKLOAD = Workload("toy", "fp32", PROGRAMS, WARPS, ELEMENTS, bytes=8 * ELEMENTS)


def compiled(kernel, types=TYPES, block=BLOCK, **constants):
    chosen = {name: types[name] for name in kernel.arg_names if name in types}
    signature = aot.signature(
        "toy",
        kernel,
        chosen,
        {**constants, "BLOCK": block},
        unaligned=("a", "b", "steps"),
        warps=WARPS,
        targets=(90,),
        programs_per_sm=1,
        load_bits=32,
    )
    (code,) = sass.disassembled([sass.compiled(signature, 90)])
    return code


def estimated(code, workload=WORKLOAD):
    return static.estimate("triton", "toy_kernel", "toy", code, workload)


@pytest.fixture(scope="module")
def pointwise():
    """(FMAs, exponentials) of an element → the estimate."""
    return {
        (fmas, exps): estimated(compiled(pointwise_kernel, FMAS=fmas, EXPS=exps))
        for fmas, exps in ((3, 2), (6, 2), (3, 4))
    }


def test_known_counts_are_exact(pointwise):
    for (fmas, exps), found in pointwise.items():
        assert found.opcodes["FFMA"] == fmas
        assert found.opcodes["MUFU.EX2"] == found.instructions["xu"] == exps
        assert found.requested_bytes == 8 * ELEMENTS
        assert found.instructions["lsu"] == 2 / 4  # a load and a store of four elements
        assert found.instructions["tensor"] == found.instructions["fp64"] == 0
        assert found.unknown == ()


def test_times_are_those_of_the_rates(pointwise):
    seconds = pointwise[3, 2].seconds
    # 10 programs for each of 132 multiprocessors, which take 16 exponentials a clock.
    assert seconds["xu"] == pytest.approx(2 * 10 * BLOCK / 16 / 1.98e9)
    assert seconds["dram"] == pytest.approx(8 * ELEMENTS / 4.3e12)
    assert seconds["lsu"] == pytest.approx(8 * 10 * BLOCK / 128 / 1.98e9)


def test_twice_the_exponentials_take_the_pipe_twice_as_long(pointwise):
    one, two = pointwise[3, 2], pointwise[3, 4]
    assert two.seconds["xu"] == pytest.approx(2 * one.seconds["xu"])
    assert two.seconds["dram"] == one.seconds["dram"]


def test_further_fmas_add_to_their_pipe_alone(pointwise):
    one, two = pointwise[3, 2], pointwise[6, 2]
    assert two.seconds["fma"] - one.seconds["fma"] == pytest.approx(3 * 10 * BLOCK / 128 / 1.98e9)
    for pipe in ("xu", "lsu", "dram", "l2"):
        assert two.seconds[pipe] == one.seconds[pipe]


def test_twice_the_bytes_take_memory_twice_as_long():
    one, two = (estimated(compiled(copy_kernel, COPIES=copies)) for copies in (1, 2))
    assert one.requested_bytes == 8 * ELEMENTS
    for pipe in ("dram", "l2", "lsu"):
        assert two.seconds[pipe] == pytest.approx(2 * one.seconds[pipe])
    assert one.pipe == "dram" and two.predicted == pytest.approx(2 * one.predicted)
    assert two.share == pytest.approx(one.share / 2)  # the floor stays that of the task


def test_a_program_more_than_multiprocessors_takes_a_round_more():
    code = compiled(copy_kernel, COPIES=1)
    full, one_more = (estimated(code, replace(WORKLOAD, programs=programs)) for programs in (132, 133))
    assert one_more.seconds["issue"] == 2 * full.seconds["issue"]
    assert one_more.seconds["dram"] == pytest.approx(133 / 132 * full.seconds["dram"])


def test_passes_of_a_loop():
    code = compiled(sum_kernel)
    assert code.flow.hot_loop is not None
    for steps in (16, 32):
        found = estimated(code, replace(WORKLOAD, passes=steps, pass_bytes=4 * BLOCK))
        assert found.requested_bytes == 4 * (steps + 1) * ELEMENTS
        assert found.opcodes["FADD"] == steps


def test_products_count_their_operations():
    code = compiled(product_kernel, {**TYPES, "x": "*bf16"}, block=64)
    workload = Workload("toy", "bf16", 132, WARPS, 64 * 64, bytes=1, pass_bytes=2 * 64 * 64)
    for passes in (16, 32):
        found = estimated(code, replace(workload, passes=passes))
        assert found.seconds["tensor"] == pytest.approx(passes * 2 * 64**3 * 132 / 989.4e12)
        assert found.requested_bytes == 132 * (passes * 2 + 4) * 64 * 64


def test_conversions_to_64_bits_are_slower():
    def clocks(name):
        return round(1.98e9 * static.seconds_of(sass.Instruction(0, "", name, "")), 6)

    assert clocks("F2F.F64.F32") == clocks("MUFU.EX2") == 2
    assert clocks("I2F.U32.RP") == clocks("LOP3.LUT") == clocks("IMAD.WIDE") == 0.5
    assert clocks("FFMA") == clocks("HFMA2") == 0.25
    assert clocks("LDS.128") == clocks("LDSM.16.M88.4") == clocks("LDG.E.128") == 4
    assert clocks("STG.E.U16") == clocks("SHFL.BFLY") == 1
    assert clocks("BRA") == clocks("UIADD3") == 0


def test_an_unknown_opcode_is_said():
    (code,) = sass.parse(
        '\t.section\t.text.toy,"ax"\n        /*0000*/                   WONDER.F32 R1, R2 ;\n'
    ).values()
    found = estimated(code)
    assert found.unknown == ("WONDER",)
    assert found.instructions["other"] > 0
    assert "WONDER" in static.markdown([found])


# --- the library's own kernels ----------------------------------------------------------------------------


def test_every_triton_kernel_has_a_row():
    stated = {signature.kernel for signature in static.stated_signatures()}
    package = importlib.import_module("aefast.kernels.triton")
    for module in pkgutil.iter_modules(package.__path__):
        members = inspect.getmembers(importlib.import_module(f"{package.__name__}.{module.name}"))
        for name, member in members:
            if isinstance(member, triton.JITFunction) and name.endswith("_kernel"):
                assert member in stated, f"{module.name}.{name} has no signature with a workload in aot.py"


def test_every_kind_of_product_has_a_row():
    kinds = {one.name.split()[1] for one in static.stated_signatures() if one.name.startswith("gemm")}
    assert kinds == {"forward", "derivative", "dgrad", "wgrad"}


def test_every_cuda_kernel_has_a_row():
    named = {f"{name.split()[0]}_kernel" for name in static.cuda_workloads()}
    sources = "".join(path.read_text() for path in (REPOSITORY / "kernels/cuda").glob("*.cu*"))
    launched = set(re.findall(r"__global__[^{;]*?(\w+_kernel)\(", sources))
    assert launched and launched == named
    elements = {name.split()[-1] for name in static.cuda_workloads()}
    assert elements == set(static.ITEMSIZE)


@pytest.fixture(scope="module")
def library():
    if not static.LIBRARY.exists():
        pytest.skip(f"{static.LIBRARY.name} is not built")
    return static.cuda_estimates(static.LIBRARY)


@pytest.fixture(scope="module")
def ours():
    """One signature of each kernel and kind of product, and of one kind one of each dtype."""
    chosen = {}
    for signature in static.stated_signatures():
        kind = signature.name.split()[1] if signature.name.startswith("gemm") else ""
        dtype = signature.workload.dtype if kind == "dgrad" else ""
        chosen.setdefault((signature.kernel.__name__, kind, dtype), signature)
    return static.triton_estimates(list(chosen.values()))


def check(found):
    for one in found:
        assert isinstance(one, static.Estimate), one
        assert one.unknown == (), one.name
        assert 0 < one.floor <= one.predicted * (1 + 1e-9), one.name
        if one.workload.distinct_bytes is None:  # but for partial sums, and accesses of a few lanes of a warp
            assert one.workload.bytes <= one.requested_bytes <= 1.1 * one.workload.bytes, one.name


def test_triton_estimates_keep_to_the_floor(ours):
    check(ours)
    products = [one for one in ours if one.kernel == "gemm_kernel"]
    for one in products:
        # Whole rounds of programs, and no product that the floor does not have.
        operations = one.seconds["tensor"] * static.FLOPS[one.workload.dtype]
        if operations:
            assert 1 <= operations / one.workload.flops < 1.08, one.name
        else:
            assert one.opcodes["FFMA"] >= one.workload.flops / 2 / one.workload.elements


def test_cuda_estimates_keep_to_the_floor(library):
    check(library)


def test_a_library_that_is_not_there_is_said(tmp_path):
    found = static.cuda_estimates(tmp_path / "libaefast_cuda.so")
    assert [one.name for one in found] == list(static.cuda_workloads())
    assert all("was not built into this installation" in one.reason for one in found)
    (line,) = static.markdown(found).splitlines()[-1:]
    assert line.startswith("not estimated, as libaefast_cuda.so was not built") and found[-1].name in line


def test_tables(ours, library, capsys):
    found = [*ours, *library, static.Missing("cuda", "lost bf16", "it is lost")]
    static.print_table(found)
    printed = capsys.readouterr().out
    text = static.markdown(found)
    for one in [*ours, *library]:
        assert printed.count(f"{one.language} {one.name} ") == 2
        assert f"| {one.language} {one.name} | {one.workload.shape} |" in text
        assert f"{one.predicted * 1e6:.1f}" in printed
    assert "…" not in printed
    for lines in (printed, text):
        assert "not estimated, as it is lost: cuda lost bf16" in lines
