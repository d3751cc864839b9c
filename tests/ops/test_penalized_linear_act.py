import functools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.kernels.activation import ACTIVATIONS, NEED_BIAS, NEED_WEIGHT, NEED_X
from aefast.ops import linear_act, penalized_linear_act
from support import numerics

OP = penalized_linear_act.OP
CPU = torch.device("cpu")
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]


def layers(device, dtype, penalty):
    """Layers to take with any activation. For "kl" their outputs are about 0.3, in between the rate and 1: where a mean
    activation is near 0 or 1 the divergence is so steep that rounding decides the gradient."""
    for sample in linear_act.samples(torch.device(device), dtype):
        if sample["x"].numel() == 0 and sample["weight"].shape[1] > 0:
            continue
        if penalty == "kl":
            bias = torch.zeros_like(sample["weight"][:, 0]) if sample["bias"] is None else sample["bias"]
            sample |= {"weight": sample["weight"] * 0.05, "bias": bias * 0.03 + 0.3}
        yield {**sample, "penalty": penalty}


def operands(rows=6, inputs=5, features=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)
        for shape in ((rows, inputs), (features, inputs), (features,))
    )


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    for sample in OP.samples(torch.device(device), dtype):
        numerics.check(OP, backend, sample, dtype)


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_each_activation(poisoned_memory, backend, device, dtype, activation, penalty):
    numerics.require_backend(backend, OP.name, device, dtype)
    for sample in layers(device, dtype, penalty):
        settings = {"activation": activation, "negative_slope": 0.2, "alpha": 0.7}
        draws = [{**sample, **settings}]
        if penalty == "kl":
            # The two parts of its slope cancel, where one draw of few elements says little of rounding.
            draws = [{**sample, **settings, "bias": sample["bias"] + 0.01 * index} for index in range(6)]
        numerics.check_draws(OP, backend, draws, dtype)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_each_instruction_set(poisoned_memory, instruction_set, dtype):
    assert torch.ops.aefast_cpu.instruction_set() == instruction_set
    for sample in OP.samples(CPU, dtype):
        numerics.check(OP, "cpu", sample, dtype)
    for activation, penalty in (("tanh", "l1"), ("identity", "kl"), ("silu", "kl")):
        for sample in layers("cpu", dtype, penalty):
            numerics.check(OP, "cpu", {**sample, "activation": activation}, dtype)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_expanded_gradient(poisoned_memory, backend, device):
    numerics.require_backend(backend, OP.name, device, torch.float32)
    for sample in OP.samples(torch.device(device), torch.float32):
        numerics.check(OP, backend, sample, torch.float32, expand_grad=True)


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [24, 211])
def test_many_chunks(poisoned_memory, features, dtype, activation, penalty):
    """Enough rows that chunks run in parallel, and blocks end inside chunks; and narrow layers, which sum their
    weight gradients by groups of rows."""
    numerics.require_backend("cpu", OP.name, "cpu", dtype)
    generator = torch.Generator().manual_seed(3)
    sample = {
        "x": torch.randn(5003, 37, generator=generator).to(dtype),
        "weight": (torch.randn(features, 37, generator=generator) * 0.02).to(dtype),
        "bias": (torch.randn(features, generator=generator) * 0.05 + 0.4).to(dtype),
        "activation": activation,
        "penalty": penalty,
    }
    numerics.check(OP, "cpu", sample, dtype)


