"""Whether generated samples are new: their distances to the training data, beside those of held-out data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.functional import nearest
from aefast.ops import _pairwise

# Numbers of which the bits are summed at once.
_PART = 1 << 20


@dataclass(frozen=True, eq=False)
class Novelty:
    """What `novelty` found.

    ``distances`` (N,) are those of the samples to their nearest training points, whose rows are ``nearest`` (N,), and
    ``held_out`` (M,) those of the held-out data. ``closer`` is the probability that a sample lies closer to the
    training data than a held-out point, ties counting half: 1/2 if samples are as new as real data, near 1 if they are
    copies of training points or lie amid all data, as blurred ones do, and near 0 if they are far from all data.
    ``copies`` is the share of samples with a training point that stands out: at most about 0.01 for real data and for
    whatever else no training point has a part in, and near 1 for copies of training points.
    """

    distances: Tensor = field(repr=False)
    nearest: Tensor = field(repr=False)
    held_out: Tensor = field(repr=False)
    closer: float
    copies: float


@torch.no_grad()
def novelty(samples: Tensor, training: Tensor, held_out: Tensor) -> Novelty:
    """Compares the distances of generated and of held-out points to their nearest training points.

    A generator that has learnt its training data by heart makes samples that are too close to them; held-out data of
    the same kind tell how close is too close (Meehan, Chaudhuri, Dasgupta, A Non-Parametric Test to Detect Data-Copying
    in Generative Models, AISTATS 2020; ``closer`` is their statistic with one cell, as a probability). What is close to
    all data alike copies none of it, so that ``copies`` counts what passes two comparisons. One is of the distance to
    training data by that to one half of the held-out data: smaller than for all but one in a hundred held-out points,
    for which it is that to the other half. The second is of the distance to the nearest training point by that to the
    nearest in the half of the training data without it: smaller than for all but one in a hundred held-out points, and
    than for as many of the samples with held-out in the place of training data, since samples without the noise of
    data lie otherwise among them, but among training points as among held-out ones. Equal points share a half. Samples
    that are nearly one point tell as much as one. No matrix of distances is made.

    Args:
        samples: (N, D), generated points: float32, bfloat16, float16 or float64, any strides, on any device.
        training: (T, D), what the generator was trained on, of the dtype and device of samples.
        held_out: (M, D), data that it was not, likewise, at least two points.

    Returns:
        A `Novelty`, with distances in the units of samples.

    Raises:
        InputError: a shape, dtype or device is not as above, there are no points, or, on the CPU, some are not finite;
            the message names it.
    """
    for name, value in (("samples", samples), ("training", training), ("held_out", held_out)):
        _pairwise.check_points("novelty", name, value)
        least, told = (2, "two rows") if name == "held_out" else (1, "one row")
        if len(value) < least:
            raise InputError(f"novelty: {name} must have at least {told}, got shape {tuple(value.shape)}")
    _pairwise.check_dimensions("novelty", "training", training, "samples", samples)
    _pairwise.check_dimensions("novelty", "held_out", held_out, "samples", samples)
    distances, index = nearest(samples, training)
    of_held_out, _ = nearest(held_out, training)
    halves = held_out[::2], held_out[1::2]
    ratios = _ratios(distances, nearest(samples, halves[0])[0])
    of_halves = [
        _ratios(of_held_out[first::2], nearest(half, other)[0])
        for first, half, other in ((0, *halves), (1, *reversed(halves)))
    ]
    ordered = of_held_out.sort().values
    # Held-out points that are farther away, and those that are as far.
    below, up_to = (torch.searchsorted(ordered, distances, right=right) for right in (False, True))
    farther = len(ordered) - 0.5 * (below + up_to).double()
    is_closer = ratios < torch.quantile(torch.cat(of_halves), 0.01)
    usual = [_prominences(samples, held_out), _prominences(held_out, training)]
    limit = min(torch.quantile(one, 0.01) for one in usual)
    stands_out = _prominences(samples, training) < limit
    return Novelty(
        distances,
        index,
        of_held_out,
        closer=(farther / len(ordered)).mean().item(),
        copies=(is_closer & stands_out).double().mean().item(),
    )


def _ratios(a: Tensor, b: Tensor) -> Tensor:
    """Of distances, in float64; 1 where both are 0."""
    a, b = a.double(), b.double()
    return torch.where((a == 0) & (b == 0), 1.0, a / b)


def _prominences(points: Tensor, data: Tensor) -> Tensor:
    """Of each point, the distance to the nearest of `data` by that to the nearest in the half without it."""
    is_first = _is_in_first_half(data)
    one, other = (
        nearest(points, half)[0] if len(half) else points.new_full((len(points),), float("inf"))
        for half in (data[is_first], data[~is_first])
    )
    return _ratios(torch.minimum(one, other), torch.maximum(one, other))


def _is_in_first_half(data: Tensor) -> Tensor:
    """Halves by chance, in which equal rows are together: by the sign of a sum of their bits with random weights."""
    of_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**63), 2**63 - 1, data.shape[1:], generator=generator).to(data.device)
    # Wraps around, and is the same for equal rows wherever they are, which a product of floats need not be.
    parts = data.split(max(1, _PART // max(1, data.shape[1])))
    # -0 is 0.
    return torch.cat([((part + 0.0).contiguous().view(of_bits) * weights).sum(1) < 0 for part in parts])
