"""The README's table of results, from the documents in ``bench/results``.

``python -m aefast.bench.readme README.md`` writes it between the two comments that mark its place.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aefast.bench import document
from aefast.bench.cli import SHORT

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
MODE_NAMES = {"fwd": "forward", "fwdbwd": "forward + backward", "step": "training step", "epoch": "epoch"}


_SPEEDUP = f"Speed-up over eager PyTorch, for calls of which eager takes {SHORT * 1e6:.0f} µs or more"
Key = tuple[str, str, str, str]
"""Op, kind, dtype and mode."""


def table(results: dict[str, Any]) -> str:
    """A row for each op, kind, dtype and mode, over the calls that take eager `SHORT` or longer."""
    lines = [
        f"{_origin(results)}. {_SPEEDUP}:",
        "",
        "| op | kind | dtype | mode | cases | median | best | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, speedups in _speedups(results).items():
        figures = statistics.median(speedups), max(speedups), min(speedups)
        shown = " | ".join(f"{figure:.2f}×" for figure in figures)
        lines.append(f"{_named(key)} {len(speedups)} | {shown} |")
    return "\n".join([*lines, *_short([results]), *_failing([results])])


def joint_table(documents: Sequence[dict[str, Any]]) -> str:
    """As `table`, with a column for each device: the median, and the worst and the best case; and one over the code of
    torch.compile."""
    names = [results["device"]["name"] for results in documents]
    found = [_speedups(results) for results in documents]
    lines = [
        f"{_SPEEDUP}: the median, and from the worst to the best case. {'. '.join(map(_origin, documents))}.",
        "",
        f"| op | kind | dtype | mode | {' | '.join(names)} |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for key in dict.fromkeys(key for speedups in found for key in speedups):
        shown = " | ".join(_summary(speedups.get(key, [])) for speedups in found)
        lines.append(f"{_named(key)} {shown} |")
    return "\n".join([*lines, *_short(documents), *_over_compile(documents), *_failing(documents)])


def section(folder: Path) -> str:
    """The table of all documents in `folder`, with the marks around it."""
    documents = [document.load_results(path) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join([BEGIN, joint_table(documents), END])


def replaced(readme: str, folder: Path) -> str:
    """`readme` with its section made anew."""
    before, rest = readme.split(BEGIN)
    return before + section(folder) + rest.split(END)[1]


def _speedups(results: dict[str, Any]) -> dict[Key, list[float]]:
    rows: dict[Key, list[float]] = {}
    for case in results["cases"]:
        if case["failure"]:
            continue
        if not _is_short(case):
            key = (case["op"], case["kind"], case["dtype"], case["mode"])
            rows.setdefault(key, []).append(_speedup(case))
    return rows


def _speedup(case: dict[str, Any], over: str = "eager") -> float:
    return case["variants"][over]["median_ms"] / case["variants"]["aefast"]["median_ms"]


def _is_short(case: dict[str, Any]) -> bool:
    return case["variants"]["eager"]["median_ms"] < SHORT * 1e3


def _short(documents: Sequence[dict[str, Any]]) -> list[str]:
    """What the speed-ups are of the calls that take eager less than `SHORT`, which the rows leave out."""
    found = []
    for results in documents:
        cases = [case for case in results["cases"] if not case["failure"]]
        speedups = [_speedup(case) for case in cases if _is_short(case)]
        if speedups:
            below = sum(speedup < 1.0 for speedup in speedups)
            found.append(
                f"{len(speedups)} of {len(cases)} on {results['device']['name']}, "
                f"median {statistics.median(speedups):.2f}×, {100 * below / len(speedups):.0f} % of them below 1"
            )
    left_out = f"Left out are calls of which eager takes less than {SHORT * 1e6:.0f} µs"
    return ["", f"{left_out}: {'; '.join(found)}."] if found else []


def _over_compile(documents: Sequence[dict[str, Any]]) -> list[str]:
    """A table with a row for each op and mode that `torch.compile` took part in, over calls of every length."""
    names = [results["device"]["name"] for results in documents]
    found: list[dict[tuple[str, str], list[float]]] = []
    for results in documents:
        rows: dict[tuple[str, str], list[float]] = {}
        for case in results["cases"]:
            if not case["failure"] and "compile" in case["variants"]:
                rows.setdefault((case["op"], case["mode"]), []).append(_speedup(case, "compile"))
        found.append(rows)
    keys = dict.fromkeys(key for rows in found for key in rows)
    if not keys:
        return []
    lines = [
        "",
        "Speed-up over eager's code by `torch.compile(fullgraph=True)`, for the part of the shapes that it was run at, "
        "calls of every length: the median, from the worst to the best case, and how many of the cases are below 1.",
        "",
        f"| op | mode | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for op, mode in keys:
        shown = " | ".join(_summary_and_losses(rows.get((op, mode), [])) for rows in found)
        lines.append(f"| `{op}` | {MODE_NAMES[mode]} | {shown} |")
    return lines


def _origin(results: dict[str, Any]) -> str:
    commit = (results["commit"] or "unknown")[:10] + (" with changes" if results["dirty"] else "")
    return f"{results['device']['name']}; torch {results['versions']['torch']}, commit {commit}"


def _named(key: Key) -> str:
    op, kind, dtype, mode = key
    return f"| `{op}` | {kind} | {dtype} | {MODE_NAMES[mode]} |"


def _summary(speedups: list[float]) -> str:
    if not speedups:
        return ""
    if len(speedups) == 1:
        return f"{speedups[0]:.2f}×"
    return f"{statistics.median(speedups):.2f}× ({min(speedups):.2f} to {max(speedups):.2f})"


def _summary_and_losses(speedups: list[float]) -> str:
    below = sum(speedup < 1.0 for speedup in speedups)
    return f"{_summary(speedups)}, {below} of {len(speedups)}" if speedups else ""


def _failing(documents: Sequence[dict[str, Any]]) -> list[str]:
    failing = [case["id"] for results in documents for case in results["cases"] if case["failure"]]
    return ["", f"Wrong, and therefore not timed: {', '.join(failing)}."] if failing else []


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(replaced(path.read_text(), Path(__file__).parent / "results"))
