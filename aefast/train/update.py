"""The update of torch's fused Adam and AdamW on the CPU, by a kernel of aefast's or torch's, without what
`Optimizer.step` does around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from aefast import _library
from aefast.ops import _registry
from aefast.ops._library import below_autograd

# Parameters, gradients, first and second moments, steps.
Operands = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class Update:
    """``optimizer.zero_grad()`` and ``optimizer.step()`` on the CPU.

    Profiling ranges, hooks that nobody has registered and the search for devices and dtypes take a hundred microseconds
    a step, a third of what the update of 800,000 parameters takes. Where an optimizer is one of torch's own, fused, and
    nobody listens to it, a kernel is called at once, with the state that the optimizer keeps; any other makes its own
    step.

    In float32 and float64 that kernel is aefast's. It equals torch's to rounding, but that on x86-64 it takes subnormal
    numbers, in float32 those below 1.2e-38, for 0. The first moments of weights whose unit is dead shrink to there
    within 800 steps, and an instruction with one takes processors of Intel a hundred times as long.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._is_known = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        if not self._is_known or "zero_grad" in vars(self._optimizer):
            self._optimizer.zero_grad(set_to_none=True)
            return
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self) -> None:
        """Update the parameters that have gradients."""
        groups = self._optimizer.param_groups
        operands = [self._operands(group) for group in groups] if self._is_unobserved() else [None]
        if None in operands:
            self._optimizer.step()
            return
        with torch.no_grad():
            for group, of_group in zip(groups, operands, strict=True):
                _update(group, of_group)

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

    def _operands(self, group: dict[str, Any]) -> Operands | None:
        """What the update of a group takes; None if the optimizer has to look after it."""
        if not group["fused"] or group["amsgrad"]:
            return None
        operands: Operands = ([], [], [], [], [])
        parameters, gradients, means, squares, steps = operands
        state = self._optimizer.state
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            its = state.get(parameter)
            if not gradient.is_cpu or gradient.layout is not torch.strided or not its:
                return None
            parameters.append(parameter)
            gradients.append(gradient)
            means.append(its["exp_avg"])
            squares.append(its["exp_avg_sq"])
            steps.append(its["step"])
        return operands


def _update(group: dict[str, Any], operands: Operands) -> None:
    parameters, gradients, means, squares, steps = operands
    if not parameters or _is_updated(group, operands):
        return
    torch._foreach_add_(steps, 1)
    beta1, beta2 = group["betas"]
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        parameters,
        gradients,
        means,
        squares,
        [],
        steps,
        amsgrad=False,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _is_updated(group: dict[str, Any], operands: Operands) -> bool:
    """Makes the update by aefast's kernel, if that is there and takes the operands."""
    parameters, _, means, squares, steps = operands
    is_wanted = _registry.requested() in ("auto", "cpu") and not _registry.is_watched()
    if not is_wanted or _library.load("cpu") is not None:
        return False
    if any(type(one) not in _registry.PLAIN for tensors in operands for one in tensors):
        return False
    with below_autograd():
        is_updated = torch.ops.aefast_cpu.adam.default(
            *operands,
            float(group["lr"]),
            *map(float, group["betas"]),
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
        )
    if is_updated:
        for changed in (parameters, means, squares, steps):
            torch._C._increment_version(changed)
    return is_updated
