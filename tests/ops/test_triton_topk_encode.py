"""The Triton kernels of topk_encode in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import dataclasses
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

import aefast
import aefast.functional as AF
from aefast.kernels.triton import topk_encode as launchers
from aefast.ops import topk_encode as op
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]
VALUES = dataclasses.replace(
    op.OP,
    function=lambda **given: AF.topk_encode(**given)[0],
    reference=lambda **given: op.reference(**given)[0],
)


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype):
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        # The interpreter takes milliseconds for a latent.
        if len(sample["weight"]) > 300:
            continue
        numerics.check(VALUES, "triton", sample, dtype, expand_grad=index % 2 == 0)
        with aefast.backend("triton"):
            _, found = AF.topk_encode(**sample)
        assert found.dtype == torch.int64
        assert torch.equal(found, op.reference(**numerics.cast(sample, torch.float64))[1])


def test_rows_at_a_time(monkeypatch):
    """However many there are."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((17, 6), (40, 6)))
    expected = launchers.topk_encode(x, weight, None, 5)
    for size, least in ((0, 1), (0, 5), (4 * 40 * 3, 1), (10**6, 1)):
        monkeypatch.setattr(launchers, "BYTES", size)
        monkeypatch.setattr(launchers, "ROWS", least)
        found = launchers.topk_encode(x, weight, None, 5)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(dtype):
    bias = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("nan"), float("-inf"), 1.0, float("nan")])
    values, indices = launchers.topk_encode(
        torch.ones(2, 1, dtype=dtype), torch.zeros(8, 1, dtype=dtype), bias.to(dtype), 8
    )
    assert indices.tolist() == [[4, 7, 3, 2, 6, 0, 1, 5]] * 2
    torch.testing.assert_close(values, bias.to(dtype)[indices], rtol=0, atol=0, equal_nan=True)


def test_only_the_gradients_asked_for():
    x, weight, grad = draw(6, 5), draw(9, 5, seed=1), draw(6, 2, seed=2)
    indices = torch.arange(12).reshape(6, 2) % 9
    every = launchers.topk_encode_backward(grad, indices, x, weight, 7)
    for needs in range(1, 8):
        found = launchers.topk_encode_backward(grad, indices, x, weight, needs)
        for bit, ours, theirs in zip((1, 2, 4), found, every, strict=True):
            assert torch.equal(ours, theirs) if needs & bit else ours is None


def test_opcheck():
    for wants in (False, True):
        x, weight, bias = (draw(*shape).requires_grad_(wants) for shape in ((4, 3), (7, 3), (7,)))
        torch.library.opcheck(torch.ops.aefast.topk_encode.default, (x, weight, bias, 2, "triton"))
    for needs in range(1, 8):
        arguments = (draw(4, 2), torch.arange(8).reshape(4, 2) % 7, draw(4, 3), draw(7, 3), needs, "triton")
        torch.library.opcheck(torch.ops.aefast.topk_encode_backward.default, arguments)


def test_derivatives():
    inputs = [draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 2), (7, 2), (7,))]

    def values(x, weight, bias):
        return AF.topk_encode(x, weight, bias, 2)[0]

    with aefast.backend("triton"):
        assert torch.autograd.gradcheck(values, inputs)
        assert torch.autograd.gradgradcheck(values, inputs)


def test_compiles_whole():
    x, weight = draw(4, 3).requires_grad_(), draw(7, 3).requires_grad_()

    def loss(x, weight):
        values, indices = AF.topk_encode(x, weight, None, 2)
        return values.square().sum() + indices.sum()

    with aefast.backend("triton"):
        expected = loss(x, weight), *torch.autograd.grad(loss(x, weight), (x, weight))
        value = torch.compile(loss, fullgraph=True)(x, weight)
        found = value, *torch.autograd.grad(value, (x, weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
