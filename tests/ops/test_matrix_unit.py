"""Products of float32 by the processor's matrix unit, which dense layers take where they are large enough."""

import itertools

import pytest
import torch

import aefast
import aefast.functional as AF
from aefast import _library
from aefast.ops import linear_act, mlp
from support import numerics


@pytest.fixture(autouse=True)
def matrix_unit():
    """Within it, the CPU library uses the unit, which tests that turn it off turn on again."""
    reason = _library.load("cpu")
    if reason:
        pytest.skip(reason)
    supported = torch.ops.aefast_cpu.supported_instruction_sets()
    if "amx" not in supported:
        pytest.skip("this processor has no matrix unit, or the compiler did not know it")
    yield
    torch.ops.aefast_cpu.use_instruction_set(supported[0])


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
def test_sums_of_every_length(poisoned_memory, inputs, layouts):
    numerics.check(linear_act.OP, "cpu", layer(97, inputs, 90, layouts), torch.float32)


# Whole tiles, and those whose last rows and columns are nobody's; several packs of rows and columns.
@pytest.mark.parametrize(
    ("rows", "features"),
    [(96, 96), (112, 80), (113, 81), (127, 95), (128, 97), (129, 113), (81, 255), (600, 129), (130, 1100)],
)
def test_edges_of_tiles(poisoned_memory, rows, features):
    numerics.check(linear_act.OP, "cpu", layer(rows, 200, features, activation="tanh"), torch.float32)


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
def test_numbers_beyond_its_range_are_left_to_vectors(one_thread, x_value, weight_value):
    x, weight = matrix(100, 70), matrix(90, 70, seed=1)
    x[11, 5], weight[7, 5] = x_value, weight_value
    found = product(x, weight, "amx")
    assert torch.equal(bits(found), bits(product(x, weight, "avx512")))
    assert torch.equal(found.isfinite(), (x @ weight.t()).isfinite())


@pytest.mark.parametrize(
    ("x_scale", "weight_scale"), [(1e-30, 1.0), (1.0, 1e-39), (1e-14, 1e-14), (1e-40, 1e30)]
)
def test_numbers_whose_parts_would_be_subnormal_are_left_to_vectors(one_thread, x_scale, weight_scale):
    x, weight = matrix(100, 70) * x_scale, matrix(90, 70, seed=1) * weight_scale
    assert torch.equal(product(x, weight, "amx"), product(x, weight, "avx512"))


@pytest.mark.parametrize(
    ("x_scale", "weight_scale"), [(1e-20, 1e5), (1e-10, 1e-10), (1e30, 1e-20), (0.0, 1.0)]
)
def test_scales_within_its_range(x_scale, weight_scale):
    x, weight = matrix(100, 70) * x_scale, matrix(90, 70, seed=1) * weight_scale
    exact = x.double() @ weight.double().t()
    terms = x.double().abs() @ weight.double().abs().t()
    # Half a spacing of each of 70 sums, at most.
    assert ((product(x, weight, "amx").double() - exact).abs() <= 35 * 2.0**-23 * terms).all()


@pytest.mark.parametrize("rows", [4099, 2048])
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
