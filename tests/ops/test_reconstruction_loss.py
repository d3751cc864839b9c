import math

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.nn import ReconstructionLoss
from aefast.ops import _loss
from aefast.ops import reconstruction_loss as op
from support import numerics

KINDS = {
    **{kind: {} for kind in _loss.KINDS},
    "lp": {"p": 1.7},
    "huber": {"delta": 0.6},
    "charbonnier": {"eps": 0.05},
}
# PyTorch's own, of those kinds that it has.
TORCH = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "bce": F.binary_cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


def pair(kind, *shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind.startswith("bce"):
        second = second.sigmoid()
    if kind == "bce":
        first = first.sigmoid()
    return first.to(dtype), second.to(dtype)


def value_and_gradient(function, input, target, grad=1.0):
    leaf = input.detach().requires_grad_()
    value = function(leaf, target)
    (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, grad))
    return value.detach(), gradient


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", TORCH)
def test_is_what_torch_has(kind, reduction):
    numerics.require_backend("cpu", "reconstruction_loss", "cpu", torch.float64)
    input, target = pair(kind, 7, 33)
    expected = value_and_gradient(
        lambda x, t: TORCH[kind](x, t, reduction=reduction, **KINDS[kind]), input, target
    )
    found = value_and_gradient(
        lambda x, t: AF.reconstruction_loss(x, t, kind, reduction=reduction, **KINDS[kind]), input, target
    )
    torch.testing.assert_close(found, expected)


def test_formulas():
    input, target = pair("mse", 7, 33)
    residual = input - target
    expected = {
        "rmse": residual.square().mean().sqrt(),
        "lp": residual.abs().pow(1.7).mean(),
        "charbonnier": (residual.square() + 0.05**2).sqrt().mean(),
    }
    for kind, value in expected.items():
        torch.testing.assert_close(AF.reconstruction_loss(input, target, kind, **KINDS[kind]), value)
    for reduction, factor in (("sum", 7 * 33), ("batchmean", 33)):
        found = AF.reconstruction_loss(input, target, "l1", reduction=reduction)
        torch.testing.assert_close(found, factor * residual.abs().mean())
        found = AF.reconstruction_loss(input, target, "rmse", reduction=reduction)
        torch.testing.assert_close(found, math.sqrt(factor) * expected["rmse"])


def test_equivalent_kinds():
    input, target = pair("mse", 5, 9, dtype=torch.float32)
    for first, second in (
        (("lp", {"p": 1}), ("l1", {})),
        (("lp", {"p": 2}), ("mse", {})),
        (("charbonnier", {"eps": 0}), ("l1", {})),
    ):
        found, expected = (
            value_and_gradient(
                lambda x, t, k=kind, o=options: AF.reconstruction_loss(x, t, k, **o), input, target
            )
            for kind, options in (first, second)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_eps_whose_square_is_no_float32_counts_as_zero():
    input = torch.tensor([0.0, 1e-25, -1e-25, 3.0])
    found, expected = (
        value_and_gradient(
            lambda x, t, k=kind, o=options: AF.reconstruction_loss(x, t, k, **o), input, torch.zeros(4)
        )
        for kind, options in (("charbonnier", {"eps": 1e-24}), ("l1", {}))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize("kind", ["l1", "lp", "rmse", "mse", "huber", "charbonnier"])
def test_gradient_is_zero_where_nothing_is_left(instruction_set, kind, dtype):
    input = torch.randn(3, 50).to(dtype)
    for reduction in ("mean", "none") if kind != "rmse" else ("mean", "sum"):

        def loss(x, t, reduction=reduction):
            return AF.reconstruction_loss(x, t, kind, reduction=reduction, **KINDS[kind])

        value, gradient = value_and_gradient(loss, input, input.clone())
        assert (value == (0.05 if kind == "charbonnier" else 0)).all() or kind == "charbonnier"
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_under_a_grad_scaler(poisoned_memory, kind, dtype):
    """Gradients of a mean over many elements are too small for float16, times 65536 they are not."""
    numerics.require_backend("cpu", "reconstruction_loss", "cpu", dtype)
    input, target = pair(kind, 512, 784, dtype=dtype)

    def loss(x, t):
        return AF.reconstruction_loss(x, t, kind, **KINDS[kind])

    with aefast.backend("cpu"):
        value, gradient = value_and_gradient(loss, input, target, 65536.0)
    exact = value_and_gradient(
        lambda x, t: op.reference(x, t, kind, **KINDS[kind]), input.double(), target.double(), 65536.0
    )
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), exact[0], rtol=1e-6, atol=0)
    # Kept in half precision, and rounded once more.
    error = (gradient.double() - exact[1]).abs()
    # Half of float16's last place among subnormal numbers, and float32's rounding of probabilities that cancel.
    smallest = (2**-25 if dtype == torch.float16 else 0.0) + 2**-23 * 65536 / input.numel()
    assert (error <= torch.finfo(dtype).eps * exact[1].abs() + smallest).all()


