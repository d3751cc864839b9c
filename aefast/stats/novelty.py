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
    copies of training points, and near 0 if they are far from all data. ``copies`` is the share of samples that lie
    closer than all but one in a hundred of the held-out points, which is 0.01 for real data.
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
    in Generative Models, AISTATS 2020; ``closer`` is their statistic with one cell, as a probability). No matrix of
    distances is made.

    Args:
        samples: (N, D), generated points: float32, bfloat16, float16 or float64, any strides, on any device.
        training: (T, D), what the generator was trained on, of the dtype and device of samples.
        held_out: (M, D), data that it was not, likewise.

    Returns:
        A `Novelty`, with distances in the units of samples.

    Raises:
        InputError: a shape, dtype or device is not as above, there are no points, or, on the CPU, some are not finite;
            the message names it.
    """
    for name, value in (("samples", samples), ("training", training), ("held_out", held_out)):
        _pairwise.check_points("novelty", name, value)
        if len(value) == 0:
            raise InputError(f"novelty: {name} must have at least one row, got shape {tuple(value.shape)}")
    _pairwise.check_dimensions("novelty", "training", training, "samples", samples)
    _pairwise.check_dimensions("novelty", "held_out", held_out, "samples", samples)
    distances, index = nearest(samples, training)
    of_held_out, _ = nearest(held_out, training)
    ordered = of_held_out.sort().values
    # Held-out points that are farther away, and those that are as far.
    below, up_to = (torch.searchsorted(ordered, distances, right=right) for right in (False, True))
    farther = len(ordered) - 0.5 * (below + up_to).double()
    limit = torch.quantile(of_held_out.double(), 0.01)
    return Novelty(
        distances,
        index,
        of_held_out,
        closer=(farther / len(ordered)).mean().item(),
        copies=(distances < limit).double().mean().item(),
    )
