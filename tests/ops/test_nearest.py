import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops import nearest
from support import numerics

CPU = torch.device("cpu")
OP = nearest.OP
# Indices have neither rounding errors nor gradients: they are compared on their own.
DISTANCE = dataclasses.replace(
    OP, function=lambda x, y: AF.nearest(x, y)[0], reference=lambda x, y: nearest.reference(x, y)[0]
)
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
# Where nothing but what surrounds a launcher is tested, and the reference where there is none.
ON_CPU = ["cpu", "eager"]


def draw(*shape, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def clouds(dtype=torch.float64, rows=7, columns=9, size=3, batch=()):
    return tuple(
        draw(*batch, count, size, dtype=dtype, seed=seed).requires_grad_()
        for seed, count in enumerate((rows, columns))
    )


def all_squared(x, y):
    """(*, N, M), by differences in float64."""
    return (x.double()[..., :, None, :] - y.double()[..., None, :, :]).square().sum(-1)


def taken(y, index):
    return y.take_along_dim(index[..., None], -2)


@pytest.fixture(params=ON_CPU)
def on_cpu(request):
    numerics.require_backend(request.param, OP.name, "cpu", torch.float32)
    with aefast.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_samples_leave_no_choice_to_rounding(dtype):
    """Each sample's second nearest row is one of the same coordinates, or a hundred float32 spacings farther."""
    for sample in OP.samples(CPU, dtype):
        for x, y in ((sample["x"], sample["y"]), (sample["y"], sample["x"])):
            if x.numel() == 0 or y.numel() == 0:
                continue
            squared = all_squared(x, y)
            least, index = squared.min(-1, keepdim=True)
            is_same = (y.unsqueeze(-3) == taken(y, index[..., 0]).unsqueeze(-2)).all(-1)
            assert (is_same | (squared - least > 1e-5 * least)).all()


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    for index, sample in enumerate(OP.samples(torch.device(device), dtype)):
        numerics.check(DISTANCE, backend, sample, dtype, expand_grad=index % 2 == 0)
        with aefast.backend(backend):
            _, found = AF.nearest(**sample)
        assert found.dtype == torch.int64
        if found.numel():
            assert torch.equal(found, all_squared(**sample).min(-1).indices)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_each_instruction_set(poisoned_memory, instruction_set, dtype):
    numerics.require_backend("cpu", OP.name, "cpu", dtype)
    for sample in OP.samples(CPU, dtype):
        numerics.check(DISTANCE, "cpu", sample, dtype)


@pytest.mark.parametrize("differences", [1, 100, nearest._DIFFERENCES])
def test_reference_is_the_definition(differences, monkeypatch):
    """Whatever the blocks it works in."""
    monkeypatch.setattr(nearest, "_DIFFERENCES", differences)
    for sample in OP.samples(CPU, torch.float64):
        distance, index = OP.reference(**sample)
        if distance.numel():
            squared, expected = all_squared(**sample).min(-1)
            assert torch.equal(index, expected)
            torch.testing.assert_close(distance, squared.sqrt(), rtol=1e-14, atol=0)


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    # The fixture is to hold for all examples.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    batch=st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    rows=st.integers(0, 80),
    columns=st.integers(1, 150),
    size=st.one_of(st.integers(1, 40), st.integers(60, 70)),
    strides=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced", "expanded"])] * 2),
)
def test_any_shape_and_stride(on_cpu, batch, rows, columns, size, strides):
    generator = torch.Generator().manual_seed(rows + 100 * columns + 20000 * size)

    def cloud(layout, count):
        if layout == "transposed":
            return torch.randn(*batch, size, count, generator=generator).transpose(-1, -2)
        if layout == "sliced":
            return torch.randn(*batch, 2 * count + 1, size + 3, generator=generator)[..., 1::2, 2 : size + 2]
        if layout == "expanded":
            return torch.randn(1, size, generator=generator).expand(*batch, count, size)
        return torch.randn(*batch, count, size, generator=generator)

    x, y = cloud(strides[0], rows), cloud(strides[1], columns)
    distance, index = AF.nearest(x, y)
    assert distance.shape == index.shape == (*batch, rows)
    if not distance.numel():
        return
    # A sum of `size` squares, each of two roundings.
    tolerance = (size + 4) * torch.finfo(torch.float32).eps
    least = all_squared(x, y).min(-1).values.sqrt()
    torch.testing.assert_close(distance.double(), least, rtol=tolerance, atol=0)
    at_index = (x.double() - taken(y, index).double()).norm(dim=-1)
    torch.testing.assert_close(at_index, least, rtol=tolerance, atol=0)


