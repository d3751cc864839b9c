"""Products by instructions for bfloat16, which dense layers take where they are large enough: of float32 by the matrix
unit's; of operands that may be rounded, and of bfloat16, by the vectors', too."""

import itertools

import pytest
import torch

import aefast
import aefast.functional as AF
from aefast import _library
from aefast.ops import linear_act, mlp
from support import numerics


@pytest.fixture
def matrix_unit():
    """Within it, the CPU library uses the unit, which tests that turn it off turn on again."""
    supported = supported_sets()
    if "amx" not in supported:
        pytest.skip("this processor has no matrix unit, or the compiler did not know it")
    yield
    torch.ops.aefast_cpu.use_instruction_set(supported[0])


def supported_sets():
    reason = _library.load("cpu")
    if reason:
        pytest.skip(reason)
    return torch.ops.aefast_cpu.supported_instruction_sets()


@pytest.fixture
def one_thread():
    """Each thread looks at the numbers of its own part of a product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def matrix(rows, cols, layout="plain", seed=0):
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        return torch.randn(cols, rows, generator=generator).t()
    if layout == "spread":
        return torch.randn(2 * rows, 2 * cols, generator=generator)[::2, ::2]
    if layout == "sliced":
        return torch.randn(2 * rows, cols + 3, generator=generator)[::2, 1 : cols + 1]
    return torch.randn(rows, cols, generator=generator)


def layer(rows, inputs, features, layouts=("plain", "plain"), activation="identity"):
    return {
        "x": matrix(rows, inputs, layouts[0], seed=1),
        "weight": matrix(features, inputs, layouts[1], seed=2) * inputs**-0.5,
        "bias": matrix(1, features, seed=3)[0],
        "activation": activation,
    }


def product(x, weight, instruction_set):
    torch.ops.aefast_cpu.use_instruction_set(instruction_set)
    return AF.linear_act(x, weight, activation="identity")


def bits(tensor):
    return tensor.view(torch.int32)


@pytest.mark.usefixtures("matrix_unit")
def test_is_used():
    """It rounds otherwise than vectors do; without that the tests here would not test it."""
    x, weight = matrix(100, 64), matrix(90, 64)
    assert not torch.equal(product(x, weight, "amx"), product(x, weight, "avx512"))
    assert torch.equal(product(x[:2], weight, "amx"), product(x[:2], weight, "avx512"))


# One step and less, whole packs and less, and as many as are summed apart.
@pytest.mark.parametrize("inputs", [32, 33, 64, 127, 128, 129, 784, 1024, 1025, 2500])
@pytest.mark.parametrize(
    "layouts",
    list(itertools.product(["plain", "transposed", "sliced"], ["plain", "transposed"])),
    ids="-".join,
)
@pytest.mark.usefixtures("matrix_unit")
def test_sums_of_every_length(poisoned_memory, inputs, layouts):
    numerics.check(linear_act.OP, "cpu", layer(97, inputs, 90, layouts), torch.float32)


# Whole tiles, and those whose last rows and columns are nobody's; several packs of rows and columns.
@pytest.mark.parametrize(
    ("rows", "features"),
    [(96, 96), (112, 80), (113, 81), (127, 95), (128, 97), (129, 113), (81, 255), (600, 129), (130, 1100)],
)
@pytest.mark.usefixtures("matrix_unit")
def test_edges_of_tiles(poisoned_memory, rows, features):
    numerics.check(linear_act.OP, "cpu", layer(rows, 200, features, activation="tanh"), torch.float32)


@pytest.mark.usefixtures("matrix_unit")
def test_is_as_exact_as_float32():
    """Three parts of 8 bits hold a float32 to the last of its 24: less would be 2^-16 off."""
    x, weight = matrix(256, 512), matrix(256, 512, seed=1)
    exact = x.double() @ weight.double().t()
    terms = x.double().abs() @ weight.double().abs().t()
    error = ((product(x, weight, "amx").double() - exact).abs() / terms).max().item()
    assert error <= ((x @ weight.t() - exact).abs() / terms).max().item()
    # A matrix of one number in each row and column: nothing is rounded.
    order = torch.randperm(256, generator=torch.Generator().manual_seed(4))
    assert torch.equal(product(x[:, :256], torch.eye(256)[order], "amx"), x[:, order])


@pytest.mark.parametrize(
    ("x_value", "weight_value"),
    [
        (float("inf"), 1.0),
        (float("-inf"), 0.0),
        (float("nan"), 1.0),
        (torch.finfo(torch.float32).max, 0.5),
        (1.0, 3e38),
        (0.0, float("inf")),
        (1e25, 1e15),
    ],
)
@pytest.mark.usefixtures("matrix_unit")
def test_numbers_beyond_its_range_are_left_to_vectors(one_thread, x_value, weight_value):
    x, weight = matrix(100, 70), matrix(90, 70, seed=1)
    x[11, 5], weight[7, 5] = x_value, weight_value
    found = product(x, weight, "amx")
    assert torch.equal(bits(found), bits(product(x, weight, "avx512")))
    assert torch.equal(found.isfinite(), (x @ weight.t()).isfinite())


@pytest.mark.parametrize(
    ("x_scale", "weight_scale"), [(1e-30, 1.0), (1.0, 1e-39), (1e-14, 1e-14), (1e-40, 1e30)]
)
@pytest.mark.usefixtures("matrix_unit")
def test_numbers_whose_parts_would_be_subnormal_are_left_to_vectors(one_thread, x_scale, weight_scale):
    x, weight = matrix(100, 70) * x_scale, matrix(90, 70, seed=1) * weight_scale
    assert torch.equal(product(x, weight, "amx"), product(x, weight, "avx512"))


@pytest.mark.parametrize(
    ("x_scale", "weight_scale"), [(1e-20, 1e5), (1e-10, 1e-10), (1e30, 1e-20), (0.0, 1.0)]
)
@pytest.mark.usefixtures("matrix_unit")
def test_scales_within_its_range(x_scale, weight_scale):
    x, weight = matrix(100, 70) * x_scale, matrix(90, 70, seed=1) * weight_scale
    exact = x.double() @ weight.double().t()
    terms = x.double().abs() @ weight.double().abs().t()
    # Half a spacing of each of 70 sums, at most.
    assert ((product(x, weight, "amx").double() - exact).abs() <= 35 * 2.0**-23 * terms).all()


@pytest.mark.parametrize("rows", [4099, 2048])
@pytest.mark.usefixtures("matrix_unit")
def test_sums_of_long_batches(poisoned_memory, rows):
    """Weight gradients that groups of rows add up, and one of long sums."""
    for inputs, features in ((96, 90), (260, 200)):
        sample = {
            "x": matrix(rows, inputs),
            "weights": [matrix(features, inputs, seed=1) * inputs**-0.5],
            "biases": [None],
            "activations": ["relu"],
        }
        numerics.check(mlp.OP, "cpu", sample, torch.float32)


@pytest.mark.usefixtures("matrix_unit")
def test_infinities_in_sums_that_are_added_to():
    x, weight = matrix(4096, 96), matrix(90, 96, seed=1)
    x[3000, 50] = float("inf")
    weight.requires_grad_()
    found, expected = (
        torch.autograd.grad(AF.linear_act(x, weight, activation="sigmoid").sum(), weight)[0]
        if name == "cpu"
        else torch.autograd.grad(torch.sigmoid(x @ weight.t()).sum(), weight)[0]
        for name in ("cpu", "eager")
    )
    assert not expected.isfinite().all()
    assert torch.equal(found.isfinite(), expected.isfinite())
    is_finite = expected.isfinite()
    assert torch.allclose(found[is_finite], expected[is_finite], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("rows", "inputs", "features"), [(300, 200, 150), (2100, 784, 512), (4099, 96, 90)])
@pytest.mark.usefixtures("matrix_unit")
def test_does_not_depend_on_threads(rows, inputs, features):
    sample = layer(rows, inputs, features, activation="gelu")
    upstream = [matrix(rows, features, seed=5)]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            with aefast.backend("cpu"):
                found.append(numerics.run(linear_act.OP.function, sample, upstream))
    finally:
        torch.set_num_threads(threads)
    for results in found[1:]:
        for one, other in zip(found[0], results, strict=True):
            assert torch.equal(one, other)


# Products from operands rounded to bfloat16.


@pytest.fixture(params=["avx512bf16", "amx"])
def rounding(request):
    """Within it torch's setting for products of float32 is bfloat16, which the instructions of that set form."""
    supported = supported_sets()
    if request.param not in supported:
        pytest.skip(f"this processor has no {request.param}, or the compiler did not know it")
    torch.ops.aefast_cpu.use_instruction_set(request.param)
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    yield
    setting.fp32_precision = before
    torch.ops.aefast_cpu.use_instruction_set(supported[0])


