"""The results of a run as a JSON document: what it was measured on, by which code, and every sample."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import aefast
from aefast.bench.ceilings import Ceilings
from aefast.bench.measure import Result, interval
from aefast.bench.timing import Timing
from aefast.errors import InputError

SCHEMA = 1
CPUINFO = Path("/proc/cpuinfo")
FIELDS = ("device", "backend", "versions", "commit", "dirty", "ceilings", "not_run", "cases")
CASE_FIELDS = (
    *("id", "op", "kind", "dtype", "mode", "sizes", "error", "failure", "missing", "cost"),
    *("floor_ms", "floor_kind", "variants"),
)


def make(
    results: list[Result],
    ceilings: dict[str, Ceilings],
    device: str,
    backend: str,
    not_run: Sequence[str] = (),
) -> dict[str, Any]:
    """The document of a run; `ceilings` by dtype, `not_run` the ids that a limit of time left out."""
    commit, dirty = _commit()
    return {
        "schema": SCHEMA,
        "device": {"type": device, "name": device_name(device), "machine": platform.machine()},
        "backend": backend,
        "versions": {
            "aefast": aefast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": commit,
        "dirty": dirty,
        "ceilings": {
            dtype: {f"{kind}_per_s": rate for kind, rate in asdict(one).items()}
            for dtype, one in ceilings.items()
        },
        "not_run": list(not_run),
        "cases": [_case(result) for result in results],
    }


def _case(result: Result) -> dict[str, Any]:
    variants = {
        name: {**_timing(timing), "peak_bytes": result.peak_bytes[name]}
        for name, timing in result.timings.items()
    }
    for name, timing in result.graph_timings.items():
        variants[name]["graph"] = _timing(timing)
    return {
        "id": result.id,
        "op": result.op,
        "kind": result.kind,
        "dtype": result.dtype,
        "mode": result.mode,
        "sizes": result.sizes,
        "error": {name: error if math.isfinite(error) else None for name, error in result.errors.items()},
        "failure": result.failure,
        "missing": result.missing,
        "cost": asdict(result.cost),
        "floor_ms": result.floor * 1e3,
        "floor_kind": result.floor_kind,
        "variants": variants,
    }


def _timing(timing: Timing) -> dict[str, Any]:
    return {
        "median_ms": timing.median * 1e3,
        "p20_ms": timing.quantile(0.2) * 1e3,
        "p80_ms": timing.quantile(0.8) * 1e3,
        # Five digits are more than any clock tells.
        "samples_ms": [float(f"{sample * 1e3:.5g}") for sample in timing.samples],
    }


def device_name(device: str) -> str:
    """GPU or processor, and for the latter the family and model, since virtual machines give many of them one name, the
    threads, the vector instructions that torch uses, and AMX."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if CPUINFO.exists():
        pairs = (line.partition(":") for line in CPUINFO.read_text().splitlines())
        # All of a machine's processors, of which the last is as good as another.
        fields = {name.strip(): value.strip() for name, _, value in pairs}
        model = fields.get("model name", model)
        if "cpu family" in fields:
            model += f" (family {fields['cpu family']}, model {fields['model']})"
    unit = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{unit}"


def file_stem(name: str) -> str:
    """What the files of a device of that name are called: letters and digits in lower case, and hyphens."""
    plain = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b", " ", name.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", plain))


def _commit() -> tuple[str | None, bool | None]:
    """The commit that the code is at and whether it was changed since.

    Outside a checkout that is what AEFAST_COMMIT says, for copies sent elsewhere, and whether it was changed unknown.
    """
    stated = os.environ.get("AEFAST_COMMIT"), None
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", os.fspath(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # An installed package may lie inside somebody else's checkout.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return stated
        return git("rev-parse", "HEAD"), git("status", "--porcelain") != ""
    except (OSError, subprocess.CalledProcessError):
        return stated


def save(document: dict[str, Any], path: Path) -> None:
    """Writes a line a case, so that a change shows where it is."""
    head = json.dumps({**document, "cases": []}, indent=1).removesuffix("[]\n}")
    path.write_text(head + "[\n" + ",\n".join(json.dumps(case) for case in document["cases"]) + "\n]}\n")


def load(path: Path) -> dict[str, Any]:
    """The document in a file.

    Raises:
        InputError: there is no such file, or no such document in it.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"bench: cannot read results from {path}: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise InputError(f"bench: {path} holds no results of schema {SCHEMA}")
    return document


def load_results(path: Path) -> dict[str, Any]:
    """The document of a run of the benchmark in a file, with every field that this version writes.

    Raises:
        InputError: there is no such file, or no such document in it.
    """
    document = load(path)
    lacking = [field for field in FIELDS if field not in document]
    if not lacking:
        lacking = [
            f"cases[{index}].{field}"
            for index, case in enumerate(document["cases"])
            for field in CASE_FIELDS
            if field not in case
        ]
    if lacking:
        raise InputError(f"bench: {path} lacks {lacking[0]}; it is of another version of aefast")
    return document


def check_comparable(earlier: dict[str, Any], device: str, backend: str, option: str) -> None:
    """Raises:
    InputError: `earlier`, which `option` has named, was measured on another device, or of another backend.
    """
    name = device_name(device)
    if earlier["device"]["name"] != name:
        raise InputError(
            f"bench: {option} needs results of the same device: {earlier['device']['name']} is not {name}"
        )
    if earlier["backend"] != backend:
        raise InputError(
            f"bench: {option} needs results of the same backend: {earlier['backend']} is not {backend}"
        )


def check_same_code(earlier: dict[str, Any]) -> None:
    """Raises:
    InputError: `earlier` was measured of another commit.
    """
    commit, _ = _commit()
    if earlier["commit"] != commit:
        raise InputError(
            f"bench: --resume needs results of the same commit: {earlier['commit']} is not {commit}"
        )


def joined(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """One document of two runs; of a case that both have the new run's."""
    ids = {case["id"] for case in new["cases"]}
    cases = [*(case for case in earlier["cases"] if case["id"] not in ids), *new["cases"]]
    return {
        **new,
        "ceilings": {**earlier["ceilings"], **new["ceilings"]},
        "cases": sorted(cases, key=lambda case: case["op"]),
    }


def missing_variants(cases: list[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """(variant, why it did not take part) → the ids of the cases without it."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, reason in case["missing"].items():
            found.setdefault((name, reason), []).append(case["id"])
    return found


REGRESSION = 0.05


def regressions(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """A line for each case whose speed-up over eager fell by `REGRESSION` or more since `old`, or that fails now.

    The speed-up is compared, not the time, because eager took turns with it on the same machine in the same
    state. A fall that the spread of both runs' rounds explains at 95 % confidence does not count.
    """
    before = {case["id"]: case for case in old["cases"]}
    lines = []
    for case in new["cases"]:
        earlier = before.get(case["id"])
        if earlier is None or earlier["failure"]:
            continue
        if case["failure"]:
            lines.append(f"{case['id']}: fails: {case['failure']}")
            continue
        speedup, was = _speedup(case), _speedup(earlier)
        if speedup <= (1 - REGRESSION) * was and speedup_interval(case)[1] < speedup_interval(earlier)[0]:
            lines.append(f"{case['id']}: {speedup:.2f}×, was {was:.2f}×")
    return lines


def _speedup(case: dict[str, Any]) -> float:
    return case["variants"]["eager"]["median_ms"] / case["variants"]["aefast"]["median_ms"]


def speedup_interval(case: dict[str, Any], over: str = "eager") -> tuple[float, float]:
    return interval(case["variants"][over]["samples_ms"], case["variants"]["aefast"]["samples_ms"])
