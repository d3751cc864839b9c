import itertools

import pytest
import torch

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.kernels.activation import ACTIVATIONS
from aefast.ops import mlp
from support import numerics

OP = mlp.OP
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]


def operands(widths=(5, 4, 3), rows=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)

    weights = [draw(n, k) for k, n in itertools.pairwise(widths)]
    return draw(rows, widths[0]), weights, [draw(n) for n in widths[1:]]


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    for sample in OP.samples(torch.device(device), dtype):
        numerics.check(OP, backend, sample, dtype)
        numerics.check(OP, backend, sample, dtype, expand_grad=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_every_activation_in_a_data_gradient(poisoned_memory, backend, device, activation):
    """The derivative of the first layer is applied inside the second layer's data gradient."""
    numerics.require_backend(backend, OP.name, device, torch.float32)
    x, weights, biases = operands((20, 33, 10), 150, torch.float32)
    sample = {
        "x": x.detach().to(device),
        "weights": [(weight.detach() * 0.3).to(device) for weight in weights],
        "biases": [bias.detach().to(device) for bias in biases],
        "activations": [activation, "identity"],
        "negative_slope": 0.2,
        "alpha": 0.7,
    }
    numerics.check(OP, backend, sample, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    x, weights, biases = operands()
    x = x.detach().to(device, dtype)
    weights = [weight.detach().to(device, dtype) for weight in weights]
    biases = [bias.detach().to(device, dtype) for bias in biases]
    activations = "gelu,elu:0.5"
    for need in (True, False):
        arguments = (
            x.clone(),
            [weight.clone().requires_grad_(need) for weight in weights],
            [biases[0].clone().requires_grad_(need), None],
        )
        torch.library.opcheck(torch.ops.aefast.mlp.default, (*arguments, activations, backend))
    torch.library.opcheck(torch.ops.aefast.mlp_saving.default, (x, weights, biases, activations, backend))
    with aefast.backend(backend):
        saved = torch.ops.aefast.mlp_saving.default(x, weights, biases, activations, backend)
    torch.library.opcheck(
        torch.ops.aefast.mlp_backward.default,
        (saved[1].clone(), x, weights, saved, activations, "1" + "10" + "01", backend),
    )


@pytest.mark.parametrize("rows", [1024, 1500, 5003])
@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_long_batches_of_small_layers(poisoned_memory, instruction_set, rows, frozen):
    """Groups of rows sum weight gradients of their own, and no layer's gradient is kept."""
    generator = torch.Generator().manual_seed(5)
    widths = (19, 40, 7, 33)
    x = torch.randn(rows, widths[0], generator=generator)
    weights = [torch.randn(n, k, generator=generator) * k**-0.5 for k, n in itertools.pairwise(widths)]
    biases = [torch.randn(n, generator=generator) for n in widths[1:]]
    sample = {"x": x, "weights": weights, "biases": biases, "activations": ["silu", "tanh", "identity"]}
    if frozen is None:
        numerics.check(OP, "cpu", sample, torch.float32)
        return
    for tensor in (weights[frozen], biases[frozen]):
        tensor.requires_grad_()
    with aefast.backend("cpu"):
        out = AF.mlp(**sample)
    upstream = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, (weights[frozen], biases[frozen]), upstream)
    exact = mlp.reference(
        x.double(), [w.double() for w in weights], [b.double() for b in biases], sample["activations"]
    )
    truth = torch.autograd.grad(exact, (weights[frozen], biases[frozen]), upstream.double())
    for ours, theirs in zip(found, truth, strict=True):
        # Sums of up to 5003 products, of rounding errors of half a spacing each.
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=8 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
        )


def test_first_and_second_derivatives():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    x, weights, biases = operands()

    def stack(x, *parameters):
        return AF.mlp(x, parameters[:2], parameters[2:], ["gelu", "sigmoid"])

    with aefast.backend("cpu"):
        assert torch.autograd.gradcheck(stack, (x, *weights, *biases))
        assert torch.autograd.gradgradcheck(stack, (x, *weights, *biases))


