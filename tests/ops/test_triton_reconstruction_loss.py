"""The Triton kernels of losses in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from aefast.kernels.triton import loss_gradient as gradient_kernels
from aefast.kernels.triton import reconstruction_loss as kernels
from aefast.ops import _loss
from aefast.ops import reconstruction_loss as op
from aefast.ops._loss import Loss
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]
LOSSES = [
    Loss("mse"),
    Loss("mse", root=True),
    Loss("l1"),
    Loss("huber", 0.7),
    Loss("lp", 1.5),
    Loss("lp", 3.5),
    Loss("charbonnier", 0.1),
    Loss("bce"),
    Loss("bce_with_logits"),
]


def pair(*shape, dtype=torch.float32, seed=0):
    """Probabilities, which every loss takes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype):
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_runs_of_blocks(loss, monkeypatch):
    """More blocks than programs, the last of them partly filled, and programs that are left with nothing."""
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "PROGRAMS", 5)
    for count in (64, 63, 65, 640, 64 * 12 + 1, 64 * 11, 1):
        input, target = pair(count)
        arguments = (loss.kind, loss.parameter, 1 / count, loss.root, 0.5, True, False)
        value, gradient = kernels.reconstruction_loss(input, target, *arguments)
        leaf = input.double().requires_grad_()
        exact = loss.elements(leaf, target.double()).sum()
        (slope,) = torch.autograd.grad(exact, leaf)
        exact = exact.detach() / count
        torch.testing.assert_close(value.double(), exact.sqrt() if loss.root else exact, rtol=2e-6, atol=1e-9)
        torch.testing.assert_close(gradient.double(), 0.5 * slope, rtol=2e-6, atol=1e-7)


def test_sums_repeat_and_count_alone_decides(monkeypatch):
    input, target = pair(5000)
    arguments = ("mse", 0.0, 1.0, False, 1.0)
    first, _ = kernels.reconstruction_loss(input, target, *arguments, True, False)
    again, none = kernels.reconstruction_loss(input, target, *arguments, False, False)
    assert torch.equal(first, again) and none.shape == (0,)


@pytest.mark.parametrize("p", [1.0078125, 1.5, 3.0, 4.5, 8.0])
def test_powers_of_any_size(p):
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    residual = (
        torch.exp2(exponents) * (1 + torch.rand(277, generator=generator, dtype=torch.float64))
    ).float()
    residual = torch.cat((residual, -residual, torch.tensor([0.0, math.inf, -math.inf, math.nan])))
    loss, zeros = Loss("lp", p), torch.zeros_like(residual)
    values = kernels.reconstruction_loss_elements(residual, zeros, "lp", p, False)
    slopes = kernels.reconstruction_loss_backward(torch.tensor(1.0), residual, zeros, "lp", p, 1.0)
    leaf = residual.double().requires_grad_()
    exact = loss.elements(leaf, zeros.double())
    (exact_slopes,) = torch.autograd.grad(exact.sum(), leaf)
    for ours, true in ((values, exact.detach().float()), (slopes, exact_slopes.float())):
        assert ours[-1].isnan()
        ours, true = ours[:-1], true[:-1]
        is_large = true.abs() > 3e38
        error = (ours.double() - true.double()).abs()[~is_large]
        assert (error <= 4e-7 * (1 + p / 3) * true.double().abs()[~is_large] + 1e-37).all()
        assert (ours.abs()[is_large] > 3e38).all()


def test_nan_goes_through():
    input, target = pair(4)
    for loss in LOSSES:
        for place in (input, target):
            kept, place[1] = place[1].clone(), math.nan
            values = kernels.reconstruction_loss_elements(input, target, loss.kind, loss.parameter, False)
            place[1] = kept
            assert values.isnan().tolist() == [False, True, False, False], loss


def test_logarithms_are_cut_off():
    input = torch.tensor([0.0, 1e-40, 1e-30, 1e-7, 1e-3, 0.3, 0.5, 0.7, 1 - 2**-24, 1.0]).repeat(2)
    target = torch.tensor([0.0] * 10 + [1.0] * 10)
    loss = Loss("bce")
    values = kernels.reconstruction_loss_elements(input, target, "bce", 0.0, False)
    slopes = kernels.reconstruction_loss_backward(torch.tensor(1.0), input, target, "bce", 0.0, 1.0)
    leaf = input.double().requires_grad_()
    exact = loss.elements(leaf, target.double())
    (exact_slopes,) = torch.autograd.grad(exact.sum(), leaf)
    torch.testing.assert_close(values.double(), exact.detach(), rtol=1e-6, atol=1e-37)
    torch.testing.assert_close(slopes.double(), exact_slopes, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_gradient(dtype, monkeypatch):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    monkeypatch.setattr(gradient_kernels, "BLOCK_BYTES", 512)
    for shape in ((0,), (), (1,), (700,), (3, 100), (5, 7, 9), (2, 300), (4, 1)):
        gradient = pair(*shape, dtype=dtype)[0]
        grads = [torch.tensor(0.3, dtype=wide)]
        if shape and shape[0] > 0:
            grads += [pair(shape[0], dtype=wide)[0], pair(2 * shape[0], dtype=wide)[0][::2]]
        for grad in grads:
            factor = (grad.double() * 0.7).to(wide)
            factor = factor.reshape(factor.shape + (1,) * (gradient.dim() - factor.dim()))
            expected = (gradient.to(wide) * factor).to(dtype)
            assert torch.equal(_loss.scaled(gradient, grad, 0.7, 1, "triton"), expected)
