"""The pointwise CUDA kernels of the dense layer, emulated, against float64."""

import ctypes
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aefast.kernels.activation import ACTIVATIONS, STORES_DERIVATIVE
from support import numerics

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels/cuda/linear_act_kernels.cuh"

SLOPE, ALPHA = 0.2, 1.3
GUARD = 64  # elements past each buffer's end, which must stay untouched

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TYPE_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}

FORWARD = {
    "identity": lambda x: x * 1,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, SLOPE),
    "elu": lambda x: F.elu(x, ALPHA),
    "selu": F.selu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}

# One element, one row, one column, primes, whole vectors, several blocks each way, rows of no whole vectors.
SHAPES = ((1, 1), (1, 7), (5, 1), (13, 17), (31, 64), (3, 1032), (1100, 3), (2100, 8), (130, 264), (70, 261))

# Of one operation in the type the kernel computes in.
ROUNDING = {torch.float32: 6e-8, torch.float64: 2e-16, torch.float16: 6e-8, torch.bfloat16: 6e-8}


def is_nan_filled(buffer: torch.Tensor) -> bool:
    return bool(buffer.isnan().all())


class Poisoned:
    """A matrix of NaNs inside a longer buffer, `offset` elements past a 16-byte boundary."""

    def __init__(self, rows, cols, dtype, offset=0, values=None):
        self.buffer = torch.full((rows * cols + offset + GUARD,), torch.nan, dtype=dtype)
        assert self.buffer.data_ptr() % 16 == 0
        self.offset = offset
        self.matrix = self.buffer[offset : offset + rows * cols].view(rows, cols)
        if values is not None:
            self.matrix.copy_(values)

    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.buffer.data_ptr() + self.offset * self.buffer.element_size())

    def read(self) -> torch.Tensor:
        assert is_nan_filled(self.buffer[: self.offset]) and is_nan_filled(self.buffer[-GUARD:])
        return self.matrix.clone()


class Kernels:
    """The launchers of one compiled copy of the kernels."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.emulate_activation.restype = ctypes.c_char_p
        self.library.emulate_gradient.restype = ctypes.c_char_p
        self.library.gradient_row_blocks.restype = ctypes.c_int64

    def activation(self, name: str, x: torch.Tensor, with_derivative: bool, seed: int = 0):
        values = Poisoned(1, x.numel(), x.dtype, values=x.reshape(1, -1))
        derivative = Poisoned(1, x.numel(), x.dtype)
        error = self.library.emulate_activation(
            TYPE_CODE[x.dtype],
            ACTIVATIONS.index(name),
            ctypes.c_double(SLOPE),
            ctypes.c_double(ALPHA),
            ctypes.c_uint64(seed),
            values.pointer(),
            derivative.pointer() if with_derivative else None,
            ctypes.c_int64(x.numel()),
        )
        assert error is None, error
        return values.read().view_as(x), derivative.read().view_as(x)

    def gradient(self, name: str, grad, saved, *, seed=0, offset=0, with_g=True, with_bias=True):
        rows, cols = grad.shape
        row_blocks = self.library.gradient_row_blocks(
            TYPE_CODE[grad.dtype], ctypes.c_int64(rows), ctypes.c_int64(cols)
        )
        compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
        grad_buffer = Poisoned(rows, cols, grad.dtype, offset, grad)
        saved_buffer = None if saved is None else Poisoned(rows, cols, grad.dtype, offset, saved)
        g = Poisoned(rows, cols, grad.dtype, offset)
        partials = Poisoned(row_blocks, cols, compute)
        bias = Poisoned(1, cols, grad.dtype)
        error = self.library.emulate_gradient(
            TYPE_CODE[grad.dtype],
            ACTIVATIONS.index(name),
            ctypes.c_double(SLOPE),
            ctypes.c_double(ALPHA),
            ctypes.c_uint64(seed),
            grad_buffer.pointer(),
            None if saved_buffer is None else saved_buffer.pointer(),
            g.pointer() if with_g else None,
            partials.pointer() if with_bias else None,
            bias.pointer() if with_bias else None,
            ctypes.c_int64(rows),
            ctypes.c_int64(cols),
        )
        assert error is None, error
        partials.read()
        return g.read(), bias.read()[0]


@pytest.fixture(scope="module")
def kernels(compile_emulated):
    return Kernels(compile_emulated(HERE / "linear_act_driver.cpp"))


def random(shape, dtype, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def derivative_of(name: str, x: torch.Tensor) -> torch.Tensor:
    x = x.double().requires_grad_()
    return torch.autograd.grad(FORWARD[name](x).sum(), x)[0]


def saved_by_forward(name: str, x: torch.Tensor) -> torch.Tensor | None:
    if name == "identity":
        return None
    return (derivative_of(name, x) if name in STORES_DERIVATIVE else FORWARD[name](x.double())).to(x.dtype)


def derivative_from_saved(name: str, saved: torch.Tensor | None) -> torch.Tensor | float:
    """act' in float64 from what the kernel was given: its own rounding is no error of the kernel."""
    if saved is None:
        return 1.0
    y = saved.double()
    positive = y > 0
    scale, selu_alpha = 1.0507009873554805, 1.6732632423543772
    return {
        "relu": lambda: positive.double(),
        "leaky_relu": lambda: torch.where(positive, 1.0, torch.full_like(y, SLOPE)),
        "elu": lambda: torch.where(positive, 1.0, y + ALPHA),
        "selu": lambda: torch.where(positive, scale, y + scale * selu_alpha),
        "tanh": lambda: 1 - y * y,
        "sigmoid": lambda: y * (1 - y),
        "softplus": lambda: -torch.expm1(-y),
    }.get(name, lambda: y)()


