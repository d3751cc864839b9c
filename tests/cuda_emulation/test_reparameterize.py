"""The CUDA kernels of normal distributions, emulated, and kernels/cuda/reparameterize.cu whole, against float64."""

import ctypes
import math
import re
from pathlib import Path

import pytest
import torch

from support import philox

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "kernels/cuda"
KERNELS = CUDA / "reparameterize_kernels.cuh"

GUARD = 64  # elements past each result's end, which must stay untouched
INFINITY = math.inf

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TYPE_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}

# One element, one row, one column, primes, rows of few vectors, of several for each thread, of several warps, of more
# than a block, and of no whole vectors.
SHAPES = (
    (1, 1),
    (1, 7),
    (5, 1),
    (13, 17),
    (70, 2),
    (37, 16),
    (9, 20),
    (3, 264),
    (2, 1024),
    (3, 1031),
    (2, 8192),
)

# Of one operation in the type the kernel computes in, and the absolute error of a normal value.
ROUNDING = {torch.float32: 6e-8, torch.float64: 2e-16, torch.float16: 1e-6, torch.bfloat16: 1e-6}
NOISE = {torch.float32: 2e-6, torch.float64: 2e-14, torch.float16: 2e-5, torch.bfloat16: 2e-5}

# Whether there are gradients of z and of the divergence.
UPSTREAM = ((True, True), (True, False), (False, True))


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64))


def matrix_of(tensor):
    return Matrix(None, 0, 0) if tensor is None else Matrix(tensor.data_ptr(), *tensor.stride())


class Result:
    """NaNs, of which `read` gives those that are to be written, and checks the others."""

    def __init__(self, *shape, dtype):
        self.shape = shape
        self.buffer = torch.full((math.prod(shape) + GUARD,), torch.nan, dtype=dtype)
        assert self.buffer.data_ptr() % 16 == 0
        self.pointer = ctypes.c_void_p(self.buffer.data_ptr())

    def read(self):
        assert self.buffer[-GUARD:].isnan().all()
        return self.buffer[:-GUARD].view(self.shape).clone()


