"""kernels/include/philox.h: the generator's published answers, and whether its normal values are normal."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from support import philox

DRAWS = 12_000_000


@pytest.fixture(scope="module")
def library(compile_emulated):
    library = ctypes.CDLL(str(compile_emulated(Path(__file__).with_name("philox_driver.cpp"), "-O2")))
    library.squared_radius_of.restype = ctypes.c_float
    return library


@pytest.fixture(scope="module")
def draw(library):
    """draw(count, seed=0, offset=0, first_block=0, dtype=np.float32): normal values, (count,)."""

    def draw(count, seed=0, offset=0, first_block=0, dtype=np.float32):
        assert count % 4 == 0
        out = np.empty(count, dtype=dtype)
        numbers = (ctypes.c_uint64(number) for number in (seed, offset, first_block, count // 4))
        fill = library.normal_values if dtype == np.float32 else library.double_normal_values
        fill(*numbers, out.ctypes.data_as(ctypes.c_void_p))
        return out

    return draw


@pytest.fixture(scope="module")
def many(draw):
    return draw(DRAWS, seed=2026).astype(np.float64)


@pytest.mark.parametrize(("counter", "key", "expected"), philox.KNOWN_ANSWERS)
def test_known_answers(library, counter, key, expected):
    out = (ctypes.c_uint32 * 4)()
    library.words((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    assert tuple(out) == expected
    assert tuple(philox.words(counter, key)) == expected


@pytest.mark.parametrize(
    ("seed", "offset", "first_block"),
    [(0, 0, 0), (1, 2, 3), (2**64 - 1, 2**40 + 5, 2**32 - 100), (2**33 + 7, 2**63, 2**45)],
)
def test_values_are_those_of_the_reference(draw, seed, offset, first_block):
    expected = philox.normals(seed, offset, first_block, 5000)
    # A radius of at most 6.8 errs by 2 ulp, and a sine and a cosine by as much.
    found = draw(4 * 5000, seed, offset, first_block)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    found = draw(4 * 5000, seed, offset, first_block, np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-14)


def test_squared_radius_at_the_ends(library):
    """Relative to the true value: the largest uniforms are as far from 1 as the smallest are from 0."""

    def error(word):
        u = (word + 0.5) * 2.0**-32
        exact = -2 * np.log1p(u - 1) if u > 0.5 else -2 * np.log(u)
        return abs(library.squared_radius_of(ctypes.c_uint32(word)) / exact - 1)

    middle = (0x7FFFFFFF, 0x80000000)
    for word in (0, 1, 2, 1000, *middle, 0xFFFFFFFF - 1000, 0xFFFFFFFE, 0xFFFFFFFF):
        assert error(word) < 3 * 2.0**-23, hex(word)
    assert library.squared_radius_of(ctypes.c_uint32(0)) == np.float32(66 * np.log(2))
    assert library.squared_radius_of(ctypes.c_uint32(0xFFFFFFFF)) == 2.0**-32


def test_sines_and_cosines_near_quarter_turns(library):
    """Each within 2 ulp of its own size, down to the 2π · 2⁻³³ next to where it is 0."""
    out = (ctypes.c_float * 2)()
    for quarter in range(4):
        for away in (-(2**29), -(2**20), -2, -1, 0, 1, 2**20, 2**29 - 1):
            word = (quarter * 2**30 + away) % 2**32
            library.sine_and_cosine_of(ctypes.c_uint32(word), out)
            rest = (away + 0.5) * (2 * np.pi * 2.0**-32)
            sine, cosine = np.sin(rest), np.cos(rest)
            exact = [(sine, cosine), (cosine, -sine), (-sine, -cosine), (-cosine, sine)][quarter]
            np.testing.assert_allclose(out, exact, rtol=2 * 2.0**-23, atol=0, err_msg=hex(word))


def test_moments(many):
    # A mean of n draws of a value with variance v lies within 5 √(v/n) of its expectation but once in 1.7 million.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)):
        assert abs((many**power).mean() - expected) < 5 * (variance / DRAWS) ** 0.5


def test_distribution(many):
    assert stats.kstest(many, "norm").pvalue > 1e-4


@pytest.mark.parametrize("limit", [2.0, 3.0, 4.0, 5.0, 6.0])
def test_tails(many, limit):
    """How many draws lie beyond is a Poisson variable, on either side."""
    expected = DRAWS * stats.norm.sf(limit)
    for count in (np.count_nonzero(many > limit), np.count_nonzero(many < -limit)):
        assert stats.poisson.cdf(count, expected) > 1e-6
        assert stats.poisson.sf(count - 1, expected) > 1e-6


def test_tail_reaches_beyond_six(draw):
    """2⁻³³ is the smallest uniform: values end at 6.76, which no test of a few million draws would show."""
    smallest = np.sqrt(-2 * np.log(2.0**-33))
    assert 6.7 < smallest < 6.8
    found = draw(40_000_000, seed=7)
    assert 5.3 < np.abs(found).max() <= smallest * (1 + 1e-6)


def correlation(a, b):
    return (a * b).mean() * len(a) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 1024])
def test_neighbouring_elements_are_independent(many, lag):
    a, b = many[:-lag], many[lag:]
    # Normalised, these are standard normal variables; squares differ from their mean by √2.
    assert abs(correlation(a, b)) < 5
    assert abs(correlation(a**2 - 1, b**2 - 1)) / 2 < 5


@pytest.mark.parametrize(
    "other",
    [{"seed": 2027}, {"seed": 2026 + 2**32}, {"offset": 1}, {"offset": 2**32}, {"first_block": 2**32}],
)
def test_neighbouring_seeds_and_streams_are_independent(draw, many, other):
    found = draw(4_000_000, **{"seed": 2026, **other}).astype(np.float64)
    first = many[: len(found)]
    assert np.count_nonzero(found == first) < 10
    assert abs(correlation(first, found)) < 5
    assert abs(correlation(first**2 - 1, found**2 - 1)) / 2 < 5