def assert_rounded(actual, expected, magnitude, dtype):
    """Within the rounding to dtype and of a few operations on numbers of the given magnitude."""
    info = torch.finfo(dtype)
    bound = info.eps * expected.abs() + 40 * ROUNDING[dtype] * magnitude + info.tiny
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"error {error.max():.3g} over {(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
def test_activation_matches_float64(kernels, name, dtype):
    for count in (1, 7, 64, 2051):
        x = random((count,), dtype, seed=count, scale=3.0)
        for with_derivative in (False, True):
            out, derivative = kernels.activation(name, x, with_derivative)
            assert_rounded(out, FORWARD[name](x.double()), 1 + x.double().abs(), dtype)
            if with_derivative and name in STORES_DERIVATIVE:
                assert_rounded(derivative, derivative_of(name, x), 1 + x.double().abs(), dtype)
            else:
                assert is_nan_filled(derivative)


def test_activation_of_nothing(kernels):
    kernels.activation("relu", torch.empty(0), with_derivative=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
def test_inputs_of_every_size(kernels, name, dtype):
    """Powers of large ones overflow, activations and derivatives do not."""
    x = numerics.of_every_size(dtype)
    out, derivative = kernels.activation(name, x, name in STORES_DERIVATIVE)
    saved = derivative if name in STORES_DERIVATIVE else out
    slope, _ = kernels.gradient(name, torch.ones(x.numel(), 1, dtype=dtype), saved[:, None], with_bias=False)
    # Beyond 10⁴ no derivative changes any more, and torch's own are NaN for the largest numbers.
    true = FORWARD[name](x.double()), derivative_of(name, x.double().clamp(-1e4, 1e4))
    tolerance = 8 * torch.finfo(dtype).eps
    for got, exact in zip((out, slope[:, 0]), true, strict=True):
        torch.testing.assert_close(got, exact.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "softplus", "tanh"])
def test_activation_keeps_nan(kernels, name, dtype):
    out, _ = kernels.activation(name, torch.full((9,), torch.nan, dtype=dtype), with_derivative=False)
    assert is_nan_filled(out)


