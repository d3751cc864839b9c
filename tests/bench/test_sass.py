"""Reading machine code: a listing's instructions, its loops, and how often each instruction runs."""

import importlib.util
from types import SimpleNamespace

import pytest

from aefast.bench import sass
from aefast.errors import InputError

# A loop that waits for a barrier and loads, with a test before it, a slow path and a remainder behind it.
LISTING = """
	.target	sm_90a
//--------------------- .text.first_kernel --------------------------
	.section	.text.first_kernel,"ax",@progbits
        .global         first_kernel
first_kernel:
.text.first_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, 0x1, PT ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;
        /*0040*/              @!P1 BRA `(.L_x_0) ;
        /*0050*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x10] ;
        /*0060*/                   FFMA R8, R4, R5, R8 ;
        /*0070*/                   FFMA R9, R6, R7.reuse, R9 ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/              @!P3 BRA `(.L_x_3) ;
        /*00a0*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_3:
        /*00b0*/               @P4 BRA `(.L_x_4) ;
        /*00c0*/                   CALL.REL.NOINC `($first_kernel$__internal_0_$__cuda_sm3x_div) ;
.L_x_4:
        /*00d0*/                   MUFU.EX2 R8, R8 ;
        /*00e0*/                   STG.E.U16 desc[UR4][R10.64], R8 ;
        /*00f0*/                   EXIT ;
        .weak           $first_kernel$__internal_0_$__cuda_sm3x_div
$first_kernel$__internal_0_$__cuda_sm3x_div:
        /*0100*/                   MUFU.RCP R8, R8 ;
        /*0110*/                   RET.REL.NODEC R10 `(first_kernel) ;
.L_x_5:
        /*0120*/                   BRA `(.L_x_5);
        /*0130*/                   NOP;
        /*0140*/                   NOP;

	.section	.text._Z6second,"ax",@progbits
_Z6second:
        /*0000*/               @P0 EXIT ;
        /*0010*/                   BRX R2 -0x20      (*"BRANCH_TARGETS .L_x_6,.L_x_7"*);
.L_x_6:
        /*0020*/                   IMAD.MOV.U32 R1, RZ, RZ, RZ ;
        /*0030*/                   EXIT ;
.L_x_7:
        /*0040*/                   EXIT ;
"""
CODES = sass.parse(LISTING)
FIRST = CODES["first_kernel"]


def executed(code, *arguments, **settings):
    return sass.histogram(code.executed(*arguments, **settings))


def test_instructions():
    assert list(CODES) == ["first_kernel", "_Z6second"]
    assert len(FIRST.instructions) == 18  # and no padding
    load = FIRST.instructions[5]
    assert (load.address, load.predicate, load.opcode) == (0x50, "", "LDG")
    assert load.modifiers == ["E", "128", "CONSTANT"]
    assert load.operands == "R4, desc[UR4][R2.64+0x10]"
    assert (load.access_bytes, load.global_bytes) == (16, 16)
    store = FIRST.instructions[14]
    assert (store.name, store.global_bytes) == ("STG.E.U16", 2)
    branch = FIRST.instructions[4]
    assert (branch.predicate, branch.targets) == ("@!P1", (0x30,))
    assert FIRST.load_bits == 128 and FIRST.spills == 0 and FIRST.count("FFMA", "MUFU") == 4
    jump = CODES["_Z6second"].instructions[1]
    assert (jump.opcode, jump.targets) == ("BRX", (0x20, 0x40))


def test_loops():
    flow = FIRST.flow
    assert len(flow.loops) == 1
    addresses = {i.address for block in flow.hot_loop.blocks for i in flow.blocks[block]}
    assert addresses == set(range(0x30, 0x90, 0x10))
    assert CODES["_Z6second"].flow.hot_loop is None


@pytest.mark.parametrize("passes", [1, 2, 100])
def test_passes_multiply_the_loop_alone(passes):
    counts = executed(FIRST, passes)
    assert counts["FFMA"] == 2 * passes
    assert counts["LDG.E.128.CONSTANT"] == passes  # without the remainder
    assert counts["STG.E.U16"] == 1
    assert counts["MUFU.EX2"] == 1 and counts["MUFU.RCP"] == 0 and counts["CALL.REL.NOINC"] == 0


def test_passes_of_an_unrolled_loop():
    # 8 bytes in a pass of the source, 16 in one of the machine code.
    assert executed(FIRST, 6, 8)["FFMA"] == 2 * 3
    assert executed(FIRST, 5, 8)["FFMA"] == 2 * 3


NESTED = """
	.section	.text.nested,"ax",@progbits
        /*0000*/                   FADD R1, R1, R2 ;
.L_x_0:
        /*0010*/                   FMUL R1, R1, R2 ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   FFMA R1, R1, R2, R3 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   FFMA R1, R1, R2, R3 ;
        /*0070*/                   FSEL R1, R1, RZ, P2 ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0090*/               @P3 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
"""


def test_loops_around_the_hot_one():
    (code,) = sass.parse(NESTED).values()
    # The longer of the innermost loops, unless it is one over edges.
    assert executed(code, 12)["FSEL"] == 12
    found = executed(code, 12, nested=(4,), edge="FSEL")
    assert found["FSEL"] == 0
    assert (found["FFMA"], found["FMUL"], found["FADD"]) == (12, 3, 1)
    assert executed(code, 12, edge="FSEL")["FMUL"] == 1
    with pytest.raises(ValueError, match="2 loops around the hot one, which has 1"):
        code.executed(12, nested=(4, 3))


def test_passes_without_a_loop():
    # Of the two targets of a jump the longer is taken, and the way past EXIT.
    assert executed(CODES["_Z6second"])["IMAD.MOV.U32"] == 1
    with pytest.raises(ValueError, match="2 passes of a kernel without a loop"):
        CODES["_Z6second"].executed(2)


def test_copies_of_a_pipelined_loop_are_made_once_a_pass():
    listing = """
	.section	.text.pipelined,"ax",@progbits
        /*0000*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2+0x10], desc[UR4][R4.64] ;
.L_x_0:
        /*0020*/               @P1 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   LDG.E R1, desc[UR4][R4.64] ;
        /*0050*/                   EXIT ;
"""
    (code,) = sass.parse(listing).values()
    assert executed(code, 7) == {"LDGSTS.E.BYPASS.128": 7, "BRA": 7, "LDG.E": 1, "EXIT": 1}


def test_a_convergence_barrier_leads_to_where_threads_join():
    listing = """
	.section	.text.joined,"ax",@progbits
        /*0000*/                   BSSY B0, `(.L_x_1) ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/                   BSYNC B0 ;
.L_x_0:
        /*0040*/                   FMUL R1, R1, R2 ;
        /*0050*/                   FMUL R1, R1, R2 ;
        /*0060*/                   BSYNC B0 ;
.L_x_1:
        /*0070*/                   EXIT ;
"""
    (code,) = sass.parse(listing).values()
    assert executed(code) == {"BSSY": 1, "BRA": 1, "FMUL": 2, "BSYNC": 1, "EXIT": 1}


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def no_disassembler(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


@pytest.fixture
def interpreting(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("no_triton", r"--static needs Triton, which is not installed; pip install"),
        ("no_disassembler", r"--static needs cuobjdump and nvdisasm"),
        ("interpreting", r"--static needs compiled kernels, and TRITON_INTERPRET=1"),
    ],
)
def test_what_is_missing_is_named(state, message, request):
    from aefast.bench import static

    request.getfixturevalue(state)
    with pytest.raises(InputError, match=message):
        static.estimates()
