"""The correctness gate of a case, and its measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aefast.bench import memory, timing
from aefast.bench.case import DTYPE_NAMES, Case, Trial, told
from aefast.bench.ceilings import Ceilings
from aefast.bench.timing import Timing, Variant
from aefast.bench.variants import is_ours
from aefast.ops._registry import Cost

# Seconds of eager's call below which, on CUDA, replays of a captured graph are timed too: the host may take longer to
# launch its kernels than the device to run them.
LAUNCH_BOUND = 200e-6


@dataclass(frozen=True)
class Result:
    """What was measured of a case in one mode; `failure` says why there are no timings.

    ``floor``: the seconds that the device's ceilings leave no call of that `cost` below, bound by ``floor_kind``.
    ``peak_bytes``: of tensors allocated during a call, for each variant. ``graph_timings``: of calls replayed without
    the host. ``missing``: why a variant is not among the timings.
    """

    id: str
    op: str
    kind: str
    dtype: str
    mode: str
    sizes: dict[str, int]
    errors: dict[str, float]
    timings: dict[str, Timing]
    peak_bytes: dict[str, int]
    cost: Cost
    floor: float
    floor_kind: str
    failure: str | None = None
    missing: dict[str, str] = field(default_factory=dict)
    graph_timings: dict[str, Timing] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Eager's median time over aefast's."""
        return self.speedup_over("eager")

    def speedup_over(self, name: str) -> float | None:
        """A variant's median time over aefast's; None where either was not timed."""
        if name not in self.timings or "aefast" not in self.timings:
            return None
        return self.timings[name].median / self.timings["aefast"].median

    @property
    def replayed_speedup(self) -> float | None:
        """Eager's median time over aefast's, both replayed as graphs; None where either was not."""
        if not {"eager", "aefast"} <= set(self.graph_timings):
            return None
        return self.graph_timings["eager"].median / self.graph_timings["aefast"].median

    @property
    def speedup_interval(self) -> tuple[float, float] | None:
        """As `interval`."""
        if self.failure:
            return None
        return interval(self.timings["eager"].samples, self.timings["aefast"].samples)

    @property
    def floor_share(self) -> float | None:
        """The share of its floor's speed that aefast's median call reaches."""
        return None if self.failure else self.floor / self.timings["aefast"].median

    @property
    def overhead(self) -> float | None:
        """Seconds by which aefast's median call is longer than eager's."""
        if self.failure:
            return None
        return self.timings["aefast"].median - self.timings["eager"].median


def interval(eager: Sequence[float], aefast: Sequence[float]) -> tuple[float, float]:
    """Where the median of the rounds' ratios eager / aefast lies, at 95 % confidence."""
    ratios = sorted(theirs / ours for theirs, ours in zip(eager, aefast, strict=True))
    # How many of n draws lie below the median is a binomial variable, here by its normal approximation.
    half, spread = len(ratios) / 2, 0.98 * len(ratios) ** 0.5
    return ratios[max(0, math.floor(half - spread))], ratios[min(len(ratios) - 1, math.ceil(half + spread))]


def relative_errors(found: list[Tensor], truth: list[Tensor], by_norm: bool = False) -> list[float]:
    """The largest error of each result, relative to that result's largest true value; or the norms' ratio."""
    errors = []
    for ours, true in zip(found, truth, strict=True):
        if ours.shape != true.shape:
            errors.append(math.inf)
            continue
        difference = ours.double() - true
        if by_norm:
            error = (difference.norm() / true.norm().clamp_min(1e-300)).item()
        else:
            error = (difference.abs().max() / true.abs().max().clamp_min(1e-300)).item()
        errors.append(math.inf if error != error else error)
    return errors