def check_gradient(kernels, name, shape, dtype, **options):
    grad, x = random(shape, dtype, seed=1, scale=1.0), random(shape, dtype, seed=2)
    saved = saved_by_forward(name, x)
    g, bias = kernels.gradient(name, grad, saved, **options)
    expected = grad.double() * derivative_from_saved(name, saved)
    # 1 - y * y cancels: its rounding is relative to 1.
    assert_rounded(g, expected, grad.double().abs() * (1 + ALPHA), dtype)
    assert_rounded(bias, expected.sum(0), (grad.double().abs() * (1 + ALPHA)).sum(0), dtype)
    return g, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_gradient_matches_float64(kernels, shape, dtype):
    check_gradient(kernels, "tanh", shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient_of_every_activation(kernels, name, dtype):
    for shape in ((37, 24), (37, 23)):
        check_gradient(kernels, name, shape, dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float64_gradient_is_autograd_s(kernels, name):
    grad, x = random((19, 11), torch.float64, seed=1), random((19, 11), torch.float64, seed=2)
    g, bias = kernels.gradient(name, grad, saved_by_forward(name, x))
    expected = grad * derivative_of(name, x)
    torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(bias, expected.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 264), (300, 16)], ids=str)
def test_gradient_does_not_depend_on_order_or_alignment(kernels, shape, dtype):
    first = check_gradient(kernels, "sigmoid", shape, dtype)
    for options in ({"seed": 1}, {"seed": 2}, {"seed": 3, "offset": 1}):
        again = check_gradient(kernels, "sigmoid", shape, dtype, **options)
        assert all(map(torch.equal, first, again))


def test_gradient_writes_only_what_is_wanted(kernels):
    grad, saved = random((40, 20), torch.float32, seed=1), random((40, 20), torch.float32, seed=2)
    g, bias = kernels.gradient("relu", grad, saved)
    only_g, no_bias = kernels.gradient("relu", grad, saved, with_bias=False)
    no_g, only_bias = kernels.gradient("relu", grad, saved, with_g=False)
    assert torch.equal(g, only_g) and torch.equal(bias, only_bias)
    assert is_nan_filled(no_bias) and is_nan_filled(no_g)


def test_gradient_of_no_rows_is_zero(kernels):
    empty = torch.empty(0, 5)
    _, bias = kernels.gradient("relu", empty, empty)
    assert torch.equal(bias, torch.zeros(5))


BARRIER = re.compile(r"^ *__syncthreads\(\);\n", re.MULTILINE)


def test_a_missing_barrier_is_caught(compile_emulated, tmp_path):
    # One copy, in which the test takes away one barrier after the other.
    numbers = itertools.count(1)
    changed = BARRIER.sub(
        lambda barrier: f"  if (missing_barrier != {next(numbers)}) {barrier[0].lstrip()}",
        KERNELS.read_text(),
    )
    for number, kernel in ((1, "activation_gradient_kernel"), (2, "column_sum_kernel")):
        body = changed[changed.index(f"{kernel}(") : changed.index(f"missing_barrier != {number}")]
        assert "__global__" not in body
    assert next(numbers) == 3, "a barrier that this test does not remove"
    declared = '#pragma once\nextern "C" {\nint missing_barrier = 0;\n}\n'
    (tmp_path / KERNELS.name).write_text(changed.replace("#pragma once\n", declared, 1))
    driver = HERE / "linear_act_driver.cpp"
    kernels = Kernels(compile_emulated(driver, "-DEMULATE_FLOAT32_ONLY", first_include=tmp_path))
    missing = ctypes.c_int.in_dll(kernels.library, "missing_barrier")

    grad, saved = random((70, 40), torch.float32, seed=1), random((70, 40), torch.float32, seed=2)
    expected = (grad.double() * (saved > 0)).sum(0).float()

    def sums():
        return [kernels.gradient("relu", grad, saved, seed=seed)[1] for seed in range(4)]

    assert all(torch.allclose(bias, expected) for bias in sums())
    for number in (1, 2):
        missing.value = number
        assert not any(torch.allclose(bias, expected) for bias in sums()), number