@pytest.mark.parametrize("kind", ["mse", "rmse", "l1", "huber", "charbonnier"])
def test_residuals_of_any_size_in_float16(kind):
    input = torch.tensor([6e4, -4e4, 1.0, 6e4], dtype=torch.float16)
    target = torch.tensor([-6e4, 0.0, 0.0, 6e4], dtype=torch.float16)
    for weight in (0.25, 0.0):

        def loss(x, t, weight=weight):
            return AF.reconstruction_loss(x, t, kind, loss_weight=weight, **KINDS[kind])

        found = value_and_gradient(loss, input, target)[1]
        expected = value_and_gradient(loss, input.double(), target.double())[1]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_one_pass_hands_on_its_gradient():
    """The buffer that the forward fills is the gradient, in float32 on the CPU; nothing is computed in the backward."""
    numerics.require_backend("cpu", "reconstruction_loss", "cpu", torch.float32)
    input, target = pair("mse", 64, 50, dtype=torch.float32)
    leaf = input.clone().requires_grad_()
    with aefast.backend("cpu"):
        value = AF.reconstruction_loss(leaf, target)
    kept = value.grad_fn.saved_tensors[2].data_ptr()
    value.backward()
    assert leaf.grad.data_ptr() == kept
    # Twice through one graph, and summed up.
    leaf.grad = None
    value = AF.reconstruction_loss(leaf, target) + AF.reconstruction_loss(2 * leaf, target)
    value.backward(retain_graph=True)
    once = leaf.grad.clone()
    value.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


