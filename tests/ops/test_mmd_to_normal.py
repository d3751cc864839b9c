import functools
import itertools
import math

import mpmath
import numpy as np
import pytest
import torch

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops import _pairwise, mmd_to_normal
from support import numerics

OP = mmd_to_normal.OP
CPU = torch.device("cpu")
KERNELS = mmd_to_normal.KERNELS
# (kernel, alpha): every kernel with a bandwidth, and the tails of rational_quadratic from heavy to light.
SCALED = [("rbf", 1.0), ("imq", 1.0), *(("rational_quadratic", alpha) for alpha in (0.5, 1.0, 2.5))]
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]


def draw(*shape, seed=2, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_of(kernel, u, bandwidth, alpha=1.0):
    """The kernels as `mmd`'s docstring has them, of numpy arrays or tensors."""
    if kernel == "rbf":
        return (torch.exp if isinstance(u, torch.Tensor) else np.exp)(-u / (2 * bandwidth**2))
    if kernel == "imq":
        return bandwidth**2 / (bandwidth**2 + u)
    if kernel == "rational_quadratic":
        return (1 + u / (2 * alpha * bandwidth**2)) ** -alpha
    return -(u**0.5)


def expectations(kernel, bandwidth, alpha, squares, dimensions):
    """What the op takes for E k(x, y), for each ‖x‖² in `squares`, and for E k(y, y')."""
    x = torch.zeros(len(squares), dimensions, dtype=torch.float64)
    x[:, 0] = torch.as_tensor(squares, dtype=torch.float64).sqrt()
    spec = mmd_to_normal.kernel_of(kernel, bandwidth, alpha)
    of_points, of_prior = mmd_to_normal.expectations(
        x, spec, mmd_to_normal.unit_of(spec, bandwidth, dimensions)
    )
    return of_points.numpy(), of_prior


def test_by_hand():
    """Two points on a line, 0 and 2, with exp(-u / 2): k between them is e^-2, and E k(x, y) = √½ exp(-x²/4)."""
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    across, prior = math.sqrt(0.5) * (1 + math.exp(-1)), math.sqrt(1 / 3)
    found = AF.mmd_to_normal(x, bandwidth=1.0)
    assert found.item() == pytest.approx(math.exp(-2) - across + prior, rel=1e-14)
    found = AF.mmd_to_normal(x, bandwidth=1.0, estimator="biased")
    assert found.item() == pytest.approx((1 + math.exp(-2)) / 2 - across + prior, rel=1e-14)
    # One point at 0: 2 E|y| - E|y - y'|, where y - y' has twice the variance.
    found = AF.mmd_to_normal(x[:1], kernel="energy", estimator="biased")
    assert found.item() == pytest.approx((2 - math.sqrt(2)) * math.sqrt(2 / math.pi), rel=1e-13)


@pytest.mark.parametrize("dimensions", [2, 16, 64])
@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("kernel", "alpha"), SCALED)
def test_expectations_are_the_integrals(kernel, alpha, bandwidth, dimensions):
    """Of the definition: y has a coordinate g along x and a norm r across, ‖x - y‖² = (‖x‖ - g)² + r².

    The trapezoidal rule is exact to rounding for these even, analytic integrands: a step of 0.05 against a distance of
    0.5 to the nearest pole, b i, errs by exp(-2π 0.5 / 0.05).
    """
    step = 0.05
    squares = [0.0, 0.1, 1.0, dimensions, 4.0 * dimensions, 900.0]
    r = step * np.arange(1 + round(25 / step))
    power = dimensions - 2
    # r^(d-2) exp(-r²/2) over its integral from 0 on, 2^((d-3)/2) Γ((d-1)/2), and 0^0 = 1.
    log_density = np.log(np.maximum(r, 1e-300)) * power if power else np.zeros_like(r)
    log_density = log_density - r**2 / 2 - (power - 1) / 2 * math.log(2) - math.lgamma((power + 1) / 2)
    of_r = step * np.exp(log_density)
    of_r[0] /= 2
    exact = []
    for square in squares:
        g = np.arange(-12, math.sqrt(square) + 12, step)
        of_g = step * np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi)
        u = (math.sqrt(square) - g[:, None]) ** 2 + r**2
        exact.append(of_g @ value_of(kernel, u, bandwidth, alpha) @ of_r)
    # ‖y - y'‖² = 2 r² with the density of r in d dimensions; here r = e^t.
    t = np.arange(-25, 3.5, 0.01)
    log_density = dimensions * t - np.exp(2 * t) / 2 - (dimensions / 2 - 1) * math.log(2)
    of_t = 0.01 * np.exp(log_density - math.lgamma(dimensions / 2))
    of_prior = of_t @ value_of(kernel, 2 * np.exp(2 * t), bandwidth, alpha)
    found, found_of_prior = expectations(kernel, bandwidth, alpha, squares, dimensions)
    # Relative errors, wherever the kernel is above 1e-4 of its largest value; rbf falls to 1e-100 here, and has none.
    least = 0.0 if kernel == "rbf" else 1e-15
    np.testing.assert_allclose(found, exact, rtol=1e-11, atol=least)
    np.testing.assert_allclose(found_of_prior, of_prior, rtol=1e-11, atol=least)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 16, 64, 1000, 5000])
