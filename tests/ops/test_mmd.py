import math
import subprocess
import sys

import pytest
import torch

import aefast
import aefast.functional as AF
from aefast.errors import BackendError, InputError
from aefast.ops import OPS, _pairwise, _registry
from aefast.ops import mmd as op
from aefast.ops._pairwise import KERNELS
from support import numerics

CPU = torch.device("cpu")
FIVE = (0.5, 1.0, 2.0, 4.0, 8.0)
# Of rates that double, as the default bandwidths are.
OCTAVES = tuple(2.0 ** (k / 2) for k in range(-2, 3))


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(x, y, kernel, bandwidths, estimator, alpha=1.0, chunk=1024):
    """MMD² and its gradients in float64 by the formulas, a chunk of rows at a time. Of many dimensions, products of
    centred points give distances to 1e-13 of those of far points, and 0 is set where a point meets itself; of few,
    where points come close, differences do."""

    def kernel_and_slope(u, b):
        if kernel == "rbf":
            value = torch.exp(-u / (2 * b * b))
            return value, -value / (2 * b * b)
        if kernel == "imq":
            return b * b / (b * b + u), -b * b / (b * b + u) ** 2
        if kernel == "rational_quadratic":
            base = 1 + u / (2 * alpha * b * b)
            return base**-alpha, -(base ** (-alpha - 1)) / (2 * b * b)
        root = u.sqrt()
        inverse = torch.where(u > 0, 1 / root, 0.0)
        if kernel == "energy":
            return -root, -0.5 * inverse
        value = torch.exp(-root / b)
        return value, -0.5 * value * inverse / b

    centre = x.double().mean(0)
    sides = (x.double() - centre, y.double() - centre)
    total = torch.zeros((), dtype=torch.float64)
    gradients = [torch.zeros_like(one) for one in sides]
    for left, right in ((0, 0), (1, 1), (0, 1)):
        rows, columns = sides[left], sides[right]
        n, m = len(rows), len(columns)
        is_same = left == right
        count = n * (n - 1) if is_same and estimator == "unbiased" else n * m
        weight = (1.0 if is_same else -2.0) / count
        for first in range(0, n, chunk):
            part = rows[first : first + chunk]
            if x.shape[1] <= 3:
                u = sum((part[:, None, k] - columns[:, k]).square() for k in range(x.shape[1]))
            else:
                u = part.square().sum(1)[:, None] + columns.square().sum(1) - 2 * part @ columns.t()
                u = u.clamp(min=0)
            if is_same:
                u.diagonal(first).zero_()
            for b in bandwidths if kernel != "energy" else (1.0,):
                value, slope = kernel_and_slope(u, b)
                if is_same and estimator == "unbiased":
                    value.diagonal(first).zero_()
                    slope.diagonal(first).zero_()
                total += weight * value.sum()
                both = 2 * weight * slope
                gradients[left][first : first + chunk] += both.sum(1)[:, None] * part - both @ columns
                gradients[right] += both.sum(0)[:, None] * columns - both.t() @ part
    return total, *gradients


def found(x, y, **settings):
    x, y = (one.detach().requires_grad_() for one in (x, y))
    value = AF.mmd(x, y, **settings)
    return value.detach(), *torch.autograd.grad(value, (x, y))


def check(x, y, kernel, bandwidths, estimator, **settings):
    """To 12 float32 spacings of the sums of the terms' magnitudes: a kernel value is good to 3, its distance, a sum
    over the dimensions, to about as many, the sums over the points to the rest."""
    sizes = op.terms(
        x.double(), y.double(), kernel=kernel, bandwidth=bandwidths, estimator=estimator, **settings
    )
    ours = found(x, y, kernel=kernel, bandwidth=bandwidths, estimator=estimator, **settings)
    for our, true, size in zip(
        ours, exact(x, y, kernel, bandwidths, estimator, **settings), sizes, strict=True
    ):
        assert (our.double() - true).abs().max() <= 12 * 2.0**-24 * size


