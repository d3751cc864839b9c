"""Whether generated samples are new: their distances to the training data, beside those of held-out data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.functional import nearest
from aefast.ops import _pairwise


@dataclass(frozen=True, eq=False)
class Novelty:
    """What `novelty` found.

    ``distances`` (N,) are those of the samples to their nearest training points, whose rows are ``nearest`` (N,), and
    ``held_out`` (M,) those of the held-out data. ``closer`` is the probability that a sample lies closer to the
    training data than a held-out point, ties counting half: 1/2 if samples are as new as real data, near 1 if they are
    copies of training points or lie amid all data, as blurred ones do, and near 0 if they are far from all data.
    ``copies`` is the share of samples that lie closer to training than to held-out data, by the ratio of the two
    distances, than all but one in a hundred of the held-out points, for which it is that to the others: 0.01 for real
    data, and near 1 for copies of training points alone.
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
    all data alike copies none of it, so that ``copies`` looks at the distance to held-out data too: to one half of
    them, as each half's own is to the other. No matrix of distances is made.

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
    limit = torch.quantile(torch.cat(of_halves), 0.01)
    return Novelty(
        distances,
        index,
        of_held_out,
        closer=(farther / len(ordered)).mean().item(),
        copies=(ratios < limit).double().mean().item(),
    )


def _ratios(to_training: Tensor, to_held_out: Tensor) -> Tensor:
    """Of distances, in float64; 1 where both are 0."""
    both = to_training.double(), to_held_out.double()
    return torch.where((both[0] == 0) & (both[1] == 0), 1.0, both[0] / both[1])
