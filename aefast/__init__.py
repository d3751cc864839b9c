"""Fused CUDA, Triton and C++ kernels that make autoencoder training fast."""

from aefast.errors import AefastError, BackendError, InputError
from aefast.ops._registry import backend

__version__ = "0.1.0"
__all__ = ["AefastError", "BackendError", "InputError", "__version__", "backend"]