def test_energy_is_the_hypergeometric_function(dimensions):
    """√2 Γ((d+1)/2) / Γ(d/2) ₁F₁(-1/2; d/2; -s/2), and its first two derivatives with respect to s = ‖x‖²."""
    squares = [0.0, 1e-6, 0.3, 1.0, 10.0, 200.0, 1e4, 1e6]
    s = torch.tensor(squares, dtype=torch.float64, requires_grad=True)
    table = mmd_to_normal._distance_nodes(CPU)
    found = [-mmd_to_normal._minus_mean_distance(s, table, dimensions)]
    for _ in range(2):
        found.append(torch.autograd.grad(found[-1].sum(), s, create_graph=True)[0])
    with mpmath.workdps(30):
        half = mpmath.mpf(dimensions) / 2
        factor = mpmath.sqrt(2) * mpmath.gamma(half + 0.5) / mpmath.gamma(half)
        exact = []
        # d/dz ₁F₁(a; b; z) = a / b ₁F₁(a + 1; b + 1; z).
        for order in range(3):
            exact.append(
                [factor * mpmath.hyp1f1(order - 0.5, half + order, -mpmath.mpf(one) / 2) for one in squares]
            )
            factor *= (order - mpmath.mpf(0.5)) / (half + order) * -0.5
    for ours, theirs in zip(found, exact, strict=True):
        np.testing.assert_allclose(ours.detach(), [float(one) for one in theirs], rtol=1e-11)
    _, of_prior = expectations("energy", None, 1.0, squares, dimensions)
    expected = -2 * mpmath.gamma(half + 0.5) / mpmath.gamma(half)
    assert of_prior == pytest.approx(float(expected), rel=1e-12)


