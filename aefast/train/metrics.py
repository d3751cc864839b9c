"""Loss terms averaged on the device, what is told of them, and the file their averages go to."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from aefast.models._files import named_errors
from aefast.train.processes import Processes


class Window:
    """Mean of each loss term over the samples since the last reset, those of other processes among them.

    Terms are summed on their device in float64, so that adding costs no wait for it; `means` and `state`, which all
    processes have to call, are the places that wait.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self._processes = Processes() if processes is None else processes
        self._sums: dict[str, torch.Tensor] = {}
        self._samples = 0
        self.reset()

    def reset(self) -> None:
        """Start an empty window now."""
        self._sums = {}
        self._samples = 0
        self._timed_samples = 0
        self._start = time.perf_counter()

    def add(self, terms: dict[str, torch.Tensor], samples: int) -> None:
        """Add the terms of a step (scalars, means over `samples` samples)."""
        for name, term in terms.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), dtype=torch.float64, device=term.device)
            self._sums[name].add_(term, alpha=samples)
        self._samples += samples
        self._timed_samples += samples

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the reset."""
        return not self._sums

    def means(self) -> dict[str, float]:
        """The mean of each term; empty if nothing was added."""
        state = self.state()
        return {name: total / state["samples"] for name, total in state["sums"].items()}

    def samples_per_s(self) -> float | None:
        """Samples a second since the reset, or None if there were none.

        Right only after `means` has waited for the device.
        """
        if self._timed_samples == 0:
            return None
        own = self._timed_samples / max(time.perf_counter() - self._start, 1e-9)
        return own * self._processes.count

    def state(self) -> dict[str, Any]:
        """The sums as JSON values."""
        if self.is_empty:
            return {"sums": {}, "samples": 0}
        totals = torch.stack(list(self._sums.values()))
        totals = self._processes.sum(torch.cat([totals, totals.new_tensor([float(self._samples)])])).tolist()
        return {"sums": dict(zip(self._sums, totals, strict=False)), "samples": round(totals[-1])}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue the window that `state` describes; its samples do not count for `samples_per_s`."""
        self.reset()
        # The sums are those of all processes.
        is_first = self._processes.is_first
        self._sums = {
            name: torch.tensor(total if is_first else 0.0, dtype=torch.float64, device=device)
            for name, total in state["sums"].items()
        }
        self._samples = state["samples"] if is_first else 0


def peak_of(batches: Iterable[torch.Tensor]) -> float:
    """The peak value that PSNRs of such data refer to: 1 for data within [0, 1], else the width of its range."""
    lows, highs = zip(*(batch.aminmax() for batch in batches), strict=True)
    low, high = torch.stack(lows).min().item(), torch.stack(highs).max().item()
    return 1.0 if low >= 0 and high <= 1 else (high - low) or 1.0


def variance_of(batches: Iterable[torch.Tensor], processes: Processes) -> float:
    """The mean squared deviation from their mean of samples (B, features) of all processes, which have to ask for it
    together."""
    samples, mean, squares = 0, 0.0, 0.0
    for batch in batches:
        # In float64 and about the batch's own mean: features may be far from 0, and of variance 0.
        of_batch = batch.double().mean(0)
        step = of_batch - mean
        samples += len(batch)
        share = len(batch) / samples
        mean = mean + share * step
        squares = squares + (batch - of_batch).square().sum() + (1 - share) * len(batch) * step.square().sum()
    total = processes.sum(torch.full_like(squares, samples))
    apart = mean - processes.sum(samples * mean) / total
    squares = processes.sum(squares + samples * apart.square().sum())
    return (squares / (total * len(mean))).item()


def held_out_measures(means: dict[str, float], peak: float) -> dict[str, float]:
    """What `aefast.models.Model.evaluate` gives, averaged over the held-out samples, as it is told to users.

    A mean squared error becomes a peak signal-to-noise ratio 10 log10(peak² / error) in dB, "mse" being called
    "psnr" then; an error of 0, whose ratio is infinite, is left out. The rest stays as it is.
    """
    told = {}
    for name, value in means.items():
        if not name.endswith("mse"):
            told[name] = value
        elif value > 0:
            told[f"{name.removesuffix('mse')}psnr"] = 10 * math.log10(peak**2 / value)
    return told


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, written as soon as it is known.

    Args:
        path: the file; it is cut to whole lines of `size` bytes at most, then appended to.
        size: bytes to keep.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._path = path
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by close)
        with named_errors(path):
            end = self._file.seek(0, os.SEEK_END)
            self._file.seek(0)
            # A machine that lost its power may have kept less of the file than of the checkpoint that knows its size.
            kept = self._file.read(min(size, end)).rfind(b"\n") + 1
            if kept < end:
                self._file.truncate(kept)
            self._file.seek(0, os.SEEK_END)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with named_errors(self._path):
            self._file.write(line)
            self._file.flush()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        with named_errors(self._path):
            # What could not be written is tried once more.
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; an unfinished last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