# The fixture is to hold for all examples.
@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    rows=st.integers(1, 150),
    inputs=st.integers(0, 40),
    features=st.integers(0, 70),
    strides=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced", "expanded"])] * 2),
    activation=st.sampled_from(ACTIVATIONS),
    penalty=st.sampled_from(penalized_linear_act.PENALTIES),
    biased=st.booleans(),
)
def test_any_shape_and_stride(instruction_set, rows, inputs, features, strides, activation, penalty, biased):
    generator = torch.Generator().manual_seed(rows + 1000 * inputs)

    def matrix(height, width, layout):
        if layout == "transposed":
            return torch.randn(width, height, generator=generator).t()
        if layout == "sliced":
            return torch.randn(2 * height + 1, width + 3, generator=generator)[1::2, 2 : width + 2]
        if layout == "expanded":
            return torch.randn(1, width, generator=generator).expand(height, width)
        return torch.randn(height, width, generator=generator)

    draws = [
        {
            "x": matrix(rows, inputs, strides[0]),
            "weight": matrix(features, inputs, strides[1]) * 0.3 * max(1, inputs) ** -0.5,
            "bias": torch.randn(features, generator=generator) * 0.3 if biased else None,
            "activation": "sigmoid" if penalty == "kl" else activation,
            "penalty": penalty,
        }
        for _ in range(8)
    ]
    numerics.check_draws(OP, "cpu", draws, torch.float32)


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_without_upstream_or_without_penalty(poisoned_memory, backend, device, activation, penalty):
    """Whichever output alone is differentiated, with the other's gradient absent."""
    numerics.require_backend(backend, OP.name, device, torch.float32)
    for rows in (40, 3000):
        x, weight, bias = (
            tensor.detach().to(device).requires_grad_() for tensor in operands(rows, 12, 24, torch.float32)
        )

        with torch.no_grad():
            weight *= 0.1
            bias.fill_(0.3)
        with aefast.backend(backend):
            found = AF.penalized_linear_act(x, weight, bias, activation, penalty=penalty)
        expected = OP.reference(x, weight, bias, activation, penalty=penalty)
        for one, other in zip(found, expected, strict=True):
            for ours, theirs in zip(
                torch.autograd.grad(one.square().sum(), (x, weight, bias), retain_graph=True),
                torch.autograd.grad(other.square().sum(), (x, weight, bias), retain_graph=True),
                strict=True,
            ):
                # Sums of `rows` terms in another order.
                atol = 16 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(needs, activation, penalty):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    tensors = [t.detach().requires_grad_(need) for t, need in zip(operands(), needs, strict=True)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def total(layer):
        h, value = layer(*tensors, activation, penalty=penalty, rate=0.3)
        return h.square().sum() + 3 * value

    with aefast.backend("cpu"):
        found = torch.autograd.grad(total(AF.penalized_linear_act), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(total(OP.reference), wanted))


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
def test_is_the_layer_and_the_textbook_s_penalty(penalty):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    x, weight, bias = operands(40, 7, 9)
    with aefast.backend("cpu"):
        h, value = AF.penalized_linear_act(x, weight, bias, "sigmoid", penalty=penalty, rate=0.2)
        assert torch.equal(h, AF.linear_act(x, weight, bias, "sigmoid"))
    if penalty == "l1":
        expected = h.abs().sum(1).mean()
    else:
        q = h.mean(0)
        expected = (0.2 * torch.log(0.2 / q) + 0.8 * torch.log(0.8 / (1 - q))).sum()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, ("eager", "cpu")])
def test_mean_activations_are_clamped(backend, device):
    """Units that are always off or always on: the divergence is finite, and has no gradient."""
    numerics.require_backend(backend, OP.name, device, torch.float64)
    x = torch.ones(5, 1, dtype=torch.float64, device=device)
    weight = torch.tensor([[-1.0], [0.25], [3.0]], dtype=torch.float64, device=device, requires_grad=True)
    with aefast.backend(backend):
        _, value = AF.penalized_linear_act(x, weight, None, "relu", penalty="kl", rate=0.1)
    eps, rate = penalized_linear_act.EPS, 0.1
    q = torch.tensor([eps, 0.25, 1 - eps], dtype=torch.float64)
    expected = (rate * (rate / q).log() + (1 - rate) * ((1 - rate) / (1 - q)).log()).sum()
    torch.testing.assert_close(value.cpu(), expected)
    (gradient,) = torch.autograd.grad(value, weight)
    slope = -rate / 0.25 + (1 - rate) / 0.75
    torch.testing.assert_close(
        gradient.cpu(), torch.tensor([[0.0], [slope], [0.0]], dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, ("eager", "cpu")])
