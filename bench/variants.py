"""What a case is measured with beside eager PyTorch: aefast by backend, torch.compile, and other people's code."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aefast.ops import _registry

COMPILED, COMPILED_GRAPHS = "compile", "compile, CUDA graphs"


@dataclass(frozen=True)
class Rival:
    """Public code for the same thing.

    ``load()`` imports it and gives what the case runs: for an op a function of its inputs, for a training step one that
    makes a `Learner` of a model. ``modes`` are those that it serves. ``refuses(device, dtype)`` says why it does not
    serve such tensors, or None.
    """

    package: str
    load: Callable[[], Any]
    modes: tuple[str, ...] = ("fwd", "fwdbwd")
    refuses: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None

    def missing(self, mode: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it does not take part, or None."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if mode not in self.modes:
            return f"{self.package} has no {mode}"
        return self.refuses(device, dtype)


def backends(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Variant → context: "aefast" as requested, and where that is "auto" each further backend with kernels that serve.

    A backend of its own is called ``aefast[name]``.
    """
    requested = _registry.requested()
    found = {"aefast": functools.partial(_registry.backend, requested)}
    if requested != "auto":
        return found
    chosen = _registry.choose(op, torch.empty(0, device=device, dtype=dtype))
    for row in _registry.BACKENDS:
        if row.name in (chosen, "eager") or _registry.refusal(row.name, op, device.type, dtype):
            continue
        found[f"aefast[{row.name}]"] = functools.partial(_registry.backend, row.name)
    return found


def is_ours(name: str) -> bool:
    return name == "aefast" or name.startswith("aefast[")


def compiled(
    function: Callable[..., Any], device: torch.device, has_graphs: bool = False
) -> Callable[..., Any]:
    """`function` by torch.compile for the one shape that it is called with; on CUDA with max-autotune, which records
    CUDA graphs if they are asked for."""
    mode = None
    if device.type == "cuda":
        mode = "max-autotune" if has_graphs else "max-autotune-no-cudagraphs"
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)
