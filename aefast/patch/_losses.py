"""Losses of reconstructions, as modules and as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops import _arguments
from aefast.patch._classes import Methods


def fused_loss(input: Any, target: Any, kind: str, reduction: str, **options: float) -> Tensor | None:
    """`aefast.functional.reconstruction_loss` where it is what torch's loss of these is, else None.

    torch broadcasts, and gives half precision back as it is; what is not a number it hands on, where aefast's losses
    say so.
    """
    if not (isinstance(input, Tensor) and isinstance(target, Tensor) and input.shape == target.shape):
        return None
    is_autocast = _arguments.is_autocast(input.device.type)
    if not is_autocast and (input.dtype != target.dtype or input.dtype.itemsize < 4):
        return None
    if (is_autocast and kind == "bce") or not input.is_floating_point() or input.device != target.device:
        return None
    try:
        return AF.reconstruction_loss(input, target, kind, reduction=reduction, **options)
    except InputError:
        return None


# torch's function → aefast's kind, and of each further option whether aefast has a loss with such a value.
_KINDS: dict[Callable[..., Tensor], tuple[str, dict[str, Callable[[Any], bool]]]] = {
    F.mse_loss: ("mse", {}),
    F.l1_loss: ("l1", {}),
    F.huber_loss: ("huber", {"delta": lambda delta: delta > 0}),
    F.smooth_l1_loss: ("huber", {"beta": lambda beta: beta == 1}),
    F.binary_cross_entropy: ("bce", {"weight": lambda weight: weight is None}),
    F.binary_cross_entropy_with_logits: (
        "bce_with_logits",
        {"weight": lambda weight: weight is None, "pos_weight": lambda weight: weight is None},
    ),
}
_FUNCTIONS = {
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
}


def why_not(function: Callable[..., Tensor], reduction: Any, options: dict[str, Any]) -> str | None:
    """Why a call of a loss with such options is left as it is, or None."""
    if reduction not in ("mean", "sum"):
        return f"its reduction is {reduction!r}; to fuse the loss with its sum, it must be 'mean' or 'sum'"
    known = _KINDS[function][1]
    for name, value in options.items():
        if name not in known or not known[name](value):
            return f"aefast has no such loss with this {name}"
    return None


def _fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kind = _KINDS[function][0]

    def loss(input: Any, target: Any, *rest: Any, reduction: Any = "mean", **options: Any) -> Tensor:
        if not rest and why_not(function, reduction, options) is None:
            parameters = {"delta": options["delta"]} if "delta" in options else {}
            value = fused_loss(input, target, kind, reduction, **parameters)
            if value is not None:
                return value
        return function(input, target, *rest, reduction=reduction, **options)

    return loss


FUSED = {function: _fused(function) for function in _KINDS}
"""torch's function → what takes its arguments and does the same, fused where it can be."""


def _options_of(module: nn.Module) -> dict[str, Any]:
    return {name: getattr(module, name) for name in _KINDS[_FUNCTIONS[type(module)]][1]}


def _forward_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    names = tuple(_KINDS[function][1])

    def forward(self: nn.Module, input: Tensor, target: Tensor) -> Tensor:
        options = {name: getattr(self, name) for name in names}
        return FUSED[function](input, target, reduction=self.reduction, **options)

    return forward


MODULES: dict[type[nn.Module], Methods] = {
    module_class: {"forward": _forward_of(function)} for module_class, function in _FUNCTIONS.items()
}
"""The classes of losses, and what takes the place of their methods."""


def why_not_module(module: nn.Module) -> str | None:
    """Why a loss of one of the classes in `MODULES` is left as it is, or None."""
    return why_not(_FUNCTIONS[type(module)], module.reduction, _options_of(module))
