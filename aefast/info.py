"""What is installed, what can run here, and why not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from aefast import _library, ops
from aefast.ops import _registry


def versions() -> dict[str, str]:
    """Package → version, or "not installed"."""
    found = {"python": platform.python_version()}
    for package in ("aefast", "torch", "triton", "numpy", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    """Device → what it is."""
    library = _library.load("cpu")
    kernels = (
        f"kernels: {torch.ops.aefast_cpu.instruction_set()}" if library is None else "no compiled kernels"
    )
    found = {
        "cpu": f"{torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}, {kernels}"
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def triton_compiler() -> str | None:
    """Why Triton cannot compile kernels here, or None: it needs a C compiler and Python's headers."""
    missing = _registry.triton_missing()
    if missing:
        return missing
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return "no C compiler (gcc or clang) on PATH, and CC is not set"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"Python's headers are not installed ({header} is missing)"
    if not torch.cuda.is_available():
        return (
            "torch finds no CUDA device to compile for (ahead-of-time compilation and the interpreter work)"
        )
    return None


def backends(dtype: torch.dtype = torch.float32) -> dict[str, dict[str, str | None]]:
    """Op → backend → why it cannot serve the op on its own kind of device, or None if it can."""
    table: dict[str, dict[str, str | None]] = {}
    for op in ops.OPS:
        table[op] = {}
        for backend in _registry.BACKENDS:
            device_types = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
            reasons = [
                _registry.refusal(backend.name, op, device_type, dtype) for device_type in device_types
            ]
            table[op][backend.name] = None if None in reasons else reasons[0]
    return table


def main() -> None:
    """Prints versions, devices, and op × backend × reason."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("what", "found", title="aefast info", title_justify="left")
    for name, value in {**versions(), **devices()}.items():
        table.add_row(name, value)
    table.add_row("AEFAST_BACKEND", _registry.requested())
    table.add_row("Triton compiles here", triton_compiler() or "yes")
    console.print(table)

    names = [backend.name for backend in _registry.BACKENDS]
    table = Table("op", *names, title="op × backend (a dtype of float32; ✓ serves it)", title_justify="left")
    reasons: dict[str, str] = {}
    for op, row in backends().items():
        table.add_row(op, *("✓" if row[name] is None else "–" for name in names))
        reasons.update({name: reason for name, reason in row.items() if reason})
    console.print(table)
    for name, reason in reasons.items():
        console.print(f"{name}: {reason}", highlight=False)
