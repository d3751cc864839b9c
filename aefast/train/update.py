"""Clipping, the optimizer's step and a moving average; those of torch's fused Adam and AdamW on the CPU by a kernel of
aefast's or torch's, without what `Optimizer.step` does around it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.swa_utils import get_ema_multi_avg_fn

from aefast import _library
from aefast.ops import _registry
from aefast.ops._library import below_autograd

# What torch's clip_grad_norm_ adds to the norm.
_CLIP_EPSILON = 1e-6


@dataclasses.dataclass
class _Operands:
    """Of the parameters of a group that have gradients."""

    parameters: list[Tensor] = dataclasses.field(default_factory=list)
    gradients: list[Tensor] = dataclasses.field(default_factory=list)
    means: list[Tensor] = dataclasses.field(default_factory=list)
    squares: list[Tensor] = dataclasses.field(default_factory=list)
    steps: list[Tensor] = dataclasses.field(default_factory=list)
    # None at all, or one of each parameter.
    averages: list[Tensor] = dataclasses.field(default_factory=list)


class Update:
    """``optimizer.zero_grad()``, and ``optimizer.step()`` between clipping and a moving average.

    Profiling ranges, hooks that nobody has registered and the search for devices and dtypes take a hundred microseconds
    a step, a third of what the update of 800,000 parameters takes. Where an optimizer is one of torch's own, fused, and
    nobody listens to it, a kernel is called at once, with the state that the optimizer keeps; any other makes its own
    step.

    In float32 and float64 that kernel is aefast's. It equals torch's to rounding, but that on x86-64 it takes subnormal
    numbers, in float32 those below 1.2e-38, for 0. The first moments of weights whose unit is dead shrink to there
    within 800 steps, and an instruction with one takes processors of Intel a hundred times as long. In its pass over
    the parameters it scales their gradients to the norm, too, and moves their averages.

    Args:
        optimizer: what makes the step.
        averages: moving averages of the optimizer's parameters, in its order, or none.
        decay: of the averages.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, averages: Sequence[Tensor] = (), decay: float = 0.0
    ) -> None:
        self._optimizer = optimizer
        self._is_known = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        self._averages = list(averages)
        self._decay = decay

    def zero_grad(self) -> None:
        """Forget the gradients."""
        if not self._is_known or "zero_grad" in vars(self._optimizer):
            self._optimizer.zero_grad(set_to_none=True)
            return
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, clip_norm: float | None = None) -> None:
        """Update the parameters that have gradients, and the averages of all.

        Args:
            clip_norm: largest norm of all gradients together; longer ones are scaled down to it, in place. None for no
                limit.
        """
        parameters = [one for group in self._optimizer.param_groups for one in group["params"]]
        operands = self._operands() if self._is_unobserved() else None
        if operands is None:
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            self._optimizer.step()
            self.average()
            return
        scale = 1.0 if clip_norm is None else _scale(parameters, clip_norm)
        for group, of_group in zip(self._optimizer.param_groups, operands, strict=True):
            _update(group, of_group, scale, self._decay)
        if self._averages:
            of_none = [index for index, one in enumerate(parameters) if one.grad is None]
            average(
                [self._averages[index] for index in of_none],
                [parameters[index] for index in of_none],
                self._decay,
            )

    def average(self) -> None:
        """Update the averages alone."""
        parameters = [one for group in self._optimizer.param_groups for one in group["params"]]
        average(self._averages, parameters[: len(self._averages)], self._decay)

    def _is_unobserved(self) -> bool:
        """Whether nothing is to run before or after the optimizer's step.

        Torch's schedulers of learning rates put a step of their own in its place.
        """
        optimizer = self._optimizer
        return self._is_known and not (
            "step" in vars(optimizer)
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )

    def _operands(self) -> list[_Operands] | None:
        """What the update of each group takes; None if the optimizer has to look after one."""
        operands: list[_Operands] = []
        state = self._optimizer.state
        averages = iter(self._averages)
        for group in self._optimizer.param_groups:
            if not group["fused"] or group["amsgrad"]:
                return None
            of_group = _Operands()
            for parameter in group["params"]:
                gradient, its_average = parameter.grad, next(averages, None)
                if gradient is None:
                    continue
                its = state.get(parameter)
                if not gradient.is_cpu or gradient.layout is not torch.strided or not its:
                    return None
                of_group.parameters.append(parameter)
                of_group.gradients.append(gradient)
                of_group.means.append(its["exp_avg"])
                of_group.squares.append(its["exp_avg_sq"])
                of_group.steps.append(its["step"])
                if its_average is not None:
                    of_group.averages.append(its_average)
            operands.append(of_group)
        return operands


@torch.no_grad()
def average(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """Move each average, in place, towards its value by 1 - decay of the way."""
    if averages:
        _average(decay)(averages, values, None)


_average = functools.cache(get_ema_multi_avg_fn)


def _scale(parameters: list[Tensor], clip_norm: float) -> float:
    """By how much gradients are still to be multiplied, so that their norm is at most `clip_norm`."""
    gradients = [one.grad for one in parameters if one.grad is not None]
    # One that several parameters share is multiplied for each of them before any is updated.
    is_shared = len({id(one) for one in gradients}) < len(gradients)
    if gradients and not is_shared and _takes_kernels(gradients):
        with below_autograd():
            norm = torch.ops.aefast_cpu.gradient_norm.default(gradients)
        if not norm < 0:
            scale = clip_norm / (norm + _CLIP_EPSILON)
            return 1.0 if scale > 1 else scale
    nn.utils.clip_grad_norm_(parameters, clip_norm)
    return 1.0


@torch.no_grad()
def _update(group: dict[str, Any], operands: _Operands, scale: float, decay: float) -> None:
    if not operands.parameters or _is_updated(group, operands, scale, decay):
        return
    if scale != 1:
        torch._foreach_mul_(operands.gradients, scale)
    torch._foreach_add_(operands.steps, 1)
    beta1, beta2 = group["betas"]
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        operands.parameters,
        operands.gradients,
        operands.means,
        operands.squares,
        [],
        operands.steps,
        amsgrad=False,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    average(operands.averages, operands.parameters, decay)


def _takes_kernels(tensors: Iterable[Tensor]) -> bool:
    """Whether aefast's kernels are wanted and there, for tensors of torch's own."""
    is_wanted = _registry.requested() in ("auto", "cpu") and not _registry.is_watched()
    return is_wanted and _library.load("cpu") is None and all(type(one) in _registry.PLAIN for one in tensors)


def _is_updated(group: dict[str, Any], operands: _Operands, scale: float, decay: float) -> bool:
    """Makes the update by aefast's kernel, if that is there and takes the operands."""
    every = (
        operands.parameters,
        operands.gradients,
        operands.means,
        operands.squares,
        operands.steps,
        operands.averages,
    )
    if not _takes_kernels(itertools.chain.from_iterable(every)):
        return False
    with below_autograd():
        is_updated = torch.ops.aefast_cpu.adam.default(
            *every,
            float(group["lr"]),
            *map(float, group["betas"]),
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
            scale,
            1.0 - decay,
        )
    if is_updated:
        for changed in every:
            if changed is not operands.gradients or scale != 1:
                torch._C._increment_version(changed)
    return is_updated
