from fractions import Fraction

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.kernels.activation import ACTIVATIONS, NEED_BIAS, NEED_X, STORES_DERIVATIVE
from aefast.ops import linear_act
from support import numerics

OP = linear_act.OP
CPU = torch.device("cpu")
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]


def operands(rows=6, inputs=5, features=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)
        for shape in ((rows, inputs), (features, inputs), (features,))
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype, activation):
    numerics.require_backend(backend, OP.name, device, dtype)
    for sample in OP.samples(torch.device(device), dtype):
        settings = {"activation": activation, "negative_slope": 0.2, "alpha": 0.7}
        numerics.check(OP, backend, {**sample, **settings}, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_each_instruction_set(poisoned_memory, instruction_set, dtype, activation):
    assert torch.ops.aefast_cpu.instruction_set() == instruction_set
    for sample in OP.samples(CPU, dtype):
        numerics.check(OP, "cpu", {**sample, "activation": activation}, dtype)


def test_unknown_instruction_set():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="this processor has no mmx"):
        torch.ops.aefast_cpu.use_instruction_set("mmx")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_expanded_gradient(poisoned_memory, backend, device):
    numerics.require_backend(backend, OP.name, device, torch.float32)
    for sample in OP.samples(torch.device(device), torch.float32):
        numerics.check(OP, backend, {**sample, "activation": "gelu"}, torch.float32, expand_grad=True)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_chunks(poisoned_memory, dtype, activation):
    """Enough rows that chunks run in parallel, and blocks end inside chunks."""
    numerics.require_backend("cpu", OP.name, "cpu", dtype)
    generator = torch.Generator().manual_seed(3)
    sample = {
        "x": torch.randn(5003, 37, generator=generator).to(dtype),
        "weight": (torch.randn(211, 37, generator=generator) * 0.2).to(dtype),
        "bias": torch.randn(211, generator=generator).to(dtype),
        "activation": activation,
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
    rows=st.integers(0, 150),
    inputs=st.integers(0, 40),
    features=st.integers(0, 70),
    strides=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced", "expanded"])] * 2),
    activation=st.sampled_from(ACTIVATIONS),
    biased=st.booleans(),
)
def test_any_shape_and_stride(instruction_set, rows, inputs, features, strides, activation, biased):
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
            "weight": matrix(features, inputs, strides[1]) * max(1, inputs) ** -0.5,
            "bias": torch.randn(features, generator=generator) if biased else None,
            "activation": activation,
        }
        for _ in range(8)
    ]
    numerics.check_draws(OP, "cpu", draws, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "leaky_relu:0.25"])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend, device, activation, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    x, weight, bias = (tensor.detach().to(device, dtype) for tensor in operands())
    for needs in ((True, True, True), (False, True, False), (False, False, False)):
        tensors = [
            tensor.clone().requires_grad_(need) for tensor, need in zip((x, weight, bias), needs, strict=True)
        ]
        torch.library.opcheck(torch.ops.aefast.linear_act.default, (*tensors, activation, backend))
    torch.library.opcheck(torch.ops.aefast.linear_act.default, (x, weight, None, activation, backend))
    grad = torch.randn(x.shape[0], weight.shape[0], device=device, dtype=dtype)
    saved = None if activation == "identity" else torch.rand_like(grad)
    torch.library.opcheck(
        torch.ops.aefast.linear_act_backward.default,
        (grad, x, weight, saved, activation, NEED_X | NEED_BIAS, backend),
    )
    if activation in STORES_DERIVATIVE:
        torch.library.opcheck(
            torch.ops.aefast.linear_act_with_derivative.default, (x, weight, bias, activation, backend)
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives(activation):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    with aefast.backend("cpu"):
        assert torch.autograd.gradcheck(lambda *t: AF.linear_act(*t, activation), operands())
        assert torch.autograd.gradgradcheck(lambda *t: AF.linear_act(*t, activation), operands())


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_gradient_penalty(activation):
    """Second derivatives flow through both an input and a weight that depends on it."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)

    def penalty(layer):
        x, weight, bias = operands()
        mixed = weight * x.mean()
        out = layer(x, mixed, bias, activation)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weight, bias))

    with aefast.backend("cpu"):
        found = penalty(AF.linear_act)
    for ours, theirs in zip(found, penalty(OP.reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "silu"])
def test_compiles_whole(activation):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)

    def loss(x, weight, bias):
        return AF.linear_act(x.view(2, 3, 5), weight, bias, activation).square().sum()

    with aefast.backend("cpu"):
        expected = torch.autograd.grad(loss(*(t := operands(dtype=torch.float32))), t)
        compiled = torch.compile(loss, fullgraph=True)
        found = torch.autograd.grad(compiled(*(t := operands(dtype=torch.float32))), t)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    numerics.require_backend("cpu", OP.name, "cpu", dtype)
    x, weight, bias = operands(40, 30, 20, torch.float32)
    with aefast.backend("cpu"), torch.autocast("cpu", dtype):
        out = AF.linear_act(x, weight, bias, "gelu")
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out.float().square().sum(), (x, weight, bias))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    with torch.autocast("cpu", dtype):
        expected = F.gelu(F.linear(x, weight, bias))
    eager = torch.autograd.grad(expected.float().square().sum(), (x, weight, bias))
    # Both round operands and output to `dtype`: three roundings on each side.
    tolerance = 6 * torch.finfo(dtype).eps
    for ours, theirs in zip((out.float(), *gradients), (expected.float(), *eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())
    with aefast.backend("cpu"), torch.autocast("cpu", dtype):
        wide = AF.linear_act(*(tensor.detach().double() for tensor in (x, weight, bias)))
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_autocast_takes_mixed_dtypes(backend):
    """A layer's input is half precision already where the layer below ran under autocast."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    x, weight, bias = operands(40, 30, 20, torch.float32)
    with aefast.backend(backend), torch.autocast("cpu", torch.bfloat16):
        hidden = AF.linear_act(x, weight, bias, "relu")
        out = AF.linear_act(hidden, torch.ones(7, 20), None, "tanh")
        stack = AF.mlp(hidden, [torch.ones(7, 20)], [None], ["tanh"])
    assert hidden.dtype == out.dtype == stack.dtype == torch.bfloat16
    assert torch.equal(out, stack)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(needs, activation):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    tensors = [t.detach().requires_grad_(need) for t, need in zip(operands(), needs, strict=True)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    with aefast.backend("cpu"):
        found = torch.autograd.grad(AF.linear_act(*tensors, activation).square().sum(), wanted)
    expected = torch.autograd.grad(OP.reference(*tensors, activation).square().sum(), wanted)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_propagate(activation, training):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x = torch.tensor([[float("nan")], [float("inf")], [float("-inf")], [1e30], [-1e30], [0.0]])
    weight = torch.ones(9, 1, requires_grad=training)
    with aefast.backend("cpu"):
        found = AF.linear_act(x, weight, None, activation)
    # In float64, because torch's own float32 gelu is NaN at infinity on machines with AVX-512.
    expected = OP.reference(x.double(), weight.double(), None, activation)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected.float(), equal_nan=True)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inputs_of_every_size(instruction_set, activation, dtype):
    """Powers of large ones overflow, activations and derivatives do not."""
    values, one = numerics.of_every_size(dtype), torch.ones(1, 1, dtype=dtype)
    weight = values[:, None].requires_grad_()
    with aefast.backend("cpu"):
        out = AF.linear_act(one, weight, None, activation)
        (gradient,) = torch.autograd.grad(out.sum(), weight)
        inferred = AF.linear_act(one, weight.detach(), None, activation)
    # Beyond 10⁴ no derivative changes any more, and torch's own are NaN for the largest numbers.
    bounded = weight.detach().double().clamp(-1e4, 1e4).requires_grad_()
    true = OP.reference(one.double(), weight.detach().double(), None, activation)
    (slope,) = torch.autograd.grad(OP.reference(one.double(), bounded, None, activation).sum(), bounded)
    tolerance = 8 * torch.finfo(dtype).eps
    for ours, truth in ((out, true), (inferred, true), (gradient, slope)):
        torch.testing.assert_close(ours, truth.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["one value", "one row", "transposed", "stepped"])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_upstream_strides_of_long_batches(poisoned_memory, instruction_set, activation, layout):
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
    with aefast.backend("cpu"):
        out = AF.linear_act(x, weight, None, activation)
    (found,) = torch.autograd.grad(out, weight, upstream)
    exact = OP.reference(x.double(), weight.double(), None, activation)
    (truth,) = torch.autograd.grad(exact, weight, upstream.double())
    # Sums of 2048 products, of rounding errors of half a spacing each.
    atol = 8 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    torch.testing.assert_close(found, truth, rtol=0, atol=atol)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_bfloat16_products(poisoned_memory, activation):
    """As on processors that multiply bfloat16; elsewhere torch's product of them is slow, but the same."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    generator = torch.Generator().manual_seed(7)
    had = torch.ops.aefast_cpu.use_bfloat16_products(True)
    try:
        for sample in OP.samples(CPU, torch.bfloat16):
            numerics.check(OP, "cpu", {**sample, "activation": activation}, torch.bfloat16)
        # Short ones, which are converted; some rows of a large weight, and a large batch, which are the BLAS's.
        for rows, inputs, features in (
            (64, 16, 8),
            (1024, 16, 8),
            (1500, 16, 8),
            (12, 260, 270),
            (300, 300, 310),
        ):
            sample = {
                "x": torch.randn(rows, inputs, generator=generator).bfloat16(),
                "weight": (torch.randn(features, inputs, generator=generator) * inputs**-0.5).bfloat16(),
                "bias": None if features == 8 else torch.randn(features, generator=generator).bfloat16(),
                "activation": activation,
            }
            numerics.check(OP, "cpu", sample, torch.bfloat16)
    finally:
        torch.ops.aefast_cpu.use_bfloat16_products(had)


@pytest.mark.parametrize("layout", ["plain", "transposed", "spread"])
@pytest.mark.parametrize(("inputs", "features"), [(784, 512), (2500, 90), (33, 1030), (1, 7)])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 11, 24])
def test_few_rows_of_bfloat16(poisoned_memory, instruction_set, rows, inputs, features, layout):
    """Vectors multiply them in float32, in the order of float32's own product, and read the weight as it is.

    Of more than 8 rows the product with a transposed weight in float32 sums in another order.
    """
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(2 * features, 2 * inputs, generator=generator).bfloat16() * inputs**-0.5
    weight = {
        "plain": weight[:features, :inputs].contiguous(),
        "transposed": weight[:features, :inputs].t().contiguous().t(),
        "spread": weight[::2, ::2],
    }[layout]
    x, grad = (torch.randn(rows, size, generator=generator).bfloat16() for size in (inputs, features))
    bias = torch.randn(features, generator=generator).bfloat16()

    def found(x, weight, bias, grad):
        x = x.requires_grad_()
        out = AF.linear_act(x, weight, bias, "tanh")
        return out, *torch.autograd.grad(out, x, grad)

    with aefast.backend("cpu"):
        out, gradient = found(x, weight, bias, grad)
        # A weight of any strides is copied to rows.
        plain = weight.contiguous() if layout == "spread" else weight
        wide_out, _ = found(x.detach().float(), plain.float(), bias.float(), grad.float())
        if rows > 8 and layout == "transposed":
            torch.testing.assert_close(out, wide_out.bfloat16(), rtol=2**-7, atol=2**-9)
        else:
            assert torch.equal(out, wide_out.bfloat16())
        # Of the output as it was rounded.
        slope = (grad.float() * (1 - out.float() ** 2)).bfloat16()
        wide = AF.linear_act(slope.float(), plain.float().t(), None, "identity")
    torch.testing.assert_close(gradient, wide.bfloat16(), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("inputs", "features"), [(272, 33), (273, 90), (784, 17), (3, 65)])
@pytest.mark.parametrize("rows", [9, 23, 24, 25, 34])
def test_rows_and_terms_of_every_kind(
    poisoned_memory, instruction_set, rows, inputs, features, dtype, layout
):
    """A weight that is read where it is and one that is packed; sums of one part, and of several, of unequal sizes."""
    x, weight, bias = operands(rows, inputs, features, dtype)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    numerics.check(OP, "cpu", {"x": x, "weight": weight, "bias": bias, "activation": "identity"}, dtype)


@pytest.fixture
def use_blas(request):
    """Whether large products are left to the BLAS, whichever is the faster on this processor."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    before = torch.ops.aefast_cpu.use_large_blas_products(request.param)
    yield request.param
    torch.ops.aefast_cpu.use_large_blas_products(before)


@pytest.mark.parametrize("use_blas", [False, True], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "inputs", "features"), [(701, 1030, 515), (400, 900, 800)])
def test_large_products(poisoned_memory, instruction_set, use_blas, dtype, rows, inputs, features):
    """Of more than 5e8 operations, from where on the BLAS takes them if it is as fast."""
    x, weight, bias = operands(rows, inputs, features, dtype)
    # Pre-activations of order 1: gelu's second derivative multiplies the rounding of larger ones near 0.
    weight = weight * inputs**-0.5
    numerics.check(OP, "cpu", {"x": x, "weight": weight, "bias": bias, "activation": "gelu"}, dtype)