@pytest.mark.parametrize("reduction", _loss.REDUCTIONS)
@pytest.mark.parametrize("kind", ["mse", "rmse", "bce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight", [0, 0.5, 3])
def test_weight_is_a_factor(kind, reduction, dtype, weight):
    if kind == "rmse" and reduction == "none":
        return
    input, target = pair(kind, 8, 9, dtype=dtype)

    def weighted(x, t):
        return AF.reconstruction_loss(x, t, kind, reduction=reduction, loss_weight=weight)

    def multiplied(x, t):
        return weight * AF.reconstruction_loss(x, t, kind, reduction=reduction)

    # A factor that goes into the normaliser is rounded there and not with the result.
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(
        value_and_gradient(weighted, input, target),
        value_and_gradient(multiplied, input, target),
        **tolerance,
    )


def test_weighted_gradient_is_written_once():
    numerics.require_backend("cpu", "reconstruction_loss", "cpu", torch.float32)
    input, target = pair("mse", 64, 50, dtype=torch.float32)
    leaf = input.clone().requires_grad_()
    with aefast.backend("cpu"):
        value = AF.reconstruction_loss(leaf, target, loss_weight=0.5)
    kept = value.grad_fn.saved_tensors[2].data_ptr()
    value.backward()
    assert leaf.grad.data_ptr() == kept


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_is_one_launch(dtype):
    numerics.require_backend("cpu", "reconstruction_loss", "cpu", dtype)
    input, target = pair("l1", 16, 5, dtype=dtype)
    leaf = input.clone().requires_grad_()
    with aefast.backend("cpu"):
        value = AF.reconstruction_loss(leaf, target, "l1")
        with _Ops() as ops:
            torch.autograd.grad(value, leaf, torch.tensor(3.0))
    assert [name for name in ops.names if name.startswith("aefast")] == ["aefast::loss_gradient"]
    assert len(ops.names) <= 2  # and perhaps a detach


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_keeps_the_layout_of_images(kind):
    numerics.require_backend("cpu", "reconstruction_loss", "cpu", torch.float32)
    input, target = (
        one.contiguous(memory_format=torch.channels_last)
        for one in pair(kind, 2, 3, 9, 8, dtype=torch.float32)
    )
    with aefast.backend("cpu"):
        _, gradient = value_and_gradient(
            lambda x, t: AF.reconstruction_loss(x, t, kind, **KINDS[kind]), input, target
        )
    assert gradient.stride() == input.stride()
    exact = value_and_gradient(
        lambda x, t: op.reference(x, t, kind, **KINDS[kind]), input.double(), target.double()
    )[1]
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-9)


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    kind=st.sampled_from(sorted(KINDS)),
    rows=st.integers(0, 150),
    columns=st.one_of(st.integers(0, 70), st.integers(900, 2200)),
    strides=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced", "expanded"])] * 2),
    reduction=st.sampled_from(_loss.REDUCTIONS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
def test_any_shape_and_stride(instruction_set, kind, rows, columns, strides, reduction, dtype):
    rows = rows if columns < 900 else rows % 7
    hypothesis.assume(not (kind == "rmse" and reduction == "none"))
    hypothesis.assume(reduction == "none" or rows * columns > 0)

    def matrix(layout, which):
        def make(*shape):
            return pair(kind, *shape, dtype=dtype, seed=rows + 1000 * columns)[which]

        if layout == "transposed":
            return make(columns, rows).t()
        if layout == "sliced":
            return make(2 * rows + 1, columns + 3)[1::2, 2 : columns + 2]
        if layout == "expanded":
            return make(1, columns).expand(rows, columns)
        return make(rows, columns)

    sample = {
        "input": matrix(strides[0], 0),
        "target": matrix(strides[1], 1),
        "kind": kind,
        "reduction": reduction,
        **KINDS[kind],
    }
    numerics.check(op.OP, "cpu", sample, dtype)


@pytest.mark.parametrize("p", [1.0, 1.0078125, 1.5, 2.0, 3.0, 4.5, 8.0])
def test_powers_of_any_size(instruction_set, p):
    """Residuals from subnormal numbers to where the power overflows."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    residual = (torch.exp2(exponents) * (1 + torch.rand(277, dtype=torch.float64))).float()
    residual = torch.cat((residual, -residual, torch.tensor([0.0, math.inf, -math.inf])))
    target = torch.zeros_like(residual)

    def run(function, residual, target):
        leaf = residual.clone().requires_grad_()
        values = function(leaf, target, "lp", p=p, reduction="none")
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]

    found = run(AF.reconstruction_loss, residual, target)
    exact = run(op.reference, residual.double(), target.double())
    for ours, true in zip(found, exact, strict=True):
        true = true.float()
        # What is between the largest float and infinity may round to either.
        is_large = true.abs() > 3e38
        error = (ours.double() - true.double()).abs()[~is_large]
        assert (error <= 4e-7 * (1 + p / 3) * true.double().abs()[~is_large] + 1e-37).all()
        assert (ours.abs()[is_large] > 3e38).all()
        assert torch.equal(ours.sign(), true.sign()) or (ours * true >= 0).all()


def test_cross_entropy_keeps_its_digits(instruction_set):
    """Where the reconstruction is nearly perfect, and far off."""
    logits = torch.tensor([-80.0, -20.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 20.0, 80.0]).repeat(2)
    target = torch.tensor([0.0] * 9 + [1.0] * 9)
    found = AF.reconstruction_loss(logits, target, "bce_with_logits", reduction="none")
    size = logits.double().abs()
    # PyTorch's own loses those below 1e-16.
    exact = size * (target != (logits > 0)) + torch.log1p(torch.exp(-size))
    torch.testing.assert_close(found.double(), exact, rtol=5e-7, atol=1e-37)
    inputs = torch.tensor([0.0, 1e-40, 1e-30, 1e-7, 1e-3, 0.3, 0.5, 0.7, 1 - 2**-24, 1.0]).repeat(2)
    target = torch.tensor([0.0] * 10 + [1.0] * 10)
    found = value_and_gradient(
        lambda x, t: AF.reconstruction_loss(x, t, "bce", reduction="none"), inputs, target
    )
    exact = value_and_gradient(
        lambda x, t: F.binary_cross_entropy(x, t, reduction="none"), inputs.double(), target.double()
    )
    for ours, true in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-6, atol=1e-37)


def test_means_of_nothing():
    empty = torch.empty(0, 3)
    assert AF.reconstruction_loss(empty, empty).isnan()
    assert AF.reconstruction_loss(empty, empty, reduction="batchmean").isnan()
    assert AF.reconstruction_loss(empty, empty, reduction="sum") == 0
    leaf = empty.clone().requires_grad_()
    assert torch.autograd.grad(AF.reconstruction_loss(leaf, empty), leaf)[0].shape == (0, 3)


def test_autocast_mixes_dtypes():
    input, target = pair("l1", 6, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = AF.reconstruction_loss(input.bfloat16(), target, "l1")
        same = AF.reconstruction_loss(input.bfloat16(), target.bfloat16(), "huber")
    assert found.dtype == same.dtype == torch.float32
    torch.testing.assert_close(found, F.l1_loss(input.bfloat16().float(), target))
    for backend in ("eager", "auto"):
        first, second = pair("bce", 6, 5, dtype=torch.float32)
        with aefast.backend(backend), torch.autocast("cpu", torch.bfloat16):
            value = AF.reconstruction_loss(first, second, "bce")
        torch.testing.assert_close(value, F.binary_cross_entropy(first, second))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_contents_are_checked_on_the_cpu(backend):
    input, target = pair("bce", 4, 7, dtype=torch.float32)
    for kind, name, value in (
        ("bce", "input", 1.5),
        ("bce", "input", -0.25),
        ("bce", "target", 1.25),
        ("bce_with_logits", "target", -0.5),
        ("bce_with_logits", "target", 2.0),
    ):
        wrong = {"input": input.clone(), "target": target.clone()}
        wrong[name][3, 6] = value
        for reduction in ("mean", "none"):
            for needs in (False, True):
                given = {**wrong, "input": wrong["input"].requires_grad_(needs)}
                message = f"reconstruction_loss: {name} must be from 0 to 1 for {kind}, got {value:g}$"
                with aefast.backend(backend), pytest.raises(InputError, match=message):
                    AF.reconstruction_loss(**given, kind=kind, reduction=reduction)
                wrong["input"].requires_grad_(False)
    for name, value in (("input", math.nan), ("target", math.nan)):
        wrong = {"input": input.clone(), "target": target.clone()}
        wrong[name][1, 2] = value
        message = f"{name} must be finite, got 1 elements"
        with aefast.backend(backend), pytest.raises(InputError, match=message):
            AF.reconstruction_loss(**wrong, kind="l1")
        with aefast.backend(backend):
            values = AF.reconstruction_loss(**wrong, kind="huber", reduction="none")
        assert values.isnan().nonzero().tolist() == [[1, 2]]
    # Logits are any numbers.
    AF.reconstruction_loss(10 * input, target, "bce_with_logits")


def test_compiled_code_checks_no_contents():
    torch._dynamo.reset()
    numerics.require_backend("cpu", "reconstruction_loss", "cpu", torch.float32)
    input, target = pair("bce_with_logits", 4, 7, dtype=torch.float32)
    target[0, 0] = 2.0
    compiled = torch.compile(lambda x, t: AF.reconstruction_loss(x, t, "bce_with_logits"), fullgraph=True)
    torch.testing.assert_close(compiled(input, target), F.binary_cross_entropy_with_logits(input, target))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_compiles_for_other_sizes_in_other_layouts(layout):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t: AF.reconstruction_loss(x, t, "l1", reduction="sum"), fullgraph=True, backend="aot_eager"
    )
    for size in (8, 5, 7):
        pairs = torch.rand(2, size, 3, 6, 4)
        if layout == "channels_last":
            x, t = (one.contiguous(memory_format=torch.channels_last) for one in pairs)
        else:
            x, t = (one.transpose(2, 3) for one in pairs)
        torch.testing.assert_close(compiled(x, t), F.l1_loss(x, t, reduction="sum"))


@pytest.mark.parametrize("kind", ["mse", "lp", "bce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_with_any_gradient(kind, dtype):
    """Also where the gradient is 1, of which a graph must not ask the device, and where nothing is kept."""
    torch._dynamo.reset()
    numerics.require_backend("cpu", "reconstruction_loss", "cpu", dtype)
    input, target = pair(kind, 5, 6, dtype=dtype)
    leaf = input.clone().requires_grad_()

    def loss(x, t):
        return AF.reconstruction_loss(x, t, kind, **KINDS[kind])

    compiled = torch.compile(loss, fullgraph=True)
    for grad in (1.0, 3.0):
        with aefast.backend("cpu"):
            value = compiled(leaf, target)
            (found,) = torch.autograd.grad(value, leaf, torch.tensor(grad))
            expected = value_and_gradient(loss, input, target, grad)
        torch.testing.assert_close((value.detach(), found), expected)


def draw():
    return torch.full((3, 5), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": 1.0}, "input must be a torch.Tensor, got float"),
        ({"target": [0.0]}, "target must be a torch.Tensor, got list"),
        ({"target": torch.ones(5)}, r"target must have the shape of input, \(3, 5\), got \(5,\)"),
        (
            {"input": torch.ones(3, 5).long()},
            "input must be float32, bfloat16, float16 or float64, got int64",
        ),
        (
            {"target": torch.ones(3, 5).bool()},
            "target must be float32, bfloat16, float16 or float64, got bool",
        ),
        ({"target": draw().half()}, "target must have the dtype of input, float32, got float16"),
        ({"target": draw().to_sparse()}, "target must be a dense tensor, got a sparse_coo one"),
        ({"kind": "L2"}, "kind must be one of mse, rmse, l1, huber, lp, .*, got 'L2'"),
        ({"kind": "MSE"}, "kind must be one of .*, got 'MSE'; did you mean 'mse'\\?$"),
        ({"kind": ["mse"]}, r"kind must be one of .*, got \['mse'\]"),
        ({"kind": "lp"}, "p must be a number of at least 1 for lp, got None"),
        ({"kind": "lp", "p": 0.5}, "p must be a finite number of at least 1, got 0.5"),
        ({"kind": "lp", "p": math.inf}, "p must be a finite number of at least 1, got inf"),
        ({"kind": "lp", "p": True}, "p must be a finite number of at least 1, got True"),
        ({"p": 2}, "mse has no p, got 2"),
        ({"kind": "charbonnier", "eps": -1e-3}, "eps must be a finite number of at least 0, got -0.001"),
        ({"kind": "huber", "delta": 0}, "delta must be a finite number above 0, got 0"),
        ({"kind": "huber", "delta": -1.0}, "delta must be a finite number above 0, got -1.0"),
        ({"loss_weight": -0.5}, "loss_weight must be a finite number of at least 0, got -0.5"),
        ({"loss_weight": math.nan}, "loss_weight must be a finite number of at least 0, got nan"),
        ({"loss_weight": True}, "loss_weight must be a finite number of at least 0, got True"),
        ({"loss_weight": torch.ones(2)}, r"loss_weight must be a finite number of at least 0, got tensor"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, batchmean, none, got 'max'"),
        ({"reduction": None}, "reduction must be one of mean, sum, batchmean, none, got None"),
        (
            {"kind": "rmse", "reduction": "none"},
            "reduction must be mean, sum or batchmean for rmse, got 'none'",
        ),
        (
            {"input": torch.tensor(1.0), "target": torch.tensor(1.0), "reduction": "batchmean"},
            "input must have at least one dimension for batchmean, got a scalar",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"input": draw(), "target": draw()}
    with pytest.raises(InputError, match=f"reconstruction_loss: {message}"):
        AF.reconstruction_loss(**{**arguments, **change})


@pytest.mark.parametrize(
    ("count", "more"),
    [(1, ""), (2, " and 1 more element that is not"), (3, " and 2 more elements that are not")],
)
def test_elements_out_of_range_are_counted(count, more):
    target = torch.tensor([2.0] * count + [0.5])
    with pytest.raises(InputError, match=f"target must be from 0 to 1 for bce, got 2{more}$"):
        AF.reconstruction_loss(torch.full((count + 1,), 0.5), target, "bce")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_does_not_read_changes_nothing(kind):
    input, target = pair(kind, 4, 9)
    read = {"charbonnier": "eps", "huber": "delta"}.get(kind)
    unread = {name: -1.0 for name in ("eps", "delta") if name != read}
    given = AF.reconstruction_loss(input, target, kind, **{**unread, **KINDS[kind]})
    assert torch.equal(given, AF.reconstruction_loss(input, target, kind, **KINDS[kind]))


@pytest.mark.parametrize("reduction", _loss.REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_module_and_its_twin(kind, reduction):
    if kind == "rmse" and reduction == "none":
        with pytest.raises(InputError, match="ReconstructionLoss: reduction must be mean, sum or batchmean"):
            ReconstructionLoss(kind, reduction=reduction)
        return
    module = ReconstructionLoss(kind, reduction=reduction, loss_weight=0.75, **KINDS[kind])
    twin = module.eager()
    input, target = pair(kind, 4, 9)
    torch.testing.assert_close(
        value_and_gradient(module, input, target), value_and_gradient(twin, input, target)
    )
    assert not module.state_dict() and not twin.state_dict()
    assert repr(module).removeprefix("ReconstructionLoss") == repr(twin).removeprefix(
        "EagerReconstructionLoss"
    )


def test_module_shows_its_options():
    assert ReconstructionLoss().extra_repr() == "mse, reduction=mean"
    assert ReconstructionLoss("huber", delta=0.5).extra_repr() == "huber, delta=0.5, reduction=mean"
    assert ReconstructionLoss("lp", p=3, reduction="sum").extra_repr() == "lp, p=3, reduction=sum"
    assert ReconstructionLoss(loss_weight=0.5).extra_repr() == "mse, reduction=mean, loss_weight=0.5"
    with pytest.raises(InputError, match="ReconstructionLoss: loss_weight must be"):
        ReconstructionLoss(loss_weight=-1.0)
    with pytest.raises(InputError, match="ReconstructionLoss: eps must be"):
        ReconstructionLoss("charbonnier", eps=-1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_no_contents_are_checked(kind):
    numerics.require_backend("triton", "reconstruction_loss", "cuda", torch.float32)
    input, target = (one.cuda() for one in pair(kind, 6, 50, dtype=torch.float32))
    input[0, 0] = math.nan
    assert AF.reconstruction_loss(input, target, kind, **KINDS[kind]).isnan()
