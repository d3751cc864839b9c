"""How a model is trained."""

from __future__ import annotations

import dataclasses
import math

import torch

from aefast.errors import InputError
from aefast.models._base import check_choice
from aefast.nn.linear_act import check_positive_int
from aefast.train.schedule import SCHEDULES
from aefast.train.step import PRECISIONS

DEVICES = ("auto", "cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of a training run.

    Attributes:
        epochs: passes over the training samples.
        steps: the run ends after so many steps instead; None for whole epochs.
        batch_size: samples of a step; the last batch of an epoch keeps the rest.
        drop_last: whether that rest is left out of the epoch instead. An iterable decides itself.
        lr: learning rate of Adam.
        schedule: how the learning rate goes over the run: "constant", "linear" or "cosine", to 0
            (`aefast.train.Schedule`).
        warmup_steps: steps over which it grows to `lr` at first; 0 for none.
        precision: "fp32"; "bf16" or "fp16", the type in which matrix products are formed, as `CapturedStep` has it.
        clip_norm: largest norm of all gradients together; None for no limit.
        accumulate: into how many parts a batch is cut whose gradients are summed, to save memory.
        ema_decay: decay of a moving average of the weights, which is what is validated and kept, and of the running
            statistics that networks of the caller's own keep; None for none.
        validate_every: steps between two validations on held-out samples within an epoch, whose end always makes one;
            None for these alone.
        patience: the run ends once so many validations in a row have not lowered the loss on held-out samples, which
            are as many epochs without `validate_every`; None to go on to the end.
        keep_last: how many checkpoints stay.
        keep_best: whether the weights with the lowest loss on held-out samples go to ``best/``.
        steps_per_replay: steps of a CUDA graph, 0 for none; on the CPU each step is one.
        seed: decides the order of the samples and the noise of stochastic models.
        device: "cpu", "cuda", or "auto": CUDA where it is.
        log_every: steps between two lines of ``metrics.jsonl``; the end of an epoch always makes one.
        checkpoint_seconds: longest time without a checkpoint, in seconds, or ten times as long as the last one took to
            write if that is longer. The end of the first epoch, the end of the run and an interruption make one too.
    """

    epochs: int = 10
    steps: int | None = None
    batch_size: int = 256
    drop_last: bool = False
    lr: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    precision: str = "fp32"
    clip_norm: float | None = None
    accumulate: int = 1
    ema_decay: float | None = None
    validate_every: int | None = None
    patience: int | None = None
    keep_last: int = 2
    keep_best: bool = False
    steps_per_replay: int = 8
    seed: int = 0
    device: str = "auto"
    log_every: int = 50
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every", "accumulate", "keep_last"):
            check_positive_int(getattr(self, name), name)
        if not isinstance(self.drop_last, bool):
            raise InputError(f"drop_last={self.drop_last!r}: expected true or false")
        if self.steps_per_replay != 0:
            check_positive_int(self.steps_per_replay, "steps_per_replay")
        for name in ("steps", "validate_every", "patience"):
            if getattr(self, name) is not None:
                check_positive_int(getattr(self, name), name)
        if self.warmup_steps != 0:
            check_positive_int(self.warmup_steps, "warmup_steps")
        check_choice(self.schedule, "schedule", SCHEDULES)
        check_choice(self.precision, "precision", PRECISIONS)
        for name in ("lr", "checkpoint_seconds", "clip_norm"):
            value = getattr(self, name)
            if name == "clip_norm" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InputError(f"{name}={value!r}: expected a finite number above 0")
        decay = self.ema_decay
        if decay is not None and (not isinstance(decay, (int, float)) or not 0 <= decay < 1):
            raise InputError(f"ema_decay={decay!r}: expected a number from 0 to below 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed!r}: expected an integer from 0 to 2**63 - 1")
        if self.device not in DEVICES:
            raise InputError(f"device={self.device!r}: expected one of {', '.join(DEVICES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            build = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
            raise InputError(
                f"device='cuda': expected a CUDA device, but torch {torch.__version__} {build}; "
                "use device cpu"
            )

    def resolve_device(self) -> torch.device:
        """The device that `device` means in this process; a GPU with its number, as tensors on it have it."""
        if self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available()):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
