import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops import sparse_decode
from support import numerics

CPU = torch.device("cpu")
OP = sparse_decode.OP
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]
# Where nothing but what surrounds a launcher is tested, and the reference where there is none.
ON_CPU = ["cpu", "eager"]
# Latents of a code of 3 entries that is decoded by dense products, and of one that is not.
LATENTS = [11, 200]


def draw(*shape, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def choose(latents, *shape, seed=3):
    return torch.randint(latents, shape, generator=torch.Generator().manual_seed(seed))


def operands(dtype=torch.float64, latents=11, rows=7, entries=3, columns=5):
    """Of which one index is padding, and one stands twice in its row."""
    values, weight, bias = (
        draw(*shape, dtype=dtype, seed=seed).requires_grad_()
        for seed, shape in enumerate(((rows, entries), (latents, columns), (columns,)))
    )
    indices = choose(latents, rows, entries)
    indices[1, 2], indices[2, 1] = -1, indices[2, 0]
    return values, indices, weight, bias


def of_code(values, indices, weight, bias):
    """By the whole code, in float64."""
    code = torch.zeros(*values.shape[:-1], weight.shape[0] + 1, dtype=torch.float64)
    places = torch.where(indices < 0, weight.shape[0], indices)
    code = code.scatter_add(-1, places, values.double())[..., :-1]
    return code @ weight.double() + (0 if bias is None else bias.double())


@pytest.fixture(params=ON_CPU)
def on_cpu(request):
    numerics.require_backend(request.param, OP.name, "cpu", torch.float32)
    with aefast.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    for index, sample in enumerate(OP.samples(torch.device(device), dtype)):
        numerics.check(OP, backend, sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_each_instruction_set(poisoned_memory, instruction_set, dtype):
    numerics.require_backend("cpu", OP.name, "cpu", dtype)
    for sample in OP.samples(CPU, dtype):
        numerics.check(OP, "cpu", sample, dtype)


def test_bfloat16_without_its_instructions(poisoned_memory):
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    before = torch.ops.aefast_cpu.use_bfloat16_products(False)
    try:
        for sample in OP.samples(CPU, torch.bfloat16):
            numerics.check(OP, "cpu", sample, torch.bfloat16)
    finally:
        torch.ops.aefast_cpu.use_bfloat16_products(before)


def test_reference_is_the_definition():
    for sample in OP.samples(CPU, torch.float64):
        torch.testing.assert_close(OP.reference(**sample), of_code(**sample), rtol=1e-12, atol=1e-12)


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    # The fixture is to hold for all examples.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    batch=st.sampled_from([(), (1,), (37,), (2, 3), (0,)]),
    entries=st.integers(0, 9),
    latents=st.one_of(st.integers(1, 20), st.integers(100, 300)),
    columns=st.one_of(st.integers(0, 40), st.integers(120, 140)),
    strides=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced"])] * 2),
    has_bias=st.booleans(),
)
def test_any_shape_and_stride(on_cpu, batch, entries, latents, columns, strides, has_bias):
    generator = torch.Generator().manual_seed(entries + 10 * latents + 10000 * columns)

    def matrix(layout, *shape):
        *leading, rows, cols = shape
        if layout == "transposed":
            return torch.randn(*leading, cols, rows, generator=generator).transpose(-1, -2)
        if layout == "sliced":
            return torch.randn(*leading, 2 * rows + 1, cols + 3, generator=generator)[..., 1::2, 2 : cols + 2]
        return torch.randn(*shape, generator=generator)

    values = matrix(strides[0], *batch, 1, entries)[..., 0, :]
    indices = torch.randint(-1, latents, (*batch, entries), generator=generator)
    weight = matrix(strides[1], latents, columns)
    bias = torch.randn(columns, generator=generator) if has_bias else None
    arguments = [one if one is None else one.requires_grad_() for one in (values, weight, bias)]
    out = AF.sparse_decode(values, indices, weight, bias)
    assert out.shape == (*batch, columns)
    exact = [one if one is None else one.detach().double().requires_grad_() for one in arguments]
    expected = of_code(exact[0], indices, exact[1], exact[2])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, [one for one in arguments if one is not None], upstream)
    true = torch.autograd.grad(expected, [one for one in exact if one is not None], upstream.double())
    for ours, theirs in zip(found, true, strict=True):
        # The gradient of a value that is padding is none of the code's.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("latents", LATENTS)
