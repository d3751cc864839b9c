import pytest
import torch
import torch.nn.functional as F

import aefast
import aefast.functional as AF
from aefast.bench import memory
from aefast.errors import InputError
from aefast.ops import _loss, _registry
from aefast.ops import linear_reconstruction_loss as op
from support import numerics

CPU = torch.device("cpu")
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]


def draw(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(rows, inputs, features, dtype=torch.float32):
    return (
        draw(rows, inputs, dtype=dtype),
        draw(features, inputs, dtype=dtype, seed=2) * inputs**-0.5,
        draw(features, dtype=dtype, seed=3),
        draw(rows, features, dtype=dtype, seed=4),
    )


def gradients(function, operands, grad=1.0, **options):
    """The value, and the gradients of all operands but the target."""
    leaves = [one.detach().requires_grad_() for one in operands[:3]]
    value = function(*leaves, operands[3], **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, grad))]


@pytest.fixture
def small_parts(monkeypatch):
    """Within it, the reconstruction is made in many parts."""
    monkeypatch.setattr(op, "_PART", 128)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_the_reference_in_parts(poisoned_memory, small_parts, backend, device, dtype):
    numerics.require_backend(backend, "linear_reconstruction_loss", device, dtype)
    for sample in op.samples(torch.device(device), dtype):
        numerics.check(op.OP, backend, sample, dtype)


def test_is_the_two_ops_one_after_the_other():
    operands = layer(70, 9, 33)
    for reduction in op.REDUCTIONS:
        for kind in ("mse", "rmse", "huber"):
            found = gradients(
                AF.linear_reconstruction_loss,
                operands,
                kind=kind,
                reduction=reduction,
                output_activation="tanh",
            )

            def apart(h, weight, bias, target, kind=kind, reduction=reduction):
                output = AF.linear_act(h, weight, bias, "tanh")
                return AF.reconstruction_loss(output, target, kind, reduction=reduction)

            torch.testing.assert_close(found, gradients(apart, operands))


@pytest.mark.parametrize("shape", [(64, 16, 20000), (20000, 16, 64)])
def test_the_reconstruction_is_never_whole(monkeypatch, shape):
    numerics.require_backend("cpu", "linear_reconstruction_loss", "cpu", torch.float32)
    operands = layer(*shape)
    size = 4 * shape[0] * shape[2]

    def eager(h, weight, bias, target):
        return F.mse_loss(F.linear(h, weight, bias), target)

    def peak(function):
        return memory.peak_bytes(lambda index: gradients(function, operands), CPU)

    assert peak(eager) >= 2 * size
    monkeypatch.setattr(op, "_PART", 1 << 15)
    # Of the operands' gradients and of a few parts.
    assert peak(AF.linear_reconstruction_loss) <= 0.35 * peak(eager)


def test_value_alone_needs_no_gradients(small_parts):
    operands = layer(40, 9, 33)
    with torch.no_grad():
        value = AF.linear_reconstruction_loss(*operands)
    assert not value.requires_grad
    torch.testing.assert_close(value, op.reference(*operands))


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_wanted_gradients(small_parts, wanted):
    operands = [
        one.requires_grad_(bool(wanted >> index & 1)) for index, one in enumerate(layer(20, 9, 33)[:3])
    ]
    target = draw(20, 33, seed=4)
    leaves = [one for one in operands if one.requires_grad]
    found = torch.autograd.grad(AF.linear_reconstruction_loss(*operands, target, "l1"), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(op.reference(*operands, target, "l1"), leaves))


def test_target_that_requires_a_gradient():
    operands = [one.double().requires_grad_() for one in layer(6, 4, 5)]
    assert torch.autograd.gradcheck(AF.linear_reconstruction_loss, operands)
    assert torch.autograd.gradcheck(
        lambda *given: AF.linear_reconstruction_loss(*given, "bce_with_logits"),
        [*operands[:3], operands[3].detach().sigmoid().requires_grad_()],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mse", "l1", "bce_with_logits", "bce"])
def test_under_a_grad_scaler(poisoned_memory, kind, dtype):
    """Gradients of a mean over many elements are too small for float16, and sums over many rows too large."""
    h, weight, bias, target = layer(4096, 8, 65, dtype)
    options = {"output_activation": "sigmoid"} if kind == "bce" else {}
    if kind.startswith("bce"):
        target = target.sigmoid()
    if kind == "mse":
        # One sign for all derivatives, whose sums over the rows are up to 10⁵.
        target = target + 12
    operands = (h.abs(), weight, bias, target)
    found = gradients(AF.linear_reconstruction_loss, operands, 65536.0, kind=kind, **options)
    exact = gradients(op.reference, [one.double() for one in operands], 65536.0, kind=kind, **options)
    eager = gradients(op.reference, operands, 65536.0, kind=kind, **options)
    for ours, theirs, true in zip(found, eager, exact, strict=True):
        error = (ours.double() - true).abs().max()
        bound = 2 * (theirs.double() - true).abs().max() + 2 * torch.finfo(dtype).eps * true.abs().max()
        assert error <= bound


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mse", "bce", "bce_with_logits"])
def test_under_autocast_targets_are_of_any_dtype(kind, half, wide):
    h, weight = torch.randn(4, 3, dtype=wide), torch.randn(5, 3, dtype=wide)
    options = {"kind": kind, "output_activation": "sigmoid" if kind == "bce" else "identity"}
    for dtype in numerics.DTYPES:
        target = torch.rand(4, 5).to(dtype)
        with torch.autocast("cpu", dtype=half):
            found = AF.linear_reconstruction_loss(h, weight, None, target, **options)
            with aefast.backend("eager"):
                expected = AF.linear_reconstruction_loss(h, weight, None, target, **options)
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-2, atol=1e-3)
        if kind != "mse":
            target[1, 1] = 1.5
            with (
                torch.autocast("cpu", dtype=half),
                pytest.raises(InputError, match="target must be from 0 to 1"),
            ):
                AF.linear_reconstruction_loss(h, weight, None, target, **options)


