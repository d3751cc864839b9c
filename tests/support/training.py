"""What a run has left behind, and how to stop one."""

import json
import os
import signal

import torch

from aefast.models import from_pretrained
from aefast.train import CapturedStep


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory):
    """The lines of metrics.jsonl without the one thing that depends on the clock."""
    return [{k: v for k, v in record.items() if k != "samples_per_s"} for record in metrics(directory)]


def weights(directory):
    return torch.cat([parameter.flatten() for parameter in from_pretrained(directory).parameters()])


# What each kind of sparsity of a small model needs.
SPARSE = {
    "topk": {"k": 5},
    "batchtopk": {"k": 5},
    "l1": {"sparsity_weight": 0.01},
    "kl": {"sparsity_weight": 0.01, "rate": 0.1},
    "jumprelu": {"sparsity_weight": 0.01, "bandwidth": 0.5, "threshold": 0.2},
}


def interrupt_after(monkeypatch, steps, number=signal.SIGINT):
    """The process gets a signal while it takes training step number `steps`."""
    taken = 0
    original = CapturedStep.__call__

    def call(self, batch):
        nonlocal taken
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), number)
        return original(self, batch)

    monkeypatch.setattr(CapturedStep, "__call__", call)


def interrupt_in_validation(monkeypatch, trainer, steps):
    """The process gets a signal as the trainer turns to validation behind so many steps."""
    evaluate, is_sent = trainer.model.eval, False

    def interrupted():
        nonlocal is_sent
        if trainer.steps_taken == steps and not is_sent:
            is_sent = True
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate()

    monkeypatch.setattr(trainer.model, "eval", interrupted)
