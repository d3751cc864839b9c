"""The Triton kernels of corrupt in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import dataclasses
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

import triton.language as tl

from aefast.kernels.triton import corrupt as kernels
from aefast.ops import _philox
from aefast.ops import corrupt as op
from aefast.ops.corrupt import Noise
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]

NOISES = {
    "salt_and_pepper": Noise("salt_and_pepper", -1.1, 2.3, 2**30, 1),
    "masking": Noise("masking", 0.0, 0.0, 2**30, 1),
    "dropout": Noise("dropout", 1 / 0.9, 0.0, 2**30, 1),
    "gaussian": Noise("gaussian", 0.1, 0.7, 0, 1),
}


def normal(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def ours(x, seed, noise):
    return kernels.corrupt(x, torch.tensor(seed), *noise.arguments)


def eager(x, seed, noise):
    return op._reference(x, torch.tensor(seed), noise)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype):
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["salt_and_pepper", "masking", "dropout"])
def test_what_is_replaced_is_bitwise_the_reference(kind, dtype):
    """At a whole number of programs, at one element more and less, and for the gradient."""
    noise = NOISES[kind]
    block = kernels.BLOCK_BYTES // dtype.itemsize
    for count in (block, 2 * block + 1, block - 1, 3):
        x = normal(count, dtype=dtype)
        for one in (noise, noise.gradient):
            out = ours(x, 2**40 + 1, one)
            assert out.dtype == dtype and torch.equal(out, eager(x, 2**40 + 1, one))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_gaussian_noise_is_that_of_the_seed(dtype, tolerance):
    x = torch.zeros(1031, dtype=dtype)
    out = ours(x, -5, Noise("gaussian", 0.0, 1.0, 0, 1))
    assert (out.double() - _philox.normals(torch.tensor(-5), x.shape, torch.float64)).abs().max() <= tolerance


def test_float64_is_exact_in_its_options():
    """1/10 and 1/0.9 as float32 has them would be wrong by 1e-9."""
    x = torch.zeros(8, dtype=torch.float64)
    assert (ours(x, 1, Noise("gaussian", 0.1, 0.0, 0, 1)) == 0.1).all()
    ones = torch.ones(64, dtype=torch.float64)
    assert set(ours(ones, 1, NOISES["dropout"]).tolist()) == {0.0, 1 / 0.9}


@pytest.mark.parametrize("kind", ["salt_and_pepper", "masking", "dropout"])
def test_limits_are_compared_as_unsigned(kind):
    x = normal(4000) + 10
    words = _philox.words(torch.tensor(7), 4000)
    for limit in (1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32):
        noise = Noise(kind, -1.0 if kind == "salt_and_pepper" else 2.0, -2.0, limit, 1)
        out = ours(x, 7, noise)
        assert torch.equal(out, eager(x, 7, noise))
        replaced = out <= 0
        assert torch.equal(replaced, words < limit)
        if kind == "salt_and_pepper":
            assert torch.equal(out == -1.0, words < limit // 2)
    assert replaced.all()


@pytest.mark.parametrize(
    "limit, expected", [(1, [-2, 9, 9, 9]), (2**31, [-1, -1, 9, 9]), (2**32, [-1, -1, -2, -2])]
)
def test_words_at_the_limits(limit, expected, monkeypatch):
    """No draw of a test's size has these words, so they are made up."""

    def made_up(seed, offset, block):
        zero = (block * 0).to(tl.uint32)
        return zero, zero + (2**30 - 1), zero + 2**31, zero + (2**32 - 1)

    monkeypatch.setattr(kernels, "block_words", made_up)
    out = ours(torch.full((4,), 9.0), 0, Noise("salt_and_pepper", -1.0, -2.0, limit, 1))
    assert out.tolist() == expected


@pytest.mark.parametrize("kind", NOISES)
def test_results_do_not_depend_on_the_launch(kind, monkeypatch):
    x = normal(1100)
    expected = ours(x, 3, NOISES[kind])
    for size in (512, 2048, 2**15):
        monkeypatch.setattr(kernels, "BLOCK_BYTES", size)
        assert torch.equal(ours(x, 3, NOISES[kind]), expected)


@pytest.mark.parametrize(
    ("side", "dtype"),
    [
        *((side, torch.float32) for side in (2, 3, 4, 5, 6, 7, 8, 30, 2**31 - 1)),
        *((side, dtype) for side in (3, 8, 30) for dtype in DTYPES if dtype != torch.float32),
    ],
)
def test_squares(side, dtype, monkeypatch):
    """Sides that four columns divide or do not, of images that squares or tiles do not fit."""
    for shape in ((2, 3, 9, 21), (3, 1, 8, 16), (1, 2, 5, 132)):
        x = normal(*shape, dtype=dtype)
        noise = Noise("masking", 0.0, 0.0, 2**31, side)
        # One square holds the image, whatever its side; the reference makes all of it.
        expected = eager(x, 11, dataclasses.replace(noise, block=min(side, 200)))
        # In other dtypes the places are the same.
        for tile in (1024, 4096) if dtype == torch.float32 else (4096,):
            monkeypatch.setattr(kernels, "SQUARES_TILE", tile)
            assert torch.equal(ours(x, 11, noise), expected)


def test_all_squares_are_masked_at_the_largest_limit():
    assert (ours(torch.ones(2, 3, 9, 13), 1, Noise("masking", 0.0, 0.0, 2**32, 4)) == 0).all()