@pytest.mark.parametrize("size", [2, 3, 40])
def test_of_equal_rows_the_first(on_cpu, size):
    y = draw(5, size, dtype=torch.float32).repeat(300, 1)
    x = y[:5] + 0.01 * draw(5, size, dtype=torch.float32, seed=3)
    distance, index = AF.nearest(torch.cat((x, y[:5])), y)
    assert index.tolist() == [0, 1, 2, 3, 4] * 2
    assert (distance[5:] == 0).all()
    # On a lattice many rows are at the same distance, which float32 has exactly.
    lattice = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0), torch.arange(8.0))
    _, index = AF.nearest(lattice + 0.5, lattice)
    assert torch.equal(index, all_squared(lattice + 0.5, lattice).min(-1).indices)


def test_far_from_zero(on_cpu):
    """An offset that products would drown in."""
    x, y = (one.detach() for one in clouds(torch.float32, 50, 60, 4))
    x, y = (1e4 + 64 * one.mul(64).round() / 64 for one in (x, y))
    distance, index = AF.nearest(x, y)
    squared, expected = all_squared(x, y).min(-1)
    assert torch.equal(index, expected)
    torch.testing.assert_close(distance.double(), squared.sqrt(), rtol=1e-6, atol=0)


def test_gradient_is_that_of_the_pairs(on_cpu):
    """Of a distance d the unit vector along it, to both of its ends; y's row 0 is nearest to three."""
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [20.0, 21.0], [20.0, 20.0]], requires_grad=True)
    y = torch.tensor([[0.0, 0.0], [20.0, 20.0], [90.0, 0.0]], requires_grad=True)
    distance, index = AF.nearest(x, y)
    assert distance.tolist() == [5.0, 2.0, 1.0, 1.0, 0.0] and index.tolist() == [0, 0, 0, 1, 1]
    assert not index.requires_grad
    grad = torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4])
    of_x, of_y = torch.autograd.grad(distance, (x, y), grad)
    expected = torch.tensor([[0.6, 0.8], [0.0, 10.0], [-100.0, 0.0], [0.0, 1000.0], [0.0, 0.0]])
    torch.testing.assert_close(of_x, expected)
    torch.testing.assert_close(of_y, torch.tensor([[99.4, -10.8], [0.0, -1000.0], [0.0, 0.0]]))


def test_no_gradient_where_the_distance_is_zero(on_cpu):
    x = draw(6, 3, dtype=torch.float32).requires_grad_()
    for y in (x.detach().clone().requires_grad_(), x):
        distance, _ = AF.nearest(x, y)
        assert (distance == 0).all()
        for gradient in torch.autograd.grad(distance.sum(), {x, y}):
            assert (gradient == 0).all()


@pytest.mark.parametrize("columns", [1, 7, 50, 64, 131])
def test_of_equal_rows_the_reference_takes_the_first(columns):
    """Whatever the order in which PyTorch sums the last columns of a matrix."""
    generator = torch.Generator().manual_seed(250)
    for size in (2, 5, 17):
        x = torch.randn(40, size, generator=generator)
        y = torch.randn(1, size, generator=generator).repeat(columns, 1)
        with aefast.backend("eager"):
            assert (AF.nearest(x, y)[1] == 0).all()


def test_first_and_second_derivatives(on_cpu):
    for batch in ((), (2,), (2, 1)):
        tensors = clouds(batch=batch)

        def distance(x, y):
            return AF.nearest(x, y)[0]

        assert torch.autograd.gradcheck(distance, tensors)
        assert torch.autograd.gradgradcheck(distance, tensors)