def test_autocast():
    operands = layer(20, 9, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(AF.linear_reconstruction_loss, operands)
        expected = gradients(
            lambda h, weight, bias, target: F.mse_loss(F.linear(h, weight, bias).float(), target), operands
        )
    assert [one.dtype for one in found] == [torch.float32] * 4
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * theirs.abs().max()
    # Neither of two halves holds the other's numbers.
    target = operands[3].half()
    for backend in ("auto", "eager"):
        with aefast.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            value = AF.linear_reconstruction_loss(0 * operands[0], operands[1], None, target)
        torch.testing.assert_close(value, target.float().square().mean())


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_empty(dtype):
    for shape in ((0, 3, 5), (5, 3, 0)):
        operands = layer(*shape, dtype)
        found = gradients(AF.linear_reconstruction_loss, operands, reduction="sum")
        assert all((one == 0).all() for one in found)
        for kind in ("mse", "rmse"):
            value, *found = gradients(AF.linear_reconstruction_loss, operands, kind=kind)
            assert value.isnan() and all((one == 0).all() for one in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": [1.0]}, "h must be a torch.Tensor, got list"),
        ({"h": draw(4, 3)}, r"weight must be \(N, 3\) to match h of shape \(4, 3\), got shape \(6, 5\)"),
        ({"bias": draw(5)}, r"bias must be \(6,\) to match weight"),
        ({"target": draw(4, 5)}, r"target must be \(4, 6\) to match h .* got shape \(4, 5\)"),
        ({"target": draw(4, 6).int()}, "target must be float32, bfloat16, float16 or float64, got int32"),
        ({"target": draw(4, 6).double()}, "target must have the dtype of h, float32, got float64"),
        ({"kind": "mae"}, "kind must be one of mse, rmse, .* got 'mae'"),
        ({"kind": "lp", "p": 0.5}, "p must be a finite number of at least 1, got 0.5"),
        ({"kind": "bce_with_logits"}, "target must be from 0 to 1 for bce_with_logits"),
        (
            {"kind": "bce", "target": draw(4, 6).sigmoid()},
            "output_activation must give numbers from 0 to 1 for bce",
        ),
        ({"output_activation": "swish"}, "output_activation must be one of identity, .* got 'swish'"),
        ({"loss_weight": "2"}, "loss_weight must be a finite number of at least 0, got '2'"),
        ({"reduction": "none"}, "reduction must be one of mean, sum, batchmean, got 'none'"),
        ({"weight": draw(6, 5) * float("nan")}, "weight must be finite, got 30 elements that are not"),
    ],
)
def test_bad_input(change, message):
    h, weight, bias, target = layer(4, 5, 6)
    arguments = {"h": h, "weight": weight, "bias": bias, "target": target, **change}
    for backend in ("auto", "eager") if "weight" not in change else ("auto",):
        with aefast.backend(backend), pytest.raises(InputError, match=message):
            AF.linear_reconstruction_loss(**arguments)


def test_every_kind_is_known():
    for kind in _loss.KINDS:
        options = {"p": 1.5} if kind == "lp" else {}
        h, weight, bias, target = layer(4, 5, 6)
        AF.linear_reconstruction_loss(
            h, weight, bias, target.sigmoid(), kind, output_activation="sigmoid", **options
        )


def test_launcher_wants_a_bias_for_its_gradient():
    numerics.require_backend("cpu", "linear_reconstruction_loss", "cpu", torch.float32)
    launch = _registry.kernels("cpu", "linear_reconstruction_loss").linear_reconstruction_loss
    h, weight, target = torch.rand(4, 8), torch.rand(6, 8), torch.rand(4, 6)
    needs_all = 0b111
    with pytest.raises(RuntimeError, match="gradient of a bias needs a bias"):
        launch(h, weight, None, target, "identity", "mse", 0.0, 1.0, 1.0, needs_all, False, 64)
