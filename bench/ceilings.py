"""What the device can do at best, measured in the run that it is held against."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import aefast.functional as AF
from aefast.bench import timing
from aefast.ops._registry import Cost


@dataclass(frozen=True)
class Ceilings:
    """Bytes that a copy reads and writes, operations of a matrix product, and exponentials, all a second."""

    bytes: float
    flops: float
    exps: float

    def floor(self, cost: Cost) -> tuple[float, str]:
        """Seconds that a call of such a cost takes at least, and what of it takes them: bytes, flops or exps."""
        rates = asdict(self)
        seconds = {kind: amount / rates[kind] for kind, amount in asdict(cost).items()}
        kind = max(seconds, key=seconds.__getitem__)
        return seconds[kind], kind


def measure(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> Ceilings:
    """The ceilings of `device`, each within about `seconds`.

    Copies go through as much memory as the inputs of a case are rotated through. Products are torch's or aefast's,
    whichever are faster. CUDA's exponentials are computed from its clock: 16 a clock and multiprocessor on sm_80, sm_90
    and sm_100 (CUDA C++ Programming Guide, arithmetic instructions).
    """
    part = timing.LAST_LEVEL_CACHE_BYTES // 8
    if device.type == "cuda":
        part *= 32
    pairs = [torch.ones(2, part // dtype.itemsize, dtype=dtype, device=device) for _ in range(8)]
    copied = _rate(lambda index: pairs[index % 8][0].copy_(pairs[index % 8][1]), 2 * part, device, seconds)

    side = 8192 if device.type == "cuda" else 2048
    # Of ones a GPU's product is faster: switching fewer bits leaves power for a higher clock.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    multiplied = max(
        _rate(product, 2 * side**3, device, seconds / 2)
        for product in (
            lambda index: torch.mm(left, right, out=out),
            lambda index: AF.linear_act(left, right, activation="identity"),
        )
    )

    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        return Ceilings(copied, multiplied, 16 * multiprocessors * _clock(device))
    values = torch.linspace(-8.0, 0.0, 1 << 16, dtype=dtype)
    result = torch.empty_like(values)
    exps = _rate(lambda index: torch.exp(values, out=result), values.numel(), device, seconds)
    return Ceilings(copied, multiplied, exps)


# Hertz, more than any GPU's multiprocessors have: what is bound by it is bound by less.
FASTEST_CLOCK = 3e9


def _clock(device: torch.device) -> float:
    """The highest clock of its multiprocessors, in hertz; `FASTEST_CLOCK` if nothing tells it."""
    properties = torch.cuda.get_device_properties(device)
    # CUDA 13 has it no more.
    kilohertz = getattr(properties, "clock_rate", None)
    if kilohertz:
        return kilohertz * 1e3
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    query.append(f"--id=GPU-{getattr(properties, 'uuid', '')}")
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
        return float(told.stdout) * 1e6
    except (OSError, subprocess.SubprocessError, ValueError):
        return FASTEST_CLOCK


def _rate(call: Callable[[int], object], amount: int, device: torch.device, seconds: float) -> float:
    """`amount` a second, of a call that is neither among the fastest nor among the slower four fifths."""
    samples = []
    end = time.perf_counter() + seconds
    while len(samples) < 6 or time.perf_counter() < end:
        samples.append(timing.RUN[device.type](call, len(samples), 1))
    return amount / timing.Timing(samples[1:]).quantile(0.2)
