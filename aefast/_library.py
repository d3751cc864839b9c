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
        return f"the {name} library was not built into this installation ({path.name} is missing)"
    if name == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None
