"""How a model is trained."""

from __future__ import annotations

import dataclasses
import math

import torch

from aefast.errors import InputError
from aefast.nn.linear_act import check_positive_int

DEVICES = ("auto", "cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of a training run.

    Attributes:
        epochs: passes over the training samples.
        batch_size: samples of a step; the last batch of an epoch keeps the rest.
        lr: learning rate of Adam.
        seed: decides the order of the samples and the noise of stochastic models.
        device: "cpu", "cuda", or "auto": CUDA where it is.
        log_every: steps between two lines of ``metrics.jsonl``; the end of an epoch always makes one.
        checkpoint_seconds: longest time without a checkpoint, in seconds. The end of the first epoch, the end
            of the run and an interruption make one too.
    """

    epochs: int = 10
    batch_size: int = 256
    lr: float = 1e-3
    seed: int = 0
    device: str = "auto"
    log_every: int = 50
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every"):
            check_positive_int(getattr(self, name), name)
        for name in ("lr", "checkpoint_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InputError(f"{name}={value!r}: expected a finite number above 0")
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
        """The device that `device` means on this machine."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)