def linear(x, weight):
    return AF.linear_act(x, weight, activation="identity")


def rounded(tensor):
    return tensor.bfloat16().double()


def check_sums(found, left, right):
    """That `found` is the product of the rounded operands but for the roundings of float32's sums."""
    left, right = rounded(left), rounded(right)
    exact, terms = left @ right, left.abs() @ right.abs()
    # Of n products in pairs, each added to a sum of float32: n roundings by half a unit.
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= left.shape[1] * 2.0**-24 * terms).all()


@pytest.mark.parametrize("inputs", [32, 33, 384, 385, 784, 2500])
@pytest.mark.parametrize(
    "layouts",
    list(itertools.product(["plain", "transposed", "sliced"], ["plain", "transposed"])),
    ids="-".join,
)
def test_rounded_sums_of_every_length(poisoned_memory, rounding, inputs, layouts):
    x, weight = matrix(97, inputs, layouts[0]), matrix(90, inputs, layouts[1], seed=1)
    check_sums(linear(x, weight), x, weight.t())


@pytest.mark.parametrize(
    ("rows", "features"), [(96, 96), (113, 81), (127, 95), (129, 113), (41, 255), (600, 129), (130, 1100)]
)
def test_rounded_edges_of_tiles(poisoned_memory, rounding, rows, features):
    x, weight = matrix(rows, 200), matrix(features, 200, seed=1)
    check_sums(linear(x, weight), x, weight.t())


