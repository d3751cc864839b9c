"""How the learning rate goes over a run."""

from __future__ import annotations

import dataclasses
import math

import torch

from aefast.errors import InputError
from aefast.models._base import check_choice
from aefast.nn.linear_act import check_positive_int

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The share of the learning rate that each step takes.

    It grows linearly over the first `warmup_steps` steps, the first of them taking 1 / warmup_steps, and from there
    on falls to 0, which the step after the last would take: not at all ("constant"), linearly, or as the first half
    of a cosine (SGDR, Loshchilov and Hutter 2017, equation 5, without restarts).

    Args:
        kind: "constant", "linear" or "cosine".
        warmup_steps: steps until the whole rate is reached; 0 for none.
        total_steps: steps of the run; of no account for "constant", and to be given for the others.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.kind, "schedule", SCHEDULES)
        if self.warmup_steps != 0:
            check_positive_int(self.warmup_steps, "warmup_steps")
        if self.kind == "constant":
            return
        if self.total_steps is None:
            raise InputError(
                f"total_steps=None: expected how many steps the run has, for schedule={self.kind!r}"
            )
        check_positive_int(self.total_steps, "total_steps")
        if self.warmup_steps >= self.total_steps:
            raise InputError(
                f"warmup_steps={self.warmup_steps}: expected fewer than the run has steps, {self.total_steps}"
            )

    @property
    def is_constant(self) -> bool:
        """Whether every step takes the whole rate."""
        return self.kind == "constant" and self.warmup_steps == 0

    def __call__(self, step: torch.Tensor) -> torch.Tensor:
        """The share that step number `step` (from 0) takes; both are scalars on one device, of float64."""
        share = torch.ones_like(step)
        if self.kind != "constant":
            passed = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
            passed = passed.clamp(0.0, 1.0)
            share = 1.0 - passed if self.kind == "linear" else 0.5 * (1.0 + torch.cos(math.pi * passed))
        if self.warmup_steps:
            share = torch.where(step < self.warmup_steps, (step + 1.0) / self.warmup_steps, share)
        return share
