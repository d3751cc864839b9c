import pytest
import torch

from aefast.errors import InputError
from aefast.stats import novelty


def draw(count, seed, size=6):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_distances_are_those_of_all_pairs():
    training, held_out = draw(200, 2), draw(40, 9)
    # From copies to points as new as any.
    samples = training[:30] + torch.linspace(0, 1, 30)[:, None] * draw(30, 1)
    found = novelty(samples, training, held_out)
    for ours, points in ((found.distances, samples), (found.held_out, held_out)):
        torch.testing.assert_close(ours, torch.cdist(points, training).min(1).values)
    assert torch.equal(found.nearest, torch.cdist(samples, training).argmin(1))
    closer = (found.distances[:, None] < found.held_out).double().mean()
    assert found.closer == pytest.approx(closer.item())
    one, other = held_out[::2], held_out[1::2]
    ratios = found.distances / torch.cdist(samples, one).min(1).values
    of_held_out = torch.cat(
        [
            torch.cdist(points, training).min(1).values / torch.cdist(points, rest).min(1).values
            for points, rest in ((one, other), (other, one))
        ]
    )
    limit = torch.quantile(of_held_out, 0.01)
    assert 0 < found.copies <= (ratios < limit).double().mean().item() < 1


def test_real_data_copies_and_strangers():
    training, held_out = draw(2000, 1), draw(1000, 2)
    # The deviation of the probability is below 0.02 for a thousand of either.
    assert novelty(draw(1000, 3), training, held_out).closer == pytest.approx(0.5, abs=0.06)
    copies = novelty(training[:500] + 1e-3, training, held_out)
    assert copies.closer > 0.99 and copies.copies > 0.99
    # The deviation of a share of 0.01 of a thousand is 0.003, and that of the limit is as large.
    assert novelty(draw(1000, 3), training, held_out).copies < 0.03
    strangers = novelty(draw(500, 4) + 20, training, held_out)
    assert strangers.closer < 0.01 and strangers.copies == 0


@pytest.mark.parametrize("size", [2, 64])
def test_what_lies_amid_all_data_copies_none(size):
    """As blurred samples do: closer to training data than any held-out point, and as close to these."""
    training, held_out = draw(2000, 1, size), draw(200, 2, size)
    found = novelty(0.01 * draw(500, 3, size), training, held_out)
    assert found.closer > 0.8 and found.copies < 0.1
    copies = novelty(training[:500] + 1e-4 * draw(500, 3, size), training, held_out)
    assert copies.copies > 0.95


@pytest.mark.parametrize("signal", [1.0, 0.3, 0.1])
def test_what_lacks_the_noise_of_data_copies_none(signal):
    """Means of data whose noise differs by row: among more training than held-out points there is one of less noise."""
    directions = draw(5, 0, 300) * signal
    noise = {
        count: draw(count, count, 300) * torch.exp(0.3 * draw(count, count + 1, 1)) for count in (6000, 1500)
    }
    training, held_out = (draw(count, count + 2, 5) @ directions + noise[count] for count in (6000, 1500))
    means = draw(1000, 4, 5) @ directions
    # The deviation of the share that is 0.01 is 0.003, and that of the limit is as large.
    assert novelty(means, training, held_out).copies < 0.03
    near = training[:100] + 0.1 * draw(100, 5, 300)
    assert novelty(torch.cat([near, means[:900]]), training, held_out).copies == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_copies_of_points_that_training_has_twice_are_copies(dtype):
    training, held_out = draw(1000, 1, 8).to(dtype), draw(500, 2, 8).to(dtype)
    twice = torch.cat([training, training.flip(0)])
    assert novelty(training[:200], twice, held_out).copies > 0.95


def test_ties_count_half():
    points = draw(50, 1)
    found = novelty(points, points, points)
    assert (found.closer, found.copies) == (0.5, 0.0)


def test_what_is_in_training_and_in_held_out_data_copies_none():
    training = draw(50, 1)
    held_out = torch.cat([training[:1], draw(40, 2)])
    assert novelty(training[:1], training, held_out).copies == 0
    assert novelty(training[1:2], training, held_out).copies == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": [1.0]}, "samples must be a torch.Tensor, got list"),
        ({"training": torch.ones(0, 6)}, r"training must have at least one row, got shape \(0, 6\)"),
        ({"held_out": torch.ones(1, 6)}, r"held_out must have at least two rows, got shape \(1, 6\)"),
        ({"held_out": torch.ones(3, 5)}, "held_out must have as many dimensions as samples, 6"),
        ({"training": torch.ones(3, 6).double()}, "training must have the dtype of samples, float32"),
        ({"samples": torch.full((2, 6), float("nan"))}, "must be finite"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"samples": draw(3, 1), "training": draw(3, 2), "held_out": draw(3, 3)}
    with pytest.raises(InputError, match=message):
        novelty(**{**arguments, **change})
