"""The Triton kernel of the largest elements in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32 and float16 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from aefast.kernels.triton import selection
from support.selection import check, draw, hard_rows

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float16]


def select(elements, k):
    values = torch.full((len(elements), k), torch.nan, dtype=elements.dtype)
    indices = torch.full((len(elements), k), -7)
    selection.select(elements, values, indices)
    return values, indices


# Rows, columns, k: one column, fewer than k places have, one tile and more than one, the largest k, several tiles.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (2, 7, 7), (3, 1031, 40), (1, 2048, 1024), (2, 9000, 32)], ids=str
)
def test_shapes(shape, dtype):
    rows, columns, k = shape
    elements = draw(rows, columns, dtype=dtype)
    check(select(elements, k), elements, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_rows(dtype):
    for row, k in hard_rows():
        elements = row.to(dtype)[None]
        check(select(elements, k), elements, k)


@pytest.mark.parametrize("at_once", [1, 100, 10**6])
def test_what_pytorch_selects(monkeypatch, at_once):
    monkeypatch.setattr(selection, "AT_ONCE_BY_TORCH", at_once)
    for elements, k in ((draw(3, 50).double(), 7), (draw(2, 3000), selection.MOST + 1)):
        check(select(elements, k), elements, k)


def test_no_rows():
    assert select(torch.empty(0, 5), 2)[0].shape == (0, 2)
