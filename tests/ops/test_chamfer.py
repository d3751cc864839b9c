import pytest
import torch

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops import chamfer
from support import numerics

CPU = torch.device("cpu")
OP = chamfer.OP
# The launchers that it uses.
LAUNCHERS = "nearest"
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]


def draw(*shape, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def clouds(dtype=torch.float64, batch=(2,)):
    return draw(*batch, 7, 3, dtype=dtype).requires_grad_(), draw(
        *batch, 5, 3, dtype=dtype, seed=3
    ).requires_grad_()


def textbook(x, y):
    """Of each pair of clouds, in float64."""
    squared = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    return squared.min(-1).values.mean(-1) + squared.min(-2).values.mean(-1)


@pytest.fixture(params=["cpu", "eager"])
def on_cpu(request):
    numerics.require_backend(request.param, LAUNCHERS, "cpu", torch.float32)
    with aefast.backend(request.param):
        yield


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype):
    numerics.require_backend(backend, LAUNCHERS, device, dtype)
    for index, sample in enumerate(OP.samples(torch.device(device), dtype)):
        numerics.check(OP, backend, sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_many_dimensions(poisoned_memory, backend, device, dtype):
    """The squares of a distance may be added one after the other, where PyTorch adds them in a tree: a random walk of
    as many roundings, of which three standard deviations are √D / 2 spacings."""
    numerics.require_backend(backend, LAUNCHERS, device, dtype)
    for size in (257, 1030):
        x, y = (draw(3, count, size, dtype=dtype, seed=count).to(device).requires_grad_() for count in (9, 6))
        with aefast.backend(backend):
            value = AF.chamfer(x, y)
            found = torch.autograd.grad(value, (x, y))
        leaves = [one.detach().double().requires_grad_() for one in (x, y)]
        exact = OP.reference(*leaves)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), exact, rtol=size**0.5 / 2 * eps, atol=0)
        for ours, theirs in zip(found, torch.autograd.grad(exact, leaves), strict=True):
            # A difference, a factor, and the sums of a few.
            torch.testing.assert_close(
                ours.double(), theirs, rtol=8 * eps, atol=8 * eps * theirs.abs().max().item()
            )


def test_reference_is_the_definition():
    for sample in OP.samples(CPU, torch.float64):
        x, y = sample["x"], sample["y"]
        each = textbook(x, y)
        reduced = {"mean": each.mean(), "sum": each.sum(), "none": each}[sample["reduction"]]
        # Over 67 dimensions and more, roots squared again.
        torch.testing.assert_close(OP.reference(**sample), reduced, rtol=1e-13, atol=1e-13)


def test_squared_and_averaged(on_cpu):
    """The distances are 3 and 5 one way, and 3, 5 and 4 the other."""
    x = torch.tensor([[[0.0, 0.0], [10.0, 0.0]]])
    y = torch.tensor([[[0.0, 3.0], [10.0, 5.0], [-4.0, 0.0]]])
    assert AF.chamfer(x, y).item() == pytest.approx((9 + 25) / 2 + (9 + 25 + 16) / 3)


