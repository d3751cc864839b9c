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
    return "\n".join([*lines, *_failing([results])])


def joint_table(documents: Sequence[dict[str, Any]]) -> str:
    """As `table`, with a column for each device: the median, and the worst and the best case."""
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
    return "\n".join([*lines, *_failing(documents)])


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
        eager, ours = (case["variants"][name]["median_ms"] for name in ("eager", "aefast"))
        if eager >= SHORT * 1e3:
            key = (case["op"], case["kind"], case["dtype"], case["mode"])
            rows.setdefault(key, []).append(eager / ours)
    return rows


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


def _failing(documents: Sequence[dict[str, Any]]) -> list[str]:
    failing = [case["id"] for results in documents for case in results["cases"] if case["failure"]]
    return ["", f"Wrong, and therefore not timed: {', '.join(failing)}."] if failing else []


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(replaced(path.read_text(), Path(__file__).parent / "results"))
