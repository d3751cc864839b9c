"""The README's table of results, from the documents in ``bench/results``.

``python -m aefast.bench.readme README.md`` writes it between the two comments that mark its place.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from aefast.bench import document
from aefast.bench.cli import SHORT

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
MODE_NAMES = {"fwd": "forward", "fwdbwd": "forward + backward", "step": "training step", "epoch": "epoch"}


def table(results: dict[str, Any]) -> str:
    """A row for each op, kind, dtype and mode, over the calls that take eager `SHORT` or longer."""
    commit = (results["commit"] or "unknown")[:10] + (" with changes" if results["dirty"] else "")
    lines = [
        f"{results['device']['name']}; torch {results['versions']['torch']}, commit {commit}. Speed-up over"
        f" eager PyTorch, for calls of which eager takes {SHORT * 1e6:.0f} µs or more:",
        "",
        "| op | kind | dtype | mode | cases | median | best | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str, str, str], list[float]] = {}
    for case in results["cases"]:
        speedups = rows.setdefault((case["op"], case["kind"], case["dtype"], case["mode"]), [])
        if case["failure"]:
            continue
        eager, ours = (case["variants"][name]["median_ms"] for name in ("eager", "aefast"))
        if eager >= SHORT * 1e3:
            speedups.append(eager / ours)
    for (op, kind, dtype, mode), speedups in rows.items():
        if not speedups:
            continue
        figures = statistics.median(speedups), max(speedups), min(speedups)
        shown = " | ".join(f"{figure:.2f}×" for figure in figures)
        lines.append(f"| `{op}` | {kind} | {dtype} | {MODE_NAMES[mode]} | {len(speedups)} | {shown} |")
    failing = [case["id"] for case in results["cases"] if case["failure"]]
    if failing:
        lines += ["", f"Wrong, and therefore not timed: {', '.join(failing)}."]
    return "\n".join(lines)


def section(folder: Path) -> str:
    """The tables of all documents in `folder`, with the marks around them."""
    tables = [table(document.load_results(path)) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join([BEGIN, *tables, END])


def replaced(readme: str, folder: Path) -> str:
    """`readme` with its section made anew."""
    before, rest = readme.split(BEGIN)
    return before + section(folder) + rest.split(END)[1]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(replaced(path.read_text(), Path(__file__).parent / "results"))
