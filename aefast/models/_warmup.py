"""Weights of loss terms that grow over the first training steps."""

from __future__ import annotations

import torch
from torch import nn


def steps_taken(count: int, device: torch.device | str | None) -> torch.Tensor | None:
    """What a model counts its steps in, a buffer ``training_steps``, for a warm-up over `count` of them; None without
    one."""
    return torch.zeros((), device=device, dtype=torch.int64) if count else None


def warmed_up(module: nn.Module, term: torch.Tensor, weight: float, steps: int) -> torch.Tensor:
    """The term times its weight in this forward pass, which counts if it ends a step of `module`'s training.

    The count stays on its device: nothing waits for it.

    Args:
        module: the model, or its twin, with ``training_steps`` and ``ends_step``.
        term: the term, without a weight.
        weight: its whole weight, which it has in eval mode.
        steps: training steps over which that grows linearly from 0; 0 for none.
    """
    if not module.training or not steps:
        return term if weight == 1 else weight * term
    is_compiling = torch.compiler.is_compiling()
    # Within a backward this is what a checkpoint computes again, of the pass that was last.
    is_repeated = not is_compiling and torch._C._current_graph_task_id() != -1
    count = module.training_steps - 1 if is_repeated and module.ends_step else module.training_steps
    share = (count.to(term.dtype) / steps).clamp(max=1.0)
    if is_compiling:
        # The compiler would compute this again for the backward, from a count that has moved on by then
        # (https://github.com/pytorch/pytorch/pull/197039). Reductions such as this one, of a scalar, it keeps.
        share = share.amin()
    if module.ends_step and not is_repeated:
        module.training_steps.add_(1)
    return weight * share * term
