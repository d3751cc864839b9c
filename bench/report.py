"""The report of a run: a page in Markdown, with plots, beside the JSON that holds every sample."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aefast.bench import document, readme
from aefast.errors import InputError

EAGER_COLOUR, AEFAST_COLOUR = "tab:gray", "tab:blue"
VARIANT_COLOURS = ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def require_plots() -> None:
    """Raises:
    InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('bench: --report draws with matplotlib; pip install "aefast[bench]"')


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the page and its plots beside the document in `folder`, named after the device; their paths.

    `add_estimates` ends the page.
    """
    stem = document.file_stem(results["device"]["name"])
    plots = {name: folder / f"{stem}-{name}.png" for name in PLOTS}
    for name, path in plots.items():
        _draw(PLOTS[name][1], results, path)
    page = folder / f"{stem}.md"
    page.write_text(markdown(results, {name: path.name for name, path in plots.items()}, f"{stem}.json"))
    return [page, *plots.values()]


def markdown(results: dict[str, Any], plots: dict[str, str], data: str) -> str:
    """The page; `plots` are the files of the pictures by name, and `data` is that of the document."""
    parts = [
        f"# aefast on {results['device']['name']}",
        readme.table(results),
        _others(results),
        _ceilings(results),
        *(f"![{PLOTS[name][0]}]({file})" for name, file in plots.items()),
        _losses(results),
        _losses_to_compile(results),
        _missing(results),
        "## All cases",
        f"Medians. Error: the largest of a result relative to its largest true value. Samples: [{data}]({data}).",
        _all_cases(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def add_estimates(page: Path) -> None:
    """Adds what `aefast bench --static` estimates to a page, which takes minutes where Triton is."""
    text = f"## The GPU kernels, from their machine code\n\n{_static()}\n"
    page.write_text(f"{page.read_text()}\n{text}")


def _static() -> str:
    from aefast.bench import static

    try:
        return static.markdown(static.estimates())
    except InputError as error:
        return f"Not estimated: {error}."


def _timed(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for case in results["cases"] if not case["failure"]]


def _median(case: dict[str, Any], name: str) -> float:
    return case["variants"][name]["median_ms"]


def _speedup(case: dict[str, Any], over: str = "eager") -> float:
    return _median(case, over) / _median(case, "aefast")


def _other_names(results: dict[str, Any]) -> list[str]:
    names = dict.fromkeys(name for case in _timed(results) for name in case["variants"])
    return [name for name in names if name not in ("aefast", "eager")]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _others(results: dict[str, Any]) -> str:
    """aefast over compiled and rival code, case by case in its medians."""
    rows = []
    for op, mode in dict.fromkeys((case["op"], case["mode"]) for case in _timed(results)):
        for name in _other_names(results):
            ratios = [
                _speedup(case, name)
                for case in _timed(results)
                if (case["op"], case["mode"]) == (op, mode) and name in case["variants"]
            ]
            if ratios:
                figures = statistics.median(ratios), max(ratios), min(ratios)
                shown = [f"{figure:.2f}×" for figure in figures]
                rows.append([f"`{op}`", readme.MODE_NAMES[mode], name, str(len(ratios)), *shown])
    if not rows:
        return ""
    return "Speed-up over other code, at every length of call:\n\n" + _table(
        ["op", "mode", "over", "cases", "median", "best", "worst"], rows
    )


def _ceilings(results: dict[str, Any]) -> str:
    rows = [
        [
            dtype,
            f"{one['bytes_per_s'] / 1e9:,.0f}",
            f"{one['flops_per_s'] / 1e9:,.0f}",
            f"{one['exps_per_s'] / 1e9:,.1f}",
        ]
        for dtype, one in results["ceilings"].items()
    ]
    return "The device's own ceilings, measured in the same run:\n\n" + _table(
        ["dtype", "copies, GB/s read and written", "products, GFLOP/s", "exponentials, 10⁹/s"], rows
    )


def _losses(results: dict[str, Any]) -> str:
    rows = _slower([case for case in _timed(results) if _median(case, "eager") >= 0.05], "eager")
    if not rows:
        return "No case of which eager takes 50 µs or more is slower than eager with 95 % confidence."
    return "Slower than eager, with 95 % confidence, where eager takes 50 µs or more:\n\n" + _table(
        ["case", "speed-up", "95 % interval"], rows
    )


def _losses_to_compile(results: dict[str, Any]) -> str:
    compiled = [case for case in _timed(results) if "compile" in case["variants"]]
    if not compiled:
        return ""
    rows = _slower(compiled, "compile")
    if not rows:
        return "No case that torch.compile took part in is slower than its code with 95 % confidence."
    return "Slower than torch.compile, with 95 % confidence, at every length of call:\n\n" + _table(
        ["case", "speed-up", "95 % interval"], rows
    )


def _slower(cases: list[dict[str, Any]], over: str) -> list[list[str]]:
    """Rows of those that are slower than the code of that name with 95 % confidence, the slowest first."""
    found = [
        (_speedup(case, over), case["id"], interval)
        for case in cases
        if (interval := document.speedup_interval(case, over))[1] < 1.0
    ]
    return [
        [f"`{name}`", f"{speedup:.2f}×", "{:.2f} to {:.2f}".format(*interval)]
        for speedup, name, interval in sorted(found)
    ]


def _missing(results: dict[str, Any]) -> str:
    found = document.missing_variants(results["cases"])
    lines = [
        f"- {name}, from {len(ids)} cases of this run: {reason}" for (name, reason), ids in found.items()
    ]
    if results["not_run"]:
        lines.append(
            f"- {len(results['not_run'])} cases, for want of time: from `{results['not_run'][0]}` on"
        )
    return "\n".join(["What did not take part:", "", *lines]) if lines else ""


def _all_cases(results: dict[str, Any]) -> str:
    others = _other_names(results)
    has_graphs = any("graph" in one for case in results["cases"] for one in case["variants"].values())
    replayed = ["as graphs"] if has_graphs else []
    rows = []
    for case in results["cases"]:
        found = [case["error"].get(name) for name in ("aefast", "eager")]
        errors = ["" if error is None else f"{error:.1e}" for error in found]
        if case["failure"]:
            blank = ["" for _ in [*replayed, *others]]
            rows.append([f"`{case['id']}`", "", "", "wrong", *blank, "", "", *errors])
            continue
        share = case["floor_ms"] / _median(case, "aefast")
        peaks = [case["variants"][name]["peak_bytes"] / 1e6 for name in ("aefast", "eager")]
        rows.append(
            [
                f"`{case['id']}`",
                _milliseconds(_median(case, "eager")),
                _milliseconds(_median(case, "aefast")),
                f"{_speedup(case):.2f}×",
                *(_replayed(case) for _ in replayed),
                *(_milliseconds(_median(case, name)) if name in case["variants"] else "" for name in others),
                f"{share:.0%} {case['floor_kind']}",
                "{:.3g} / {:.3g}".format(*peaks),
                *errors,
            ]
        )
    times = [f"{name}, ms" for name in others]
    header = ["case", "eager, ms", "aefast, ms", "speed-up", *replayed, *times]
    return _table([*header, "of floor", "peak MB, aefast / eager", "error", "eager's"], rows)


def _replayed(case: dict[str, Any]) -> str:
    """The speed-up of CUDA graphs replayed without the host, where there are any."""
    graphs = [case["variants"][name].get("graph") for name in ("eager", "aefast")]
    if None in graphs:
        return ""
    eager, ours = (graph["median_ms"] for graph in graphs)
    return f"{eager / ours:.2f}×"


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _draw(plot: Callable[[Any, dict[str, Any]], None], results: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Inches; what has many rows makes it higher.
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure, results)
    figure.savefig(path, dpi=110)


def _speedup_plot(figure: Any, results: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in _timed(results):
        if _median(case, "eager") >= 0.05:
            groups.setdefault((case["op"], case["kind"], case["mode"]), []).append(case)
    figure.set_figheight(max(5.5, 1.2 + 0.2 * len(groups)))
    others = _other_names(results)
    named = set()
    for row, cases in enumerate(groups.values()):
        for name, colour in (("eager", AEFAST_COLOUR), *zip(others, VARIANT_COLOURS, strict=False)):
            ratios = [_speedup(case, name) for case in cases if name in case["variants"]]
            if not ratios:
                continue
            height = row if name == "eager" else row + 0.25
            label = None if name in named else f"over {name}"
            named.add(name)
            style = {"color": colour, "markersize": 4, "markeredgewidth": 0, "alpha": 0.45}
            axes.plot(ratios, [height] * len(ratios), "o", label=label, **style)
            axes.plot(statistics.median(ratios), height, "|", color=colour, markersize=13, markeredgewidth=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}×")
    axes.set_yticks(range(len(groups)), [f"{op} {kind}".rstrip() + f", {mode}" for op, kind, mode in groups])
    axes.set_ylim(len(groups), -1)
    axes.set_xlabel("speed-up of aefast (bar: median), calls of which eager takes 50 µs or more")
    if named:
        axes.legend(loc="lower right")
    axes.set_title(results["device"]["name"])


def _scaling_plot(figure: Any, results: dict[str, Any]) -> None:
    columns = 4
    by_op: dict[str, list[dict[str, Any]]] = {}
    for case in _timed(results):
        if "batch" in case["sizes"]:
            by_op.setdefault(case["op"], []).append(case)
    series = map(_over_batches, by_op.values())
    panels = [chosen for chosen in series if len({case["sizes"]["batch"] for case in chosen}) > 1]
    rows = max(1, -(-len(panels) // columns))
    figure.set_size_inches(3.2 * columns, 0.6 + 2.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    names = ["eager", "aefast", *_other_names(results)]
    colours = dict(zip(names, (EAGER_COLOUR, AEFAST_COLOUR, *VARIANT_COLOURS), strict=False))
    lines = {}
    for axes, chosen in zip(grid, panels, strict=False):
        for name, colour in colours.items():
            present = [case for case in chosen if name in case["variants"]]
            batches, times = (
                [case["sizes"]["batch"] for case in present],
                [_median(case, name) for case in present],
            )
            if present:
                (lines[name],) = axes.plot(batches, times, "o-", markersize=4, color=colour)
        batches, floors = (
            [case["sizes"]["batch"] for case in chosen],
            [case["floor_ms"] for case in chosen],
        )
        (lines["floor"],) = axes.plot(batches, floors, ":", color="black")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.tick_params(which="both", labelsize=7)
        first = chosen[0]
        sizes = " → ".join(str(size) for key, size in first["sizes"].items() if key != "batch")
        axes.set_title(
            f"{first['op']} {first['kind']}\n{sizes}, {first['dtype']}, {readme.MODE_NAMES[first['mode']]}",
            fontsize=8,
        )
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("batch", fontsize=9)
    figure.supylabel("milliseconds", fontsize=9)
    if lines:
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(lines), fontsize=8)


def _over_batches(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of an op's cases those in its last mode of the shape that was run at most batches, the larger of two."""
    mode = cases[-1]["mode"]
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in cases:
        if case["mode"] == mode:
            rest = tuple((key, size) for key, size in case["sizes"].items() if key != "batch")
            series.setdefault((case["kind"], case["dtype"], rest), []).append(case)
    chosen = max(series.values(), key=lambda found: (len(found), math.prod(found[0]["sizes"].values())))
    return sorted(chosen, key=lambda case: case["sizes"]["batch"])


