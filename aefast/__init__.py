"""Fused CUDA, Triton and C++ kernels that make autoencoder training fast."""

import importlib
from typing import Any

from aefast.errors import AefastError, BackendError, InputError
from aefast.ops._registry import backend

__version__ = "0.1.0"
__all__ = ["AefastError", "BackendError", "InputError", "__version__", "backend", "patch"]


def __getattr__(name: str) -> Any:
    # It stands on the modules that are above this one, and costs a second import.
    if name == "patch":
        return importlib.import_module("aefast.patch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