def test_expectations_of_prior_samples():
    """64 draws of 20000 points of the prior. A mean lies within 4.5 standard errors but once in 30000 trials."""
    x, alpha, bandwidth = 1.3 * draw(50, 5) + 0.3, 0.5, (0.7, 2.0)
    generator = torch.Generator().manual_seed(5)
    bandwidths = {kernel: (None,) if kernel == "energy" else bandwidth for kernel in KERNELS}

    def means(u):
        return [
            sum(value_of(kernel, u, one, alpha).mean().item() for one in its)
            for kernel, its in bandwidths.items()
        ]

    draws = []
    for _ in range(64):
        # float32 errs by a millionth, which is far below what the test can tell.
        y = torch.randn(20000, 5, generator=generator)
        # All pairs with x, and pairs of the prior that share no point.
        across = torch.cdist(x.float(), y, compute_mode="use_mm_for_euclid_dist").square()
        draws.append((means(across), means((y[::2] - y[1::2]).square().sum(1))))
    draws = np.array(draws)
    specs = [mmd_to_normal.kernel_of(kernel, bandwidth, alpha) for kernel in KERNELS]
    exact = [mmd_to_normal.expectations(x, spec, None) for spec in specs]
    exact = np.array([[one.mean().item() for one, _ in exact], [one for _, one in exact]])
    errors = draws.std(0, ddof=1) / math.sqrt(len(draws))
    assert (abs(draws.mean(0) - exact) < 4.5 * errors).all()
    # The test could tell a difference of a hundredth.
    assert (4.5 * errors < 0.01 * abs(exact)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_the_mean_of_mmd_over_prior_samples(kernel):
    x, settings = (1.3 * draw(50, 5) + 0.3).float(), {"kernel": kernel, "bandwidth": (0.7, 2.0), "alpha": 0.5}
    generator = torch.Generator().manual_seed(6)
    exact = AF.mmd_to_normal(x, **settings).item()
    found = np.array(
        [AF.mmd(x, torch.randn(1000, 5, generator=generator), **settings).item() for _ in range(64)]
    )
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert abs(found.mean() - exact) < 4.5 * error < 0.2 * exact


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_zero_on_average_for_samples_of_the_prior(kernel):
    generator = torch.Generator().manual_seed(7)
    found = np.array(
        [AF.mmd_to_normal(torch.randn(40, 8, generator=generator), kernel=kernel).item() for _ in range(200)]
    )
    assert abs(found.mean()) < 4.5 * found.std(ddof=1) / math.sqrt(len(found))
    assert (found < 0).any() and (found > 0).any()


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.03, 0.1, 0.5, 1.0, 2.5, 7.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("bandwidth", [(1.0,), (1e-3,), (0.5, 1.0, 4.0), (1e-3, 0.1, 40.0, 1e8)])
def test_sums_of_exponentials_are_the_kernel(alpha, bandwidth):
    """For bandwidths that share nodes and ones that do not, and more exponents than rules with fixed nodes serve."""
    kernel = _pairwise.kernel_of("test", "rational_quadratic", bandwidth, alpha)
    rates, log_weights = mmd_to_normal._mixture(kernel, CPU)
    u = torch.tensor([0.0, *(10.0**exponent for exponent in range(-6, 17))], dtype=torch.float64)
    found = torch.exp(log_weights - u[:, None] * rates).sum(1).numpy()
    # 1 + cu loses what alpha multiplies.
    exact = sum(np.exp(-alpha * np.log1p(c * u.numpy())) for c in kernel.rates)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-12 * len(bandwidth))
    # Where the kernel is above its error there is more to it: a power law, to eight digits.
    is_large = exact > 1e-3
    np.testing.assert_allclose(found[is_large], exact[is_large], rtol=1e-8)
    assert len(rates) < 300 * len(bandwidth)


def test_nodes_are_few_for_usual_bandwidths():
    """What several bandwidths cost beside one: each point has as many exponentials."""
    scales = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    for bandwidth, most in (((1.0,), 110), (tuple(map(math.sqrt, scales)), 130)):
        kernel = _pairwise.kernel_of("test", "imq", bandwidth, 1.0)
        assert len(mmd_to_normal._mixture(kernel, CPU)[0]) <= most


@functools.cache
def plane():
    """Points of the plane and their weights: a trapezoidal rule for the expectation over N(0, I_2)."""
    step = 0.15
    line = step * torch.arange(-60, 61, dtype=torch.float64)
    y = torch.cartesian_prod(line, line)
    return y, torch.exp(-0.5 * y.square().sum(1)) * step**2 / (2 * math.pi)


