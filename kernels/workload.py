"""What a launch of a kernel is asked to do at a stated shape: bench/static.py reads it beside the machine code."""

from __future__ import annotations

from dataclasses import dataclass

# The layer that shapes are those of: large enough that no cache holds it, and the launch is no matter.
BATCH, FEATURES = 65536, 1024


@dataclass(frozen=True)
class Workload:
    """One launch. A last program or pass that is only partly filled counts as a whole one.

    `bytes`, `flops` and `exps` are the least that any kernel for this task would have to do: every operand read
    once, every result written once, the operations of its products, exponentials and logarithms.
    """

    shape: str  # rows × columns, and for a product × the length of its sums
    dtype: str  # of the operands; "tf32" and "fp32" differ in the units that multiply
    programs: int  # thread blocks
    warps: int  # of a program
    elements: int  # that instructions are divided by: of the result, or of what a sum reads
    bytes: int
    flops: int = 0
    exps: int = 0
    passes: int = 1  # of the hot loop, in every warp; 1 also where there is none
    # Of the hot loop in one pass of the loop around it, of that one in one of the next, and so on, where what these do
    # besides counts. None of the others: their blocks count once.
    nested: tuple[int, ...] = ()
    # An opcode of loops over edges of the data, of which shapes of whole tiles have few, where the hot loop has none.
    edge: str | None = None
    # Moved by a program to or from global memory in a pass, where the compiler may unroll the loop.
    pass_bytes: int | None = None
    # Loaded through tensor descriptors by a program in a pass: their instructions do not say how much.
    descriptor_bytes: int = 0
    # Distinct bytes that the launch reads and writes, where programs load the same ones and L2 serves them all but
    # the first time. None: all that is requested comes from memory.
    distinct_bytes: int | None = None