def _roofline_plot(figure: Any, results: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    cases = [case for case in _timed(results) if case["cost"]["flops"]]
    for name, colour in (("eager", EAGER_COLOUR), ("aefast", AEFAST_COLOUR)):
        axes.plot(
            [case["cost"]["flops"] / case["cost"]["bytes"] for case in cases],
            [case["cost"]["flops"] / _median(case, name) * 1e-6 for case in cases],
            "o",
            markersize=3.5,
            alpha=0.5,
            color=colour,
            markeredgewidth=0,
            label=name,
        )
    for dtype, one in results["ceilings"].items():
        knee = one["flops_per_s"] / one["bytes_per_s"]
        points = [0.1, knee, max(1e3, 10 * knee)]
        roof = [min(point * one["bytes_per_s"], one["flops_per_s"]) * 1e-9 for point in points]
        axes.plot(points, roof, "k-", linewidth=1)
        axes.annotate(dtype, (points[-1], roof[-1]), fontsize=8, ha="right", va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of the least traffic")
    axes.set_ylabel("GFLOP/s")
    axes.legend()
    axes.set_title(results["device"]["name"])


# Name → caption, and what draws it on a figure.
PLOTS: dict[str, tuple[str, Callable[[Any, dict[str, Any]], None]]] = {
    "speedup": ("Speed-up of every case, by op, kind and mode", _speedup_plot),
    "scaling": (
        "Time over the size of the batch, of the largest shape that each op was run at with most batches",
        _scaling_plot,
    ),
    "roofline": (
        "Operations a second over operations a byte, under the device's own ceilings",
        _roofline_plot,
    ),
}
