"""The compiled libraries, loaded at first use; why one is missing is remembered."""

import functools
from pathlib import Path

import torch

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
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None
