"""The compiled libraries, loaded at first use; why one is missing is remembered."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from aefast.errors import InputError

_FOLDER = Path(__file__).parent / "lib"


@functools.cache
def load(name: str) -> str | None:
    """Loads ``libaefast_<name>.so`` ("cpu" or "cuda"); None on success, else the reason."""
    path = _FOLDER / f"libaefast_{name}.so"
    if not path.exists():
        needed = "nvcc" if name == "cuda" else "a C++ compiler"
        return f"{path.name} was not built into this installation; reinstall where {needed} is on PATH"
    if name == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    if name == "cpu":
        _check_cache()
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def _check_cache() -> None:
    """Told before the first tensor needs it, and as an error in the input."""
    given = os.environ.get("AEFAST_CPU_CACHE_MB", "")
    if given and not (given.isascii() and given.isdigit()):
        raise InputError(f"AEFAST_CPU_CACHE_MB must be a whole number of megabytes, 0 or more, got {given!r}")


@contextlib.contextmanager
def without_kept_memory() -> Iterator[None]:
    """Within it the CPU library keeps no memory for its next tensors: each is allocated by torch, and freed."""
    if load("cpu") is not None:
        yield
        return
    before = torch.ops.aefast_cpu.keep_memory(0)
    try:
        yield
    finally:
        torch.ops.aefast_cpu.keep_memory(before)
