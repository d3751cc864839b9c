import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.kernels.selection import largest
from aefast.ops import topk_encode
from support import numerics

CPU = torch.device("cpu")
OP = topk_encode.OP
# Indices have neither rounding errors nor gradients: they are compared on their own.
VALUES = dataclasses.replace(
    OP,
    function=lambda **given: AF.topk_encode(**given)[0],
    reference=lambda **given: topk_encode.reference(**given)[0],
)
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]
# Where nothing but what surrounds a launcher is tested, and the reference where there is none.
ON_CPU = ["cpu", "eager"]
# Latents of which 3 are so large a part that the backward takes dense products, and of which they are not.
LATENTS = [11, 200]
NAN, INFINITY = float("nan"), float("inf")


def draw(*shape, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(dtype=torch.float64, latents=11, rows=7, inputs=5):
    return tuple(
        draw(*shape, dtype=dtype, seed=seed).requires_grad_()
        for seed, shape in enumerate(((rows, inputs), (latents, inputs), (latents,)))
    )


def sorted_indices(elements, k):
    """The definition."""
    return elements.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@pytest.fixture(params=ON_CPU)
def on_cpu(request):
    numerics.require_backend(request.param, OP.name, "cpu", torch.float32)
    with aefast.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_samples_leave_no_choice_to_rounding(dtype):
    """Pre-activations are exact in the dtype, or a thousand of its spacings apart."""
    for sample in OP.samples(CPU, dtype):
        given = [sample["x"], sample["weight"], sample["bias"]]
        exact = F.linear(*(one if one is None else one.double() for one in given))
        if torch.equal(exact, exact.to(dtype).double()) and torch.equal(F.linear(*given).double(), exact):
            continue
        chosen = exact.sort(dim=-1, descending=True).values[..., : sample["k"] + 1]
        assert (-chosen.diff(dim=-1)).min() > 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    for index, sample in enumerate(OP.samples(torch.device(device), dtype)):
        check(backend, sample, dtype, expand_grad=index % 2 == 0)


def check(backend, sample, dtype, **options):
    numerics.check(VALUES, backend, sample, dtype, **options)
    with aefast.backend(backend):
        values, found = AF.topk_encode(**sample)
    assert found.dtype == torch.int64 and values.dtype == dtype
    assert torch.equal(found, OP.reference(**numerics.cast(sample, torch.float64))[1])


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_each_instruction_set(poisoned_memory, instruction_set, dtype):
    numerics.require_backend("cpu", OP.name, "cpu", dtype)
    for sample in OP.samples(CPU, dtype):
        check("cpu", sample, dtype)


def test_bfloat16_without_its_instructions(poisoned_memory):
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    before = torch.ops.aefast_cpu.use_bfloat16_products(False)
    try:
        for sample in OP.samples(CPU, torch.bfloat16):
            check("cpu", sample, torch.bfloat16)
    finally:
        torch.ops.aefast_cpu.use_bfloat16_products(before)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_largest_is_the_definition(dtype):
    rows = torch.randint(-3, 4, (50, 301), generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[3, 7], rows[4], rows[5, 9], rows[6, 1:100] = NAN, -INFINITY, INFINITY, -0.0
    rows[7], rows[8, ::2] = NAN, -NAN
    for k in (1, 40, 301):
        assert torch.equal(largest(rows, k), sorted_indices(rows, k))


@hypothesis.settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    # The fixture is to hold for all examples.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    batch=st.sampled_from([(), (1,), (37,), (2, 3), (0,)]),
    inputs=st.integers(0, 20),
    latents=st.one_of(st.integers(1, 40), st.integers(250, 300), st.integers(2040, 2060), st.just(4500)),
    share=st.floats(0, 1),
    levels=st.sampled_from([0, 1, 3]),
    strides=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced"])] * 2),
    has_bias=st.booleans(),
)
def test_any_shape_and_stride(on_cpu, batch, inputs, latents, share, levels, strides, has_bias):
    """On whole numbers, so that pre-activations are exact, and the more of them equal the fewer levels they have."""
    generator = torch.Generator().manual_seed(inputs + 100 * latents)
    k = max(1, round(share**4 * latents))

    def whole(*shape):
        return torch.randint(-levels, levels + 1, shape, generator=generator).float()

    def matrix(layout, *shape):
        *leading, rows, cols = shape
        if layout == "transposed":
            return whole(*leading, cols, rows).transpose(-1, -2)
        if layout == "sliced":
            return whole(*leading, 2 * rows + 1, cols + 3)[..., 1::2, 2 : cols + 2]
        return whole(*shape)

    x, weight = matrix(strides[0], *batch, 1, inputs)[..., 0, :], matrix(strides[1], latents, inputs)
    bias = whole(latents) if has_bias else None
    values, indices = AF.topk_encode(x, weight, bias, k)
    pre = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = sorted_indices(pre, k)
    assert torch.equal(indices, expected)
    assert torch.equal(values.double(), pre.gather(-1, expected))


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize("latents", [9, 300, 5000])
def test_special_numbers(on_cpu, latents, dtype):
    """NaN is the largest of all, infinities are numbers, and zeros are equal whatever their sign. As biases they are
    the pre-activations."""
    generator = torch.Generator().manual_seed(latents)
    pool = torch.tensor([NAN, INFINITY, -INFINITY, 0.0, -0.0, 1.0, -1.0, 60000.0, 2.0**-14])
    for weights in (torch.ones(9), torch.tensor([1e-3, 1e-3, 1, 1, 1, 1e-3, 1, 1e-3, 1e-3]), torch.eye(9)[2]):
        bias = pool[torch.multinomial(weights, latents, replacement=True, generator=generator)].to(dtype)
        x, weight = bias.new_ones(2, 1), bias.new_zeros(latents, 1)
        for k in (1, 4, latents):
            values, indices = AF.topk_encode(x, weight, bias, k)
            expected = sorted_indices(bias, k)
            assert torch.equal(indices, expected.expand(2, k))
            torch.testing.assert_close(values, bias[indices], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_orders_that_defeat_a_threshold(on_cpu, order):
    """Where every element is larger than all before it none can be skipped."""
    bias = torch.arange(7000.0)
    bias = bias if order == "ascending" else bias.flip(0)
    values, indices = AF.topk_encode(torch.ones(3, 1), torch.zeros(7000, 1), bias, 50)
    assert torch.equal(values, torch.arange(6999.0, 6949, -1).expand(3, 50))
    assert torch.equal(indices, sorted_indices(bias, 50).expand(3, 50))


@pytest.mark.parametrize("latents", LATENTS)
def test_first_and_second_derivatives(on_cpu, latents):
    tensors = operands(latents=latents, rows=4, inputs=3)

    def values(x, weight, bias):
        return AF.topk_encode(x, weight, bias, 3)[0]

    assert torch.autograd.gradcheck(values, tensors)
    assert torch.autograd.gradgradcheck(values, tensors)


def test_gradient_penalty(on_cpu):
    """Second derivatives flow through both an input and another that depends on it."""

    def penalty(function):
        x, weight, bias = operands()
        values, _ = function(x, weight * (1 + x.mean()), bias, 3)
        (gradient,) = torch.autograd.grad(values.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weight, bias))

    for ours, theirs in zip(penalty(AF.topk_encode), penalty(OP.reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("latents", LATENTS)
def test_only_the_gradients_asked_for(on_cpu, latents):
    inputs = operands(latents=latents)
    every = torch.autograd.grad(AF.topk_encode(*inputs, 3)[0].sum(), inputs)
    for index in range(3):
        tensors = [one.detach().requires_grad_(index == which) for which, one in enumerate(inputs)]
        values, indices = AF.topk_encode(*tensors, 3)
        assert not indices.requires_grad
        (alone,) = torch.autograd.grad(values.sum(), tensors[index])
        torch.testing.assert_close(alone, every[index], rtol=1e-14, atol=1e-14)


def test_vectorised_backward(on_cpu):
    inputs = operands(torch.float32)
    values, _ = AF.topk_encode(*inputs, 3)
    upstream = draw(3, *values.shape, dtype=torch.float32)
    found = torch.autograd.grad(values, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for index, one in enumerate(upstream):
        for ours, theirs in zip(
            found, torch.autograd.grad(values, inputs, one, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(ours[index], theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    ops = torch.ops.aefast
    for wants in (False, True):
        x, weight, bias = (one.detach().to(device).requires_grad_(wants) for one in operands(dtype))
        for its_bias in (bias, None):
            torch.library.opcheck(ops.topk_encode.default, (x, weight, its_bias, 3, backend))
    grad, indices = draw(7, 3, dtype=dtype).to(device), torch.arange(21).reshape(7, 3).to(device) % 11
    for needs in range(1, 8):
        arguments = (grad, indices, x.detach(), weight.detach(), needs, backend)
        torch.library.opcheck(ops.topk_encode_backward.default, arguments)


def test_compiles_whole(on_cpu):
    inputs = operands(torch.float32)

    def loss(x, weight, bias):
        values, indices = AF.topk_encode(x, weight, bias, 3)
        return values.square().sum() + indices.sum()

    expected = loss(*inputs), *torch.autograd.grad(loss(*inputs), inputs)
    value = torch.compile(loss, fullgraph=True)(*inputs)
    for ours, theirs in zip((value, *torch.autograd.grad(value, inputs)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torch_func_and_forward_mode_use_the_reference():
    x, weight, bias = (one.detach() for one in operands(torch.float32))

    def values(x, weight, bias):
        return AF.topk_encode(x, weight, bias, 3)[0]

    for index in range(3):
        found = torch.func.jacrev(values, index)(x, weight, bias)
        torch.testing.assert_close(found, torch.func.jacfwd(values, index)(x, weight, bias))
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    with aefast.backend("cpu"), pytest.raises(aefast.BackendError, match="forward-mode"):
        torch.func.jvp(values, (x, weight, bias), (x, weight, bias))
    try:
        torch.func.vmap(lambda row: row.view(torch.int32))(x)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} has no vmap of what numbers are sorted by: {error}")
    found = torch.func.vmap(lambda row: AF.topk_encode(row, weight, bias, 3))(x)
    for ours, theirs in zip(found, AF.topk_encode(x, weight, bias, 3), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_meta_tensors_and_negative_views():
    x, weight, bias = (one.detach() for one in operands(torch.float32))
    expected = AF.topk_encode(x, weight, bias, 3)
    found = AF.topk_encode(x.to("meta"), weight.to("meta"), bias.to("meta"), 3)
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in expected]
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    found = AF.topk_encode(negated, weight, bias, 3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_autocast(on_cpu):
    x, weight, bias = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = AF.topk_encode(x, weight, bias, 3)
    expected = AF.topk_encode(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 3)
    assert found[0].dtype == torch.bfloat16
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_does_not_depend_on_threads(dtype):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    inputs = operands(dtype, 2500, 700, 24)
    threads = torch.get_num_threads()

    def once(count):
        torch.set_num_threads(count)
        try:
            with aefast.backend("cpu"):
                values, indices = AF.topk_encode(*inputs, 20)
            return values, indices, *torch.autograd.grad(values, inputs, draw(700, 20, dtype=dtype))
        finally:
            torch.set_num_threads(threads)

    first = once(1)
    for count in (1, 2, 3, 7):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(once(count), first, strict=True))


@pytest.mark.usefixtures("no_kept_memory")
def test_no_matrix_of_pre_activations():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    rows, latents = 4000, 5000
    inputs = operands(torch.float32, latents, rows, 8)
    with torch.profiler.profile(profile_memory=True) as profile, aefast.backend("cpu"):
        values, _ = AF.topk_encode(*inputs, 4)
        torch.autograd.grad(values.sum(), inputs)
    largest_block = max(
        event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    assert 0 < largest_block < 4 * rows * latents / 8


def test_gradients_are_those_of_the_dense_code(on_cpu):
    for latents in LATENTS:
        x, weight, bias = operands(torch.float32, latents)
        values, indices = AF.topk_encode(x, weight, bias, 3)
        grad = draw(7, 3, dtype=torch.float32)
        found = torch.autograd.grad(values, (x, weight, bias), grad)
        dense = torch.zeros(7, latents).scatter(1, indices, grad)
        for ours, theirs in zip(found, (dense @ weight, dense.t() @ x, dense.sum(0)), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_decodes_what_it_encodes(on_cpu):
    x, weight, bias = operands(torch.float32, 200)
    values, indices = AF.topk_encode(x, weight, bias, 3)
    dense = torch.zeros(7, 200).scatter(1, indices, values)
    torch.testing.assert_close(AF.sparse_decode(values, indices, weight), dense @ weight)


def test_launchers_refuse_indices_beyond_the_latents():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    for latents in LATENTS:
        x, weight, _ = (one.detach() for one in operands(torch.float32, latents))
        for needs in (1, 2, 4):
            with pytest.raises(RuntimeError, match=f"indices must be less than {latents}"):
                torch.ops.aefast.topk_encode_backward(
                    torch.ones(7, 3), torch.full((7, 3), latents), x, weight, needs, "cpu"
                )


def test_tensors_must_not_change_before_the_backward(on_cpu):
    x, weight, bias = operands(torch.float32)
    values, _ = AF.topk_encode(x, moved := weight * 1.0, bias, 3)
    with torch.no_grad():
        moved.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[1.0]]}, "x must be a torch.Tensor, got list"),
        ({"weight": None}, "weight must be a torch.Tensor, got NoneType"),
        ({"x": torch.ones(())}, r"x must have at least one dimension, \(\*, K\), got a scalar"),
        ({"x": torch.ones(4, 3).long()}, "x must be float32, .*, got int64"),
        ({"weight": torch.ones(5)}, r"weight must have two dimensions, \(N, K\), got shape \(5,\)"),
        ({"weight": torch.ones(5, 4)}, r"weight must be \(N, 3\) to match x of shape \(4, 3\)"),
        ({"weight": torch.ones(5, 3).double()}, "weight must have the dtype of x, float32, got float64"),
        ({"bias": torch.ones(4)}, r"bias must be \(5,\) to match weight, got shape \(4,\)"),
        ({"k": None}, "k must be a whole number from 1 to 5, got None"),
        ({"k": 0}, "k must be a whole number from 1 to 5, got 0"),
        ({"k": 6}, "k must be a whole number from 1 to 5, got 6"),
        ({"k": 2.0}, "k must be a whole number from 1 to 5, got 2.0"),
        ({"k": True}, "k must be a whole number from 1 to 5, got True"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(4, 3), "weight": torch.ones(5, 3), "bias": torch.ones(5), "k": 2}
    with pytest.raises(InputError, match=f"topk_encode: {message}"):
        AF.topk_encode(**{**arguments, **change})
