"""The kernel of the largest elements, emulated, and kernels/cuda/selection.cu whole, against PyTorch's sort."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aefast.kernels import selection
from support.selection import check, draw, hard_rows

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "kernels/cuda"
KERNELS = CUDA / "selection_kernels.cuh"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 64  # elements past each result's end, which must stay untouched
# Rows, columns, k: one column, fewer than a chunk has, no whole chunks, fewer groups than k and more elements than
# there is room for, the largest k of both kernels and the least of the second, several chunks a thread.
SHAPES = (
    (3, 1, 1),
    (2, 7, 7),
    (3, 9, 9),
    (2, 1031, 40),
    (2, 1100, 256),
    (2, 2050, 257),
    (1, 2500, 1024),
    (1, 2048, 1024),
    (2, 9000, 32),
)


# --- the operator -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def largest(load_operators):
    return load_operators(CUDA / "selection.cu").largest


def select(largest, elements, k):
    size = elements.shape[0] * k
    values = torch.full((size + GUARD,), torch.nan, dtype=elements.dtype)
    indices = torch.full((size + GUARD,), -7)
    largest(elements, values[:size].view(-1, k), indices[:size].view(-1, k))
    assert values[size:].isnan().all() and (indices[size:] == -7).all()
    return values[:size].view(-1, k), indices[:size].view(-1, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(largest, shape, dtype):
    rows, columns, k = shape
    elements = draw(rows, columns, dtype=dtype)
    for _ in range(3):  # threads in other orders
        check(select(largest, elements, k), elements, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows(largest, dtype):
    for row, k in hard_rows():
        elements = row.to(dtype)[None]
        for _ in range(2):
            check(select(largest, elements, k), elements, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_aligned(largest, dtype):
    numbers = draw(2 * 1003 + 16, dtype=dtype)
    for offset in range(9):
        for columns in (1, 5, 1003):
            elements = numbers[offset : offset + 2 * columns].view(2, columns)
            check(select(largest, elements, min(columns, 17)), elements, min(columns, 17))


def test_no_rows(largest):
    values, indices = select(largest, torch.empty(0, 5), 2)
    assert values.shape == indices.shape == (0, 2)


def test_wrong_arguments_are_refused(largest):
    elements, values, indices = draw(4, 2000), torch.empty(4, 3), torch.empty(4, 3, dtype=torch.int64)
    for message, arguments in {
        "must be matrices": (elements[0], values, indices),
        "values must be": (elements, values[:3], indices),
        "dtype": (elements, values.half(), indices),
        "indices must be": (elements, values, indices.int()),
        "contiguous": (elements.t().contiguous().t(), values, indices),
        "k must be from 1": (elements, values[:, :0], indices[:, :0]),
        "at most 1073741824 columns": (
            torch.empty(1, 2**30 + 1, dtype=torch.half),
            values[:1].half(),
            indices[:1],
        ),
        "and the columns, got 3 of 2": (elements[:, :2].contiguous(), values, indices),
        "from 1 to 1024": (elements, torch.empty(4, 1025), torch.empty(4, 1025, dtype=torch.int64)),
        "float32, float16 or bfloat16": (elements.double(), values.double(), indices),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            largest(*arguments)
    assert (selection.MOST, selection.MOST_COLUMNS) == (1024, 2**30)


# --- barriers ---------------------------------------------------------------------------------------------

BARRIER = re.compile(r"__sync(threads|warp)\(\);")
BARRIERS = len(BARRIER.findall(KERNELS.read_text()))


def without_barrier(number):
    """The source without one of its barriers, or as it is."""
    count = iter(range(BARRIERS))
    return BARRIER.sub(lambda match: match[0] if next(count) != number else "", KERNELS.read_text())


# In a process of its own, since a broken kernel may read anywhere, and not end.
SELECT = """
import ctypes, signal, sys
import numpy as np

signal.alarm(60)
library, cases = ctypes.CDLL(sys.argv[1]), np.load(sys.argv[2])
for number in range(len(cases) // 2):
    row, expected = cases[f"row {number}"], cases[f"indices {number}"]
    values, indices = np.full(len(expected), np.nan, np.float32), np.full(len(expected), -1, np.int64)
    pointers = [ctypes.c_void_p(one.ctypes.data) for one in (row, values, indices)]
    for seed in range(8):
        library.largest(*pointers, ctypes.c_int64(1), len(row), len(expected), ctypes.c_uint64(seed))
        if (indices != expected).any():
            sys.exit("wrong")
print("right")
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    path, arrays = tmp_path_factory.mktemp("selection") / "cases.npz", {}
    for number, (row, k) in enumerate([(draw(9000), 32), *hard_rows()]):
        arrays[f"row {number}"] = row.numpy()
        arrays[f"indices {number}"] = selection.largest(row[None], k)[0].numpy()
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("number", [None, *range(BARRIERS)])
def test_a_missing_barrier_is_caught(compile_emulated, cases, tmp_path, number):
    (tmp_path / KERNELS.name).write_text(without_barrier(number))
    library = compile_emulated(HERE / "selection_driver.cpp", first_include=tmp_path)
    child = subprocess.run([sys.executable, "-c", SELECT, library, cases], capture_output=True, text=True)
    assert (child.stdout == "right\n") == (number is None), child.stderr
