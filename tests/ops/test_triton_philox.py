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
def squared_radii_of(out, words, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(out + index, kernels.squared_radius(tl.load(words + index).to(tl.uint32)))


@triton.jit
def sines_and_cosines_of(sines, cosines, words, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    sine, cosine = kernels.sine_and_cosine(tl.load(words + index).to(tl.uint32))
    tl.store(sines + index, sine)
    tl.store(cosines + index, cosine)


@triton.jit
def normals_in_double_of(out, seed, first_block, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS).to(tl.int64) + first_block
    found = kernels.normals(seed, 0, block, True)
    for index in tl.static_range(4):
        tl.store(out + tl.arange(0, BLOCKS) * 4 + index, found[index])


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
    # Three spacings of the largest value, 6.8.
    np.testing.assert_allclose(
        out.numpy(), philox.normals(seed, offset, first_block, blocks), rtol=0, atol=2e-6
    )


def test_values_in_double():
    out = torch.empty(4 * 256, dtype=torch.float64)
    normals_in_double_of[(1,)](out, 2**33 + 7, 5, BLOCKS=256)
    np.testing.assert_allclose(out.numpy(), philox.normals(2**33 + 7, 0, 5, 256), rtol=0, atol=1e-13)


def near(*words):
    """Each of `words` and the words around it, as many as a power of two."""
    return torch.tensor(
        [(word + step) % 2**32 for word in words for step in (-2, -1, 0, 1)], dtype=torch.int64
    )


def test_squared_radius():
    """At the ends, where the uniform would round to 0 or to 1, and at 1/2, where its complement takes over."""
    words = near(0, 2, 2**31, 2**32 - 2, 2**24, 2**32 - 2**24, 3 * 2**30, 2**30)
    out = torch.empty(len(words))
    squared_radii_of[(1,)](out, words, COUNT=len(words))
    u = (words.double() + 0.5) * 2.0**-32
    exact = torch.where(u < 0.5, -2 * u.log(), -2 * torch.log1p(-(2.0**32 - words.double() - 0.5) * 2.0**-32))
    assert ((out.double() - exact).abs() <= 3 * 2.0**-23 * exact).all()
    ends = torch.tensor([0, 2**32 - 1] * 2)
    squared_radii_of[(1,)](out, ends, COUNT=4)
    least, most = out[1].item(), out[0].item()
    assert most == pytest.approx(2 * 33 * np.log(2), rel=4e-7) and least == pytest.approx(2.0**-32, rel=4e-7)


def test_sine_and_cosine():
    """At quarter turns one of them is next to 0 and keeps its digits there; at eighths they change places."""
    words = near(*(turn * 2**29 for turn in range(8)))
    sines, cosines = torch.empty(len(words)), torch.empty(len(words))
    sines_and_cosines_of[(1,)](sines, cosines, words, COUNT=len(words))
    # From the nearest quarter turn, so that the truth keeps its digits too.
    quarter = (words + 2**29) // 2**30
    rest = (words - quarter * 2**30 + 0.5).double() * (2 * np.pi * 2.0**-32)
    sine, cosine = rest.sin(), rest.cos()
    turned = torch.stack([sine, cosine, -sine, -cosine, sine])
    index = torch.arange(len(words))
    for found, exact in ((sines, turned[quarter % 4, index]), (cosines, turned[quarter % 4 + 1, index])):
        assert ((found.double() - exact).abs() <= 2 * 2.0**-23 * exact.abs()).all()