def test_gradient_penalty():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)

    def penalty(stack):
        x, weights, biases = operands()
        out = stack(x, weights, biases, ["tanh", "softplus"])
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(
            (gradient.norm(dim=1) - 1).square().sum(), (x, *weights, *biases), allow_unused=True
        )

    with aefast.backend("cpu"):
        found = penalty(AF.mlp)
    for ours, theirs in zip(found, penalty(OP.reference), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_compiles_whole():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)

    def loss(x, weights, biases):
        return AF.mlp(x, weights, biases, ["relu", "silu"]).square().sum()

    with aefast.backend("cpu"):
        x, weights, biases = operands(dtype=torch.float32)
        inputs = (x, *weights, *biases)
        expected = torch.autograd.grad(loss(x, weights, biases), inputs)
        found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, weights, biases), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced(shape):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    _, weights, (bias, _) = operands()

    def stack(x, bias, *weights):
        return AF.mlp(x, weights, [bias, None], ["elu", "gelu"], alpha=0.5)

    def results(function):
        x = torch.linspace(-1, 1, 120, dtype=torch.float64, requires_grad=True)
        out = function(x.view(-1, *shape[1:]), bias, *weights)
        return out, *torch.autograd.grad(out.square().sum(), (x, bias, *weights))

    with aefast.backend("cpu"):
        traced = torch.jit.trace(stack, (torch.ones(shape, dtype=torch.float64), bias, *weights))
        torch.testing.assert_close(results(traced), results(stack))


@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_nothing_below_the_lowest_gradient(lowest):
    """Frozen layers at the bottom: their gradients are not computed, those above are right."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    x, weights, biases = operands((7, 6, 5, 4))
    x = x.detach()
    weights = [weight.detach().requires_grad_(layer >= lowest) for layer, weight in enumerate(weights)]
    biases = [bias.detach() for bias in biases]
    wanted = weights[lowest:]
    activations = ["gelu", "relu", "tanh"]
    with aefast.backend("cpu"):
        found = torch.autograd.grad(AF.mlp(x, weights, biases, activations).sum(), wanted)
    expected = torch.autograd.grad(OP.reference(x, weights, biases, activations).sum(), wanted)
    torch.testing.assert_close(found, expected)


def test_autocast():
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    x, weights, biases = operands((64, 32, 16), 200, torch.float32)
    with aefast.backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        out = AF.mlp(x, weights, biases, ["relu", "identity"])
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), (x, *weights, *biases))
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights must hold at least one layer"),
        ({"weights": torch.ones(4, 5)}, "weights must be a sequence"),
        ({"activations": "relu"}, "activations must be a sequence"),
        ({"activations": ["relu"]}, "activations must have one entry for each of the 2 weights, got 1"),
        ({"activations": ["relu", "rely"]}, r"activations\[1\] must be one of .* did you mean 'relu'"),
        ({"activations": ["relu", "elu:0.5"]}, r"activations\[1\] must be one of .* got 'elu:0.5'"),
        ({"activations": ["relu,relu", "relu"]}, r"activations\[0\] must be one of .* got 'relu,relu'"),
        ({"weights": [None, torch.ones(3, 4)]}, r"weights\[0\] must be a torch.Tensor, got NoneType"),
        ({"biases": [None]}, "biases must have one entry for each of the 2 weights, got 1"),
        (
            {"weights": [torch.ones(4, 5), torch.ones(3, 5)]},
            r"weights\[1\] must be \(N, 4\) to follow weights\[0\]",
        ),
        ({"biases": [None, torch.ones(4)]}, r"biases\[1\] must be \(3,\) to match weights\[1\]"),
        ({"weights": [torch.ones(4, 5), torch.ones(3, 4).half()]}, r"weights\[1\] must have the dtype of x"),
        ({"x": torch.ones(2, 4)}, r"weights\[0\] must be \(N, 4\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "x": torch.ones(2, 5),
        "weights": [torch.ones(4, 5), torch.ones(3, 4)],
        "biases": [None, None],
        "activations": ["relu", "identity"],
    }
    with pytest.raises(InputError, match=message):
        AF.mlp(**{**arguments, **change})


@pytest.mark.parametrize(
    ("last", "is_saved"), [("identity", False), ("silu", False), ("gelu", False), ("tanh", True)]
)
def test_last_output_is_saved_where_it_is_read(last, is_saved):
    weights = [torch.randn(5, 4), torch.randn(3, 5)]
    operands = [tensor.requires_grad_() for tensor in (torch.randn(7, 4), *weights)]
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with hooks:
        out = AF.mlp(operands[0], operands[1:], [None, None], ["relu", last])
    assert any(tensor.data_ptr() == out.data_ptr() for tensor in kept) == is_saved
    exact = [tensor.detach().double().requires_grad_() for tensor in operands]
    true = mlp._reference(exact[0], exact[1:], [None, None], f"relu,{last}")
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, operands, upstream)
    for gradient, expected in zip(found, torch.autograd.grad(true, exact, upstream.double()), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)
