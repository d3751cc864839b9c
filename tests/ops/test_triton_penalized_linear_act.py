"""The Triton kernels of penalized_linear_act in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from aefast.kernels.activation import ACTIVATIONS, NEED_BIAS, NEED_WEIGHT, NEED_X, STORES_DERIVATIVE
from aefast.kernels.penalty import EPS, PENALTIES
from aefast.kernels.triton import penalized_linear_act as kernels
from aefast.ops import penalized_linear_act as op
from support import numerics

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.usefixtures("poisoned_memory"),
    # Of an empty batch, and of pre-activations that are not finite.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float64, torch.float16]
ALL = NEED_X | NEED_WEIGHT | NEED_BIAS


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(M=9, K=7, N=6, dtype=torch.float32):
    """Outputs of about 0.4, whatever the activation: in between the rate and 1."""
    weight, bias = normal(N, K, seed=1) * 0.1 * max(1, K) ** -0.5, 0.4 + 0.05 * normal(N, seed=2)
    return normal(M, K, dtype=dtype), weight.to(dtype), bias.to(dtype)


def backward_operands(operands, activation, penalty):
    """What the launcher's forward leaves for its backward: saved, h, sums."""
    h, _, sums, derivative = kernels.penalized_linear_act(*operands, activation, penalty, 0.1, True)
    saved = derivative if activation in STORES_DERIVATIVE else None if activation == "identity" else h
    return saved, (h if penalty == "l1" else None), sums


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype):
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_activation(dtype, activation, penalty):
    # A whole tile of rows and a part of one; the samples have the other sizes.
    x, weight, bias = layer(70, 5, 33, dtype)
    settings = {"activation": activation, "penalty": penalty, "negative_slope": 0.2, "alpha": 0.7}
    # Where the two parts of a slope cancel, one draw of few elements says little of rounding.
    draws = [
        {"x": x, "weight": weight, "bias": bias + 0.01 * index, "rate": 0.1, **settings}
        for index in range(4 if penalty == "kl" else 1)
    ]
    numerics.check_draws(op.OP, "triton", draws, dtype)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("given", [(0,), (1,), (0, 1)])
def test_either_gradient_may_be_absent(given, activation, penalty):
    operands = layer()
    kept = backward_operands(operands, activation, penalty)
    grads = [
        one if index in given else None
        for index, one in enumerate((normal(9, 6, seed=3), normal(1, seed=4)[0]))
    ]
    leaves = [tensor.double().requires_grad_() for tensor in operands]
    outputs = op._reference(*leaves, activation, penalty, 0.1)
    exact = torch.autograd.grad(
        [outputs[index] for index in given], leaves, [grads[index].double() for index in given]
    )
    found = kernels.penalized_linear_act_backward(*grads, *operands[:2], *kept, activation, penalty, 0.1, ALL)
    for ours, true in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("needs", range(8))
def test_computes_what_is_needed(needs, activation, penalty):
    operands = layer()
    kept = backward_operands(operands, activation, penalty)
    grads = normal(9, 6, seed=3), normal(1, seed=4)[0]

    def gradients(needs):
        return kernels.penalized_linear_act_backward(
            *grads, *operands[:2], *kept, activation, penalty, 0.1, needs
        )

    for bit, ours, true in zip(
        (NEED_X, NEED_WEIGHT, NEED_BIAS), gradients(needs), gradients(ALL), strict=True
    ):
        assert torch.equal(ours, true) if needs & bit else ours is None


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradients_of_any_strides(penalty):
    operands = layer()
    kept = backward_operands(operands, "silu", penalty)
    grad, grad_penalty = normal(9, 6, seed=3), normal(1, seed=4)[0]

    def gradients(grad):
        arguments = (*operands[:2], *kept, "silu", penalty, 0.1, ALL)
        return kernels.penalized_linear_act_backward(grad, grad_penalty, *arguments)

    for strided in (
        grad.t().contiguous().t(),
        grad.repeat(1, 2)[:, :6],
        grad.repeat_interleave(2, 1)[:, ::2],
    ):
        assert all(torch.equal(a, b) for a, b in zip(gradients(strided), gradients(grad), strict=True))
    one = torch.ones(())
    pairs = zip(gradients(one.expand(9, 6)), gradients(torch.ones(9, 6)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_sums_are_those_of_what_is_stored(penalty):
    """Rounded to half precision, and added up wide: 3000 rows of about 1/2 would overflow nothing, but stand still."""
    h, value, sums, _ = kernels.penalized_linear_act(
        *layer(3000, 3, 5, torch.float16), "sigmoid", penalty, 0.1, True
    )
    assert value.dtype == torch.float32
    if penalty == "l1":
        assert sums is None
        torch.testing.assert_close(value.double(), h.double().abs().sum() / 3000, rtol=1e-6, atol=0)
    else:
        torch.testing.assert_close(sums.double(), h.double().sum(0), rtol=1e-6, atol=0)


def test_many_features():
    """More than penalty_kernel has lanes."""
    operands = layer(3, 2, 2051, torch.float64)
    for penalty in PENALTIES:
        _, value, _, _ = kernels.penalized_linear_act(*operands, "sigmoid", penalty, 0.1, True)
        expected = op._reference(*operands, "sigmoid", penalty, 0.1)[1]
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_activations_are_clamped(dtype):
    x, weight = torch.ones(5, 1, dtype=dtype), torch.tensor([[-1.0], [0.25], [3.0]], dtype=dtype)
    h, value, sums, _ = kernels.penalized_linear_act(x, weight, None, "relu", "kl", 0.1, True)
    # The bounds as the accumulator has them: of float32 there are few beside 1.
    q = torch.tensor([EPS, 0.25, 1 - EPS], dtype=sums.dtype)
    expected = (0.1 * (0.1 / q).log() + 0.9 * (0.9 / (1 - q)).log()).sum()
    torch.testing.assert_close(value, expected)
    one = torch.ones((), dtype=sums.dtype)
    _, to_weight, _ = kernels.penalized_linear_act_backward(
        None, one, x, weight, h, None, sums, "relu", "kl", 0.1, ALL
    )
    slope = torch.tensor([[0.0], [-0.1 / 0.25 + 0.9 / 0.75], [0.0]])
    torch.testing.assert_close(to_weight.float(), slope, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_empty_operands(penalty):
    h, value, *_ = kernels.penalized_linear_act(*layer(0), "sigmoid", penalty, 0.1, True)
    assert h.shape == (0, 6) and value.isnan()
    h, value, *_ = kernels.penalized_linear_act(*layer(N=0), "sigmoid", penalty, 0.1, True)
    assert h.shape == (9, 0) and value == 0.0
    operands = layer(0)
    kept = backward_operands(operands, "sigmoid", penalty)
    found = kernels.penalized_linear_act_backward(
        None, torch.ones(()), *operands[:2], *kept, "sigmoid", penalty, 0.1, ALL
    )
    assert [gradient.shape for gradient in found] == [(0, 7), (6, 7), (6,)]
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_nan_propagates(penalty):
    x, weight, bias = layer()
    x[3, 1] = float("nan")
    _, value, *_ = kernels.penalized_linear_act(x, weight, bias, "relu", penalty, 0.1, True)
    assert value.isnan()
