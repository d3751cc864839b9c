"""What a call of a module does beside its forward."""

from __future__ import annotations

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The names of a module's hooks, as torch keeps them."""

OF_ALL_MODULES = tuple(getattr(nn.modules.module, f"_global{name}") for name in HOOKS)
"""The hooks that each call of any module calls."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module calls hooks, such as those of pruning, spectral norm and observers."""
    return any(getattr(module, name) for name in HOOKS) or any(OF_ALL_MODULES)
