"""The training step beside the same step in plain PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from aefast.models import Model
from aefast.train import replay
from aefast.train.step import WARM_UP_STEPS, CapturedStep, EagerStep, make_optimizer

ROUNDS = 31
RUN_SECONDS = 0.03


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Training throughput of two implementations of a model, in samples a second."""

    aefast: float
    eager: float

    @property
    def ratio(self) -> float:
        """How many times the eager throughput aefast reaches."""
        return self.aefast / self.eager

    def __str__(self) -> str:
        return (
            f"aefast {self.aefast:,.0f} samples/s · eager PyTorch {self.eager:,.0f} samples/s · "
            f"{self.ratio:.2f}×"
        )


def compare_with_eager(
    model: Model, batches: Sequence[torch.Tensor], lr: float, precision: str = "fp32"
) -> Comparison:
    """Time `CapturedStep` and `EagerStep` on the same batches.

    Both start from copies of the model's weights; the model itself is not touched. Short runs of the two take
    turns in this process, each round beginning with the other one; the medians over the rounds are compared.

    Args:
        model: the model, on its device.
        batches: tensors (B, features) on that device, of one size; runs cycle through them.
        lr: learning rate of both.
        precision: of both, as of `CapturedStep`.
    """
    model = copy.deepcopy(model)
    if not model.training:
        model.train()
    fused = CapturedStep(model, make_optimizer(model.parameters(), lr), precision=precision)
    eager = EagerStep(model, lr, precision)
    device = batches[0].device
    # The fused step is recorded in its first two runs.
    count = max(WARM_UP_STEPS, replay.WARM_UP_STEPS // 2 + 1)
    warm_up = [_run(step, batches, count, device) for step in (fused, eager) * 3]
    # As many steps a run as the slower of the two takes RUN_SECONDS for.
    steps = max(1, math.ceil(RUN_SECONDS / (max(warm_up[4:]) / count)))
    seconds: dict[object, list[float]] = {fused: [], eager: []}
    for index in range(ROUNDS):
        for step in (fused, eager) if index % 2 == 0 else (eager, fused):
            seconds[step].append(_run(step, batches, steps, device))
    samples = steps * len(batches[0])
    return Comparison(
        samples / statistics.median(seconds[fused]), samples / statistics.median(seconds[eager])
    )


def _run(
    step: Callable[[torch.Tensor], object],
    batches: Sequence[torch.Tensor],
    count: int,
    device: torch.device,
) -> float:
    """Seconds that `count` steps take, to the end of the last one's work on the device."""
    start = time.perf_counter()
    for index in range(count):
        step(batches[index % len(batches)])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
