"""kernels/cuda/linear_act.cu whole, on CPU tensors: the operators' glue, with emulated kernels."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aefast.kernels.activation import (
    ACTIVATIONS,
    NEED_BIAS,
    NEED_WEIGHT,
    NEED_X,
    STORES_DERIVATIVE,
    specification,
)

SOURCE = Path(__file__).parents[2] / "kernels/cuda/linear_act.cu"
SLOPE, ALPHA = 0.2, 1.3
NEED_ALL = NEED_X | NEED_WEIGHT | NEED_BIAS

FORWARD = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, SLOPE),
    "elu": lambda x: F.elu(x, ALPHA),
    "selu": F.selu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


@pytest.fixture(scope="module")
def ops(load_operators):
    return load_operators(SOURCE)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def eager_gradients(names, grad, x, weights, biases):
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    bias_leaves = [None if b is None else b.detach().clone().requires_grad_() for b in biases]
    out = leaves[0]
    for name, weight, bias in zip(names, leaves[1:], bias_leaves, strict=True):
        out = FORWARD[name](F.linear(out, weight, bias))
    wanted = leaves + [b for b in bias_leaves if b is not None]
    gradients = iter(torch.autograd.grad(out, wanted, grad))
    d_x, *d_weights = [next(gradients) for _ in leaves]
    return out, d_x, d_weights, [None if b is None else next(gradients) for b in bias_leaves]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linear_act(ops, name, with_bias):
    x, weight, grad = random(11, 6, seed=1), random(9, 6, seed=2), random(11, 9, seed=3)
    bias = random(9, seed=4) if with_bias else None
    specified = specification(name, SLOPE, ALPHA)
    out, derivative = ops.linear_act(x, weight, bias, specified, True)
    assert (derivative is not None) == (name in STORES_DERIVATIVE)
    saved = None if name == "identity" else out if derivative is None else derivative
    needs = NEED_ALL if with_bias else NEED_X | NEED_WEIGHT
    d_x, d_weight, d_bias = ops.linear_act_backward(grad, x, weight, saved, specified, needs)

    expected, e_x, (e_weight,), (e_bias,) = eager_gradients([name], grad, x, [weight], [bias])
    for actual, reference in ((out, expected), (d_x, e_x), (d_weight, e_weight), (d_bias, e_bias)):
        assert (actual is None) == (reference is None)
        if reference is not None:
            torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)

    without, none = ops.linear_act(x, weight, bias, specified, False)
    torch.testing.assert_close(without, out, rtol=0, atol=0)
    assert none is None
    nothing = ops.linear_act_backward(grad, x, weight, saved, specified, 0)
    assert nothing == (None, None, None)


def test_strided_and_expanded_tensors(ops):
    x, weight = random(6, 11, seed=1).t(), random(6, 9, seed=2).t()
    grad = random(1, 9, seed=3).expand(11, 9)
    for name in ("identity", "tanh"):
        out, _ = ops.linear_act(x, weight, None, name, True)
        saved = None if name == "identity" else out.t().contiguous().t()
        gradients = ops.linear_act_backward(grad, x, weight, saved, name, NEED_ALL)
        zeros = torch.zeros(9, dtype=torch.float64)
        _, d_x, (d_weight,), (d_bias,) = eager_gradients([name], grad, x, [weight], [zeros])
        torch.testing.assert_close(gradients, (d_x, d_weight, d_bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0)], ids=str)
def test_empty_tensors(ops, shape):
    rows, k, n = shape
    x, weight, bias, grad = random(rows, k), random(n, k), random(n), random(rows, n)
    out, _ = ops.linear_act(x, weight, bias, "relu", True)
    gradients = ops.linear_act_backward(grad, x, weight, out, "relu", NEED_ALL)
    expected, d_x, (d_weight,), (d_bias,) = eager_gradients(["relu"], grad, x, [weight], [bias])
    torch.testing.assert_close((out, *gradients), (expected, d_x, d_weight, d_bias))


MLP = ["gelu", "relu", "identity", "tanh", "silu"]
SIZES = [5, 8, 7, 7, 3, 6]


def mlp_arguments():
    weights = [random(n, k, seed=n + k) for k, n in pairwise(SIZES)]
    biases = [None if layer == 2 else random(len(weight), seed=layer) for layer, weight in enumerate(weights)]
    return random(10, SIZES[0], seed=7), weights, biases, ",".join(MLP)


def test_mlp(ops):
    x, weights, biases, codes = mlp_arguments()
    grad = random(10, SIZES[-1], seed=8)
    saved = ops.mlp(x, weights, biases, codes, True)
    assert len(saved) == len(MLP) + sum(name in STORES_DERIVATIVE for name in MLP)
    gradients = ops.mlp_backward(grad, x, weights, saved, codes, "1" + "11111" + "11011")
    expected, *exact = eager_gradients(MLP, grad, x, weights, biases)
    exact = [exact[0], *exact[1], *(gradient for gradient in exact[2] if gradient is not None)]
    torch.testing.assert_close(saved[4], expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients, exact, rtol=1e-11, atol=1e-12)

    (only,) = ops.mlp(x, weights, biases, codes, False)
    assert torch.equal(only, saved[4])


def test_mlp_computes_only_what_is_wanted(ops):
    x, weights, biases, codes = mlp_arguments()
    grad = random(10, SIZES[-1], seed=8)
    saved = ops.mlp(x, weights, biases, codes, True)
    arguments = (grad, x, weights, saved, codes)
    every = ops.mlp_backward(*arguments, "1" * 11)
    weight, bias = ops.mlp_backward(*arguments, "0" + "00010" + "01000")
    assert torch.equal(weight, every[1 + 3]) and torch.equal(bias, every[1 + 5 + 1])
    assert ops.mlp_backward(*arguments, "0" * 11) == []


def test_mlp_refuses_arguments_that_do_not_fit(ops):
    x, weights, biases, codes = mlp_arguments()
    grad = random(10, SIZES[-1], seed=8)
    saved = ops.mlp(x, weights, biases, codes, True)
    for message, *arguments in (
        ("one entry a layer", weights, saved, codes + ",relu", "1" * 11),
        ("unknown activation", weights, saved, codes.replace("gelu", "swish"), "1" * 11),
        ("needs must have", weights, saved, codes, "1" * 10),
        ("saved must hold 7 tensors", weights, saved[:-1], codes, "1" * 11),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.mlp_backward(grad, x, *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(ops, dtype):
    x, weight, bias = (random(*shape, seed=1).to(dtype) for shape in ((20, 16), (24, 16), (24,)))
    grad = random(20, 24, seed=2).to(dtype)
    out, derivative = ops.linear_act(x, weight, bias, "gelu", True)
    gradients = ops.linear_act_backward(grad, x, weight, derivative, "gelu", NEED_ALL)
    double = [t.double() for t in (grad, x, weight, bias)]
    expected, d_x, (d_weight,), (d_bias,) = eager_gradients(["gelu"], *double[:2], [double[2]], [double[3]])
    tolerance = 20 * torch.finfo(dtype).eps
    for actual, reference in zip((out, *gradients), (expected, d_x, d_weight, d_bias), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), reference, rtol=tolerance, atol=tolerance)


def test_wrong_arguments_are_refused(ops):
    x, weight = random(4, 3), random(5, 3)
    with pytest.raises(RuntimeError, match="unknown activation rellu"):
        ops.linear_act(x, weight, None, "rellu", False)
    for wrong in ("elu", "elu:", "elu:-1", "elu:1x", "relu:1", "leaky_relu:inf", "leaky_relu:nan"):
        with pytest.raises(RuntimeError, match=f"unknown activation {wrong}"):
            ops.linear_act(x, weight, None, wrong, False)
    with pytest.raises(RuntimeError, match="weight must be"):
        ops.linear_act(x, random(5, 4), None, "identity", False)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear_act(x, weight.float(), None, "identity", False)
    with pytest.raises(RuntimeError, match="saved must be"):
        ops.linear_act_backward(random(4, 5), x, weight, random(3, 5), "relu", NEED_ALL)
