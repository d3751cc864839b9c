"""The quality report on real digits: real ones, copies, noise."""

import pytest
import torch

from aefast.data import load
from aefast.errors import InputError
from aefast.sampling import quality


@pytest.fixture(scope="module")
def digits():
    """Training digits, held-out ones, and as many others that are held out too."""
    dataset = load("digits")
    training, held_out = (dataset.samples[rows].reshape(-1, 8, 8) for rows in dataset.split(0.4))
    return training, held_out[::2], held_out[1::2]


def test_real_digits_copies_and_noise(digits):
    training, held_out, fresh = digits
    real = quality(fresh, held_out, training)
    assert real.mmd.p_value > 0.05
    # The deviation of the probability is 0.02 for 360 digits of either kind.
    assert real.novelty.closer == pytest.approx(0.5, abs=0.06)
    assert real.novelty.copies < 0.04
    told = str(real).splitlines()
    assert told[0].endswith("the test cannot tell them from held-out data")
    assert told[1].startswith("real data: MMD²")
    assert told[2].endswith("few copy training data")

    copies = quality(training[:300] + 0.01, held_out, training)
    assert copies.novelty.closer > 0.99 and copies.novelty.copies > 0.99
    assert str(copies).endswith("100.0% near copies (real data: at most 1%): many copy training data")

    noise = quality(torch.rand(300, 64, generator=torch.Generator().manual_seed(0)), held_out, training)
    assert noise.mmd.p_value < 0.05 and noise.mmd.statistic > 10 * real.mmd.statistic
    assert noise.novelty.closer < 0.01
    assert "the test tells them from held-out data" in str(noise)


def test_statistics_of_several_generators_have_one_scale(digits):
    training, held_out, fresh = digits
    near, far = (quality(fresh + shift, held_out, training) for shift in (0, 3))
    assert near.mmd.bandwidths == far.mmd.bandwidths == near.real.bandwidths
    assert near.real.statistic == far.real.statistic
    without = quality(fresh + 3, held_out)
    assert without.mmd.bandwidths != far.mmd.bandwidths
    assert without.real is None and without.novelty is None
    assert len(str(without).splitlines()) == 1


def test_more_rows_than_the_limit_are_drawn_from(digits):
    training, held_out, fresh = digits
    found = quality(fresh, held_out, training, limit=50, seed=1)
    assert (found.mmd.x_count, found.mmd.y_count, found.real.x_count) == (50, 50, 50)
    assert len(found.novelty.distances) == 50
    assert quality(fresh, held_out, training, limit=50, seed=1).mmd.statistic == found.mmd.statistic
    assert quality(fresh, held_out, training, limit=50, seed=2).mmd.statistic != found.mmd.statistic


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 3}, r"samples: expected a tensor of shape \(N, ...\).*got int"),
        ({"held_out": torch.ones(1, 64)}, r"held_out: .*at least 2 samples, got \(1, 64\)"),
        ({"samples": torch.ones(4, 63)}, "must have as many dimensions as"),
        ({"samples": torch.full((4, 64), float("inf"))}, "x must be finite"),
        ({"training": torch.ones(4, 64)}, "training: expected finite samples that differ"),
        ({"limit": 0}, "limit=0: expected a positive integer"),
        ({"permutations": 0}, "permutations must be an int of at least 1"),
        ({"seed": None}, "seed=None: expected an integer"),
    ],
)
def test_bad_input_is_named(digits, change, message):
    training, held_out, fresh = digits
    arguments = {"samples": fresh, "held_out": held_out, "training": training}
    with pytest.raises(InputError, match=message):
        quality(**{**arguments, **change})