def test_gradient_penalty(on_cpu):
    """Second derivatives flow through both an input and another that depends on it."""

    def penalty(function):
        x, y = clouds()
        distance, _ = function(x, y * (1 + x.mean()))
        (gradient,) = torch.autograd.grad(distance.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, y))

    for ours, theirs in zip(penalty(AF.nearest), penalty(OP.reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_only_the_gradients_asked_for(on_cpu):
    x, y = clouds()
    both = torch.autograd.grad(AF.nearest(x, y)[0].sum(), (x, y))
    for index in range(2):
        tensors = [one.detach().requires_grad_(index == which) for which, one in enumerate((x, y))]
        (alone,) = torch.autograd.grad(AF.nearest(*tensors)[0].sum(), tensors[index])
        assert torch.equal(alone, both[index])


def test_vectorised_backward(on_cpu):
    x, y = clouds(torch.float32)
    distance, _ = AF.nearest(x, y)
    upstream = draw(3, *distance.shape, dtype=torch.float32)
    found = torch.autograd.grad(distance, (x, y), upstream, is_grads_batched=True, retain_graph=True)
    for index, one in enumerate(upstream):
        for ours, theirs in zip(
            found, torch.autograd.grad(distance, (x, y), one, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(ours[index], theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    ops = torch.ops.aefast
    for wants in (False, True):
        x, y = (draw(2, rows, 3, seed=rows).to(device, dtype).requires_grad_(wants) for rows in (6, 5))
        torch.library.opcheck(ops.nearest.default, (x, y, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_backward(dtype):
    x, y = draw(2, 6, 3, dtype=dtype), draw(2, 5, 3, dtype=dtype, seed=3)
    grad, index = draw(2, 6, dtype=torch.float32), torch.arange(12).reshape(2, 6) % 5
    for needs in (1, 2, 3):
        torch.library.opcheck(torch.ops.aefast.nearest_backward.default, (grad, x, y, index, needs))


def test_backward_of_the_op():
    """No backend is needed for it: its gradients are those of the distances along given indices."""
    for dtype in (torch.float32, torch.float64):
        x, y = (one.detach().to(dtype).requires_grad_() for one in clouds(batch=(3,)))
        index = torch.randint(9, (3, 7), generator=torch.Generator().manual_seed(1))
        grad = draw(3, 7, dtype=dtype)
        expected = torch.autograd.grad(nearest.squared_to(x, y, index), (x, y), grad)
        for grads in (grad, grad.t().contiguous().t()):
            found = torch.ops.aefast.nearest_backward(grads, x.detach(), y.detach(), index, 3)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs)
        for needs, which in ((1, 0), (2, 1)):
            alone = torch.ops.aefast.nearest_backward(grad, x.detach(), y.detach(), index, needs)
            assert torch.equal(alone[which], found[which]) and alone[1 - which].numel() == 0


def test_compiles_whole(on_cpu):
    x, y = clouds(torch.float32, batch=(2,))

    def loss(x, y):
        distance, index = AF.nearest(x, y)
        return distance.square().sum() + index.sum()

    expected = loss(x, y), *torch.autograd.grad(loss(x, y), (x, y))
    value = torch.compile(loss, fullgraph=True)(x, y)
    for ours, theirs in zip((value, *torch.autograd.grad(value, (x, y))), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torch_func_and_forward_mode_use_the_reference():
    x, y = (one.detach() for one in clouds(torch.float32))

    def distance(x, y):
        return AF.nearest(x, y)[0]

    for index in range(2):
        found = torch.func.jacrev(distance, index)(x, y)
        torch.testing.assert_close(found, torch.func.jacfwd(distance, index)(x, y))
        leaves = [one.clone().requires_grad_() for one in (x, y)]
        expected = torch.autograd.grad(distance(*leaves).sum(), leaves[index])[0]
        torch.testing.assert_close(found.sum(0), expected)
    stacks = torch.stack((x, 2 * x)), torch.stack((y, y - 1))
    for dims in ((0, 0), (0, None), (None, 0)):
        given = [stack if dim == 0 else stack[0] for stack, dim in zip(stacks, dims, strict=True)]
        found = torch.func.vmap(AF.nearest, dims)(*given)
        for index in range(2):
            expected = AF.nearest(
                *(stack[index if dim == 0 else 0] for stack, dim in zip(stacks, dims, strict=True))
            )
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours[index], theirs)
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    with aefast.backend("cpu"), pytest.raises(aefast.BackendError, match="forward-mode"):
        torch.func.jvp(distance, (x, y), (x, y))


def test_meta_tensors_and_negative_views():
    x, y = (one.detach() for one in clouds(torch.float32, batch=(2,)))
    expected = AF.nearest(x, y)
    found = AF.nearest(x.to("meta"), y.to("meta"))
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in expected]
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(AF.nearest(negated, y), expected, strict=True)
    )


def test_autocast_runs_in_float32(on_cpu):
    x, y = clouds(torch.float32)
    expected = AF.nearest(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = AF.nearest(x, y)
        mixed, _ = AF.nearest(x.bfloat16(), y)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert mixed.dtype == torch.float32
    half, index = AF.nearest(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32 and index.dtype == torch.int64


def test_gradients_of_half_precision(on_cpu):
    x, y = clouds(torch.bfloat16)
    found = torch.autograd.grad(AF.nearest(x, y)[0].sum(), (x, y))
    leaves = [one.detach().double().requires_grad_() for one in (x, y)]
    expected = torch.autograd.grad(OP.reference(*leaves)[0].sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        # Rounded once, from float32.
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-6)


def test_does_not_depend_on_threads(on_cpu):
    x, y = clouds(torch.float32, 301, 257, 5, (2,))
    threads = torch.get_num_threads()

    def once(count):
        torch.set_num_threads(count)
        try:
            distance, index = AF.nearest(x, y)
            return distance, index, *torch.autograd.grad(distance.sum(), (x, y))
        finally:
            torch.set_num_threads(threads)

    first = once(1)
    for count in (1, 2, 3, 7):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(once(count), first, strict=True))


@pytest.mark.usefixtures("no_kept_memory")
def test_no_matrix_of_distances(on_cpu):
    """The largest tensor allocated is far smaller than one of a number for each of the pairs."""
    x, y = clouds(torch.float32, 2000, 3000, 3)
    with torch.profiler.profile(profile_memory=True) as profile:
        distance, _ = AF.nearest(x, y)
        torch.autograd.grad(distance.sum(), (x, y))
    largest = max(
        event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    assert 0 < largest <= 2 * 4 * nearest._DIFFERENCES < 4 * 2000 * 3000 / 8


def test_nan_is_named_in_eager_mode(on_cpu):
    x, y = (one.detach() for one in clouds(torch.float32))
    for name in ("x", "y"):
        for value in (float("nan"), float("inf")):
            given = {"x": x.clone(), "y": y.clone()}
            given[name][3, 1] = value
            # An infinite row of y is the nearest to none.
            if value != value:
                with pytest.raises(InputError, match=f"nearest: {name} must be finite, got 1 elements"):
                    AF.nearest(**given)
            else:
                distance, _ = AF.nearest(**given)
                assert distance.isinf().nonzero().tolist() == ([[3]] if name == "x" else [])


def test_distances_that_are_not_finite_have_gradients(on_cpu):
    """Whatever their indices, they are of a row; and what is finite has the gradient it has without them."""
    x, y = (one.detach() for one in clouds(torch.float32, batch=(2,)))
    x[1, 6, 0] = float("inf")
    x[1, 5] = 1e30
    x, y = x.requires_grad_(), y.requires_grad_()
    distance, index = AF.nearest(x, y)
    assert distance.isinf().nonzero().tolist() == [[1, 5], [1, 6]]
    assert ((index >= 0) & (index < 9)).all()
    of_x, of_y = torch.autograd.grad(distance[:, :5].sum(), (x, y), retain_graph=True)
    alone = x.detach()[:, :5].requires_grad_()
    expected = torch.autograd.grad(AF.nearest(alone, y)[0].sum(), (alone, y))
    torch.testing.assert_close(of_x[:, :5], expected[0])
    # That of an infinite distance is 0 times infinity: as in PyTorch, it reaches the row it is of.
    torch.testing.assert_close(of_y[0], expected[1][0])
    assert torch.autograd.grad(distance.sum(), y)[0].shape == y.shape


def test_nan_propagates_in_the_reference():
    x, y = (one.detach() for one in clouds(torch.float32, columns=500))
    x[2, 0] = float("nan")
    distance, index = OP.reference(x, y)
    assert distance.isnan().nonzero().tolist() == [[2]] and ((index >= 0) & (index < 500)).all()
    y[499, 1] = float("nan")
    assert OP.reference(x, y)[0].isnan().all()


def test_tensors_must_not_change_before_the_backward(on_cpu):
    x, y = clouds(torch.float32)
    distance, _ = AF.nearest(x * 1.0, moved := y * 1.0)
    with torch.no_grad():
        moved.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        distance.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[1.0]]}, "x must be a torch.Tensor, got list"),
        ({"y": None}, "y must be a torch.Tensor, got NoneType"),
        ({"x": torch.ones(3)}, r"x must be \(\*, points, dimensions\) .*, got shape \(3,\)"),
        ({"y": torch.ones(())}, r"y must be \(\*, points, dimensions\) .*, got shape \(\)"),
        ({"x": torch.ones(3, 0)}, r"x must be .* of at least one dimension, got shape \(3, 0\)"),
        ({"y": torch.ones(2, 0, 5)}, r"y must have at least one point, got shape \(2, 0, 5\)"),
        ({"y": torch.ones(2, 4, 6)}, r"y must have as many dimensions as x, 5, got shape \(2, 4, 6\)"),
        ({"y": torch.ones(4, 5)}, r"y must have the leading dimensions of x, \(2,\), got shape \(4, 5\)"),
        ({"y": torch.ones(1, 4, 5)}, r"y must have the leading dimensions of x, \(2,\)"),
        ({"x": torch.ones(2, 3, 5, dtype=torch.int64)}, "x must be float32, .*, got int64"),
        ({"y": torch.ones(2, 4, 5).double()}, "y must have the dtype of x, float32, got float64"),
        ({"y": torch.ones(2, 4, 5, device="meta")}, "y must be on the device of x, cpu, got meta"),
        ({"x": torch.ones(2, 3, 5).to_sparse()}, "x must be a dense tensor, got a sparse_coo one"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(2, 3, 5), "y": torch.ones(2, 4, 5)}
    with pytest.raises(InputError, match=f"nearest: {message}"):
        AF.nearest(**{**arguments, **change})
