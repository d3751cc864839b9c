"""The ``aefast bench`` command."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from aefast.errors import AefastError, InputError

if TYPE_CHECKING:
    from aefast.bench.case import Case
    from aefast.bench.ceilings import Ceilings
    from aefast.bench.measure import Result


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="The ops to measure; all if none is named.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes, in two to three minutes.")] = False,
    targets: Annotated[
        bool, typer.Option("--targets", help="Only the training steps that the project's targets name.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to measure.")] = "cpu",
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="The backend behind aefast: auto, cuda, triton, cpu or eager.")
    ] = "auto",
    limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Start no further case after this; the most telling come first."
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Also write all samples to a JSON file.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write the JSON file of this device, a report, and its plots there."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what the report's document has, and measure only what it lacks."),
    ] = False,
    estimates: Annotated[
        bool,
        typer.Option(
            "--estimates/--no-estimates", help="Whether the report ends with what --static estimates."
        ),
    ] = True,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON", help="Name the cases that were faster, by 5 % or more, in this earlier run."
        ),
    ] = None,
    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="Instead of measuring, estimate each GPU kernel's time on an H200 from its machine code.",
        ),
    ] = False,
) -> None:
    """Measure aefast beside eager PyTorch, torch.compile and rival libraries, after checking all against float64.

    Variants take turns in one process on fresh inputs; figures are medians. Exits with 1 if a result is
    outside its tolerance; such a case gets no speed-up. So it does if --compare finds a regression.
    """
    from aefast.bench import document
    from aefast.bench.cases import CASES, train

    if static:
        _static(bool(ops))
        return
    if targets and (ops or quick):
        raise InputError("bench: --targets names its cases itself, and takes no OP and no --quick")
    if resume and report is None:
        raise InputError("bench: --resume goes on with a report, and needs --report")
    unknown = [op for op in ops or [] if op not in CASES]
    if unknown:
        raise InputError(f"bench: OP must be one of {', '.join(CASES)}, got {unknown[0]!r}")
    if device not in ("cpu", "cuda"):
        raise InputError(f"bench: --device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("bench: --device cuda needs a CUDA device, and torch finds none")
    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise InputError(f"bench: --json must be a file in an existing folder, got {json_path}")
    if report is not None and not report.is_dir():
        raise InputError(f"bench: --report must be an existing folder, got {report}")
    if limit is not None and not limit > 0:
        raise InputError(f"bench: --limit must be a positive number of seconds, got {limit}")
    if report is not None:
        from aefast.bench import report as reports

        reports.require_plots()
        paths = [report / f"{document.file_stem(document.device_name(device))}.json"]
    else:
        paths = []
    paths += [] if json_path is None else [json_path]
    earlier = None if compare is None else document.load_results(compare)
    if earlier is not None:
        document.check_comparable(earlier, device, backend, "--compare")
    kept = document.load_results(paths[0]) if resume and paths[0].exists() else None
    if kept is not None:
        document.check_comparable(kept, device, backend, "--resume")
        document.check_same_code(kept)

    if targets:
        cases = list(train.targets(torch.device(device)))
    else:
        cases = _ordered(ops or list(CASES), torch.device(device), quick, limit is not None)
    run = _Run(device, backend, kept)
    written: list[Path] = []
    try:
        run.measure(cases, 0.1 if quick else 0.2, limit)
    finally:
        # What was measured is kept, whatever ends the run; an op's cases stand together.
        run.results.sort(key=lambda result: result.op)
        made = document.make(run.results, run.ceilings, device, backend, run.not_run)
        if kept is not None:
            made = document.joined(kept, made)
        if run.results or run.not_run:
            for path in paths:
                document.save(made, path)
            if report is not None:
                written = [*paths, *reports.write(made, report)]
    _print_table(
        run.results, run.ceilings, f"aefast ({backend}) beside eager PyTorch {torch.__version__}", device
    )
    for (name, reason), ids in document.missing_variants(made["cases"]).items():
        typer.echo(
            f"missing: {name} from {len(ids)} cases ({ids[0]}{', …' if len(ids) > 1 else ''}): {reason}"
        )
    for path in written:
        typer.echo(f"written: {path}")
    if written and estimates:
        reports.add_estimates(written[len(paths)])
    slower = [] if earlier is None else document.regressions(made, earlier)
    for line in slower:
        typer.echo(f"slower than in {compare}: {line}")
    failed = [result for result in run.results if result.failure]
    for result in failed:
        typer.echo(f"wrong: {result.id}: {result.failure}")
    if slower or failed:
        raise typer.Exit(1)


def _static(has_ops: bool) -> None:
    from aefast.bench import static

    if has_ops:
        raise InputError("bench: --static estimates every kernel and takes no OP")
    static.print_table(static.estimates())


# On CUDA, whose machines are lent for minutes, these come first in each turn.
FIRST_ON_CUDA = (
    "train",
    "mmd",
    "reparameterize",
    "corrupt",
    "pyramid_loss",
    "reconstruction_loss",
    "linear_act",
    "topk_encode",
)


def _ordered(ops: list[str], device: torch.device, quick: bool, is_short: bool) -> list[Case]:
    """The quick cases, of all ops in turn, and then the others.

    On CUDA the targets come before, and those that torch.compile takes part in, for minutes each, once more between
    both. If time `is_short` there, it takes part in no other cases but those that have it when they are quick.
    """
    from aefast.bench.cases import CASES, train

    named: list[Case] = []
    if device.type == "cuda":
        ops = [op for op in FIRST_ON_CUDA if op in ops] + [op for op in ops if op not in FIRST_ON_CUDA]
        named = list(train.targets(device)) if "train" in ops else []
    ids = {case.id for case in named}

    def others(op: str, quick: bool) -> list[Case]:
        return [case for case in CASES[op](device, quick) if case.id not in ids]

    in_turn = itertools.zip_longest(*(others(op, True) for op in ops))
    first = {case.id: case for cases in in_turn for case in cases if case is not None}
    rest: list[Case] = []
    if not quick:
        every = {case.id: case for op in ops for case in others(op, False)}
        rest = [case for id, case in every.items() if id not in first]
        if is_short and device.type == "cuda":
            rest = [dataclasses.replace(case, is_compiled=False) for case in rest]
        else:
            # Of both lists, the full one knows whether torch.compile takes part.
            first = {id: every.get(id, case) for id, case in first.items()}
    alone = [case for case in named if not case.is_compiled]
    return [*alone, *first.values(), *(case for case in named if case.is_compiled), *rest]


class _Run:
    """A run under way: its results, the ceilings by dtype, and the ids that a limit of time left out.

    `kept` is an earlier document whose cases are not measured again.
    """

    def __init__(self, device: str, backend: str, kept: dict[str, Any] | None = None) -> None:
        self.device = torch.device(device)
        self.backend = backend
        self.results: list[Result] = []
        self.ceilings: dict[str, Ceilings] = {}
        self.not_run: list[str] = []
        # Id → the names of what was tried.
        self.seen: dict[str, set[str]] = {
            case["id"]: {*case["variants"], *case["missing"]} for case in (kept["cases"] if kept else ())
        }

    def measure(self, cases: list[Case], seconds: float, limit: float | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        import aefast
        from aefast.bench import ceilings
        from aefast.bench.case import DTYPE_NAMES

        start = time.perf_counter()
        trials = [
            (case, mode) for case in cases for mode in case.modes if self._lacks(case, f"{case.id}-{mode}")
        ]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with _terminable(), aefast.backend(self.backend), Progress(*columns, transient=True) as progress:
            for dtype in dict.fromkeys(case.dtype for case, _ in trials):
                self.ceilings[DTYPE_NAMES[dtype]] = ceilings.measure(self.device, dtype)
            task = progress.add_task("measuring", total=len(trials))
            for case, mode in trials:
                id = f"{case.id}-{mode}"
                if limit is not None and time.perf_counter() - start > limit:
                    if id not in self.seen:
                        self.not_run.append(id)
                    continue
                progress.update(task, description=id)
                found = self._measured(case, mode, seconds)
                # A case that comes again comes with more.
                self.results = [*(result for result in self.results if result.id != id), found]
                self.seen[id] = {*found.timings, *found.missing}
                progress.advance(task)

    def _lacks(self, case: Case, id: str) -> bool:
        from aefast.bench.variants import COMPILED

        return id not in self.seen or (case.is_compiled and COMPILED not in self.seen[id])

    def _measured(self, case: Case, mode: str, seconds: float) -> Result:
        from aefast.bench import measure
        from aefast.bench.case import DTYPE_NAMES

        torch.manual_seed(0)
        try:
            return measure.measure(case, mode, seconds, self.ceilings[DTYPE_NAMES[case.dtype]])
        except AefastError:
            # A backend that was asked for by name and does not serve here serves no other case either.
            raise
        except Exception as error:
            return measure.failed(case, mode, error)
        finally:
            if case.is_compiled:
                # Each case is compiled for its own shape; none of it serves another.
                torch.compiler.reset()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM ends the process by way of an exception, as an interrupt from the keyboard does."""

    def end(signal_number: int, frame: object) -> None:
        raise SystemExit(128 + signal_number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_table(results: list[Result], limits: dict[str, Ceilings], title: str, device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from aefast.bench.document import device_name

    others = [
        name
        for name in dict.fromkeys(name for result in results for name in result.timings)
        if name not in ("aefast", "eager")
    ]
    ceilings = "; ".join(
        f"{dtype} products at {one.flops / 1e9:,.0f} GFLOP/s, copies at {one.bytes / 1e9:,.0f} GB/s,"
        f" {one.exps / 1e9:,.1f} Gexp/s"
        for dtype, one in limits.items()
    )
    console = Console(width=None if Console().is_terminal else 140)
    table = Table(
        title=f"{title}\n{device_name(device)}",
        caption=f"speed-up: eager's time over aefast's, and for the columns after it each variant's time over aefast's."
        f" floor: the time that the device's own ceilings allow: {ceilings}",
    )
    table.add_column("case", no_wrap=True)
    replayed = ["replayed"] if any(result.graph_timings for result in results) else []
    for heading in ("eager", "aefast", "speed-up", *replayed, *others, "of floor", "error", "eager's"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        if result.failure:
            blank = ["" for _ in [*replayed, *others]]
            table.add_row(result.id, "", "", "[red]wrong", *blank, "", *_errors(result))
            continue
        eager, ours = result.timings["eager"].median, result.timings["aefast"].median
        table.add_row(
            result.id,
            _duration(eager),
            _duration(ours),
            _times(result.speedup),
            *(_times(result.replayed_speedup) for _ in replayed),
            *(_times(result.speedup_over(name)) for name in others),
            f"{result.floor_share:.0%} {result.floor_kind}",
            *_errors(result),
        )
    console.print(table)
    for line in summary(results):
        console.print(line, highlight=False, markup=False)


# An eager call that takes this long or longer is held to parity; of shorter ones the overhead counts.
SHORT = 50e-6
NARROW_INPUTS = 256
PARITY = 0.97
# Activations in which eager PyTorch makes passes of their own that cost more than their memory traffic.
CURVED = ("gelu", "silu", "tanh")


def summary(results: list[Any]) -> list[str]:
    """The worst ratio of long calls, the median gain of narrow layers, and the overhead on short calls."""
    lines = []
    for op, mode in dict.fromkeys((result.op, result.mode) for result in results):
        chosen = [r for r in results if (r.op, r.mode) == (op, mode) and not r.failure]
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
                f" worst {worst.speedup:.2f}× ({low:.2f} to {high:.2f}: {worst.id});"
            )
        if short:
            line += f" overhead on {len(short)} shorter ones: at most {max(r.overhead for r in short) * 1e6:.1f} µs"
        lines.append(line)
        narrow = [r for r in long if _is_narrow(r)]
        if narrow:
            medians = [
                f"{kind} {statistics.median(r.speedup for r in narrow if r.kind == kind):.2f}×"
                for kind in dict.fromkeys(r.kind for r in narrow)
            ]
            lines.append(
                f"  inputs ≤ {NARROW_INPUTS}: {', '.join(medians)};"
                f" together median {statistics.median(r.speedup for r in narrow):.2f}× of {len(narrow)} cases"
            )
    narrow = [r for r in results if not r.failure and r.timings["eager"].median >= SHORT and _is_narrow(r)]
    if len({(r.op, r.mode) for r in narrow}) > 1:
        lines.append(
            f"{', '.join(CURVED)} at inputs ≤ {NARROW_INPUTS}, all ops and modes: median"
            f" {statistics.median(r.speedup for r in narrow):.2f}× of {len(narrow)} cases"
        )
    return lines


def _is_narrow(result: Any) -> bool:
    return result.kind in CURVED and result.sizes["inputs"] <= NARROW_INPUTS


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _errors(result: Any) -> tuple[str, str]:
    shown = (result.errors.get(name) for name in ("aefast", "eager"))
    return tuple("" if error is None else f"{error:.1e}" for error in shown)