def test_rounded_gradients(poisoned_memory, rounding):
    x, weight, grad = matrix(300, 200), matrix(150, 200, seed=1), matrix(300, 150, seed=2)
    leaves = x.requires_grad_(), weight.requires_grad_()
    of_x, of_weight = torch.autograd.grad(linear(*leaves), leaves, grad)
    x, weight = x.detach(), weight.detach()
    check_sums(of_x, grad, weight)
    check_sums(of_weight, grad.t(), x)


@pytest.mark.parametrize("inputs", [32, 33, 384, 385, 784, 2500])
@pytest.mark.parametrize(
    "layouts",
    list(itertools.product(["plain", "transposed", "sliced", "spread"], ["plain", "transposed", "spread"])),
    ids="-".join,
)
def test_bfloat16_is_what_float32_is_rounded_to(poisoned_memory, rounding, inputs, layouts):
    """Sums of the same numbers, so that their bits are the same too."""
    x, weight = (
        matrix(rows, inputs, layout, seed).bfloat16()
        for rows, layout, seed in ((97, layouts[0], 0), (90, layouts[1], 1))
    )
    grad = matrix(97, 90, seed=2).bfloat16()

    def found(x, weight, grad):
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = linear(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad)

    for one, wide in zip(found(x, weight, grad), found(x.float(), weight.float(), grad.float()), strict=True):
        assert torch.equal(one, wide.bfloat16())


@pytest.mark.parametrize(
    ("rows", "features"), [(96, 96), (113, 81), (127, 95), (129, 113), (41, 255), (600, 129), (130, 1100)]
)
def test_bfloat16_edges_of_tiles(poisoned_memory, rounding, rows, features):
    x, weight = matrix(rows, 200).bfloat16(), matrix(features, 200, seed=1).bfloat16()
    assert torch.equal(linear(x, weight), linear(x.float(), weight.float()).bfloat16())


def test_bfloat16_bias_and_activation_come_before_rounding(poisoned_memory, rounding):
    sample = {
        name: value if name == "activation" else value.bfloat16()
        for name, value in layer(300, 200, 150, activation="tanh").items()
    }
    wide = {name: value if name == "activation" else value.float() for name, value in sample.items()}
    assert torch.equal(AF.linear_act(**sample), AF.linear_act(**wide).bfloat16())


@pytest.mark.usefixtures("rounding")
def test_follows_torchs_setting():
    """In a forward and in a backward, called at once, through the dispatcher and in a compiled graph."""
    x, weight = matrix(100, 64).requires_grad_(), matrix(90, 64, seed=1).requires_grad_()
    grad = matrix(100, 90, seed=2)
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision

    def dispatched(x, weight):
        return torch.ops.aefast.linear_act(x, weight, None, "identity", "cpu")

    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for call in (linear, dispatched, compiled):
        found = {}
        try:
            for forward, backward in itertools.product(("ieee", "bf16"), repeat=2):
                setting.fp32_precision = forward
                out = call(x, weight)
                setting.fp32_precision = backward
                found[forward, backward] = out, *torch.autograd.grad(out, (x, weight), grad)
        finally:
            setting.fp32_precision = before
        exact, only_backward, only_forward, both = found.values()
        assert torch.equal(exact[0], only_backward[0]) and torch.equal(only_forward[0], both[0])
        assert not torch.equal(exact[0], both[0])
        for index in (1, 2):
            assert torch.equal(exact[index], only_forward[index])
            assert torch.equal(only_backward[index], both[index])
            assert not torch.equal(exact[index], both[index])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-45])
def test_what_a_bfloat16_cannot_hold_is_rounded_as_torch_does(rounding, value):
    x, weight = matrix(100, 70), matrix(90, 70, seed=1).abs() + 0.1
    x[11, 5] = value
    found, expected = linear(x, weight), x.bfloat16().float() @ weight.bfloat16().float().t()
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    is_finite = expected.isfinite()
    torch.testing.assert_close(found[is_finite], expected[is_finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_not_rounded(dtype):
    x, weight = matrix(100, 64).to(dtype), matrix(90, 64, seed=1).to(dtype)
    setting = torch.backends.mkldnn.matmul
    expected, before = linear(x, weight), setting.fp32_precision
    try:
        setting.fp32_precision = "bf16"
        assert torch.equal(linear(x, weight), expected)
    finally:
        setting.fp32_precision = before


@pytest.mark.parametrize(("rows", "inputs", "features"), [(300, 200, 150), (2100, 784, 512), (4099, 96, 90)])
def test_rounded_products_do_not_depend_on_threads(rounding, rows, inputs, features):
    test_does_not_depend_on_threads(rows, inputs, features)
