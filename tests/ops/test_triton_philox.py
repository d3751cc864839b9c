"""kernels/triton/philox.py in Triton's interpreter: the same noise as kernels/include/philox.h."""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from aefast.kernels.triton import philox as kernels
from support import philox

pytestmark = pytest.mark.interpret


@triton.jit
def words_of(out, seed, offset, first_block, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS).to(tl.int64) + first_block
    found = kernels.block_words(seed, offset, block)
    for index in tl.static_range(4):
        tl.store(out + tl.arange(0, BLOCKS) * 4 + index, found[index].to(tl.int64))


@triton.jit
def normals_of(out, seed, offset, first_block, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS).to(tl.int64) + first_block
    found = kernels.normals(seed, offset, block)
    for index in tl.static_range(4):
        tl.store(out + tl.arange(0, BLOCKS) * 4 + index, found[index])


@triton.jit
def uniforms_of(out, words, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(out + index, kernels.uniform(tl.load(words + index).to(tl.uint32)))


def signed(number):
    """The int64 with the bits of a uint64."""
    return number - 2**64 if number >= 2**63 else number


@pytest.mark.parametrize(("counter", "key", "expected"), philox.KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    out = torch.zeros(8, dtype=torch.int64)
    seed, offset = key[0] + (key[1] << 32), counter[2] + (counter[3] << 32)
    words_of[(1,)](out, signed(seed), signed(offset), signed(counter[0] + (counter[1] << 32)), BLOCKS=2)
    assert tuple(out[:4].tolist()) == expected


@pytest.mark.parametrize(
    ("seed", "offset", "first_block"),
    [(0, 0, 0), (1, 2, 3), (2**64 - 1, 2**40 + 5, 2**32 - 100), (2**33 + 7, 2**63, 2**45)],
)
def test_values_are_those_of_the_reference(seed, offset, first_block):
    blocks = 1024
    out = torch.empty(4 * blocks)
    normals_of[(1,)](out, signed(seed), signed(offset), first_block, BLOCKS=blocks)
    # As for the C++ functions: a spacing of each function, times a radius of at most 6.8.
    np.testing.assert_allclose(
        out.numpy(), philox.normals(seed, offset, first_block, blocks), rtol=0, atol=4e-6
    )


def test_uniforms_are_inside():
    words = torch.tensor([0, 0xFFFFFFFF, 0x80000000, 0xFFFFFF80], dtype=torch.int64)
    out = torch.empty(4)
    uniforms_of[(1,)](out, words, COUNT=4)
    assert out.tolist() == [2.0**-33, 1 - 2.0**-24, 0.5, 1 - 2.0**-24]