def test_padding_adds_nothing_whatever_is_beside_it(on_cpu, latents):
    """Neither NaN as its value nor in any row of weight, and its gradient is 0."""
    values, indices, weight, bias = (one.detach() for one in operands(torch.float32, latents))
    indices[:, 1:] = -1
    indices[:, 0] = 4
    values[:, 1:] = float("nan")
    weight[:4], weight[5:] = float("nan"), float("inf")
    values, weight = values.requires_grad_(), weight.requires_grad_()
    if latents == LATENTS[0] and on_cpu == "cpu":
        # Dense products meet every row of weight.
        weight = weight.detach().nan_to_num(0.0, 0.0).requires_grad_()
    out = AF.sparse_decode(values, indices, weight, bias)
    torch.testing.assert_close(out, values.detach()[:, :1] * weight.detach()[4] + bias)
    of_values, of_weight = torch.autograd.grad(out.sum(), (values, weight))
    assert (of_values[:, 1:] == 0).all()
    torch.testing.assert_close(of_values[:, 0], weight.detach()[4].sum().expand(7))
    assert (of_weight[:4] == 0).all() and (of_weight[5:] == 0).all()
    torch.testing.assert_close(of_weight[4], values.detach()[:, 0].sum().expand(5))


def test_int32_indices(on_cpu):
    values, indices, weight, bias = operands(torch.float32)
    expected = AF.sparse_decode(values, indices, weight, bias)
    assert torch.equal(AF.sparse_decode(values, indices.int(), weight, bias), expected)


@pytest.mark.parametrize("latents", LATENTS)
def test_first_and_second_derivatives(on_cpu, latents):
    values, indices, weight, bias = operands(latents=latents, rows=4, columns=3)

    def decode(values, weight, bias):
        return AF.sparse_decode(values, indices, weight, bias)

    assert torch.autograd.gradcheck(decode, (values, weight, bias))
    assert torch.autograd.gradgradcheck(decode, (values, weight, bias))