def wrong(trial: Trial, dtype: torch.dtype) -> dict[str, str]:
    """The variants that do not compute what they should, and by how much they miss it.

    aefast may err, in its output and in each gradient, by twice eager's error plus twice the spacing of the dtype, and
    its results have eager's dtypes. Eager and other code have to compute the same thing, to half of the dtype's digits:
    sums over a batch in one running total lose that many. A trial with a tolerance of its own holds all to that.
    """
    if "eager" not in trial.found:
        return {}
    found = {
        name: relative_errors(results, trial.truth, trial.has_flips) for name, results in trial.found.items()
    }
    dtypes = [one.dtype for one in trial.found["eager"]]
    noise = torch.finfo(dtype).eps
    reasons = {}
    for name, values in found.items():
        if trial.tolerance is not None:
            bounds = [trial.tolerance] * len(values)
        elif name == "eager":
            # In half precision single signs of eager's gradients are wrong.
            bounds = [noise**0.5 if noise < 1e-6 else math.inf] * len(values)
        else:
            bounds = [2 * eager + 2 * noise for eager in found["eager"]]
            if not is_ours(name):
                bounds = [max(bound, noise**0.5) for bound in bounds]
        if not all(error <= bound for error, bound in zip(values, bounds, strict=True)):
            reasons[name] = f"wrong: errors {_listed(values)}, eager's {_listed(found['eager'])}"
        elif is_ours(name) and [one.dtype for one in trial.found[name]] != dtypes:
            reasons[name] = f"wrong: results of {', '.join(str(one.dtype) for one in trial.found[name])}"
    return reasons


def measure(case: Case, mode: str, seconds: float, ceilings: Ceilings) -> Result:
    """Checks every variant against float64, then times them in turn, `seconds` for each two, and measures their memory.

    If aefast or eager is `wrong` or raises, nothing is timed; other code that is or does counts as missing.
    """
    trial = case.trial(mode)
    reasons = trial.missing | wrong(trial, case.dtype)
    failing = {name: reason for name, reason in reasons.items() if is_ours(name) or name == "eager"}
    timed = {name: variant for name, variant in trial.timed.items() if name not in reasons}
    timings, graph_timings, peak_bytes, refused = {}, {}, {}, {}
    if not failing:
        timings = timing.interleaved(
            timed,
            case.device,
            sets=trial.sets,
            seconds=seconds * len(timed) / 2,
            least=trial.least_rounds,
            run_seconds=trial.run_seconds,
        )
        peak_bytes = {
            name: memory.peak_bytes(_once(variant, case.device), case.device)
            for name, variant in timed.items()
        }
        if case.device.type == "cuda" and timings["eager"].median < LAUNCH_BOUND:
            graph_timings, refused = timing.graph_replays(timed, sets=trial.sets, seconds=seconds)
    missing = {name: reason for name, reason in reasons.items() if name not in failing}
    missing |= {f"{name} as a graph": reason for name, reason in refused.items()}
    return Result(
        *_named(case, mode),
        {name: max(relative_errors(found, trial.truth)) for name, found in trial.found.items()},
        timings,
        peak_bytes,
        trial.cost,
        *ceilings.floor(trial.cost),
        failure=", ".join(f"{name}: {reason}" for name, reason in failing.items()) or None,
        missing=missing,
        graph_timings=graph_timings,
    )


def _named(case: Case, mode: str) -> tuple[str, str, str, str, str, dict[str, int]]:
    """The first fields of its result."""
    return f"{case.id}-{mode}", case.op, case.kind, DTYPE_NAMES[case.dtype], mode, case.sizes


def failed(case: Case, mode: str, error: Exception) -> Result:
    """What there is to tell of a case that could not be measured."""
    return Result(
        *_named(case, mode),
        {},
        {},
        {},
        Cost(0, 0, 0),
        0.0,
        "bytes",
        failure=told(error),
    )


def _once(variant: Variant, device: torch.device) -> Callable[[int], None]:
    def call(index: int) -> None:
        with variant.context():
            variant.call(index)
        timing.synchronize(device)

    return call


def _listed(errors: list[float]) -> str:
    return ", ".join(f"{error:.1e}" for error in errors)
