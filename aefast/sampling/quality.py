"""How good generated samples are: whether a test tells them from real data, and whether they are new."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.nn.linear_act import check_positive_int
from aefast.ops._pairwise import DEFAULT_BANDWIDTHS
from aefast.sampling._base import check_seed
from aefast.stats import MMDTest, Novelty, mmd_test, novelty

# Of samples that a two-sample test at this level rejects, the report says so.
_LEVEL = 0.05
# A share of near copies that is this many times the one of real data, 1 %, is told as a warning.
_MANY_COPIES = 0.1


@dataclass(frozen=True, eq=False)
class Quality:
    """What `quality` found; ``print`` it for a readable summary.

    ``mmd`` is the two-sample test of the samples against held-out data. The rest takes training data, and is None
    without: ``real`` is the same test of as many training samples, what the best generator could be expected to reach;
    ``novelty`` says whether the samples are copies of training data.
    """

    mmd: MMDTest
    real: MMDTest | None
    novelty: Novelty | None

    def __str__(self) -> str:
        verdict = (
            "tells them from held-out data"
            if self.mmd.p_value <= _LEVEL
            else "cannot tell them from held-out data"
        )
        lines = [f"samples:   {_told(self.mmd)}: the test {verdict}"]
        if self.real is not None:
            lines.append(f"real data: {_told(self.real)}")
        if self.novelty is not None:
            verdict = (
                "many copy training data" if self.novelty.copies >= _MANY_COPIES else "few copy training data"
            )
            lines.append(
                f"novelty:   {self.novelty.closer:.1%} closer to training data than held-out ones (real data: 50%), "
                f"{self.novelty.copies:.1%} near copies (real data: at most 1%): {verdict}"
            )
        return "\n".join(lines)


def _told(test: MMDTest) -> str:
    return f"MMD² {test.statistic:.2e}, p = {test.p_value:.3f}"


@torch.no_grad()
def quality(
    samples: Tensor,
    held_out: Tensor,
    training: Tensor | None = None,
    *,
    permutations: int = 200,
    seed: int = 0,
    limit: int = 5000,
) -> Quality:
    """Compares generated samples with real data that the generator was not trained on.

    With training data the widths of the test's kernels are theirs, so that the MMD² of several generators compare;
    without, they follow from samples and held-out data together, which makes it a valid test but no common scale.

    Args:
        samples: (N, ...), generated.
        held_out: (M, ...), real data of the same shape.
        training: (T, ...), what the generator was trained on.
        permutations: of the test.
        seed: of the permutations, and of the choice of rows where there are more than `limit`.
        limit: rows of each that are compared; time grows with its square. The distances to training data are those to
            all of it.

    Returns:
        A `Quality`.

    Raises:
        InputError: a shape, type or number is not as above, or a value is not finite.
    """
    check_seed(seed)
    check_positive_int(limit, "limit")
    given = {"samples": samples, "held_out": held_out}
    if training is not None:
        given["training"] = training
    flat = {name: _flat(name, value) for name, value in given.items()}
    generator = torch.Generator().manual_seed(seed)
    made, real = (_some(flat[name], limit, generator) for name in ("samples", "held_out"))
    if training is None:
        return Quality(mmd_test(made, real, permutations=permutations, seed=seed), None, None)
    beside = _some(flat["training"], len(made), generator)
    options = {"permutations": permutations, "seed": seed, "bandwidth": _bandwidths(beside)}
    return Quality(
        mmd_test(made, real, **options),
        mmd_test(beside, real, **options),
        novelty(made, flat["training"], real),
    )


def _flat(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) < 2:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name}: expected a tensor of shape (N, ...) with at least 2 samples, got {got}")
    return value.flatten(1)


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` of the rows, at random."""
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]


def _bandwidths(points: Tensor) -> list[float]:
    """The multiples that `mmd_test` takes by default, of the root mean squared distance of `points` alone."""
    # Twice the sum of the variances is the mean squared distance of two of them.
    root = math.sqrt(2.0 * points.double().var(0).sum().item())
    if not 0 < root < math.inf:
        raise InputError("training: expected finite samples that differ from each other")
    return [root * factor for factor in DEFAULT_BANDWIDTHS["rbf"]]