def test_gradient_penalty(on_cpu):
    """Second derivatives flow through both an input and another that depends on it."""

    def penalty(function):
        values, indices, weight, bias = operands()
        out = function(values, indices, weight * (1 + values.mean()), bias)
        (gradient,) = torch.autograd.grad(out.square().sum(), values, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (values, weight, bias))

    for ours, theirs in zip(penalty(AF.sparse_decode), penalty(OP.reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("latents", LATENTS)
def test_only_the_gradients_asked_for(on_cpu, latents):
    values, indices, weight, bias = operands(latents=latents)
    inputs = values, weight, bias
    every = torch.autograd.grad(AF.sparse_decode(values, indices, weight, bias).sum(), inputs)
    for index in range(3):
        tensors = [one.detach().requires_grad_(index == which) for which, one in enumerate(inputs)]
        out = AF.sparse_decode(tensors[0], indices, *tensors[1:])
        (alone,) = torch.autograd.grad(out.sum(), tensors[index])
        torch.testing.assert_close(alone, every[index], rtol=1e-14, atol=1e-14)


def test_vectorised_backward(on_cpu):
    values, indices, weight, bias = operands(torch.float32)
    out = AF.sparse_decode(values, indices, weight, bias)
    upstream = draw(3, *out.shape, dtype=torch.float32)
    inputs = values, weight, bias
    found = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for index, one in enumerate(upstream):
        for ours, theirs in zip(found, torch.autograd.grad(out, inputs, one, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[index], theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    ops = torch.ops.aefast
    for wants in (False, True):
        values, indices, weight, bias = (one.detach().to(device) for one in operands(dtype))
        tensors = [one.requires_grad_(wants) for one in (values, weight, bias)]
        for its_bias in (tensors[2], None):
            torch.library.opcheck(
                ops.sparse_decode.default, (tensors[0], indices, tensors[1], its_bias, backend)
            )
    grad = draw(7, 5, dtype=dtype).to(device)
    for needs in range(1, 8):
        arguments = (grad, values.detach(), indices, weight.detach(), needs, backend)
        torch.library.opcheck(ops.sparse_decode_backward.default, arguments)


def test_compiles_whole(on_cpu):
    values, indices, weight, bias = operands(torch.float32)

    def loss(values, weight, bias):
        return AF.sparse_decode(values, indices, weight, bias).square().sum()

    inputs = values, weight, bias
    expected = loss(*inputs), *torch.autograd.grad(loss(*inputs), inputs)
    value = torch.compile(loss, fullgraph=True)(*inputs)
    for ours, theirs in zip((value, *torch.autograd.grad(value, inputs)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torch_func_and_forward_mode_use_the_reference():
    values, indices, weight, bias = (one.detach() for one in operands(torch.float32))

    def decode(values, weight, bias):
        return AF.sparse_decode(values, indices, weight, bias)

    for index in range(3):
        found = torch.func.jacrev(decode, index)(values, weight, bias)
        torch.testing.assert_close(found, torch.func.jacfwd(decode, index)(values, weight, bias))
    found = torch.func.vmap(AF.sparse_decode, (0, 0, None, None))(values, indices, weight, bias)
    torch.testing.assert_close(found, decode(values, weight, bias))
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    with aefast.backend("cpu"), pytest.raises(aefast.BackendError, match="forward-mode"):
        torch.func.jvp(decode, (values, weight, bias), (values, weight, bias))


def test_meta_tensors_and_negative_views():
    values, indices, weight, bias = (one.detach() for one in operands(torch.float32))
    expected = AF.sparse_decode(values, indices, weight, bias)
    found = AF.sparse_decode(*(one.to("meta") for one in (values, indices, weight, bias)))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    negated = torch.complex(values, -values).conj().imag
    assert negated.is_neg()
    assert torch.equal(AF.sparse_decode(negated, indices, weight, bias), expected)


def test_autocast(on_cpu):
    values, indices, weight, bias = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = AF.sparse_decode(values, indices, weight, bias)
    assert found.dtype == torch.bfloat16
    halves = (values.bfloat16(), indices, weight.bfloat16(), bias.bfloat16())
    assert torch.equal(found, AF.sparse_decode(*halves))


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_does_not_depend_on_threads(on_cpu, dtype):
    rows, latents = 1500, 301
    indices = choose(latents, rows, 9)
    indices[:, 4] = 7
    indices[::3, 5] = -1
    inputs = [
        draw(*shape, dtype=dtype, seed=seed).requires_grad_()
        for seed, shape in enumerate(((rows, 9), (latents, 67), (67,)))
    ]
    threads = torch.get_num_threads()

    def once(count):
        torch.set_num_threads(count)
        try:
            out = AF.sparse_decode(inputs[0], indices, *inputs[1:])
            return out, *torch.autograd.grad(out, inputs, draw(rows, 67, dtype=dtype))
        finally:
            torch.set_num_threads(threads)

    first = once(1)
    for count in (1, 2, 3, 7):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(once(count), first, strict=True))


@pytest.mark.usefixtures("no_kept_memory")
def test_no_matrix_of_the_code():
    """The largest tensor allocated is the gradient of weight."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    rows, latents = 2000, 3000
    values, weight = draw(rows, 4, dtype=torch.float32), draw(latents, 8, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile, aefast.backend("cpu"):
        leaves = values.requires_grad_(), weight.requires_grad_()
        out = AF.sparse_decode(values, choose(latents, rows, 4), weight)
        torch.autograd.grad(out.sum(), leaves)
    largest = max(
        event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    assert largest <= 4 * latents * 8 < 4 * rows * latents / 8


def test_gradient_of_a_latent_of_many_entries_is_exact():
    """Sums of sums: adding so many terms one by one would err by a hundred spacings."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    rows = 200_000
    values = (1 + draw(rows, 1, dtype=torch.float32).abs()).requires_grad_()
    weight = draw(500, 3, dtype=torch.float32).requires_grad_()
    with aefast.backend("cpu"):
        out = AF.sparse_decode(values, torch.full((rows, 1), 7), weight)
        (found,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(found[7].double(), values.detach().double().sum().expand(3), rtol=1e-6, atol=0)


def test_indices_beyond_the_latents(on_cpu):
    values, indices, weight, bias = operands(torch.float32)
    indices[5, 1] = 11
    with pytest.raises(InputError, match="indices must be less than the rows of weight, 11, got 11"):
        AF.sparse_decode(values, indices, weight, bias)


@pytest.mark.parametrize("latents", LATENTS)
def test_launchers_refuse_indices_beyond_the_latents(latents):
    """What a compiled graph calls."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    values, indices, weight, _ = (one.detach() for one in operands(torch.float32, latents))
    indices[5, 1] = latents
    with pytest.raises(RuntimeError, match=f"indices must be less than {latents}"):
        torch.ops.aefast.sparse_decode(values, indices, weight, None, "cpu")
    with pytest.raises(RuntimeError, match=f"indices must be less than {latents}"):
        torch.ops.aefast.sparse_decode_backward(torch.ones(7, 5), values, indices, weight, 3, "cpu")


def test_tensors_must_not_change_before_the_backward():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    values, indices, weight, bias = operands(torch.float32)
    out = AF.sparse_decode(values, indices, moved := weight * 1.0, bias)
    with torch.no_grad():
        moved.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [[1.0]]}, "values must be a torch.Tensor, got list"),
        ({"indices": None}, "indices must be a torch.Tensor, got NoneType"),
        ({"weight": 1.0}, "weight must be a torch.Tensor, got float"),
        ({"values": torch.ones(())}, r"values must have at least one dimension, \(\*, k\), got a scalar"),
        ({"values": torch.ones(4, 2).long()}, "values must be float32, .*, got int64"),
        ({"indices": torch.ones(4, 2)}, "indices must be int64 or int32, got float32"),
        ({"values": torch.ones(4, 2).to_sparse()}, "values must be a dense tensor, got a sparse_coo one"),
        ({"indices": torch.ones(4, 3).long()}, r"indices must have the shape of values, \(4, 2\), got .*3"),
        ({"indices": torch.ones(4, 2, device="meta").long()}, "indices must be on the device of values, cpu"),
        ({"weight": torch.ones(5)}, r"weight must have two dimensions, \(F, D\), got shape \(5,\)"),
        ({"weight": torch.ones(5, 3).double()}, "weight must have the dtype of values, float32, got float64"),
        ({"bias": torch.ones(4)}, r"bias must be \(3,\) to match weight, got shape \(4,\)"),
        ({"bias": torch.ones(3).half()}, "bias must have the dtype of values, float32, got float16"),
        ({"indices": torch.full((4, 2), 5)}, "indices must be less than the rows of weight, 5, got 5"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "values": torch.ones(4, 2),
        "indices": torch.ones(4, 2).long(),
        "weight": torch.ones(5, 3),
        "bias": torch.ones(3),
    }
    with pytest.raises(InputError, match=f"sparse_decode: {message}"):
        AF.sparse_decode(**{**arguments, **change})


@pytest.mark.parametrize("latents", LATENTS)
@pytest.mark.parametrize("layout", ["plain", "transposed", "spread"])
@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_no_row_has_does_not_matter(on_cpu, value, dtype, layout, latents):
    """A latent whose direction is no number, and a row whose gradient is none, where others have them not."""
    indices = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 2, 2]])
    values, weight = draw(3, 3, dtype=dtype), draw(latents, 5, dtype=dtype)
    weight[9, 2] = value
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "spread":
        weight = weight.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    values, weight = values.requires_grad_(), weight.detach().requires_grad_()
    out = AF.sparse_decode(values, indices, weight)
    assert out.isfinite().all()
    grad = torch.ones_like(out)
    grad[1] = value
    (of_weight,) = torch.autograd.grad(out, weight, grad)
    is_finite = torch.ones(latents, dtype=torch.bool)
    is_finite[3:6] = False
    assert torch.equal(of_weight.isfinite().all(1), is_finite)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("latents", LATENTS)
def test_many_entries_of_one_latent_are_summed_before_they_are_rounded(on_cpu, latents, dtype):
    entries = 5000 if dtype == torch.bfloat16 else 3000
    indices = torch.zeros(2, entries, dtype=torch.long)
    indices[1] = torch.arange(entries) % 2
    out = AF.sparse_decode(torch.ones(2, entries, dtype=dtype), indices, torch.ones(latents, 1, dtype=dtype))
    assert torch.equal(out, torch.full((2, 1), entries, dtype=dtype))