class Kernels:
    """The launchers of one compiled copy of the kernels."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.emulate_reparameterize.restype = ctypes.c_char_p
        self.library.emulate_gradient.restype = ctypes.c_char_p

    def forward(self, mu, logvar, seed=None, limits=(-INFINITY, INFINITY), machine_seed=0):
        """(z, divergence); without a seed z is None."""
        z, divergence = Result(*mu.shape, dtype=mu.dtype), Result(len(mu), dtype=wide(mu.dtype))
        error = self.library.emulate_reparameterize(
            TYPE_CODE[mu.dtype],
            ctypes.c_uint64(machine_seed),
            *map(ctypes.c_int64, mu.shape),
            matrix_of(mu),
            matrix_of(logvar),
            None if seed is None else ctypes.byref(ctypes.c_int64(seed)),
            *map(ctypes.c_double, limits),
            None if seed is None else z.pointer,
            divergence.pointer,
        )
        assert error is None, error
        return None if seed is None else z.read(), divergence.read()

    def gradients(self, grad_z, grad_kl, mu, logvar, seed, limits=(-INFINITY, INFINITY), machine_seed=0):
        """Of mu and logvar. The seed is not given to kernels that draw no noise."""
        results = [Result(*mu.shape, dtype=mu.dtype) for _ in range(2)]
        error = self.library.emulate_gradient(
            TYPE_CODE[mu.dtype],
            ctypes.c_uint64(machine_seed),
            *map(ctypes.c_int64, mu.shape),
            matrix_of(grad_z),
            None if grad_kl is None else ctypes.c_void_p(grad_kl.data_ptr()),
            ctypes.c_int64(0 if grad_kl is None else grad_kl.stride(0)),
            # Without the divergence's gradient mu is not read.
            matrix_of(None if grad_kl is None else mu),
            matrix_of(logvar),
            None if grad_z is None else ctypes.byref(ctypes.c_int64(seed)),
            *map(ctypes.c_double, limits),
            *(result.pointer for result in results),
        )
        assert error is None, error
        return [result.read() for result in results]


@pytest.fixture(scope="module")
def kernels(compile_emulated):
    return Kernels(compile_emulated(HERE / "reparameterize_driver.cpp"))


def random(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def parameters(shape, dtype):
    return random(*shape, dtype=dtype, seed=1), random(*shape, dtype=dtype, seed=2, scale=1.5)


def upstream(shape, dtype, of_z=True, of_kl=True):
    grad_z, grad_kl = random(*shape, dtype=dtype, seed=3), random(shape[0], dtype=wide(dtype), seed=4)
    return grad_z if of_z else None, grad_kl if of_kl else None


def noise_of(seed, shape):
    count = math.prod(shape)
    values = philox.normals(seed % 2**64, 0, 0, -(-count // 4))
    return torch.from_numpy(values)[:count].view(shape)


def assert_near(found, expected, bound, dtype):
    """Within `bound` and the rounding to dtype."""
    info = torch.finfo(dtype)
    bound = bound + info.eps * expected.abs() + info.tiny
    error = (found.double() - expected).abs()
    assert (error <= bound).all(), f"error {error.max():.3g}, {(error / bound).max():.3g} times the bound"


def check_forward(kernels, mu, logvar, seed=11, limits=(-INFINITY, INFINITY), **options):
    z, divergence = kernels.forward(mu, logvar, seed, limits, **options)
    dtype, unit = mu.dtype, ROUNDING[mu.dtype]
    mean, log_variance = mu.double(), logvar.double().clamp(*limits)
    deviation, noise = (0.5 * log_variance).exp(), noise_of(seed, mu.shape)
    # An exponential's error grows with its argument.
    exponent = 4 * unit * (1 + log_variance.abs())
    bound = deviation * (NOISE[dtype] + exponent * noise.abs())
    assert_near(z, mean + deviation * noise, bound, dtype)
    terms = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    bound = (exponent * (deviation**2 + 1) + 4 * unit * mean**2).sum(1)
    bound = bound + 4 * unit * math.log2(2 + mu.shape[1]) * terms.sum(1)
    assert_near(divergence, terms.sum(1), bound, wide(dtype))
    return z, divergence


def check_gradients(kernels, grad_z, grad_kl, mu, logvar, seed=11, limits=(-INFINITY, INFINITY), **options):
    found = kernels.gradients(grad_z, grad_kl, mu, logvar, seed, limits, **options)
    dtype, unit = mu.dtype, ROUNDING[mu.dtype]
    mean, log_variance = mu.double(), logvar.double().clamp(*limits)
    inside = (logvar.double() >= limits[0]) & (logvar.double() <= limits[1])
    deviation, noise = (0.5 * log_variance).exp(), noise_of(seed, mu.shape)
    of_z = torch.zeros_like(mean) if grad_z is None else grad_z.double()
    of_kl = mean.new_zeros(len(mean), 1) if grad_kl is None else grad_kl.double()[:, None]
    assert_near(found[0], of_z + of_kl * mean, 4 * unit * (of_z.abs() + (of_kl * mean).abs()), dtype)
    exact = 0.5 * inside * (of_z * deviation * noise + of_kl * (deviation**2 - 1))
    exponent = 4 * unit * (1 + log_variance.abs())
    bound = (of_z * deviation).abs() * (NOISE[dtype] + exponent * noise.abs())
    assert_near(found[1], exact, bound + exponent * of_kl.abs() * (deviation**2 + 1), dtype)
    return found


def is_same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_values_and_gradients_match_float64(kernels, shape, dtype):
    mu, logvar = parameters(shape, dtype)
    _, divergence = check_forward(kernels, mu, logvar)
    alone, divergence_alone = kernels.forward(mu, logvar)
    assert alone is None
    torch.testing.assert_close(divergence_alone, divergence, rtol=20 * ROUNDING[dtype], atol=0)
    for of_z, of_kl in UPSTREAM:
        check_gradients(kernels, *upstream(shape, dtype, of_z, of_kl), mu, logvar)


@pytest.mark.parametrize("seed", [0, 2**32, 2**40 + 3, -1, -(2**63)], ids=hex)
def test_every_bit_of_the_seed_counts(kernels, seed):
    mu, logvar = parameters((7, 12), torch.float32)
    check_forward(kernels, mu, logvar, seed)
    check_gradients(kernels, *upstream((7, 12), torch.float32), mu, logvar, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(20, 48), (13, 17)], ids=str)
def test_strides_and_alignment_do_not_change_a_bit(kernels, shape, dtype):
    rows, columns = shape
    mu, logvar = parameters(shape, dtype)
    grads = upstream(shape, dtype)
    z = check_forward(kernels, mu, logvar)
    gradients = check_gradients(kernels, *grads, mu, logvar)

    def halves(matrix):
        both = torch.full((rows, 2 * columns), torch.nan, dtype=dtype)
        both[:, columns:] = matrix
        return both[:, columns:]

    def unaligned(matrix):
        return torch.cat([matrix.new_full((1,), torch.nan), matrix.reshape(-1)])[1:].view(shape)

    def transposed(matrix):
        return matrix.t().contiguous().t()

    def spread(matrix):
        wider = torch.full((2 * rows, 3 * columns), torch.nan, dtype=dtype)
        wider[::2, ::3] = matrix
        return wider[::2, ::3]

    for change in (halves, unaligned, transposed, spread):
        assert is_same(check_forward(kernels, change(mu), logvar), z)
        assert is_same(check_forward(kernels, change(mu), change(logvar)), z)
        assert is_same(check_gradients(kernels, *grads, change(mu), change(logvar)), gradients)
        assert is_same(check_gradients(kernels, change(grads[0]), grads[1], mu, logvar), gradients)
    assert is_same(
        check_gradients(kernels, grads[0], grads[1].repeat_interleave(3)[::3], mu, logvar), gradients
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_are_read_where_they_lie_on_16_bytes(kernels, dtype):
    """The emulation itself reads them anywhere."""
    vector = 16 // dtype.itemsize
    chunk = max(4, vector)
    even, odd = torch.zeros(6, 4 * chunk, dtype=dtype), torch.zeros(6, chunk + 1, dtype=dtype)
    far = torch.zeros(6, 4 * chunk + 1, dtype=dtype)
    for expected, matrix in (
        (2, even),
        (2, even[:, 2 * chunk :]),  # half of a matrix
        (2, even[:1].expand(5, -1)),
        (2, even[:, vector : vector + chunk]),
        (1, odd),
        (1, even.view(-1)[: 6 * (chunk + 1)].view(6, chunk + 1)),
        (0, even.view(-1)[1:][: 2 * chunk].view(2, chunk)),
        (0, odd[:, :chunk]),
        (0, far[:, : 4 * chunk]),
        (0, even[:, ::2]),
        (0, even.view(2 * chunk, 12).t()),
        (0, even[:, :1].expand(6, chunk)),
        (0, odd.view(-1)[1 : 4 * chunk].view(1, -1)),
        (0, odd[:1].expand(6, -1)),
    ):
        arguments = (*map(ctypes.c_int64, matrix.shape), matrix_of(matrix))
        found = kernels.library.reading_of(TYPE_CODE[dtype], *arguments)
        assert found == expected, (matrix.shape, matrix.stride(), matrix.storage_offset())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 32), (6, 5)], ids=str)
def test_expanded_tensors(kernels, shape, dtype):
    rows, columns = shape
    of_rows = [random(rows, 1, dtype=dtype, seed=seed).expand(shape) for seed in range(3)]
    of_columns = [random(1, columns, dtype=dtype, seed=seed).expand(shape) for seed in range(3)]
    grad_kl = random(1, dtype=wide(dtype)).expand(rows)
    for mu, logvar, grad_z in (of_rows, of_columns):
        check_forward(kernels, mu, logvar)
        check_gradients(kernels, grad_z, grad_kl, mu, logvar)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 24), (11, 2056), (41, 10)], ids=str)
def test_results_do_not_depend_on_order(kernels, shape, dtype):
    mu, logvar = parameters(shape, dtype)
    grads = upstream(shape, dtype)
    first = check_forward(kernels, mu, logvar), kernels.gradients(*grads, mu, logvar, 11)
    for machine_seed in (1, 2):
        assert is_same(kernels.forward(mu, logvar, 11, machine_seed=machine_seed), first[0])
        assert is_same(kernels.gradients(*grads, mu, logvar, 11, machine_seed=machine_seed), first[1])


def test_empty_matrices(kernels):
    for seed in (None, 3):
        z, divergence = kernels.forward(torch.empty(0, 5), torch.empty(0, 5), seed)
        assert divergence.shape == (0,)
        z, divergence = kernels.forward(torch.empty(4, 0), torch.empty(4, 0), seed)
        assert torch.equal(divergence, torch.zeros(4))
        assert z is None or z.shape == (4, 0)
    for shape in ((0, 5), (4, 0)):
        mu, logvar = parameters(shape, torch.float32)
        assert kernels.gradients(*upstream(shape, torch.float32), mu, logvar, 3)[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [8, 7])
def test_extreme_log_variances_go_as_in_pytorch(kernels, columns, dtype):
    # exp overflows in float32 above 88.7, and exp(x / 2) above 177.4.
    values = (88.0, 100.0, 170.0, 200.0, 1e4, INFINITY, -100.0, -1e4, -INFINITY, torch.nan)
    logvar = torch.tensor(values)[:, None].expand(-1, columns).to(dtype)
    mu = random(len(values), columns, dtype=dtype)
    z, divergence = kernels.forward(mu, logvar, 5)
    _, alone = kernels.forward(mu, logvar)
    means, log_variances = mu.float(), logvar.float()
    noise = noise_of(5, mu.shape).float()
    expected = (means + (0.5 * log_variances).exp() * noise).to(dtype)
    # Powers of large numbers err by more than ordinary ones.
    torch.testing.assert_close(z, expected, rtol=max(1e-4, torch.finfo(dtype).eps), atol=2e-5, equal_nan=True)
    expected = 0.5 * (means**2 + (log_variances.exp() - 1 - log_variances)).sum(1)
    torch.testing.assert_close(divergence, expected, rtol=2e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(alone, expected, rtol=2e-5, atol=0, equal_nan=True)


def test_an_absent_gradient_has_no_part_in_the_others(kernels):
    """Where exp(logvar) is infinite, even none of it would be NaN."""
    logvar = torch.full((3, 8), 100.0)
    mu, logvar_gradient = kernels.gradients(torch.ones(3, 8), None, torch.ones(3, 8), logvar, 5)
    assert torch.equal(mu, torch.ones(3, 8)) and logvar_gradient.isfinite().all()
    mu, logvar_gradient = kernels.gradients(None, torch.ones(3), torch.ones(3, 8), logvar + 100, 5)
    assert torch.equal(mu, torch.ones(3, 8)) and (logvar_gradient == INFINITY).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [16, 7])
def test_the_limits_of_logvar(kernels, columns, dtype):
    limits = (-0.5, 0.75)
    values = torch.tensor([-1e4, -0.75, -0.5, 0.0, 0.75, 1.0, 100.0])
    logvar = values[torch.arange(9 * columns) % len(values)].view(9, columns).to(dtype)
    mu = random(9, columns, dtype=dtype)
    check_forward(kernels, mu, logvar, limits=limits)
    for of_z, of_kl in UPSTREAM:
        grads = upstream(mu.shape, dtype, of_z, of_kl)
        _, gradient = check_gradients(kernels, *grads, mu, logvar, limits=limits)
        inside = (logvar >= limits[0]) & (logvar <= limits[1])
        assert (gradient[~inside] == 0).all()
        assert (gradient[inside & (logvar != 0)] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan_within_limits(kernels, dtype):
    mu, logvar = parameters((3, 8), dtype)
    logvar[1, 2] = torch.nan
    z, divergence = kernels.forward(mu, logvar, 5, (-1.0, 1.0))
    assert z.isnan().nonzero().tolist() == [[1, 2]] and divergence.isnan().nonzero().tolist() == [[1]]
    mu_gradient, logvar_gradient = kernels.gradients(*upstream((3, 8), dtype), mu, logvar, 5, (-1.0, 1.0))
    assert mu_gradient.isfinite().all() and logvar_gradient.isnan().nonzero().tolist() == [[1, 2]]


BARRIER = re.compile(r"^ *__syncthreads\(\);\n", re.MULTILINE)


def test_a_missing_barrier_is_caught(compile_emulated, tmp_path):
    broken, removed = BARRIER.subn("", KERNELS.read_text())
    assert removed == 1, "a barrier that this test does not remove"
    (tmp_path / KERNELS.name).write_text(broken)
    driver = HERE / "reparameterize_driver.cpp"
    kernels = Kernels(compile_emulated(driver, "-DEMULATE_FLOAT32_ONLY", first_include=tmp_path))
    mu, logvar = parameters((3, 2048), torch.float32)
    expected = 0.5 * (mu.double() ** 2 + logvar.double().exp() - 1 - logvar.double()).sum(1).float()
    for machine_seed in range(4):
        _, divergence = kernels.forward(mu, logvar, machine_seed=machine_seed)
        assert not torch.allclose(divergence, expected)


# --- the operators ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ops(load_operators):
    return load_operators(CUDA / "reparameterize.cu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators(ops, kernels, dtype):
    head = random(13, 48, dtype=dtype)
    mu, logvar, seed, limits = head[:, :24], head[:, 24:], torch.tensor(2**40 + 1), (-0.5, 1.0)
    assert is_same(
        ops.reparameterize(mu, logvar, seed, *limits), kernels.forward(mu, logvar, int(seed), limits)
    )
    assert torch.equal(ops.kl_normal(mu, logvar), kernels.forward(mu, logvar)[1])
    grad_z, grad_kl = random(24, 13, dtype=dtype).t(), random(1, dtype=wide(dtype)).expand(13)
    for grads in ((grad_z, grad_kl), (grad_z, None), (None, grad_kl)):
        found = ops.reparameterize_backward(*grads, mu, logvar, seed, *limits)
        assert is_same(found, kernels.gradients(*grads, mu, logvar, int(seed), limits))
    found = ops.kl_normal_backward(grad_kl, mu, logvar)
    assert is_same(found, kernels.gradients(None, grad_kl, mu, logvar, 0))


def test_operators_of_nothing(ops):
    for shape in ((0, 5), (4, 0)):
        mu, logvar = parameters(shape, torch.float32)
        z, divergence = ops.reparameterize(mu, logvar, torch.tensor(1), -INFINITY, INFINITY)
        assert z.shape == shape and torch.equal(divergence, torch.zeros(shape[0]))
        assert torch.equal(ops.kl_normal(mu, logvar), torch.zeros(shape[0]))
        assert ops.kl_normal_backward(torch.ones(shape[0]), mu, logvar)[1].shape == shape


def test_operators_refuse_what_does_not_fit(ops):
    mu, seed, limits = torch.zeros(4, 3), torch.tensor(1), (-INFINITY, INFINITY)
    for message, call in (
        ("mu must be a matrix", lambda: ops.kl_normal(mu[0], mu[0])),
        (r"logvar must be \(4, 3\)", lambda: ops.kl_normal(mu, mu[1:])),
        ("logvar must have the dtype", lambda: ops.kl_normal(mu, mu.double())),
        ("expected float32", lambda: ops.kl_normal(mu.long(), mu.long())),
        ("seed must be an int64", lambda: ops.reparameterize(mu, mu, seed.int(), *limits)),
        ("seed must be an int64", lambda: ops.reparameterize(mu, mu, seed.expand(2), *limits)),
        ("grad_z must be", lambda: ops.reparameterize_backward(mu[1:], None, mu, mu, seed, *limits)),
        ("at least one", lambda: ops.reparameterize_backward(None, None, mu, mu, seed, *limits)),
        (r"must be \(4,\) of", lambda: ops.kl_normal_backward(torch.ones(3), mu, mu)),
        (r"must be \(4,\) of", lambda: ops.kl_normal_backward(torch.ones(4).double(), mu, mu)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
