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
    cache = _cache_bytes() if name == "cpu" else None
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    if name == "cpu" and not torch.backends.mkl.is_available():
        # The library knows where its products are faster than MKL's; of another BLAS it knows nothing.
        torch.ops.aefast_cpu.use_large_blas_products(True)
    if cache is not None:
        torch.ops.aefast_cpu.keep_memory(cache)
    return None


def keeps_to_float32() -> str | None:
    """The instruction set of the CPU library, if it never forms products of float32 in bfloat16 on this processor; None
    if it may, where that is faster, or if there is no library."""
    if load("cpu") is not None:
        return None
    name = torch.ops.aefast_cpu.instruction_set()
    return None if name in ("amx", "avx512bf16") else name


def _cache_bytes() -> int | None:
    """How much freed memory the environment asks the CPU library to keep; None for its default."""
    given = os.environ.get("AEFAST_CPU_CACHE_MB", "")
    if not given:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= 12):
        raise InputError(f"AEFAST_CPU_CACHE_MB must be a whole number of megabytes, 0 or more, got {given!r}")
    return int(given) << 20


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
