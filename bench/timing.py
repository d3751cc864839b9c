"""Timing of variants that take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one entry a repetition."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def interleaved(
    variants: Mapping[str, Callable[[int], object]], *, seconds: float = 0.3, least: int = 5, most: int = 200
) -> dict[str, Timing]:
    """Times the variants in turn, each round in the opposite order of the one before.

    Args:
        variants: name → call. A call gets the number of its repetition, by which it can pick fresh inputs.
        seconds: how long all repetitions together should take.
        least: repetitions of each variant, however long they take.
        most: repetitions of each variant at the most.

    Short calls are timed in runs of several, so that the clock's own cost does not count; garbage
    collection and lazy initialisation fall into the two rounds of warm-up.
    """
    names = list(variants)
    slowest = 0.0
    for index in range(2):
        for name in names:
            start = time.perf_counter()
            variants[name](index)
            slowest = max(slowest, time.perf_counter() - start) if index else 0.0
    # A run lasts 200 µs or one call.
    calls = max(1, int(200e-6 / max(slowest, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    repetition = 0
    while repetition < least or (time.perf_counter() < end and repetition < most):
        for name in names if repetition % 2 == 0 else reversed(names):
            call = variants[name]
            start = time.perf_counter()
            for index in range(calls):
                call(repetition * calls + index)
            samples[name].append((time.perf_counter() - start) / calls)
        repetition += 1
    return {name: Timing(times) for name, times in samples.items()}


# Inputs are rotated through sets that together exceed this, so that no call finds its own in the cache.
LAST_LEVEL_CACHE_BYTES = 64 << 20


def input_sets(nbytes: int) -> int:
    """How many sets of inputs of `nbytes` bytes to rotate through, 2 to 16."""
    return min(16, max(2, LAST_LEVEL_CACHE_BYTES // max(1, nbytes)))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
