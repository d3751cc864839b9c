"""Timing of variants that take turns in one process: a wall clock on the CPU, events and graph replays on CUDA."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from aefast.train.graphs import recording

# A run of calls lasts this long, or one call: the clock's own cost, and on CUDA the way to the first kernel, do not
# count in it.
RUN_SECONDS = {"cpu": 200e-6, "cuda": 1e-3}
LEAST_ROUNDS = 5


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


@dataclass(frozen=True)
class Variant:
    """Code to be timed. ``call(index)`` is its index-th repetition, by which it can pick fresh inputs; it need not wait
    for the device. All its calls are made within ``context()``."""

    call: Callable[[int], object]
    context: Callable[[], contextlib.AbstractContextManager[object]] = field(default=contextlib.nullcontext)


def interleaved(
    variants: Mapping[str, Variant],
    device: torch.device,
    *,
    sets: int = 1,
    seconds: float = 0.3,
    least: int = LEAST_ROUNDS,
    most: int = 200,
    run_seconds: float = 0.0,
) -> dict[str, Timing]:
    """Times the variants in turn, each round in the opposite order of the one before.

    Args:
        variants: by name.
        device: where they run.
        sets: how many sets of inputs the calls pick from by ``index % sets``. In a round each variant begins at
            another, so that none finds in the cache what the one before it has read.
        seconds: how long all repetitions together should take.
        least: repetitions of each variant, however long they take.
        most: repetitions of each variant at the most.
        run_seconds: how long a run is at least, where calls are to find what the one before them left behind.

    Short calls are timed in runs of several. Garbage collection and lazy initialisation fall into the two rounds of
    warm-up.
    """
    run = RUN[device.type]
    shifts = _shifts(variants, sets)
    slowest = 0.0
    for index in range(2):
        slowest = 0.0
        for name, variant in variants.items():
            with variant.context():
                slowest = max(slowest, run(variant.call, index + shifts[name], 1))
    calls = max(1, int(max(RUN_SECONDS[device.type], run_seconds) / max(slowest, 1e-7)))
    return _rounds(
        {
            name: lambda first, variant=variant, shift=shifts[name]: _in_context(
                variant, run, first + shift, calls
            )
            for name, variant in variants.items()
        },
        calls,
        seconds,
        least,
        most,
    )


def _shifts(variants: Mapping[str, Variant], sets: int) -> dict[str, int]:
    return {name: place * sets // len(variants) for place, name in enumerate(variants)}


def _in_context(variant: Variant, run: Callable[..., float], first: int, calls: int) -> float:
    with variant.context():
        return run(variant.call, first, calls)


def _rounds(
    runs: Mapping[str, Callable[[int], float]], calls: int, seconds: float, least: int, most: int
) -> dict[str, Timing]:
    """``runs[name](first)`` are the seconds of `calls` calls, of which the first has that number."""
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    repetition = 0
    while repetition < least or (time.perf_counter() < end and repetition < most):
        for name in names if repetition % 2 == 0 else reversed(names):
            samples[name].append(runs[name](repetition * calls) / calls)
        repetition += 1
    return {name: Timing(times) for name, times in samples.items()}


@functools.cache
def _parallel_work() -> torch.Tensor:
    """What torch gives to all of its threads; small against the caches."""
    return torch.ones(1 << 16)


def _run_on_cpu(call: Callable[[int], object], first: int, calls: int) -> float:
    # A thread of torch's pool that went to sleep, as behind a variant that uses one thread, takes half a millisecond to
    # come back where processors are virtual. In training it would be awake.
    _parallel_work().neg_()
    start = time.perf_counter()
    for index in range(first, first + calls):
        call(index)
    return time.perf_counter() - start


def _run_on_cuda(call: Callable[[int], object], first: int, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for index in range(first, first + calls):
        call(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


# Device → the seconds of a run: ``run(call, first, calls)``.
RUN = {"cpu": _run_on_cpu, "cuda": _run_on_cuda}

# Calls recorded into a graph at least, so that the launch of the graph itself counts little.
GRAPH_CALLS = 20


def graph_replays(
    variants: Mapping[str, Variant],
    *,
    sets: int = 1,
    seconds: float = 0.2,
    least: int = LEAST_ROUNDS,
    most: int = 100,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """The same calls without the host: each variant's as one CUDA graph, which goes through all sets of inputs.

    Returns:
        The timings, and for each variant that cannot be captured the reason.
    """
    graphs, refused = {}, {}
    calls = max(GRAPH_CALLS, sets)
    shifts = _shifts(variants, sets)
    for name, variant in variants.items():
        try:
            with variant.context():
                graphs[name] = _captured(variant.call, shifts[name], calls)
        except RuntimeError as error:
            refused[name] = str(error).strip().splitlines()[0]
    runs = {
        name: lambda first, graph=graph: _run_on_cuda(lambda index: graph.replay(), 0, 1)
        for name, graph in graphs.items()
    }
    for run in runs.values():
        run(0)
    return _rounds(runs, calls, seconds, least, most), refused


def _captured(call: Callable[[int], object], first: int, calls: int) -> torch.cuda.CUDAGraph:
    # Libraries initialise in the warm-up, on a stream of its own as capture asks for.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(3):
            call(first + index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, stream):
        for index in range(calls):
            call(first + index)
    return graph


# More than a core's own caches hold, and than most that cores share. The largest of servers hold more.
LAST_LEVEL_CACHE_BYTES = 64 << 20
MOST_SETS = 64


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of `nbytes` bytes to rotate through, 2 to `MOST_SETS`.

    Together they exceed the last cache of `device`, whichever of them was used last, a GPU's twice over: what a call
    writes takes its place there too.
    """
    cache = LAST_LEVEL_CACHE_BYTES
    if device.type == "cuda":
        cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, 2 + cache // max(1, nbytes))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