def test_empty_batch_has_no_mean(backend, device, penalty):
    numerics.require_backend(backend, OP.name, device, torch.float32)
    x, weight, bias = (
        tensor.detach().to(device).requires_grad_() for tensor in operands(0, 5, 4, torch.float32)
    )
    with aefast.backend(backend):
        h, value = AF.penalized_linear_act(x, weight, bias, "sigmoid", penalty=penalty)
    assert h.shape == (0, 4) and value.isnan()
    gradients = torch.autograd.grad(
        (h, value), (x, weight, bias), (torch.ones_like(h), torch.ones_like(value))
    )
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
def test_nan_and_infinity_propagate(penalty, training):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.tensor([[1.0], [value], [2.0]])
        weight = torch.ones(9, 1, requires_grad=training)
        with aefast.backend("cpu"):
            found = AF.penalized_linear_act(x, weight, None, "identity", penalty=penalty)
        # In float64, as float32 has few values beside 1.
        expected = OP.reference(x.double(), weight.double(), None, "identity", penalty=penalty)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, equal_nan=True, rtol=1e-6, atol=0)
        if training:
            (ours,), (theirs,) = (torch.autograd.grad(one[1], weight) for one in (found, expected))
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
@pytest.mark.parametrize("layout", ["one value", "one row", "transposed", "stepped"])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_upstream_strides_of_long_batches(poisoned_memory, instruction_set, activation, layout, penalty):
    """Small layers of many rows sum their weight gradients in ways of their own."""
    rows, features = 2048, 24
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(rows, 32, generator=generator)
    weight = (torch.randn(features, 32, generator=generator) * 0.2).requires_grad_()
    upstream = {
        "one value": torch.randn(1, 1, generator=generator).expand(rows, features),
        "one row": torch.randn(1, features, generator=generator).expand(rows, features),
        "transposed": torch.randn(features, rows, generator=generator).t(),
        "stepped": torch.randn(rows, 2 * features, generator=generator)[:, ::2],
    }[layout]
    bias = torch.full((features,), 0.4)
    with aefast.backend("cpu"):
        outputs = AF.penalized_linear_act(x, weight, bias, activation, penalty=penalty)
    (found,) = torch.autograd.grad(outputs, weight, (upstream, torch.tensor(3.0)))
    outputs = OP.reference(x.double(), weight.double(), bias.double(), activation, penalty=penalty)
    (truth,) = torch.autograd.grad(outputs, weight, (upstream.double(), torch.tensor(3.0).double()))
    # Sums of 2048 products, of rounding errors of half a spacing each.
    atol = 8 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    torch.testing.assert_close(found, truth, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("activation", "penalty", "dtype"),
    [
        (activation, penalty, (torch.float32, torch.bfloat16)[(first + second) % 2])
        for first, activation in enumerate(("identity", "relu", "gelu", "leaky_relu:0.25"))
        for second, penalty in enumerate(penalized_linear_act.PENALTIES)
    ],
)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend, device, activation, penalty, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    x, weight, bias = (tensor.detach().to(device, dtype) for tensor in operands())
    ops = torch.ops.aefast
    settings = (activation, penalty, 0.1, backend)
    for needs in ((True, True, True), (False, True, False), (False, False, False)):
        tensors = [
            tensor.clone().requires_grad_(need) for tensor, need in zip((x, weight, bias), needs, strict=True)
        ]
        torch.library.opcheck(ops.penalized_linear_act.default, (*tensors, *settings))
    torch.library.opcheck(ops.penalized_linear_act.default, (x, weight, None, *settings))
    torch.library.opcheck(ops.penalized_linear_act_saving.default, (x, weight, bias, *settings))
    h = torch.rand(x.shape[0], weight.shape[0], device=device, dtype=dtype)
    saved = None if activation == "identity" else h.clone()
    kept = (h, None) if penalty == "l1" else (None, torch.rand(4, device=device))
    grad, grad_penalty = torch.randn_like(h), torch.rand((), device=device)
    for grads in ((grad, grad_penalty), (None, grad_penalty), (grad, None)):
        for needs in (NEED_X | NEED_BIAS, NEED_WEIGHT):
            torch.library.opcheck(
                ops.penalized_linear_act_backward.default,
                (*grads, x, weight, saved, *kept, activation, penalty, 0.1, needs, backend),
            )


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives(activation, penalty):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    layer = functools.partial(AF.penalized_linear_act, activation=activation, penalty=penalty, rate=0.2)
    x, weight, bias = operands()
    if penalty == "kl":
        # Mean activations in between 0 and 1, whatever the activation.
        with torch.no_grad():
            weight *= 0.02
            bias.copy_(0.3 + 0.02 * bias)
    with aefast.backend("cpu"):
        assert torch.autograd.gradcheck(layer, (x, weight, bias))
        assert torch.autograd.gradgradcheck(layer, (x, weight, bias))


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
def test_gradient_penalty(penalty):
    """Second derivatives flow through both an input and a weight that depends on it."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)

    def second(layer):
        x, weight, bias = operands()
        h, value = layer(x, weight * x.mean(), bias, "sigmoid", penalty=penalty)
        (gradient,) = torch.autograd.grad(h.square().sum() + value.square(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weight, bias))

    with aefast.backend("cpu"):
        found = second(AF.penalized_linear_act)
    for ours, theirs in zip(found, second(OP.reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
@pytest.mark.parametrize("activation", ["identity", "sigmoid", "silu"])
def test_compiles_whole(activation, penalty):
    torch._dynamo.reset()
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)

    def loss(x, weight, bias):
        h, value = AF.penalized_linear_act(
            x.view(2, 3, 5), weight, bias, activation, penalty=penalty, rate=0.1
        )
        return h.square().sum() + value

    with aefast.backend("cpu"):
        expected = torch.autograd.grad(loss(*(t := operands(dtype=torch.float32))), t)
        compiled = torch.compile(loss, fullgraph=True)
        found = torch.autograd.grad(compiled(*(t := operands(dtype=torch.float32))), t)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
def test_autocast(penalty):
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    x, weight, bias = operands(40, 30, 20, torch.float32)
    with aefast.backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        h, value = AF.penalized_linear_act(x, weight, bias, "sigmoid", penalty=penalty)
    assert h.dtype == torch.bfloat16 and value.dtype == torch.float32
    gradients = torch.autograd.grad(h.float().sum() + value, (x, weight, bias))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = OP.reference(x, weight, bias, "sigmoid", penalty=penalty)
    # Operands and results are rounded to 8 bits: three roundings, in sums of 30 terms.
    torch.testing.assert_close(h.float(), exact[0], rtol=0, atol=8 * 2.0**-8)
    torch.testing.assert_close(value, exact[1], rtol=8 * 2.0**-8, atol=0)


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_small_layers_do_not_depend_on_threads(activation, penalty):
    """Neither outputs nor gradients; larger products are the BLAS's business, but not the sums over their results."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6007, 64, generator=generator, requires_grad=True)
    weight = (torch.randn(96, 64, generator=generator) * 0.01).requires_grad_()
    bias = torch.full((96,), 0.4, requires_grad=True)
    threads = torch.get_num_threads()

    def once(count):
        torch.set_num_threads(count)
        try:
            with aefast.backend("cpu"):
                h, value = AF.penalized_linear_act(x, weight, bias, activation, penalty=penalty)
            loss = h.square().sum() + value
            return h.detach(), value.detach(), *torch.autograd.grad(loss, (x, weight, bias))
        finally:
            torch.set_num_threads(threads)

    first = once(1)
    for count in (1, 2, 2, 3, 7):
        for ours, theirs in zip(once(count), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("penalty", penalized_linear_act.PENALTIES)
def test_torch_func_and_forward_mode_use_the_reference(penalty):
    x, weight, bias = (tensor.detach() for tensor in operands(30, 20, 10, torch.float32))

    def value(layer):
        return lambda w: layer(x, w, bias, "sigmoid", penalty=penalty)[1]

    ours, theirs = value(AF.penalized_linear_act), value(OP.reference)
    torch.testing.assert_close(torch.func.grad(ours)(weight), torch.func.grad(theirs)(weight))
    torch.testing.assert_close(
        torch.func.jvp(ours, (weight,), (weight,)), torch.func.jvp(theirs, (weight,), (weight,))
    )
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    with aefast.backend("cpu"), pytest.raises(aefast.BackendError, match="forward-mode"):
        torch.func.jvp(ours, (weight,), (weight,))


def test_vectorised_backward():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x, weight, bias = operands(40, 30, 20, torch.float32)
    upstream = torch.randn(3, 40, 20), torch.randn(3)
    with aefast.backend("cpu"):
        outputs = AF.penalized_linear_act(x, weight, bias, "gelu")
    found = torch.autograd.grad(outputs, (x, weight, bias), upstream, is_grads_batched=True)
    expected = [
        torch.autograd.grad(OP.reference(x, weight, bias, "gelu"), (x, weight, bias), grads)
        for grads in zip(*upstream, strict=True)
    ]
    for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_saved_tensors_may_come_back_with_other_strides(activation):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x, weight, bias = operands(40, 30, 20, torch.float32)

    def gradients(layer):
        h, value = layer(x, weight, bias, activation)
        return torch.autograd.grad(h.square().sum() + value, (x, weight, bias))

    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.t().contiguous() if tensor.dim() == 2 else tensor,
        lambda tensor: tensor.t() if tensor.dim() == 2 else tensor,
    )
    with aefast.backend("cpu"), hooks:
        found = gradients(AF.penalized_linear_act)
    for ours, theirs in zip(found, gradients(OP.reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[1.0]]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 6)}, r"weight must be \(N, 6\) to match x of shape \(3, 6\)"),
        ({"weight": torch.ones(4, 5).half()}, "weight must have the dtype of x, float32, got float16"),
        ({"bias": torch.ones(5)}, r"bias must be \(4,\) to match weight, got shape \(5,\)"),
        ({"activation": "rellu"}, "activation must be one of .* got 'rellu'; did you mean 'relu'"),
        ({"activation": "elu", "alpha": -1.0}, "alpha must be a finite number of at least 0, got -1.0"),
        ({"penalty": "l2"}, "penalty must be one of l1, kl, got 'l2'"),
        ({"penalty": None}, "penalty must be one of l1, kl, got None"),
        ({"penalty": "kl", "rate": 1.5}, "rate must be a number from 0 to 1, got 1.5"),
        ({"penalty": "kl", "rate": 0.0}, "rate must be above 0 and below 1, got 0.0"),
        ({"penalty": "kl", "rate": "0.1"}, "rate must be a number from 0 to 1, got '0.1'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(3, 5), "weight": torch.ones(4, 5), "bias": torch.ones(4)}
    with pytest.raises(InputError, match=f"penalized_linear_act: {message}"):
        AF.penalized_linear_act(**{**arguments, **change})
