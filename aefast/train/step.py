"""One training step."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from aefast.models import Model


def make_optimizer(parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam with its update fused into one kernel over all parameters."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


class TrainStep:
    """Forward, loss, backward and update on one batch.

    Nothing in it waits for the device.

    Args:
        model: the model to train, on its device, in training mode.
        lr: learning rate of Adam.
    """

    def __init__(self, model: Model, lr: float) -> None:
        self.model = model
        self.optimizer = make_optimizer(model.parameters(), lr)

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Train on a batch (B, features); the loss terms before the update, detached scalars by name."""
        self.optimizer.zero_grad(set_to_none=True)
        output = self.model(batch)
        loss = output.loss
        terms = {name: term.detach() for name, term in output.terms.items()}
        # With it the reconstruction would be kept through the backward.
        del output
        loss.backward()
        self.optimizer.step()
        return terms


class EagerStep:
    """The same step on the plain PyTorch twin of a model: what `TrainStep` is compared with.

    Args:
        model: the model whose twin, with copied weights, is trained.
        lr: learning rate of Adam.
    """

    def __init__(self, model: Model, lr: float) -> None:
        self.model = model
        self.twin = model.eager_twin()
        self.optimizer = make_optimizer(self.twin.parameters(), lr)

    def __call__(self, batch: torch.Tensor) -> None:
        """Train on a batch (B, features)."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eager_loss(self.twin, batch).backward()
        self.optimizer.step()
