"""How a training step grows with batch, width, data set and processes, and what follows for 10⁹ samples on many GPUs.

``python -m aefast.bench.scaling`` measures the former on this device and writes ``bench/results/scaling``. The latter
are the formulae of `projection`; ``--docs docs/scaling.md`` renders both into the page.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from torch.nn.parallel import DistributedDataParallel

from aefast.bench import document, memory, timing
from aefast.bench.projection import (
    H200,
    NETWORKS,
    PARAMETER_BYTES,
    SMALL,
    Hardware,
    Network,
    all_gather_bytes,
    all_reduce_bytes,
    bound_world,
    bytes_per_epoch,
    gather_world,
    hiding_batch,
    input_seconds,
    mmd_global_batch,
    nodes,
    project,
    rank_bytes,
    step_count,
    step_flops,
)
from aefast.bench.timing import Timing, Variant
from aefast.data import Batches, load
from aefast.errors import AefastError, InputError
from aefast.models import Autoencoder
from aefast.nn.linear_act import check_positive_int
from aefast.train.step import CapturedStep, EagerStep, make_optimizer

RESULTS = Path(__file__).parent / "results" / "scaling"


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y over log x, fitted by least squares to the upper half: the last ⌈n/2⌉ points, two at least.

    Raises:
        InputError: fewer than two points, or one that is not positive.
    """
    if len(xs) != len(ys) or len(xs) < 2 or min(*xs, *ys) <= 0:
        raise InputError(f"exponent: expected at least two points of positive values, got {xs!r} and {ys!r}")
    kept = max(2, -(-len(xs) // 2))
    slope, _ = np.polyfit(np.log(xs[-kept:]), np.log(ys[-kept:]), 1)
    return float(slope)


# Measurement.


@dataclass(frozen=True)
class Plan:
    """What is measured: points of each series, seconds a point, and rounds where the clock must not decide."""

    batches: tuple[int, ...]
    widths: tuple[int, ...]
    samples: tuple[int, ...]
    worlds: tuple[int, ...]
    seconds: float
    rounds: int


FULL = Plan(
    batches=(16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    widths=(64, 128, 256, 512, 1024, 2048),
    samples=(2048, 4096, 8192, 16384, 32768),
    worlds=(1, 2, 3),
    seconds=2.0,
    rounds=40,
)
QUICK = Plan(
    batches=(32, 128, 512),
    widths=(64, 128, 256),
    samples=(1024, 2048, 4096),
    worlds=(1, 2),
    seconds=0.2,
    rounds=8,
)
BATCH, LEARNING_RATE = 256, 1e-3
# Of all gradients together, ‖found − true‖ / ‖true‖. A unit within rounding of relu's kink may fall on its other side,
# and is one of very many.
GRADIENT_TOLERANCE = 1e-3
# Seconds after which processes that have not finished are ended.
TIMEOUT = 120.0


class ProcessError(AefastError, RuntimeError):
    """A process of a group failed or did not finish."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _autoencoder(encoder: Sequence[int], device: torch.device) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(
        input_size=encoder[0], hidden=tuple(encoder[1:-1]), latent=encoder[-1], device=device
    ).train()


def _batch(number: int, batch: int, features: int, device: torch.device) -> torch.Tensor:
    """(batch, features), the same for the same number."""
    generator = torch.Generator().manual_seed(number)
    return torch.rand(batch, features, generator=generator).to(device)


def _gradient(step: CapturedStep | EagerStep, batch: torch.Tensor) -> torch.Tensor:
    """All gradients of a step's loss as one vector in float64."""
    step.optimizer.zero_grad(set_to_none=True)
    is_ours = isinstance(step, CapturedStep)
    loss = step.model(batch).loss if is_ours else step.model.eager_loss(step.twin, batch)
    loss.backward()
    (group,) = step.optimizer.param_groups
    return torch.cat([parameter.grad.double().flatten() for parameter in group["params"]])


def gradient_errors(
    steps: Mapping[str, CapturedStep | EagerStep],
    model: Autoencoder,
    batch: torch.Tensor,
    joint: torch.Tensor,
) -> dict[str, float]:
    """How far each step's gradients on `batch` are from those of `model` on `joint` in float64, relative.

    In a group of processes `joint` are the batches of all of them.
    """
    exact = EagerStep(model, LEARNING_RATE)
    exact.twin.double()
    truth = _gradient(exact, joint.double())
    return {
        name: ((_gradient(step, batch) - truth).norm() / truth.norm()).item() for name, step in steps.items()
    }


def _failure(errors: Mapping[str, float]) -> str | None:
    wrong = [
        f"{name}: error {error:.1e}" for name, error in errors.items() if not error <= GRADIENT_TOLERANCE
    ]
    return ", ".join(wrong) or None


def _row(
    series: str,
    x: int,
    encoder: Sequence[int],
    batch: int,
    samples: int,
    errors: Mapping[str, float],
    timings: Mapping[str, Timing],
    peak_bytes: Mapping[str, int],
    **labels: Any,
) -> dict[str, Any]:
    """A point of a series as it stands in the JSON document."""
    name = "-".join(map(str, encoder))
    mode = "epoch" if series == "samples" else "step"
    return {
        "id": f"scaling/{series}-{x}-{name}-b{batch}-fp32-{mode}",
        "series": series,
        "x": x,
        "labels": {"encoder": list(encoder), "batch": batch, "samples": samples, **labels},
        "flops": step_flops(Network("", tuple(encoder)).parameters, samples),
        "bytes_read": bytes_per_epoch(samples, encoder[0], 4),
        "error": dict(errors),
        "failure": _failure(errors),
        "variants": {
            variant: {
                "median_ms": found.median * 1e3,
                "p20_ms": found.quantile(0.2) * 1e3,
                "p80_ms": found.quantile(0.8) * 1e3,
                "samples_ms": [float(f"{sample * 1e3:.5g}") for sample in found.samples],
                "peak_bytes": peak_bytes[variant],
            }
            for variant, found in timings.items()
        },
    }


def measure_step(
    series: str, x: int, encoder: Sequence[int], batch: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    """A row of the training step beside eager's, on fresh batches in turn."""
    model = _autoencoder(encoder, device)
    steps = {
        "eager": EagerStep(model, LEARNING_RATE),
        "aefast": CapturedStep(model, make_optimizer(model.parameters(), LEARNING_RATE)),
    }
    sets = timing.input_sets(4 * batch * encoder[0], device)
    batches = [_batch(number, batch, encoder[0], device) for number in range(sets)]
    errors = gradient_errors(steps, model, batches[0], batches[0])
    timings, peaks = {}, {}
    if _failure(errors) is None:
        calls = {name: lambda index, step=step: step(batches[index % sets]) for name, step in steps.items()}
        timings, peaks = _measured(steps, calls, device, sets=sets, seconds=seconds, least=7)
    return _row(series, x, encoder, batch, batch, errors, timings, peaks)


def measure_epoch(path: Path, encoder: Sequence[int], batch: int, device: torch.device) -> dict[str, Any]:
    """A row of one epoch, in shuffled order, over the rows of a float32 ``.npy`` file that stays on disk."""
    dataset = load(path)
    rows = torch.arange(len(dataset))
    batches = Batches(dataset.samples, rows, batch_size=batch, seed=0, device=device)
    model = _autoencoder(encoder, device)
    steps = {
        "eager": EagerStep(model, LEARNING_RATE),
        "aefast": CapturedStep(model, make_optimizer(model.parameters(), LEARNING_RATE)),
    }

    def epoch(step: CapturedStep | EagerStep) -> Callable[[int], None]:
        def call(index: int) -> None:
            for samples in batches.epoch(index):
                step(samples)

        return call

    calls = {name: epoch(step) for name, step in steps.items()}
    timings, peaks = _measured(steps, calls, device, sets=1, seconds=0.0, least=3)
    return _row("samples", len(dataset), encoder, batch, len(dataset), {}, timings, peaks)


def _measured(
    steps: Mapping[str, CapturedStep | EagerStep],
    calls: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    sets: int,
    seconds: float,
    least: int,
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Timings of calls, which take steps of the same name, and their peak memory."""
    variants = {name: Variant(call) for name, call in calls.items()}
    timings = timing.interleaved(variants, device, sets=sets, seconds=seconds, least=least)
    return timings, {name: _peak_bytes(steps[name], call, device) for name, call in calls.items()}


def _peak_bytes(step: CapturedStep | EagerStep, call: Callable[[int], object], device: torch.device) -> int:
    """Gradients among them, which the step before has left behind otherwise."""
    step.optimizer.zero_grad(set_to_none=True)
    return memory.peak_bytes(call, device)


def write_samples(path: Path, samples: int, features: int) -> None:
    """A float32 ``.npy`` file of values in [0, 1), written piece by piece."""
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(samples, features))
    generator = np.random.default_rng(0)
    for start in range(0, samples, 4096):
        piece = file[start : start + 4096]
        piece[:] = generator.random(piece.shape, dtype=np.float32)
    file.flush()


def measure_world(
    world: int, encoder: Sequence[int], batch: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """A row of the step in `world` processes, each with `batch` samples of its own and, on the CPU, one thread."""
    found = launch(_train_in_group, world, (tuple(encoder), batch, device.type, rounds), device=device.type)
    errors = {name: max(one["error"][name] for one in found) for name in found[0]["error"]}
    # A step is over when its last process is done.
    timings = {
        name: Timing([max(times) for times in zip(*(one["seconds"][name] for one in found), strict=True)])
        for name in found[0]["seconds"]
    }
    if _failure(errors):
        timings = {}
    peaks = {name: max(one["peak_bytes"][name] for one in found) for name in timings}
    sent = [one["bytes_sent"] for one in found]
    return _row(
        "world",
        world,
        encoder,
        batch,
        world * batch,
        errors,
        timings,
        peaks,
        bytes_sent=None if None in sent else max(sent),
        crowded=device.type == "cpu" and world > cores(),
        backend=found[0]["backend"],
    )


def launch(
    worker: Callable[..., Any],
    world: int,
    arguments: Sequence[Any] = (),
    *,
    device: str = "cpu",
    timeout: float = TIMEOUT,
) -> list[Any]:
    """What ``worker(rank, world, *arguments)`` gives in each of `world` processes that form one process group, by rank.

    The processes are spawned, run one thread each, and talk by gloo on the CPU and by nccl on CUDA. However this ends,
    none of them is left.

    Args:
        worker: a function of a module that a new process can import; its result must be JSON.
        world: number of processes.
        arguments: to be pickled.
        device: "cpu" or "cuda".
        timeout: seconds until all of them must be done.

    Raises:
        ProcessError: a process failed, with its traceback, or they took too long.
    """
    check_positive_int(world, "world")
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(
            _process, (worker, tuple(arguments), world, device, folder, timeout), nprocs=world, join=False
        )
        try:
            end = time.monotonic() + timeout
            while not context.join(timeout=max(0.0, end - time.monotonic())):
                if time.monotonic() >= end:
                    raise ProcessError(f"world={world}: the processes did not finish within {timeout:g} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            told = Path(folder, "error")
            reason = told.read_text() if told.exists() else str(error)
            raise ProcessError(f"world={world}: {reason.strip()}") from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def _process(
    rank: int,
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    world: int,
    device: str,
    folder: str,
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    if "lo" in (name for _, name in socket.if_nameindex()):
        # gloo takes the interface of the host's name otherwise, which need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        result = worker(rank, world, *arguments)
    except Exception:
        # The others fail next, for want of this one: the first to fail tells why.
        with contextlib.suppress(FileExistsError), Path(folder, "error").open("x") as file:
            file.write(f"process {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    # All that is left is to tear the process down, in which a thread that PyTorch has not joined at times aborts it.
    os._exit(0)


def _train_in_group(
    rank: int, world: int, encoder: tuple[int, ...], batch: int, device_type: str, rounds: int
) -> dict[str, Any]:
    """Seconds, by name and round, of the step, of eager's, of the step without its all-reduce, and of that alone."""
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    model = _autoencoder(encoder, device)
    eager = EagerStep(model, LEARNING_RATE)
    eager.twin = DistributedDataParallel(eager.twin)
    wrapped = DistributedDataParallel(_autoencoder(encoder, device))
    step = CapturedStep(wrapped, make_optimizer(wrapped.parameters(), LEARNING_RATE))
    own, *others = (
        _batch(number, batch, encoder[0], device)
        for number in (rank, *(other for other in range(world) if other != rank))
    )
    errors = gradient_errors({"eager": eager, "aefast": step}, model, own, torch.cat([own, *others]))
    gradient = torch.ones(sum(parameter.numel() for parameter in model.parameters()), device=device)

    def without_all_reduce() -> None:
        with wrapped.no_sync():
            step(own)

    calls = {
        "eager": lambda: eager(own),
        "aefast": lambda: step(own),
        "aefast without all-reduce": without_all_reduce,
        "all-reduce": lambda: dist.all_reduce(gradient),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    # timing.interleaved lets the clock decide how often it calls, on which the processes would not agree.
    for number in range(rounds + 2):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            dist.barrier()
            start = time.perf_counter()
            calls[name]()
            timing.synchronize(device)
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    before = _bytes_written()
    step(own)
    timing.synchronize(device)
    after = _bytes_written()
    owners = {name: eager if name == "eager" else step for name in calls}
    peaks = {
        name: _peak_bytes(owners[name], lambda index, call=call: call(), device)
        for name, call in calls.items()
    }
    counted = dist.get_backend() == "gloo" and before is not None and after is not None
    return {
        "backend": dist.get_backend(),
        "error": errors,
        "seconds": seconds,
        "peak_bytes": peaks,
        "bytes_sent": after - before if counted else None,
    }


def _bytes_written() -> int | None:
    """Bytes that this process has passed to ``write``, to sockets too, where Linux counts them."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return None
    return int(re.search(r"^wchar: (\d+)$", counters.read_text(), re.MULTILINE)[1])


def measurements(plan: Plan, device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What to show while it is measured, and the call that gives the row."""
    for batch in plan.batches:
        yield (
            f"batch {batch}",
            lambda batch=batch: measure_step("batch", batch, SMALL, batch, device, plan.seconds),
        )
    for width in plan.widths:
        encoder = (SMALL[0], width, width, SMALL[-1])
        yield (
            f"width {width}",
            lambda width=width, encoder=encoder: measure_step(
                "width", width, encoder, BATCH, device, plan.seconds
            ),
        )
    for samples in plan.samples:
        yield f"{samples} samples", lambda samples=samples: _measure_file(samples, device)
    most = torch.cuda.device_count() if device.type == "cuda" else max(plan.worlds)
    for world in plan.worlds:
        if world <= most:
            yield (
                f"{world} processes",
                lambda world=world: measure_world(world, SMALL, BATCH, device, plan.rounds),
            )


def _measure_file(samples: int, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.npy"
        write_samples(path, samples, SMALL[0])
        return measure_epoch(path, SMALL, BATCH, device)


# Documents.

KIND = "scaling"


def make(rows: list[dict[str, Any]], device: str, *, quick: bool) -> dict[str, Any]:
    """The rows as a document with what they were measured on."""
    head = document.make([], {}, device, "auto")
    kept = {key: head[key] for key in ("schema", "device", "versions", "commit", "dirty")}
    return {**kept, "kind": KIND, "cores": cores(), "quick": quick, "cases": rows}


def read(path: Path) -> dict[str, Any]:
    """The document in a file.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    found = document.load(path)
    if found.get("kind") != KIND:
        raise InputError(f"scaling: {path} holds no results of kind {KIND}")
    return found


# Tables, on the terminal and in the page.


@dataclass(frozen=True)
class Sheet:
    """A table of text; the first column is on the left."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", _line(self.headings)]
        lines.append(_line(("---", *("---:" for _ in self.headings[1:]))))
        lines += [_line(row) for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)

    def show(self, console: Any) -> None:
        from rich.table import Table

        table = Table(title=self.title, caption="\n".join(self.notes) or None, caption_justify="left")
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, unit: float = 1.0) -> str:
    """Three digits, in units of `unit`; a dash for None."""
    if value is None:
        return "–"
    scaled = value / unit
    if scaled == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(scaled))))
    return f"{scaled:,.{min(digits, 6)}f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _throughput(row: dict[str, Any], variant: str = "aefast") -> float:
    return row["labels"]["samples"] / (row["variants"][variant]["median_ms"] * 1e-3)


def _columns(row: dict[str, Any], unit_ms: float) -> tuple[str, ...]:
    """aefast's median, eager's, and their ratio; throughput; peak of both."""
    if row["failure"]:
        return (f"wrong: {row['failure']}", *("–" for _ in range(5)))
    ours, eager = row["variants"]["aefast"], row["variants"]["eager"]
    return (
        _number(ours["median_ms"], unit_ms),
        _number(eager["median_ms"], unit_ms),
        f"{eager['median_ms'] / ours['median_ms']:.2f}×",
        _count(_throughput(row)),
        _number(ours["peak_bytes"], 1e6),
        _number(eager["peak_bytes"], 1e6),
    )


def _exponents(
    rows: list[dict[str, Any]], of: Mapping[str, Callable[[dict[str, Any]], float]]
) -> tuple[str, ...]:
    """A note with the fitted exponent of each of the quantities."""
    kept = [row for row in rows if not row["failure"]]
    if len(kept) < 2:
        return ()
    xs = [row["x"] for row in kept]
    first = xs[-max(2, -(-len(xs) // 2))]
    found = ", ".join(
        f"{name} {exponent(xs, [value(row) for row in kept]):.2f}" for name, value in of.items()
    )
    return (f"Exponents, fitted from {first:,} to {xs[-1]:,}: {found}.",)


def _median(variant: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: row["variants"][variant]["median_ms"]


def _peak(variant: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: row["variants"][variant]["peak_bytes"]


GROWTH = {
    "time": _median("aefast"),
    "eager's time": _median("eager"),
    "peak memory": _peak("aefast"),
    "eager's peak memory": _peak("eager"),
}
COLUMNS = ("speed-up", "samples/s", "peak, MB", "eager's peak, MB")
STEP_COLUMNS = ("aefast, ms", "eager, ms", *COLUMNS)


def measured(results: dict[str, Any]) -> list[Sheet]:
    """The tables of a document."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in results["cases"]:
        series.setdefault(row["series"], []).append(row)
    name = "-".join(map(str, SMALL))
    sheets = []
    if rows := series.get("batch"):
        cells = [(_count(row["x"]), *_columns(row, 1.0)) for row in rows]
        title = f"Step of autoencoder {name} over the batch"
        sheets.append(Sheet(title, ("batch", *STEP_COLUMNS), cells, _exponents(rows, GROWTH)))
    if rows := series.get("width"):
        cells = [
            (
                _count(row["x"]),
                _number(Network("", tuple(row["labels"]["encoder"])).parameters, 1e6),
                *_columns(row, 1.0),
            )
            for row in rows
        ]
        title = f"Step of autoencoder {SMALL[0]}-w-w-{SMALL[-1]} over the width w, batch {BATCH}"
        notes = _exponents(rows, {**GROWTH, "operations": lambda row: row["flops"]})
        headings = ("width", "million parameters", *STEP_COLUMNS)
        sheets.append(Sheet(title, headings, cells, notes))
    if rows := series.get("samples"):
        cells = [(_count(row["x"]), _number(row["bytes_read"], 1e6), *_columns(row, 1e3)) for row in rows]
        title = f"One epoch of autoencoder {name} from a float32 memory map, batch {BATCH}"
        headings = ("samples", "MB read", "aefast, s", "eager, s", *COLUMNS)
        sheets.append(Sheet(title, headings, cells, (*_exponents(rows, GROWTH), *_growth_of_memory(rows))))
    if rows := series.get("world"):
        sheets.append(_world_sheet(rows, name, results["cores"]))
    return sheets


def _growth_of_memory(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    first, last = rows[0], rows[-1]
    if first["x"] == last["x"]:
        return ()
    peaks = _peak("aefast")
    growth = (peaks(last) - peaks(first)) / (last["x"] - first["x"])
    read = last["bytes_read"] / last["x"]
    return (f"Peak memory grows by {growth:.1f} bytes a sample, of {read:,.0f} that are read.",)


def _world_sheet(rows: list[dict[str, Any]], name: str, available: int) -> Sheet:
    base = next((row for row in rows if row["x"] == 1 and not row["failure"]), None)
    nbytes = 4 * Network("", SMALL).parameters
    cells = []
    for row in rows:
        label = _count(row["x"])
        if row["labels"]["crowded"]:
            label += f" (on {available} cores)"
        if row["failure"]:
            cells.append((label, f"wrong: {row['failure']}", *("–" for _ in range(8))))
            continue
        ours, eager, compute, alone = (
            row["variants"][variant]["median_ms"]
            for variant in ("aefast", "eager", "aefast without all-reduce", "all-reduce")
        )
        sent = row["labels"]["bytes_sent"]
        efficiency = None if base is None else _throughput(row) / (row["x"] * _throughput(base))
        cells.append(
            (
                label,
                _number(ours),
                _number(eager),
                f"{eager / ours:.2f}×",
                _number(alone),
                f"{alone / ours:.0%}",
                f"{1 - compute / ours:.0%}",
                f"{_number(sent, 1e6)} ({_number(all_reduce_bytes(row['x'], nbytes), 1e6)})",
                _count(_throughput(row)),
                "–" if efficiency is None else f"{efficiency:.0%}",
            )
        )
    headings = (
        *("processes", "aefast, ms", "eager, ms", "speed-up", "all-reduce alone, ms", "share of the step"),
        *("added to the step", "MB sent a rank (formula)", "samples/s", "of perfect scaling"),
    )
    growth = {name: GROWTH[name] for name in ("time", "eager's time")}
    batch, backend = rows[0]["labels"]["batch"], rows[0]["labels"]["backend"]
    return Sheet(
        f"Step of autoencoder {name} over processes by {backend}, batch {batch} each, one thread each",
        headings,
        cells,
        _exponents([row for row in rows if not row["labels"]["crowded"]], growth),
    )


SAMPLES = 10**9
WORLDS = (1, 8, 64, 512)
RANK_BATCH, GLOBAL_BATCH = 4096, 65536
VALUE_BYTES = {"uint8": 1, "float32": 4}
# Of a GPU's memory, what its part of the data may take.
DATA_SHARE = 0.8


def projected(hardware: Hardware = H200) -> list[Sheet]:
    """The tables of the projection."""
    return [
        _hardware_sheet(hardware),
        _data_sheet(hardware),
        _step_sheet(f"Steps with {RANK_BATCH:,} samples a GPU", lambda world: RANK_BATCH, hardware),
        _step_sheet(
            f"Steps with {GLOBAL_BATCH:,} samples on all GPUs", lambda world: GLOBAL_BATCH // world, hardware
        ),
        _traffic_sheet(hardware),
        _critical_sheet(hardware),
        _memory_sheet(hardware),
    ]


def _hardware_sheet(hardware: Hardware) -> Sheet:
    rows = [
        (one.name, f"{getattr(hardware, one.name):.4g} {one.metadata['unit']}", one.metadata["source"])
        for one in fields(hardware)
    ]
    return Sheet("Figures that the projection assumes", ("figure", "value", "source"), rows)


def _data_sheet(hardware: Hardware) -> Sheet:
    rows = []
    for kind, value_bytes in VALUE_BYTES.items():
        total = bytes_per_epoch(SAMPLES, SMALL[0], value_bytes)
        for world in WORLDS:
            _, count = nodes(world, hardware)
            share = total / world
            fits = "yes" if share <= DATA_SHARE * hardware.memory else "no"
            rows.append(
                (
                    kind,
                    _number(total, 1e9),
                    _count(world),
                    _number(total / (count * hardware.storage)),
                    _number(share, 1e9),
                    fits,
                )
            )
    headings = ("values", "GB an epoch", "GPUs", "s to read it", "GB a GPU", "stays there")
    return Sheet(f"Reading {SAMPLES:,} samples of {SMALL[0]} features", headings, rows)


def _step_sheet(title: str, batch_of: Callable[[int], int], hardware: Hardware) -> Sheet:
    rows = []
    for network in NETWORKS:
        alone = project(network, 1, batch_of(1), hardware).overlapped / batch_of(1)
        for world in WORLDS:
            batch = batch_of(world)
            step = project(network, world, batch, hardware)
            count = step_count(SAMPLES, 1, world, batch)
            sample_bytes = network.features * VALUE_BYTES["uint8"]
            streamed = max(step.overlapped, input_seconds(world, batch, sample_bytes, hardware))
            local, _ = nodes(world, hardware)
            rows.append(
                (
                    network.label,
                    _count(world),
                    _count(count),
                    *(
                        _number(seconds, 1e-3)
                        for seconds in (step.dense + step.update, step.mmd, step.gather, step.reduce)
                    ),
                    _number(step.serial, 1e-3),
                    _number(step.overlapped, 1e-3),
                    step.bound,
                    f"{alone * batch / step.overlapped:.0%}",
                    _number(count * step.overlapped),
                    _number(count * streamed),
                    _number(local * batch * sample_bytes / step.overlapped, 1e9),
                )
            )
    headings = (
        *("model", "GPUs", "steps an epoch", "dense, Adam, ms", "MMD, ms", "all-gather, ms"),
        *("all-reduce, ms", "step, ms", "overlapped, ms", "bound by", "of perfect scaling"),
        *("epoch, s", "from storage, s"),
        "GB/s a node",
    )
    notes = (
        f"An epoch is one of {SAMPLES:,} samples, overlapped; from storage, and GB/s a node to keep up, in uint8.",
    )
    return Sheet(title, headings, rows, notes)


def _traffic_sheet(hardware: Hardware) -> Sheet:
    rows = []
    for network in NETWORKS:
        nbytes = PARAMETER_BYTES * network.parameters
        codes = 4 * RANK_BATCH * network.latent if network.blocks else 0
        for world in WORLDS[1:]:
            count = step_count(SAMPLES, 1, world, RANK_BATCH)
            reduced, gathered = all_reduce_bytes(world, nbytes), all_gather_bytes(world, codes)
            rows.append(
                (
                    network.label,
                    _count(world),
                    _number(reduced, 1e6),
                    _number(gathered, 1e6),
                    _number(count * (reduced + gathered), 1e9),
                )
            )
    headings = ("model", "GPUs", "MB all-reduced a step", "MB gathered a step", "GB an epoch")
    return Sheet(f"Traffic of a GPU with {RANK_BATCH:,} samples a step", headings, rows)


def _critical_sheet(hardware: Hardware) -> Sheet:
    rows = []
    for network in NETWORKS:
        rows.append(
            (
                network.label,
                _number(network.parameters, 1e6),
                *(_count(bound_world(network, batch, hardware)) for batch in (256, RANK_BATCH)),
                *(_count(hiding_batch(network, world, hardware)) for world in WORLDS[1:]),
                _count(hiding_batch(network, WORLDS[-1], hardware, gradient_bytes=2)),
                _count(mmd_global_batch(network, hardware)),
                _count(gather_world(network, RANK_BATCH, hardware)),
            )
        )
    headings = (
        *("model", "million parameters", "W₁, B = 256", f"W₁, B = {RANK_BATCH:,}"),
        *(f"B₁, W = {world}" for world in WORLDS[1:]),
        *(f"B₁, W = {WORLDS[-1]}, bfloat16 gradients", "W·B₂", f"W₃, B = {RANK_BATCH:,}"),
    )
    notes = (
        "W₁: GPUs from which on communication takes longer than the dense step and Adam. B₁: samples a GPU from which"
        " on the backward hides the all-reduce. W·B₂: samples on all GPUs from which on the MMD term takes longer than"
        " the dense step. W₃: GPUs from which on the all-gather of codes does.",
    )
    return Sheet("Where one thing overtakes another", headings, rows, notes)


def _memory_sheet(hardware: Hardware) -> Sheet:
    rows = []
    for network in NETWORKS:
        for world in (1, WORLDS[-1]):
            parts = rank_bytes(network, world, RANK_BATCH)
            total = sum(parts.values())
            cells = (_number(nbytes, 1e6) for nbytes in parts.values())
            rows.append((network.label, _count(world), *cells, f"{total / hardware.memory:.1%}"))
    headings = ("model", "GPUs", "parameters and Adam, MB", "activations, MB", "codes, MB", "of memory")
    return Sheet(f"Memory of a GPU with {RANK_BATCH:,} samples a step", headings, rows)


MARKS = {part: (f"<!-- {part}: begin -->", f"<!-- {part}: end -->") for part in ("scaling", "projection")}


def replaced(page: str, folder: Path) -> str:
    """`page` with its tables made anew, the measured ones from the documents in `folder`.

    Raises:
        InputError: a mark of a section's place is missing, or a file holds something else.
    """
    parts = {"scaling": [], "projection": [sheet.markdown() for sheet in projected()]}
    for path in sorted(folder.glob("*.json")):
        results = read(path)
        commit = (results["commit"] or "unknown")[:10] + (" with changes" if results["dirty"] else "")
        parts["scaling"].append(
            f"{results['device']['name']}; torch {results['versions']['torch']}, float32, commit {commit}."
        )
        parts["scaling"] += [sheet.markdown() for sheet in measured(results)]
    for part, (begin, end) in MARKS.items():
        if page.count(begin) != 1 or page.count(end) != 1:
            raise InputError(f"scaling: the page needs {begin} and {end} once each")
        before, rest = page.split(begin)
        page = before + "\n\n".join([begin, *parts[part], end]) + rest.split(end)[1]
    return page


# The command.


def scaling(
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to measure.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A few points, in under 40 seconds.")] = False,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="PATH",
            help="Where the results go; bench/results/scaling/<device>.json, and nowhere with --quick.",
        ),
    ] = None,
    docs: Annotated[
        Path | None,
        typer.Option(metavar="PAGE", help="Also make the tables of this page anew, such as docs/scaling.md."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure, or only make the page's tables.")
    ] = True,
) -> None:
    """Measure how a training step grows with batch, width, data set and processes; project it to many GPUs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    if device not in ("cpu", "cuda"):
        raise InputError(f"scaling: --device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("scaling: --device cuda needs a CUDA device, and torch finds none")
    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise InputError(f"scaling: --json must be a file in an existing folder, got {json_path}")
    if docs is not None:
        if not docs.is_file():
            raise InputError(f"scaling: --docs must be a page, got {docs}")
        replaced(docs.read_text(), RESULTS)

    console = Console(width=None if Console().is_terminal else 200)
    if measure:
        where = torch.device(device)
        todo = list(measurements(QUICK if quick else FULL, where))
        rows = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=len(todo))
            for description, run in todo:
                progress.update(task, description=description)
                rows.append(run())
                progress.advance(task)
        made = make(rows, device, quick=quick)
        console.print(f"{made['device']['name']}, torch {torch.__version__}, float32", highlight=False)
        for sheet in measured(made):
            sheet.show(console)
        if json_path is None and not quick:
            RESULTS.mkdir(parents=True, exist_ok=True)
            json_path = RESULTS / f"{document.file_stem(document.device_name(device))}.json"
        if json_path is not None:
            document.save(made, json_path)
            console.print(f"results: {json_path}", highlight=False, soft_wrap=True)
    console.print("Projection, from formulae and assumed figures:", highlight=False)
    for sheet in projected():
        sheet.show(console)
    if docs is not None:
        docs.write_text(replaced(docs.read_text(), RESULTS))
    if measure and any(row["failure"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(scaling)
    except AefastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
