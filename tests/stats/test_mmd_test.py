import dataclasses
import importlib
import itertools
import sys
from fractions import Fraction

import pytest
import torch
from scipy import stats

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops import _pairwise, mmd
from aefast.stats import MMDTest, mmd_test
from support.processes import environment, run

module = importlib.import_module("aefast.stats.mmd_test")
KERNELS = _pairwise.KERNELS


def samples(rows=23, columns=17, size=3, shift=0.4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, size, generator=generator, dtype=torch.float64) for count in (rows, columns))
    return x.to(dtype), (y + shift).to(dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Of which even few points have several, the last of them not full."""
    monkeypatch.setattr(module, "_BLOCK", {"cpu": 7})


@pytest.mark.parametrize("estimator", _pairwise.ESTIMATORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_statistic_is_the_mmd(kernel, estimator, small_blocks):
    """Of the samples, and of each of the permutations, which are drawn again here."""
    x, y = samples()
    pooled = torch.cat((x, y))
    for bandwidth, alpha in ((None, 1.0), (1.5, 0.7), ([0.5, 1.0, 3.0, 4.0], 2.0)):
        settings = {"kernel": kernel, "bandwidth": bandwidth, "alpha": alpha, "estimator": estimator}
        result = mmd_test(x, y, permutations=20, seed=3, **settings)
        assert result.statistic == pytest.approx(AF.mmd(x, y, **settings).item(), rel=1e-11, abs=1e-13)
        member = module._draw(40, 23, 20, torch.Generator().manual_seed(3))
        expected = [mmd.reference(pooled[row], pooled[~row], **settings) for row in member[1:]]
        torch.testing.assert_close(result.permuted, torch.stack(expected), rtol=1e-11, atol=1e-13)
        as_large = int((result.permuted >= result.statistic).sum())
        assert result.p_value == (1 + as_large) / 21


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_more_points_than_a_block(kernel, dtype, monkeypatch):
    """In float32 they are: kernel values have errors of some spacings, and 10⁶ of them make a mean."""
    x, y = samples(700, 500, 6, dtype=dtype)
    assert len(x) + len(y) > module._FEW
    result = mmd_test(x, y, kernel=kernel, permutations=30, seed=1)
    exact = mmd_test(x.double(), y.double(), kernel=kernel, permutations=30, seed=1)
    scale = 4 * torch.finfo(torch.float32).eps * max(1, len(result.bandwidths)) * 4
    assert abs(result.statistic - exact.statistic) <= scale
    assert (result.permuted - exact.permuted).abs().max() <= scale
    assert result.permuted.dtype == torch.float64 and result.p_value == exact.p_value
    other = AF.mmd(x, y, kernel=kernel).item()
    assert abs(result.statistic - other) <= 4 * scale


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_data_far_from_zero(backend):
    x, y = samples(700, 500, 4, dtype=torch.float32)
    with aefast.backend(backend):
        expected = mmd_test(x, y, permutations=30, seed=1)
        found = mmd_test(x + 1000, y + 1000, permutations=30, seed=1)
    # 1000 + x has lost the bits of x below 2^-14.
    torch.testing.assert_close(found.permuted, expected.permuted, rtol=0, atol=1e-4)
    assert found.statistic == pytest.approx(expected.statistic, abs=1e-4)


@pytest.mark.parametrize("size", [5, module._DIFFERENCES + 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_block_is_the_kernel(kernel, size):
    x, y = samples(31, 29, size)
    for bandwidths in ((0.5, 1.0, 2.0), (1.0, 1.0, 8.0, 100.0), (0.7,), (1.0, 1.3)):
        for unit in (None, torch.tensor(3.0, dtype=torch.float64)):
            spec = _pairwise.kernel_of("test", kernel, bandwidths, 1.7)
            u = _pairwise.squared_distances(x, y)
            before = x.clone(), y.clone()
            found = module.kernel_block(x, y, spec, unit)
            torch.testing.assert_close(
                found, spec.values(u if unit is None else u / unit), rtol=1e-12, atol=1e-14
            )
            assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("estimator", _pairwise.ESTIMATORS)
@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (12, 30)])
def test_level(estimator, rows, columns):
    """With 99 permutations, p ≤ 0.05 in exactly 5 of 100 ranks of exchangeable statistics: 500 trials have a binomial
    number of rejections, within these bounds but once in a million."""
    generator = torch.Generator().manual_seed(7)
    trials, permutations, level = 500, 99, 0.05
    p_values = []
    for _ in range(trials):
        x, y = (torch.randn(count, 2, generator=generator) for count in (rows, columns))
        found = mmd_test(x, y, permutations=permutations, estimator=estimator, generator=generator)
        p_values.append(found.p_value)
    rejected = sum(p <= level for p in p_values)
    low, high = stats.binom.ppf((5e-7, 1 - 5e-7), trials, level)
    assert low <= rejected <= high
    # And all other ranks are as likely: with ties broken at random a p-value is uniform on 1/100 ... 100/100.
    assert stats.kstest(p_values, stats.uniform(0, 1 + 1 / (1 + permutations)).cdf).pvalue > 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_power(kernel):
    """A shift by a whole standard deviation is seen; so is a difference in nothing but spread."""
    x, y = samples(100, 80, 2, shift=1.0)
    assert mmd_test(x, y, kernel=kernel, permutations=199, seed=0).p_value == 1 / 200
    x, y = samples(150, 150, 2, shift=0.0)
    assert mmd_test(x, 2 * y, kernel=kernel, permutations=199, seed=0).p_value <= 0.01


def exact_p_value(z, counts, permutations, seed):
    """Of data of two values: the MMD² of a permutation depends on how many points of the rarer one x gets."""
    n, m = counts
    member = module._draw(n + m, n, permutations, torch.Generator().manual_seed(seed))
    total = int(z.sum())

    def statistic(count):
        other = total - count
        within = Fraction(-2 * count * (n - count), n * (n - 1)) + Fraction(
            -2 * other * (m - other), m * (m - 1)
        )
        return within + 2 * Fraction(count * (m - other) + (n - count) * other, n * m)

    statistics = [statistic(count) for count in (member & (z[:, 0] > 0)).sum(1).tolist()]
    return (1 + sum(one >= statistics[0] for one in statistics[1:])) / (1 + permutations)


@pytest.mark.parametrize(
    ("counts", "share", "dtypes"),
    [
        ((1200, 100), 0.002, (torch.float32, torch.float64)),
        ((40, 1500), 0.002, (torch.float32, torch.float64)),
        ((400, 24), 0.01, (torch.float32, torch.float64)),
        ((700, 700), 0.01, (torch.float32, torch.float64)),
        ((3000, 3000), 0.01, (torch.float32,)),
    ],
)
def test_p_values_of_data_with_ties(counts, share, dtypes):
    """Most permutations have the same MMD² then: none of them may count as less for its rounding errors."""
    for dtype, kernel, seed in itertools.product(dtypes, KERNELS, range(4)):
        generator = torch.Generator().manual_seed(seed)
        z = (torch.rand(sum(counts), 1, generator=generator) < share).to(dtype)
        z[5] = 1
        found = mmd_test(*z.split(counts), kernel=kernel, permutations=49, seed=seed)
        assert found.p_value == exact_p_value(z, counts, 49, seed)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("D", [3, 16, 70])
def test_values_of_equal_pairs_are_equal(kernel, D):
    """To the last bit, whatever points lie beside them: else permutations that are the same would not be."""
    base = torch.randint(0, 2, (4, D), generator=torch.Generator().manual_seed(D)).float()
    spec = _pairwise.kernel_of("test", kernel, 2.0, 0.7)
    alone = module.kernel_block(base, base, spec, None)
    beside = torch.cat((base, torch.full((300, D), 1e3), base))
    found = module.kernel_block(beside, beside, spec, None)
    for rows, columns in itertools.product((slice(4), slice(304, 308)), repeat=2):
        assert torch.equal(found[rows, columns], alone)


def test_large_samples_have_no_ties():
    """None of their permutations counts as equal, though they differ by little."""
    x, y = samples(2500, 2000, 16, shift=0.0, dtype=torch.float32)
    for kernel in KERNELS:
        found = mmd_test(x, y, kernel=kernel, permutations=200, seed=0)
        assert found.p_value == (1 + int((found.permuted >= found.statistic).sum())) / 201


def test_equal_partitions_count_as_equal():
    """Of 4 points there are 3 ways to make two pairs: a third of all permutations are the samples' own."""
    for scale in (1.0, 1e-3, 1e6):
        for kernel, estimator in itertools.product(KERNELS, _pairwise.ESTIMATORS):
            x = scale * torch.tensor([[0.0], [0.13]])
            y = scale * torch.tensor([[1.01], [1.17]])
            result = mmd_test(x, y, kernel=kernel, estimator=estimator, permutations=2000, seed=0)
            # Of a binomial number with p = 1/3, but once in a million; none is larger than the samples'.
            low, high = stats.binom.ppf((5e-7, 1 - 5e-7), 2000, 1 / 3)
            assert low <= 2001 * result.p_value - 1 <= high
            assert result.permuted.max() <= result.statistic + 1e-9 * scale


@pytest.mark.parametrize("kernel", KERNELS)
def test_partitions_that_are_nearly_equal_do_not_count(kernel):
    """Of a rectangle that is a little wider than high, the sides that are farther apart have the larger MMD²: by 3e-10
    and more, of which rounding errors are less than a fiftieth."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    y = x + torch.tensor([1 + 1e-10, 0.0], dtype=torch.float64)
    result = mmd_test(x, y, kernel=kernel, permutations=200, seed=0)
    member = module._draw(4, 2, 200, torch.Generator().manual_seed(0))
    same = (member[1:] == member[0]).all(1) | (member[1:] != member[0]).all(1)
    assert result.p_value == (1 + int(same.sum())) / 201


def test_points_that_are_all_the_same():
    for count in (3, 700):
        result = mmd_test(torch.ones(count, 2), torch.ones(count, 2), permutations=50, seed=0)
        assert result.p_value == 1.0 and abs(result.statistic) < 1e-12


def test_seeds_and_generators():
    x, y = samples()
    settings = {"permutations": 40}
    first = mmd_test(x, y, seed=5, **settings)
    state = torch.get_rng_state()
    assert torch.equal(mmd_test(x, y, seed=5, **settings).permuted, first.permuted)
    assert not torch.equal(mmd_test(x, y, seed=6, **settings).permuted, first.permuted)
    found = mmd_test(x, y, generator=torch.Generator().manual_seed(5), **settings)
    assert torch.equal(found.permuted, first.permuted)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(mmd_test(x, y, **settings).permuted, first.permuted)
    assert not torch.equal(mmd_test(x, y, **settings).permuted, first.permuted)
    assert first.seed == 5 and found.seed is None
    more = mmd_test(x, y, seed=5, permutations=60)
    # A BLAS may sum in another order where there are more columns: of the 40 x 40 terms' float64 sums, of order one.
    torch.testing.assert_close(more.permuted[:40], first.permuted, rtol=0, atol=1e-13)


def test_does_not_depend_on_threads():
    x, y = samples(900, 800, 4, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            found.append(mmd_test(x, y, permutations=20, seed=0))
        finally:
            torch.set_num_threads(threads)
    # A matrix product may split its sums otherwise.
    torch.testing.assert_close(found[0].permuted, found[1].permuted, rtol=0, atol=1e-6)
    assert found[0].p_value == found[1].p_value


def test_gradients_autocast_and_strides():
    x, y = samples(700, 500, dtype=torch.float32)
    expected = mmd_test(x, y, permutations=20, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        found = mmd_test(x.requires_grad_(), y, permutations=20, seed=0)
    assert torch.equal(found.permuted, expected.permuted) and not found.permuted.requires_grad
    strided = torch.stack((x.detach(), x.detach()), 2)[..., 1], y.t().contiguous().t()
    assert torch.equal(mmd_test(*strided, permutations=20, seed=0).permuted, expected.permuted)


def test_inputs_are_left_as_they_are():
    x, y = samples()
    before = x.clone(), y.clone()
    mmd_test(x, y, permutations=2, seed=0)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_result():
    x, y = samples()
    result = mmd_test(
        x,
        y,
        kernel="rational_quadratic",
        bandwidth=[3, 1.5],
        estimator="biased",
        permutations=9,
        alpha=2,
        seed=1,
    )
    assert isinstance(result, MMDTest)
    assert (result.x_count, result.y_count, result.permutations) == (23, 17, 9)
    options = (result.kernel, result.estimator, result.alpha, result.seed)
    assert options == ("rational_quadratic", "biased", 2.0, 1)
    assert result.bandwidths == pytest.approx((1.5, 3.0)) and result.permuted.shape == (9,)
    assert type(result.statistic) is float and type(result.p_value) is float
    assert "statistic=" in repr(result) and "tensor" not in repr(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.p_value = 0.0


@pytest.mark.parametrize("kernel", KERNELS)
def test_bandwidths_are_in_the_units_of_the_points(kernel):
    """Given back to the test, they are its default."""
    x, y = samples()
    result = mmd_test(x, y, kernel=kernel, alpha=0.7, permutations=10, seed=0)
    if kernel == "energy":
        assert result.bandwidths == ()
        return
    again = mmd_test(x, y, kernel=kernel, alpha=0.7, permutations=10, seed=0, bandwidth=result.bandwidths)
    torch.testing.assert_close(again.permuted, result.permuted)
    assert again.bandwidths == pytest.approx(result.bandwidths)


MEMORY = """
import resource
import torch
from aefast.stats import mmd_test

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
mmd_test(*torch.randn(2, 1500, 16, generator=generator), permutations=500)
x, y = torch.randn(2, 10000, 16, generator=generator)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(mmd_test(x, y, permutations=500, seed=0).p_value)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory():
    """20000 points: their kernel values would take 1.6 GB in float32. ru_maxrss is in KiB, and what the allocator keeps
    for each thread differs by 100 MiB from run to run."""
    done = run([sys.executable, "-c", MEMORY], env=environment())
    assert done.returncode == 0, done.stdout
    p_value, growth = done.stdout.split()
    assert 0.001 < float(p_value) <= 1.0
    assert int(growth) < 300 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_devices_agree(kernel):
    x, y = samples(700, 500, 6, dtype=torch.float32)
    ours = mmd_test(x.cuda(), y.cuda(), kernel=kernel, permutations=30, seed=1)
    theirs = mmd_test(x, y, kernel=kernel, permutations=30, seed=1)
    # Means of kernel values of at most 5, each with errors of some spacings.
    torch.testing.assert_close(ours.permuted, theirs.permuted, rtol=0, atol=2e-5)
    assert ours.statistic == pytest.approx(theirs.statistic, abs=2e-5)
    drawn = mmd_test(x.cuda(), y.cuda(), permutations=9, generator=torch.Generator("cuda").manual_seed(1))
    assert drawn.permuted.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[1.0]]}, "x must be a torch.Tensor, got list"),
        ({"y": torch.ones(4)}, r"y must be a matrix \(points, dimensions\) .*, got shape \(4,\)"),
        ({"x": torch.ones(3, 5, dtype=torch.int64)}, "x must be float32, .*, got int64"),
        ({"y": torch.ones(4, 6)}, r"y must have as many dimensions as x, 5, got shape \(4, 6\)"),
        ({"y": torch.ones(4, 5).double()}, "y must have the dtype of x, float32, got float64"),
        ({"x": torch.ones(1, 5)}, "x must have at least 2 rows for 'unbiased', got 1"),
        ({"y": torch.ones(0, 5), "estimator": "biased"}, "y must have at least 1 rows for 'biased', got 0"),
        ({"y": torch.full((4, 5), float("inf"))}, "y must be finite, got 20 elements that are not"),
        ({"kernel": "gaussian"}, "kernel must be one of rbf, .*, got 'gaussian'"),
        ({"bandwidth": 0.0}, "bandwidth must be a number above 0, .*, got 0.0"),
        (
            {"kernel": "rational_quadratic", "alpha": -1.0},
            "alpha must be a number above 0, from 1e-6 to 1e6, got -1.0",
        ),
        ({"estimator": "U"}, "estimator must be one of unbiased, biased, got 'U'"),
        ({"permutations": 0}, "permutations must be an int of at least 1, got 0"),
        ({"permutations": 10.0}, "permutations must be an int of at least 1, got 10.0"),
        ({"permutations": True}, "permutations must be an int of at least 1, got True"),
        ({"seed": 1.5}, r"seed must be an int from -2\*\*63 to 2\*\*63 - 1, got 1.5"),
        ({"seed": 2**63}, r"seed must be an int from .*, got 9223372036854775808"),
        ({"seed": 1, "generator": torch.Generator()}, "give either seed or generator, not both"),
        ({"generator": 3}, "generator must be a torch.Generator, got int"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(3, 5), "y": torch.ones(4, 5)}
    with pytest.raises(InputError, match=f"mmd_test: {message}"):
        mmd_test(**{**arguments, **change})