def exact_by_differences(x, y, **settings):
    """MMD² and its gradients in float64, by the reference, which sums differences of so few points."""
    with aefast.backend("eager"):
        return found(x.double(), y.double(), **settings)


def test_three_points_by_hand():
    """x at 0, 1 and 3, y at 0 and 2, kernel exp(-u / 2)."""
    numerics.require_backend("cpu", "mmd", "cpu", torch.float32)
    x, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [2.0]])
    e = [math.exp(-(distance**2) / 2) for distance in range(4)]
    of_x, of_y = e[1] + e[3] + e[2], e[2]
    across = (e[0] + e[2]) + (e[1] + e[1]) + (e[3] + e[1])
    unbiased = 2 * of_x / (3 * 2) + 2 * of_y / (2 * 1) - 2 * across / (3 * 2)
    biased = (3 + 2 * of_x) / 9 + (2 + 2 * of_y) / 4 - 2 * across / 6
    for backend in ("cpu", "eager"):
        with aefast.backend(backend):
            assert AF.mmd(x, y, bandwidth=1.0).item() == pytest.approx(unbiased, rel=1e-6)
            assert AF.mmd(x, y, bandwidth=1.0, estimator="biased").item() == pytest.approx(biased, rel=1e-6)


@pytest.mark.parametrize("estimator", _pairwise.ESTIMATORS)
@pytest.mark.parametrize("bandwidths", [(2.0,), FIVE], ids=["one", "five"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_matches_the_formulas(kernel, bandwidths, estimator):
    numerics.require_backend("cpu", "mmd", "cpu", torch.float32)
    for d in (1, 2, 3, 16, 64, 257):
        scaled = tuple(b * math.sqrt(d) for b in bandwidths)
        for n, m in ((1, 1), (2, 3), (3, 2), (129, 70), (70, 300)):
            if n == 1 and estimator == "unbiased":
                continue
            x, y = draw(n, d, dtype=torch.float32), 1.2 * draw(m, d, seed=2, dtype=torch.float32) + 0.25
            check(x, y, kernel, scaled, estimator)
            check(x + 100, y + 100, kernel, scaled, estimator)


# (points of x, points of y): thousands, and as many as fill several tiles of either side.
THOUSANDS, HUNDREDS = (4097, 1000), (1031, 500)


@pytest.mark.parametrize(
    ("d", "kernel", "counts"),
    [
        *((16, kernel, THOUSANDS if kernel == "rbf" else HUNDREDS) for kernel in KERNELS),
        *((d, kernel, HUNDREDS) for d in (2, 3, 64, 257) for kernel in ("rbf", "energy")),
        (1, "rbf", HUNDREDS),
        (1, "energy", THOUSANDS),
        (1, "laplacian", THOUSANDS),
    ],
)
@pytest.mark.slow
def test_matches_the_formulas_on_many_points(d, kernel, counts):
    n, m = counts
    x, y = draw(n, d, dtype=torch.float32), 1.1 * draw(m, d, seed=2, dtype=torch.float32)
    scaled = tuple(b * math.sqrt(d) for b in FIVE)
    ours = found(x, y, kernel=kernel, bandwidth=scaled)
    # Of the sums of four means of kernel values, five of up to 1, or distances.
    size = 20.0 if kernel != "energy" else 8 * math.sqrt(d)
    value, *gradients = exact(x, y, kernel, scaled, "unbiased")
    assert abs(ours[0].double() - value) <= 6 * 2.0**-24 * size
    for our, true, points in zip(ours[1:], gradients, (x, y), strict=True):
        # What thousands of terms of both signs leave. Those of energy are of one size in one dimension, up to
        # 4 / points in all, and may cancel but for rounding errors of their sums.
        atol = 1e-5 * true.abs().max().item()
        if kernel == "energy":
            atol = max(atol, 12 * 2.0**-24 * 4 / len(points))
        torch.testing.assert_close(our.double(), true, rtol=0, atol=atol)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_instruction_set(poisoned_memory, instruction_set, kernel):
    x, y = draw(140, 5, dtype=torch.float32), draw(70, 5, seed=2, dtype=torch.float32) + 0.5
    for alpha in (1.0, 0.7):
        for bandwidths in (FIVE, OCTAVES):
            check(x, y, kernel, bandwidths, "unbiased", alpha=alpha)
        check(x, y, kernel, (0.3, 1.1, 2.7), "biased", alpha=alpha)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_that_coincide(instruction_set, kernel, dtype):
    """The value is 0 but for rounding, and no gradient is NaN; kernels of √u have none there."""
    x = draw(3, 4, dtype=dtype).repeat(50, 1)
    for settings in ({"bandwidth": FIVE}, {}):
        value, *gradients = found(x, x.clone(), kernel=kernel, estimator="biased", **settings)
        assert abs(value.item()) < 1e-5
        for gradient in gradients:
            assert gradient.abs().max() < 1e-5
    same = torch.ones(9, 3, dtype=dtype)
    for result in found(same, same.clone(), kernel=kernel):
        assert (result == 0).all()


@pytest.mark.parametrize("dtype, scale, tolerance", numerics.TINY_POINTS)
@pytest.mark.parametrize("kernel", ["laplacian", "energy"])
def test_tiny_points_keep_their_digits(instruction_set, kernel, dtype, scale, tolerance):
    """The root of a squared distance knows no smallest one, but 0."""
    x, y = scale * draw(150, 16), scale * (1.2 * draw(70, 16, seed=2) + 0.5)
    x, y = x.to(dtype), y.to(dtype)
    x[1] = x[0]
    settings = {"kernel": kernel, "estimator": "biased"}
    truth = exact_by_differences(x, y, **settings)
    for our, true in zip(found(x, y, **settings), truth, strict=True):
        torch.testing.assert_close(our.double(), true, rtol=0, atol=tolerance * true.abs().max().item())


def test_squared_bandwidths_are_as_exact_as_others():
    """Kernels that are powers of each other are computed by squaring."""
    numerics.require_backend("cpu", "mmd", "cpu", torch.float32)
    x, y = draw(200, 8, dtype=torch.float32), draw(200, 8, seed=2, dtype=torch.float32) + 0.5
    for bandwidths in (FIVE, tuple(2.0 ** (k / 2) for k in range(-4, 9)), (1.0, 1.0, 1.0), (4.0, 0.125, 1.0)):
        check(x, y, "rbf", bandwidths, "unbiased")


@pytest.mark.parametrize("bandwidths", [FIVE, OCTAVES], ids=["five", "octaves"])
def test_errors_of_powers_average_out(instruction_set, bandwidths):
    """Squaring again and again multiplies errors. Those of single values, 10⁻⁶, average out in the sums; what all
    values near a distance have in common would not."""
    scaled = tuple(4 * b for b in bandwidths)
    x, y = draw(800, 64, dtype=torch.float32), 1.25 * draw(800, 64, seed=2, dtype=torch.float32)
    value = found(x, y, bandwidth=scaled)[0].item()
    assert value == pytest.approx(exact(x, y, "rbf", scaled, "unbiased")[0].item(), rel=4e-7)


def test_far_points_and_narrow_bandwidths_are_zero(instruction_set):
    x, y = draw(130, 3, dtype=torch.float32), draw(130, 3, seed=2, dtype=torch.float32) + 1e6
    for kernel in ("rbf", "laplacian"):
        value, *gradients = found(x, y, kernel=kernel, bandwidth=FIVE)
        assert value.item() > 0
        assert all(gradient.isfinite().all() for gradient in gradients)
        value, *gradients = found(x, y, kernel=kernel, bandwidth=1e-6)
        assert value.item() == 0
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("d", [3, 16, 40])
@pytest.mark.parametrize("kernel", ["rbf", "imq", "rational_quadratic"])
def test_clusters_far_from_their_centre_keep_their_digits(instruction_set, kernel, d):
    """What distances from products, and sums of products of far points, would lose: all of it."""
    x, y = draw(90, d, dtype=torch.float32), draw(70, d, seed=2, dtype=torch.float32) + 0.5
    x[::2, 0] += 1e4
    y[::3, 0] += 1e4
    settings = {"kernel": kernel, "bandwidth": math.sqrt(d), "alpha": 0.7}
    truth = exact_by_differences(x, y, **settings)
    for our, true in zip(found(x, y, **settings), truth, strict=True):
        # Half of the pairs are of one cluster, whose coordinates by 10⁴ are rounded before they come here.
        torch.testing.assert_close(our.double(), true, rtol=0, atol=1e-5 * true.abs().max().item())
    # Parts find distances as the whole does, however their own points lie.
    spec = _pairwise.kernel_of("mmd", kernel, math.sqrt(d), 0.7)
    weights = op.weights_of("unbiased", spec, len(x), len(y))
    settings = (None, spec.name, spec.rates, spec.alpha, weights, 3)
    _, whole, _ = torch.ops.aefast_cpu.mmd(x, y, *settings)
    _, part, _ = torch.ops.aefast_cpu.mmd_rows(x[:1], y[:0], x, y, 0, 0, *settings)
    torch.testing.assert_close(part[0], whole[0], rtol=0, atol=1e-5 * whole.abs().max().item())


@pytest.mark.parametrize("bandwidth", [1.0, 0.3, 0.05])
def test_points_that_coincide_count_whole_among_others(instruction_set, bandwidth):
    x = draw(50, 64, dtype=torch.float32).repeat(2, 1)
    y = draw(70, 64, seed=2, dtype=torch.float32)
    settings = {"kernel": "rbf", "bandwidth": bandwidth, "alpha": 1.0}
    value = exact_by_differences(x, y, **settings)[0].item()
    assert found(x, y, **settings)[0].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_infinite_point_is_named(kernel):
    x, y = draw(8, 3, dtype=torch.float32), draw(9, 3, seed=2, dtype=torch.float32)
    for changed in (x, y):
        others = [one.clone() for one in (x, y)]
        others[changed is y][3, 0] = math.inf
        with pytest.raises(InputError, match=f"mmd: {'xy'[changed is y]} must be finite, got 1 elements"):
            AF.mmd(*others, kernel=kernel, bandwidth=1.0)


def test_default_bandwidths_follow_the_data():
    x, y = draw(50, 3), draw(40, 3, seed=2) + 1
    points = torch.cat((x, y))
    m = torch.pdist(points).square().mean().item()
    expected = {
        "rbf": [math.sqrt(factor * m / 2) for factor in (0.25, 0.5, 1, 2, 4)],
        "laplacian": [math.sqrt(factor * m) for factor in (0.25, 0.5, 1, 2, 4)],
        "imq": [math.sqrt(scale * m) for scale in (0.1, 0.2, 0.5, 1, 2, 5, 10)],
        "rational_quadratic": [math.sqrt(factor * m / 2) for factor in (0.25, 0.5, 1, 2, 4)],
    }
    for kernel, bandwidths in expected.items():
        for alpha in (1.0, 2.5):
            given = found(x, y, kernel=kernel, bandwidth=bandwidths, alpha=alpha)
            for ours, theirs in zip(found(x, y, kernel=kernel, alpha=alpha), given, strict=True):
                torch.testing.assert_close(ours, theirs)
    # The scale of the data changes nothing.
    torch.testing.assert_close(AF.mmd(x, y), AF.mmd(1e4 * x, 1e4 * y))


def test_energy_distance_is_that_of_its_definition():
    x, y = draw(30, 4), draw(20, 4, seed=2) + 1
    expected = 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()
    torch.testing.assert_close(AF.mmd(x, y, kernel="energy", estimator="biased"), expected)


# Blocks are of 128 points, and teams of one, two, four or eight blocks; they are an even or odd number, and one of them
# may be incomplete.
@pytest.mark.parametrize("counts", [(700, 300), (1000, 950), (2000, 1200), (3000, 2000), (4400, 3900)])
def test_does_not_depend_on_threads(counts):
    numerics.require_backend("cpu", "mmd", "cpu", torch.float32)
    x, y = (draw(count, 2, seed=count, dtype=torch.float32) for count in counts)
    threads = torch.get_num_threads()

    def once(count):
        torch.set_num_threads(count)
        try:
            return found(x, y, bandwidth=1.0, estimator="biased")
        finally:
            torch.set_num_threads(threads)

    first = once(1)
    for ours, true in zip(first, exact(x, y, "rbf", (1.0,), "biased"), strict=True):
        # Gradients are sums of thousands of terms of both signs.
        torch.testing.assert_close(
            ours.double(), true, rtol=0, atol=max(1e-7, 1e-5 * true.abs().max().item())
        )
    for count in (2, 2, 3, 5, 16):
        for ours, theirs in zip(once(count), first, strict=True):
            assert torch.equal(ours, theirs)


def test_only_the_gradient_asked_for():
    numerics.require_backend("cpu", "mmd", "cpu", torch.float32)
    x, y = draw(200, 6, dtype=torch.float32), draw(150, 6, seed=2, dtype=torch.float32)
    _, of_x, of_y = found(x, y)
    for needs, expected in (((True, False), of_x), ((False, True), of_y)):
        tensors = [one.detach().requires_grad_(need) for one, need in zip((x, y), needs, strict=True)]
        (gradient,) = torch.autograd.grad(AF.mmd(*tensors), [one for one in tensors if one.requires_grad])
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    x, y = draw(300, 16).to(dtype), (draw(200, 16, seed=2) + 0.25).to(dtype)
    value, *gradients = found(x, y)
    wide = found(x.float(), y.float())
    assert value.dtype == torch.float32 and torch.equal(value, wide[0])
    for ours, theirs in zip(gradients, wide[1:], strict=True):
        assert torch.equal(ours, theirs.to(dtype))


def test_runs_in_float32_under_autocast():
    x, y = draw(20, 3, dtype=torch.float32), draw(30, 3, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain, mixed = AF.mmd(x, y), AF.mmd(x.bfloat16(), y)
    assert torch.equal(plain, AF.mmd(x, y))
    assert torch.equal(mixed, AF.mmd(x.bfloat16().float(), y))


def test_large_upstream_gradient():
    """As under a gradient scaler, in half precision."""
    x, y = draw(64, 8).half().requires_grad_(), (draw(64, 8, seed=2) + 1).half()
    (scaled,) = torch.autograd.grad(AF.mmd(x, y) * 65536.0, x)
    (wide,) = torch.autograd.grad(AF.mmd(x.float(), y.float()), x)
    torch.testing.assert_close(scaled.float() / 65536.0, wide.float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_a_larger_sample(instruction_set, kernel):
    """Parts of any sizes add up to the whole, and have its gradients."""
    x, y = draw(290, 5, dtype=torch.float32), draw(150, 5, seed=2, dtype=torch.float32) + 0.5
    spec = _pairwise.kernel_of("mmd", kernel, FIVE, 0.7)
    weights = op.weights_of("unbiased", spec, len(x), len(y))
    settings = (None, spec.name, spec.rates, spec.alpha, weights, 3)
    whole = torch.ops.aefast_cpu.mmd(x, y, *settings)
    parts = []
    for x_part, y_part in (((0, 129), (0, 0)), ((129, 130), (0, 101)), ((130, 290), (101, 150))):
        (x_begin, x_end), (y_begin, y_end) = x_part, y_part
        rows = x[x_begin:x_end], y[y_begin:y_end]
        parts.append(torch.ops.aefast_cpu.mmd_rows(*rows, x, y, x_begin, y_begin, *settings))
        truth = op.rows_reference(
            *(one.double() for one in (*rows, x, y)), (x_begin, y_begin), None, spec, weights
        )
        torch.testing.assert_close(parts[-1][0].double(), truth, rtol=1e-5, atol=1e-7)
    values, *gradients = zip(*parts, strict=True)
    torch.testing.assert_close(sum(values), whole[0], rtol=0, atol=3e-6)
    for ours, theirs in zip(gradients, whole[1:], strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(torch.cat(ours), theirs, rtol=0, atol=1e-5 * scale)


def test_memory_does_not_grow_with_pairs():
    """Beyond inputs and results there are two copies of the points and one of their gradients."""
    numerics.require_backend("cpu", "mmd", "cpu", torch.float32)
    code = """
import resource, torch
import aefast.functional as AF
x = torch.randn(20000, 16, requires_grad=True)
y = torch.randn(20000, 16, requires_grad=True)
AF.mmd(x[:200], y[:200]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
AF.mmd(x, y, bandwidth=1.0).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    points = 2 * 20000 * 16 * 4 / 2**20
    # One kernel matrix would have 1526 MiB.
    assert float(done.stdout) < 8 * points + 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(4)}, r"x must be a matrix \(points, dimensions\).* got shape \(4,\)"),
        ({"x": torch.ones(4, 0)}, r"of at least one dimension, got shape \(4, 0\)"),
        ({"x": torch.ones(4, 3).long()}, "x must be float32, bfloat16, float16 or float64, got int64"),
        ({"y": torch.ones(4, 2)}, r"y must have as many dimensions as x, 3, got shape \(4, 2\)"),
        ({"y": torch.ones(4, 3).half()}, "y must have the dtype of x, float32, got float16"),
        ({"x": torch.ones(1, 3)}, "x must have at least 2 rows for 'unbiased', got 1"),
        ({"y": torch.ones(0, 3)}, "y must have at least 2 rows for 'unbiased', got 0"),
        ({"y": torch.ones(0, 3), "estimator": "biased"}, "y must have at least 1 rows for 'biased', got 0"),
        ({"kernel": "gauss"}, "kernel must be one of rbf, laplacian, imq, .*got 'gauss'"),
        ({"kernel": "RBF"}, r"kernel must be one of .*, got 'RBF'; did you mean 'rbf'\?$"),
        ({"bandwidth": 0.0}, "bandwidth must be a number above 0, .*got 0.0"),
        ({"bandwidth": (1.0, -1.0)}, "bandwidth must be a number above 0, .*got -1.0"),
        ({"bandwidth": float("nan")}, "bandwidth must be a number above 0, .*got nan"),
        ({"bandwidth": "1"}, "bandwidth must be a number above 0, .*got '1'"),
        ({"bandwidth": ()}, "bandwidth must have at least one number"),
        ({"bandwidth": torch.ones(2)}, "bandwidth must be .*got a tensor"),
        ({"bandwidth": True}, "bandwidth must be a number above 0, .*got True"),
        (
            {"kernel": "rational_quadratic", "alpha": 0},
            "alpha must be a number above 0, from 1e-6 to 1e6, got 0",
        ),
        ({"estimator": "u"}, "estimator must be one of unbiased, biased, got 'u'"),
        ({"x": torch.full((4, 3), math.nan)}, "x must be finite, got 12 elements that are not"),
        ({"y": torch.tensor([[1.0, math.inf, 0.0]] * 4)}, "y must be finite, got 4 elements"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(4, 3), "y": torch.zeros(4, 3)}
    with pytest.raises(InputError, match=f"mmd: .*{message}"):
        AF.mmd(**{**arguments, **change})


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "rational_quadratic"])
def test_the_alpha_of_another_kernel_changes_nothing(kernel):
    x, y = draw(9, 2), draw(9, 2, seed=2)
    assert torch.equal(AF.mmd(x, y, kernel=kernel, alpha=-1.0), AF.mmd(x, y, kernel=kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_not_a_number_is_not_swallowed(instruction_set, kernel):
    x, y = draw(20, 3, dtype=torch.float32), draw(300, 3, seed=2, dtype=torch.float32)
    y[7, 1] = math.nan
    spec = _pairwise.kernel_of("mmd", kernel, 1.0, 0.7)
    weights = op.weights_of("unbiased", spec, len(x), len(y))
    results = torch.ops.aefast_cpu.mmd(x, y, None, spec.name, spec.rates, spec.alpha, weights, 3)
    assert all(result.isnan().all() for result in results)


def test_bandwidths_may_be_any_numbers():
    numpy = pytest.importorskip("numpy")
    x, y = draw(9, 2), draw(9, 2, seed=2)
    expected = AF.mmd(x, y, bandwidth=(1.0, 2.0))
    for bandwidth in ([1, 2], (2.0, 1.0), [numpy.float32(1), numpy.float64(2)]):
        assert torch.equal(AF.mmd(x, y, bandwidth=bandwidth), expected)
    assert torch.equal(AF.mmd(x, y, bandwidth=numpy.float32(2)), AF.mmd(x, y, bandwidth=2))
    for array in (numpy.array([1.0, 2.0]), numpy.array(2.0)):
        with pytest.raises(
            InputError, match=r"bandwidth must be .* got an array; its \.item\(\) or \.tolist\(\)"
        ):
            AF.mmd(x, y, bandwidth=array)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "imq", "rational_quadratic"])
def test_the_order_of_bandwidths_does_not_matter(kernel, backend):
    numerics.require_backend(backend, "mmd", "cpu", torch.float32)
    x, y = draw(40, 2, dtype=torch.float32), draw(40, 2, seed=2, dtype=torch.float32)
    bandwidths = (0.3, 0.7, 1.1, 2.0, 5.0)
    with aefast.backend(backend):
        expected = found(x, y, kernel=kernel, bandwidth=bandwidths)
        for start in range(1, len(bandwidths)):
            turned = bandwidths[start:] + bandwidths[:start]
            for one, other in zip(found(x, y, kernel=kernel, bandwidth=turned), expected, strict=True):
                assert torch.equal(one, other)


def test_cost_counts_pairs():
    x, y = torch.empty(30, 4), torch.empty(20, 4)
    cost = OPS["mmd"].cost(True, x, y, bandwidth=FIVE)
    pairs = 50 * 49 // 2
    assert (cost.flops, cost.exps) == (pairs * 4 * 6, pairs)
    assert OPS["mmd"].cost(False, x, y, bandwidth=(1.0, 3.0), kernel="laplacian").exps == 2 * pairs


def test_dimensions_that_the_cuda_kernels_are_for(monkeypatch):
    """Of more, a GPU's calls go on to Triton, and asking for CUDA says why it cannot be."""
    monkeypatch.setattr(
        _registry, "refusal", lambda name, *call: None if name in ("cuda", "triton") else name
    )
    _registry._resolve.cache_clear()
    try:
        for D, auto in ((1, "cuda"), (op.CUDA_DIMENSIONS, "cuda"), (op.CUDA_DIMENSIONS + 1, "triton")):
            x = torch.ones(3, D)
            assert op.backend_of(x, x) == auto
            with aefast.backend("cuda"):
                if auto == "cuda":
                    assert op.backend_of(x, x) == "cuda"
                else:
                    with pytest.raises(BackendError, match="points of up to 16 dimensions"):
                        op.backend_of(x, x)
    finally:
        _registry._resolve.cache_clear()
