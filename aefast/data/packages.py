"""Packages that data sources need and aefast itself does not."""

from __future__ import annotations

import importlib
from types import ModuleType

from aefast.data.dataset import DataError


def optional(module: str, package: str, source: str) -> ModuleType:
    """The module, which `package` contains; `DataError` about the data `source` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f'data={source!r}: needs {package} ({error}); install it with: pip install "aefast[train]"'
        ) from None
