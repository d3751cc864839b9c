"""The torch.library namespace ``aefast`` and what its ops share."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("aefast", "DEF")


def define(schema: str) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


# What the ops run on plain tensors, by their names.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def implement(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what `op` runs on every device, on tensors that autograd has left behind."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        IMPLEMENTATIONS[op] = function
        return torch.library.impl(LIBRARY, op, "CompositeExplicitAutograd")(function)

    return register


below_autograd = torch._C._AutoDispatchBelowAutograd


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without what it does for torch.func's transforms, which is half of its time."""
    return super(torch.autograd.Function, function).apply