@pytest.mark.parametrize("use_blas", [False, True], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 300, 1300])
def test_large_weights_in_half_precision(poisoned_memory, instruction_set, use_blas, dtype, rows):
    """Their gradients are rounded by parts, of which the last is shorter, and of the longest batch summed by blocks."""
    x, weight, bias = operands(rows, 525, 517, dtype)
    weight = weight * 525**-0.5
    numerics.check(OP, "cpu", {"x": x, "weight": weight, "bias": bias, "activation": "relu"}, dtype)


# Of many rows; of few rows or columns, which threads share in another way; of parts that are narrow or leave few rows.
@pytest.mark.parametrize(
    ("rows", "inputs", "features"),
    [
        (6007, 64, 96),
        (33, 512, 24),
        (65, 512, 24),
        (129, 512, 24),
        (300, 784, 7),
        (100, 64, 512),
        (260, 24, 300),
        (600, 100, 65),
    ],
)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_small_layers_do_not_depend_on_threads(activation, rows, inputs, features):
    """Neither the output nor a gradient; larger products may be the BLAS's business."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    assert_threads_do_not_matter(activation, rows, inputs, features)


@pytest.mark.parametrize("use_blas", [False], indirect=True)
def test_large_layers_do_not_depend_on_threads_without_the_blas(use_blas):
    assert_threads_do_not_matter("gelu", 1100, 700, 400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_layers_do_not_depend_on_threads(dtype):
    numerics.require_backend("cpu", OP.name, "cpu", dtype)
    assert_threads_do_not_matter("identity", 1000, 100, 300, dtype, step=2)


def assert_threads_do_not_matter(activation, rows, inputs, features, dtype=torch.float32, step=1):
    """Elements of x lie `step` apart, in rows and in columns."""
    generator = torch.Generator().manual_seed(4)
    x = (
        torch.randn(step * rows, step * inputs, generator=generator)
        .to(dtype)[::step, ::step]
        .requires_grad_()
    )
    weight = torch.randn(features, inputs, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(features, generator=generator).to(dtype).requires_grad_()
    threads = torch.get_num_threads()

    def once(count):
        torch.set_num_threads(count)
        try:
            with aefast.backend("cpu"):
                out = AF.linear_act(x, weight, bias, activation)
            return out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight, bias))
        finally:
            torch.set_num_threads(threads)

    first = once(1)
    for count in (1, 2, 2, 3, 7):
        for ours, theirs in zip(once(count), first, strict=True):
            assert torch.equal(ours, theirs)


def test_torch_func_and_forward_mode_use_the_reference():
    x, weight, bias = (tensor.detach() for tensor in operands(300, 300, 300, torch.float32))

    def layer(activate):
        return lambda w: activate(x, w, bias, "tanh").sum()

    torch.testing.assert_close(
        torch.func.grad(layer(AF.linear_act))(weight), torch.func.grad(layer(OP.reference))(weight)
    )
    found = torch.func.jvp(lambda x: AF.linear_act(x, weight, bias, "tanh"), (x,), (x,))
    expected = torch.func.jvp(lambda x: OP.reference(x, weight, bias, "tanh"), (x,), (x,))
    torch.testing.assert_close(found, expected)
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    with aefast.backend("cpu"), pytest.raises(aefast.BackendError, match="forward-mode"):
        torch.func.jvp(lambda x: AF.linear_act(x, weight, bias), (x,), (x,))


@pytest.mark.parametrize("function", [torch.func.jvp, torch.func.grad, torch.func.vmap])
def test_compiled_torch_func(function):
    x, weight, bias = (tensor.detach() for tensor in operands(30, 20, 10, torch.float32))

    def transformed(layer):
        def call(w):
            return layer(x, w, bias, "tanh")

        if function is torch.func.jvp:
            return lambda: torch.func.jvp(call, (weight,), (weight,))
        if function is torch.func.grad:
            return lambda: torch.func.grad(lambda w: call(w).sum())(weight)
        return lambda: torch.func.vmap(call)(weight.expand(3, 10, 20))

    found = torch.compile(transformed(AF.linear_act))()
    torch.testing.assert_close(found, transformed(OP.reference)())


@pytest.mark.parametrize("op", ["linear_act", "mlp"])
def test_vectorised_backward(op):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x, weight, bias = operands(40, 30, 20, torch.float32)
    upstream = torch.randn(3, 40, 20)
    with aefast.backend("cpu"):
        out = AF.mlp(x, [weight], [bias], ["gelu"]) if op == "mlp" else AF.linear_act(x, weight, bias, "gelu")
    found = torch.autograd.grad(out, (x, weight, bias), upstream, is_grads_batched=True)
    expected = [
        torch.autograd.grad(OP.reference(x, weight, bias, "gelu"), (x, weight, bias), g) for g in upstream
    ]
    for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("op", ["linear_act", "mlp"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_saved_tensors_may_come_back_with_other_strides(op, activation):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x, weight, bias = operands(40, 30, 20, torch.float32)

    def gradients(layer):
        out = layer()
        return torch.autograd.grad(out.square().sum(), (x, weight, bias))

    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.t().contiguous() if tensor.dim() == 2 else tensor,
        lambda tensor: tensor.t() if tensor.dim() == 2 else tensor,
    )
    with aefast.backend("cpu"), hooks:
        found = gradients(
            lambda: (
                AF.mlp(x, [weight], [bias], [activation])
                if op == "mlp"
                else AF.linear_act(x, weight, bias, activation)
            )
        )
    for ours, theirs in zip(found, gradients(lambda: OP.reference(x, weight, bias, activation)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_negative_views_meta_and_traced_tensors():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x, weight, bias = (tensor.detach() for tensor in operands(40, 30, 20, torch.float32))
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    with aefast.backend("cpu"):
        torch.testing.assert_close(AF.linear_act(negated, weight, bias), OP.reference(x, weight, bias))
        traced = torch.jit.trace(lambda x: AF.linear_act(x, weight, bias, "gelu"), (x,))
        torch.testing.assert_close(traced(x), OP.reference(x, weight, bias, "gelu"))
    out = AF.linear_act(*(tensor.to("meta") for tensor in (x, weight, bias)))
    assert out.device.type == "meta" and out.shape == (40, 20)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("op", ["linear_act", "mlp"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(op, layout):
    parts = [torch.randn(rows, 4, requires_grad=True) for rows in (2, 3)]
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)

    def results(xs, function):
        outs = [out for x in xs for out in function(x)]
        inputs = (*parts, weight, bias)
        return *outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), inputs)

    def ours(x):
        out = AF.mlp(x, [weight], [bias], ["relu"]) if op == "mlp" else AF.linear_act(x, weight, bias)
        return out.unbind()

    found = results([torch.nested.as_nested_tensor(parts, layout=layout)], ours)
    torch.testing.assert_close(found, results(parts, lambda x: [OP.reference(x, weight, bias)]))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
@pytest.mark.parametrize(
    "change",
    [
        {"bias": torch.ones(4, 1)},
        {"bias": torch.ones(1)},
        {"bias": torch.ones(4, dtype=torch.int64)},
        {"activation": "leaky_relu", "negative_slope": float("inf")},
        {"alpha": "1"},
        {"activation": "leaky_relu", "negative_slope": 10**400},
        {"weight": torch.ones(5)},
    ],
)
def test_what_launchers_would_let_through_is_refused(change, shape):
    """Matrices are launched before they are examined, other shapes after."""
    arguments = {
        "x": torch.ones(shape),
        "weight": torch.ones(4, 5),
        "bias": torch.ones(4),
        "activation": "elu",
    }
    with pytest.raises(InputError, match=list(change)[-1]):
        AF.linear_act(**{**arguments, **change})


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_the_parameter_that_an_activation_reads_is_looked_at_alone(shape):
    x, weight = torch.randn(shape), torch.randn(4, 5)
    target = torch.randn(*shape[:-1], 4)
    calls = {
        "linear_act": lambda **given: AF.linear_act(x, weight, None, **given),
        "penalized_linear_act": lambda **given: AF.penalized_linear_act(x, weight, None, **given)[0],
        "mlp": lambda activation, **given: AF.mlp(x, [weight], [None], [activation], **given),
        "linear_reconstruction_loss": lambda activation, **given: AF.linear_reconstruction_loss(
            x, weight, None, target, output_activation=activation, **given
        ),
    }
    for op, call in calls.items():
        expected = call(activation="elu", alpha=0.5)
        torch.testing.assert_close(
            call(activation="elu", alpha=Fraction(1, 2), negative_slope=None), expected
        )
        torch.testing.assert_close(call(activation="relu", alpha=None), call(activation="relu"))
        with pytest.raises(InputError, match=f"{op}: alpha must be a finite number of at least 0, got '2'"):
            call(activation="elu", alpha="2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[1.0]]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(())}, "x must have at least one dimension"),
        (
            {"x": torch.ones(3, 6)},
            r"weight must be \(N, 6\) to match x of shape \(3, 6\), got shape \(4, 5\)",
        ),
        (
            {"x": torch.ones(3, 5, dtype=torch.int64)},
            "x must be float32, bfloat16, float16 or float64, got int64",
        ),
        ({"weight": torch.ones(4)}, r"weight must have two dimensions, \(N, K\), got shape \(4,\)"),
        ({"weight": torch.ones(4, 5).half()}, "weight must have the dtype of x, float32, got float16"),
        ({"weight": torch.ones(4, 5, device="meta")}, "weight must be on the device of x, cpu, got meta"),
        ({"bias": torch.ones(5)}, r"bias must be \(4,\) to match weight, got shape \(5,\)"),
        ({"bias": torch.ones(4).double()}, "bias must have the dtype of x, float32, got float64"),
        ({"activation": "rellu"}, "activation must be one of .* got 'rellu'; did you mean 'relu'"),
        ({"activation": torch.relu}, "activation must be one of"),
        ({"activation": "elu:0.5"}, "activation must be one of .* got 'elu:0.5'"),
        ({"activation": b"relu"}, "activation must be one of .* got b'relu'"),
        ({"weight": None}, "weight must be a torch.Tensor, got NoneType"),
        (
            {"activation": "leaky_relu", "negative_slope": -0.1},
            "negative_slope must be a finite number of at least 0, got -0.1",
        ),
        (
            {"activation": "elu", "alpha": float("nan")},
            "alpha must be a finite number of at least 0, got nan",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(3, 5), "weight": torch.ones(4, 5), "bias": torch.ones(4)}
    with pytest.raises(InputError, match=message):
        AF.linear_act(**{**arguments, **change})