def test_shapes_and_reductions(on_cpu):
    x, y = (one.detach() for one in clouds(torch.float32, (2, 3)))
    each = AF.chamfer(x, y, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(each.double(), textbook(x, y), rtol=1e-6, atol=0)
    torch.testing.assert_close(AF.chamfer(x, y), each.mean())
    torch.testing.assert_close(AF.chamfer(x, y, reduction="sum"), each.sum())
    for reduction in ("none", "mean", "sum"):
        torch.testing.assert_close(AF.chamfer(x[1, 2], y[1, 2], reduction=reduction), each[1, 2])
    empty = torch.zeros(0, 4, 3, requires_grad=True)
    assert AF.chamfer(empty, empty, reduction="none").shape == (0,)
    assert AF.chamfer(empty, empty, reduction="sum") == 0 and AF.chamfer(empty, empty).isnan()
    (gradient,) = torch.autograd.grad(AF.chamfer(empty, empty, reduction="sum"), empty)
    assert gradient.shape == empty.shape


def test_symmetry_and_zero(on_cpu):
    x, y = clouds(torch.float32)
    torch.testing.assert_close(AF.chamfer(x, y), AF.chamfer(y, x))
    shuffled = x.detach()[:, torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    value = AF.chamfer(x, shuffled)
    assert value == 0 and (torch.autograd.grad(value, x)[0] == 0).all()


def test_first_and_second_derivatives(on_cpu):
    for reduction in ("mean", "sum", "none"):

        def distance(x, y, reduction=reduction):
            return AF.chamfer(x, y, reduction=reduction)

        assert torch.autograd.gradcheck(distance, clouds())
        assert torch.autograd.gradgradcheck(distance, clouds())


def test_gradient_descent_brings_clouds_together(on_cpu):
    x, y = (one.detach() for one in clouds(torch.float32, (1,)))
    x.requires_grad_()
    before = AF.chamfer(x, y).item()
    for _ in range(100):
        (gradient,) = torch.autograd.grad(AF.chamfer(x, y), x)
        x.data.sub_(gradient)
    assert AF.chamfer(x, y).item() < before / 4


def test_compiles_whole(on_cpu):
    x, y = clouds(torch.float32)
    expected = AF.chamfer(x, y), *torch.autograd.grad(AF.chamfer(x, y), (x, y))
    value = torch.compile(AF.chamfer, fullgraph=True)(x, y)
    for ours, theirs in zip((value, *torch.autograd.grad(value, (x, y))), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torch_func_and_forward_mode():
    x, y = (one.detach() for one in clouds(torch.float32))
    leaves = [one.clone().requires_grad_() for one in (x, y)]
    expected = torch.autograd.grad(AF.chamfer(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(AF.chamfer, (0, 1))(x, y), expected)
    torch.testing.assert_close(torch.func.jacfwd(AF.chamfer, (0, 1))(x, y), expected)
    found = torch.func.vmap(AF.chamfer)(x, y)
    torch.testing.assert_close(found, AF.chamfer(x, y, reduction="none"))


def test_autocast_and_half_precision(on_cpu):
    x, y = clouds(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(AF.chamfer(x, y), AF.chamfer(x, y).float())
    half = [one.detach().bfloat16().requires_grad_() for one in (x, y)]
    value = AF.chamfer(*half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), textbook(*half).mean(), rtol=1e-6, atol=0)
    assert all(one.dtype == torch.bfloat16 for one in torch.autograd.grad(value, half))


def test_nan_is_named_in_eager_mode(on_cpu):
    for name in ("x", "y"):
        given = dict(zip(("x", "y"), (one.detach() for one in clouds(torch.float32)), strict=True))
        given[name][1, 3, 1] = float("nan")
        with pytest.raises(InputError, match=f"chamfer: {name} must be finite, got 1 elements"):
            AF.chamfer(**given)
        assert OP.reference(**given, reduction="none").isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 1.0}, "x must be a torch.Tensor, got float"),
        ({"x": torch.ones(2, 0, 5)}, r"x must have at least one point, got shape \(2, 0, 5\)"),
        ({"y": torch.ones(2, 0, 5)}, r"y must have at least one point, got shape \(2, 0, 5\)"),
        (
            {"y": torch.ones(3, 4, 5)},
            r"y must have the leading dimensions of x, \(2,\), got shape \(3, 4, 5\)",
        ),
        ({"y": torch.ones(2, 4, 6)}, r"y must have as many dimensions as x, 5, got shape \(2, 4, 6\)"),
        ({"y": torch.ones(2, 4, 5).half()}, "y must have the dtype of x, float32, got float16"),
        ({"reduction": "batchmean"}, "reduction must be one of none, mean, sum, got 'batchmean'"),
        ({"reduction": None}, "reduction must be one of none, mean, sum, got None"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(2, 3, 5), "y": torch.ones(2, 4, 5)}
    with pytest.raises(InputError, match=f"chamfer: {message}"):
        AF.chamfer(**{**arguments, **change})
