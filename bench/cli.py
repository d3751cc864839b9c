"""The ``aefast bench`` command."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from aefast.errors import InputError


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="The ops to measure; all if none is named.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes, in under 90 seconds.")] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to measure.")] = "cpu",
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="The backend behind aefast: auto, cuda, triton, cpu or eager.")
    ] = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Also write all samples to a JSON file.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON", help="Name the cases that were faster, by 5 % or more, in this earlier run."
        ),
    ] = None,
) -> None:
    """Measure aefast beside eager PyTorch, after checking both against float64.

    Variants take turns in one process on fresh inputs; figures are medians. Exits with 1 if a result is
    outside its tolerance; such a case gets no speed-up. So it does if --compare finds a regression.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import aefast
    from aefast.bench import ceilings, document
    from aefast.bench.case import MODES, measure
    from aefast.bench.cases import CASES

    unknown = [op for op in ops or [] if op not in CASES]
    if unknown:
        raise InputError(f"bench: OP must be one of {', '.join(CASES)}, got {unknown[0]!r}")
    if device not in ("cpu", "cuda"):
        raise InputError(f"bench: --device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("bench: --device cuda needs a CUDA device, and torch finds none")
    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise InputError(f"bench: --json must be a file in an existing folder, got {json_path}")
    earlier = None if compare is None else document.load(compare)
    where = torch.device(device)
    limits = ceilings.measure(where)
    cases = [case for op in ops or CASES for case in CASES[op](where, quick)]
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with aefast.backend(backend), Progress(*columns, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases) * len(MODES))
        for case in cases:
            for mode in MODES:
                progress.update(task, description=f"{case.id}-{mode}")
                torch.manual_seed(0)
                results.append(measure(case, mode, 0.1 if quick else 0.2, limits))
                progress.advance(task)
    _print_table(results, limits, f"aefast ({backend}) beside eager PyTorch {torch.__version__}", device)
    made = document.make(results, limits, device, backend)
    if json_path is not None:
        document.save(made, json_path)
    slower = [] if earlier is None else document.regressions(made, earlier)
    for line in slower:
        typer.echo(f"slower than in {compare}: {line}")
    if slower or any(result.failure for result in results):
        raise typer.Exit(1)


def _print_table(results: list[Any], limits: Any, title: str, device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from aefast.bench.document import device_name

    console = Console(width=None if Console().is_terminal else 120)
    table = Table(
        title=f"{title}\n{device_name(device)}",
        caption=f"floor: the time that the device's own ceilings allow: copies at {limits.bytes / 1e9:.0f} GB/s,"
        f" products at {limits.flops / 1e9:.0f} GFLOP/s, {limits.exps / 1e9:.1f} Gexp/s",
    )
    table.add_column("case", no_wrap=True)
    for heading in ("eager", "aefast", "speed-up", "of floor", "error", "eager's"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        if result.failure:
            table.add_row(result.id, "", "", "[red]wrong", "", *_errors(result))
            continue
        eager, ours = result.timings["eager"].median, result.timings["aefast"].median
        table.add_row(
            result.id,
            _duration(eager),
            _duration(ours),
            f"{result.speedup:.2f}×",
            f"{result.floor_share:.0%} {result.floor_kind}",
            *_errors(result),
        )
    console.print(table)
    for line in summary(results):
        console.print(line, highlight=False)
    for result in results:
        if result.failure:
            console.print(f"[red]{result.id}: {result.failure}")


# Below this an eager call is mostly its own launching, and the difference in time is what counts.
SHORT = 50e-6
NARROW_INPUTS = 256
# What a layer that already runs at its products' speed is to keep of eager's.
PARITY = 0.97


def summary(results: list[Any]) -> list[str]:
    """The worst ratio of long calls, the median gain of narrow layers, and the overhead on short calls."""
    lines = []
    for op in dict.fromkeys(result.op for result in results):
        for mode in ("fwd", "fwdbwd"):
            chosen = [r for r in results if r.op == op and r.mode == mode and not r.failure]
            long = [r for r in chosen if r.timings["eager"].median >= SHORT]
            short = [r for r in chosen if r.timings["eager"].median < SHORT]
            line = f"{op} {mode}:"
            if long:
                worst = min(long, key=lambda r: r.speedup)
                median = statistics.median(r.speedup for r in long)
                slower = sum(r.speedup_interval[1] < PARITY for r in long)
                low, high = worst.speedup_interval
                line += (
                    f" {len(long)} cases of eager ≥ 50 µs, median {median:.2f}×,"
                    f" {slower} below {PARITY}× with 95 % confidence,"
                    f" worst {worst.speedup:.2f}× ({low:.2f} to {high:.2f}: {worst.labels['activation']},"
                    f" batch {worst.labels['batch']}, {worst.labels['inputs']} → {worst.labels['features']});"
                )
            if short:
                line += f" overhead on {len(short)} shorter ones: at most {max(r.overhead for r in short) * 1e6:.1f} µs"
            lines.append(line)
            for activation in ("gelu", "silu", "tanh"):
                narrow = [
                    r.speedup
                    for r in long
                    if r.labels["activation"] == activation and r.labels["inputs"] <= NARROW_INPUTS
                ]
                if narrow:
                    lines.append(
                        f"  {activation}, inputs ≤ {NARROW_INPUTS}: median {statistics.median(narrow):.2f}×"
                        f" of {len(narrow)} cases"
                    )
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _errors(result: Any) -> tuple[str, str]:
    return f"{result.errors['aefast']:.1e}", f"{result.errors['eager']:.1e}"