def straightforward(x, kernel, bandwidth, alpha, estimator):
    """MMD² by its definition, with a kernel of all pairs and integrals over the prior by other means than the op's."""
    count = len(x)
    # A root has no derivative at 0.
    is_same = torch.eye(count, dtype=torch.bool)
    u = torch.where(is_same, 1.0, (x[:, None] - x[None]).square().sum(-1))
    same = 0.0 if kernel == "energy" else 1.0
    of_pairs = torch.where(is_same, 0.0, value_of(kernel, u, bandwidth, alpha)).sum()
    pairs = of_pairs / (count * (count - 1))
    if estimator == "biased":
        pairs = (of_pairs + count * same) / count**2
    if kernel == "energy":
        # In three dimensions, with r = ‖x‖: (r + 1/r) erf(r/√2) + √(2/π) exp(-r²/2).
        r = x.square().sum(1).sqrt()
        distance = (r + 1 / r) * torch.erf(r / math.sqrt(2)) + math.sqrt(2 / math.pi) * torch.exp(-(r**2) / 2)
        return pairs + 2 * distance.mean() - 4 / math.sqrt(math.pi)
    y, weights = plane()
    u = (x[:, None] - y[None]).square().sum(-1)
    across = (value_of(kernel, u, bandwidth, alpha) @ weights).mean()
    # y - y' is √2 y.
    return (
        pairs - 2 * across + value_of(kernel, 2 * y.square().sum(1), bandwidth, alpha).dot(weights).detach()
    )


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize(("kernel", "alpha"), [*SCALED, ("energy", 1.0)])
def test_value_and_derivatives(kernel, alpha, estimator):
    """Also of a gradient penalty, against float64 autograd of another form."""
    x = (1.5 * draw(9, 3 if kernel == "energy" else 2) + 0.4).requires_grad_()
    direction = draw(*x.shape, seed=3)

    def run(function):
        value = function(x)
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum() + gradient.square().sum(), x)
        return value, gradient, second

    settings = {"kernel": kernel, "bandwidth": 1.2, "alpha": alpha, "estimator": estimator}
    found = run(functools.partial(AF.mmd_to_normal, **settings))
    expected = run(functools.partial(straightforward, **settings))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("bandwidth", [None, (0.7, 2.0)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel, bandwidth):
    x = draw(5, 3).requires_grad_()
    function = functools.partial(AF.mmd_to_normal, kernel=kernel, bandwidth=bandwidth, alpha=1.7)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype):
    numerics.require_backend(backend, "mmd", device, dtype)
    for sample in OP.samples(torch.device(device), dtype):
        numerics.check(OP, backend, sample, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_is_exact_but_for_its_pairs(kernel):
    """The expectations over the prior are of float64: of one point, which has no pairs, nothing is lost."""
    for dimensions, size in itertools.product((1, 16, 300), (0.1, 1.0, 10.0)):
        x = size * draw(1, dimensions, dtype=torch.float32)
        found = AF.mmd_to_normal(x, kernel=kernel, estimator="biased")
        exact = AF.mmd_to_normal(x.double(), kernel=kernel, estimator="biased")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact.float(), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_rounds_a_gradient_once(kernel, dtype):
    """The pull of the prior and the push of the other points nearly cancel: each rounded to half would not do."""
    x = draw(200, 4).to(dtype).requires_grad_()
    value = AF.mmd_to_normal(x, kernel=kernel)
    assert value.dtype == torch.float32
    (found,) = torch.autograd.grad(value, x, torch.tensor(1000.0))
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(AF.mmd_to_normal(wide, kernel=kernel), wide, torch.tensor(1000.0).double())
    assert found.dtype == dtype
    # A rounding to half, and float32's errors of either part, which are ten times as large as their sum.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=0.51 * eps, atol=1e-5 * exact.abs().max().item())


def test_autocast_computes_in_float32():
    x = draw(30, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = AF.mmd_to_normal(x, kernel="imq"), AF.mmd_to_normal(x.double(), kernel="imq")
    expected = AF.mmd_to_normal(x.float(), kernel="imq"), AF.mmd_to_normal(x.double(), kernel="imq")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("kernel", ["rbf", "imq", "rational_quadratic"])
def test_several_bandwidths_are_summed(kernel):
    x = 1.1 * draw(40, 7)
    for bandwidth in ((0.5, 1.0, 4.0), (1.0, 1.0), [1e-4, 1.0, 1e4]):
        found = AF.mmd_to_normal(x, kernel=kernel, bandwidth=bandwidth, alpha=1.4)
        expected = sum(AF.mmd_to_normal(x, kernel=kernel, bandwidth=one, alpha=1.4) for one in bandwidth)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("kernel", "squares"),
    [
        ("rbf", (0.125, 0.25, 0.5, 1.0, 2.0)),
        ("rational_quadratic", (0.125, 0.25, 0.5, 1.0, 2.0)),
        ("imq", (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)),
    ],
)
def test_default_bandwidths_are_multiples_of_the_priors_distance(kernel, squares):
    """b² over the mean of ‖y - y'‖², which is 2 D; the data have no part in it."""
    for dimensions, scale in itertools.product((1, 6, 50), (0.1, 5.0)):
        x = scale * draw(20, dimensions)
        bandwidth = [math.sqrt(2 * dimensions * square) for square in squares]
        found = AF.mmd_to_normal(x, kernel=kernel, alpha=0.6)
        expected = AF.mmd_to_normal(x, kernel=kernel, bandwidth=bandwidth, alpha=0.6)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_energy_has_no_bandwidth():
    x = draw(20, 3)
    assert torch.equal(
        AF.mmd_to_normal(x, kernel="energy"), AF.mmd_to_normal(x, kernel="energy", bandwidth=3)
    )


@pytest.mark.parametrize("distance", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("kernel", KERNELS)
def test_far_points(kernel, distance):
    """The prior is a point for them: E k(x, y) is k(‖x‖² + D), and E ‖x - y‖ is ‖x‖ + (D - 1) / (2 ‖x‖)."""
    x = torch.zeros(2, 10, dtype=torch.float64)
    x[0, 3], x[1, 5] = distance, 1.0
    x.requires_grad_()
    value = AF.mmd_to_normal(x, kernel=kernel, bandwidth=1.5, alpha=0.4, estimator="biased")
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert value.isfinite() and gradient.isfinite().all() and second.isfinite().all()
    of_points, _ = expectations(kernel, 1.5, 0.4, [distance**2], 10)
    u = distance**2 + (9 if kernel == "energy" else 10)
    # Next comes 4 ‖x‖² k''(u) / 2, a part of 4 / ‖x‖² for imq and of less for the others.
    expected = value_of(kernel, np.array([u]), 1.5, 0.4)
    np.testing.assert_allclose(of_points, expected, rtol=max(1e-8, 5 / distance**2), atol=1e-14)
    if kernel == "energy":
        # The prior pulls with a force of 2 / N, and the other point pushes back with half of it.
        assert gradient[0, 3].item() == pytest.approx(0.5, rel=2 / distance)


def test_large_and_small_bandwidths_and_exponents():
    """Whatever `mmd` takes: the MMD² of kernels that are 0 between points that differ, or constant, or nearly so."""
    x = draw(6, 3)
    for kernel, bandwidth in itertools.product(
        ("rbf", "imq", "rational_quadratic"), (1e-18, 1e-9, 1e9, 1e18)
    ):
        for alpha in (0.05, 1.0, 3e5):
            found = AF.mmd_to_normal(x, kernel=kernel, bandwidth=bandwidth, alpha=alpha)
            if bandwidth > 1 or alpha >= 1:
                assert abs(found.item()) < 1e-9
            assert found.isfinite()


@pytest.mark.parametrize("dimensions", [1, 5000])
@pytest.mark.parametrize("kernel", KERNELS)
def test_few_and_many_dimensions(kernel, dimensions):
    """A sample of the prior has a small MMD², and one of twice its size a large one."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(60, dimensions, generator=generator)
    near, far = (AF.mmd_to_normal(one, kernel=kernel).item() for one in (x, 2 * x))
    assert abs(near) < 0.1 * far


def test_shapes_and_strides():
    base = draw(24, 10)
    for x in (base[::2, 1::3], base.t(), base[:1].expand(7, 10), base[:, :1]):
        for kernel in KERNELS:
            found = AF.mmd_to_normal(x, kernel=kernel)
            torch.testing.assert_close(found, AF.mmd_to_normal(x.contiguous(), kernel=kernel))
            assert found.shape == () and found.dtype == torch.float64


def test_does_not_depend_on_the_order_or_the_axes():
    x = 0.8 * draw(30, 6) + 0.2
    rotation, _ = torch.linalg.qr(draw(6, 6, seed=4))
    for kernel in KERNELS:
        expected = AF.mmd_to_normal(x, kernel=kernel)
        torch.testing.assert_close(AF.mmd_to_normal(x.flip(0) @ rotation, kernel=kernel), expected)
        # But it does on where the prior is.
        assert AF.mmd_to_normal(x + 1, kernel=kernel) > expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_traces_whole(kernel):
    """The compiler's graph makes the nodes on the device, and other numbers of points and dimensions too."""

    def loss(x):
        value = AF.mmd_to_normal(x, kernel=kernel, alpha=0.7)
        return value, *torch.autograd.grad(value, x)

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: AF.mmd_to_normal(x, kernel=kernel, alpha=0.7), backend="aot_eager", fullgraph=True
    )
    for shape in ((12, 3), (13, 5), (14, 6)):
        x = draw(*shape, dtype=torch.float32).requires_grad_()
        value = compiled(x)
        for ours, theirs in zip((value, *torch.autograd.grad(value, x)), loss(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_compiles_whole():
    def function(x):
        return AF.mmd_to_normal(x, kernel="imq")

    torch._dynamo.reset()
    x = draw(12, 3, dtype=torch.float32).requires_grad_()
    found = torch.compile(function, fullgraph=True)(x)
    torch.testing.assert_close(found, function(x))
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(function(x), x))


@pytest.mark.parametrize("kernel", KERNELS)
def test_torch_func(kernel):
    function = functools.partial(AF.mmd_to_normal, kernel=kernel, alpha=0.7)
    x, direction = draw(6, 3), draw(6, 3, seed=3)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(function)(x), expected)
    value, slope = torch.func.jvp(function, (x,), (direction,))
    torch.testing.assert_close(value, function(x))
    torch.testing.assert_close(slope, (expected * direction).sum())
    found = torch.func.vmap(function)(torch.stack((x, 2 * x)))
    torch.testing.assert_close(found, torch.stack((function(x), function(2 * x))))
    torch.testing.assert_close(
        torch.func.hessian(function)(x), torch.autograd.functional.hessian(function, x)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("is_called_before", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_graphs_capture_it(kernel, is_called_before, monkeypatch):
    """A call before leaves the nodes on the device, where the graph reads them; without one it makes them."""
    monkeypatch.setattr(mmd_to_normal, "_ON_DEVICES", {})
    made, make = [], mmd_to_normal._table
    monkeypatch.setattr(
        mmd_to_normal, "_table", lambda *arguments: made.append(arguments) or make(*arguments)
    )
    mmd_to_normal._table_on_host.cache_clear()
    x = draw(64, 5, dtype=torch.float32).cuda().requires_grad_()

    def run():
        value = AF.mmd_to_normal(x, kernel=kernel)
        return value, *torch.autograd.grad(value, x)

    # The pairs' kernels are compiled before; their nodes are not made.
    AF.mmd(x, x.detach(), kernel=kernel)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        AF.mmd(x, x.detach(), kernel=kernel).backward()
    if is_called_before:
        run()
    torch.cuda.synchronize()
    made.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    assert len(made) == (not is_called_before)
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(found, run(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_device_keeps_the_nodes(monkeypatch):
    """But none that a graph has made, whose memory is the graph's."""
    monkeypatch.setattr(mmd_to_normal, "_ON_DEVICES", {})
    kernel = mmd_to_normal.Kernel("imq", (1.0, 2.0), 1.0)
    device = torch.device("meta")
    with monkeypatch.context() as within:
        within.setattr(mmd_to_normal, "_is_capturing", lambda device: True)
        made = [mmd_to_normal._table_at(kernel, 3.0, 5, device)[0] for _ in range(2)]
        assert made[0] is not made[1] and not mmd_to_normal._ON_DEVICES
    with torch.inference_mode():
        kept, constant = mmd_to_normal._table_at(kernel, 3.0, 5, device)
    assert mmd_to_normal._table_at(kernel, 3.0, 5, device)[0] is kept and not kept.is_inference()
    with monkeypatch.context() as within:
        within.setattr(mmd_to_normal, "_is_capturing", lambda device: True)
        assert mmd_to_normal._table_at(kernel, 3.0, 5, device)[0] is kept
    assert constant == mmd_to_normal._table_on_host(kernel, 3.0, 5)[1]
    monkeypatch.setattr(mmd_to_normal, "_MOST_ON_DEVICES", 1)
    others = [mmd_to_normal._table_at(kernel, 4.0, 5, device)[0] for _ in range(2)]
    assert others[0] is not others[1] and len(mmd_to_normal._ON_DEVICES) == 1


def test_inference_leaves_nothing_behind():
    """The nodes are kept from call to call, whoever called first."""
    mmd_to_normal._table_on_host.cache_clear()
    x = draw(8, 3)
    with torch.inference_mode():
        expected = AF.mmd_to_normal(x, kernel="imq")
    x.requires_grad_()
    value = AF.mmd_to_normal(x, kernel="imq")
    assert torch.equal(value, expected)
    assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_meta_tensors():
    found = AF.mmd_to_normal(torch.empty(5, 3, device="meta", dtype=torch.bfloat16), kernel="imq")
    assert found.shape == () and found.dtype == torch.float32


def test_backends_of_the_pairs():
    """The pairs are those of `mmd`, and so is what serves them."""
    x = draw(20, 3)
    with aefast.backend("eager"):
        expected = AF.mmd_to_normal(x)
    torch.testing.assert_close(AF.mmd_to_normal(x), expected)
    torch.testing.assert_close(OP.reference(x), expected)


def test_cost_has_the_pairs_and_the_nodes():
    x = torch.empty(100, 8)
    pairs = 100 * 99 // 2
    # Octaves take one exponential between those whose powers of two agree, and each point has one for each bandwidth.
    cost = OP.cost(True, x=x, kernel="rbf", bandwidth=(1.0, 2.0), estimator="biased")
    assert (cost.bytes, cost.flops, cost.exps) == (2 * 100 * 8 * 4, 6 * 8 * pairs, pairs + 2 * 100)
    for kernel in KERNELS:
        assert OP.cost(False, x=x, kernel=kernel).exps > pairs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[1.0]]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3)}, r"x must be a matrix \(points, dimensions\) .*, got shape \(3,\)"),
        ({"x": torch.ones(3, 0)}, "x must be a matrix"),
        ({"x": torch.ones(3, 2).long()}, "x must be float32, bfloat16, float16 or float64, got int64"),
        ({"x": torch.ones(3, 2).to_sparse()}, "x must be a dense tensor"),
        ({"x": torch.ones(0, 2)}, "x must have at least 2 rows for 'unbiased', got 0"),
        ({"x": torch.ones(1, 2)}, "x must have at least 2 rows for 'unbiased', got 1"),
        ({"x": torch.ones(0, 2), "estimator": "biased"}, "x must have at least 1 rows for 'biased', got 0"),
        (
            {"kernel": "laplacian"},
            r"kernel must be one of rbf, imq, rational_quadratic, energy, got 'laplacian'; .* mmd\(x, y",
        ),
        ({"kernel": "gaussian"}, "kernel must be one of rbf, .*, got 'gaussian'"),
        ({"kernel": ["rbf"]}, "kernel must be one of rbf, .*, got "),
        ({"estimator": "mean"}, "estimator must be one of unbiased, biased, got 'mean'"),
        ({"bandwidth": 0.0}, "bandwidth must be a number above 0, from 1e-18 to 1e18, got 0.0"),
        ({"bandwidth": (1.0, -1.0)}, "bandwidth must be a number above 0, .*, got -1.0"),
        ({"bandwidth": ()}, "bandwidth must have at least one number"),
        ({"bandwidth": torch.ones(2)}, "bandwidth must be a number, a sequence of numbers, or None"),
        ({"bandwidth": "median"}, "bandwidth must be a number above 0, .*, got 'median'"),
        ({"kernel": "rational_quadratic", "alpha": 0.0}, "alpha must be .* above 0.*, got 0.0"),
        ({"x": torch.tensor([[1.0, math.nan], [0.0, 0.0]])}, "x must be finite, got 1 elements that are not"),
        ({"x": torch.tensor([[1.0, math.inf], [0.0, 0.0]])}, "x must be finite, got 1 elements that are not"),
    ],
)
def test_bad_input_is_named(change, message):
    # The energy kernel is infinite for infinite points, where others are 0.
    arguments = {"x": torch.ones(3, 2)}
    if "finite" in message:
        arguments["kernel"] = "energy"
    with pytest.raises(InputError, match=f"mmd_to_normal: .*{message}"):
        AF.mmd_to_normal(**{**arguments, **change})
