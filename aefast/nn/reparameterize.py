"""A reparameterised sample of a normal distribution and its KL divergence, in one op."""

from __future__ import annotations

import torch
from torch import nn

import aefast.functional as AF
from aefast.ops import _arguments
from aefast.ops import reparameterize as op


class Reparameterize(nn.Module):
    """``z = mu + exp(logvar / 2) * eps`` and the KL divergence to N(0, I): `aefast.functional.reparameterize`.

    It has no parameters, and samples in training and in eval mode alike; what a model reconstructs in eval mode
    is the model's to decide.

    Args:
        reduction: of the divergence over the leading dimensions: "mean", "sum" or "none".
        logvar_range: (low, high); logvar counts as its nearest value in it. None sets no limits.

    Shape:
        mu and logvar (\\*, D); z (\\*, D), and the divergence in nats: a scalar, or (\\*) for "none".

    Raises:
        InputError: an unknown reduction, or a logvar_range that is no pair of numbers in order.
    """

    def __init__(self, reduction: str = "mean", logvar_range: tuple[float, float] | None = None) -> None:
        super().__init__()
        _arguments.check_reduction(reduction, "Reparameterize")
        op.range_of(logvar_range, "Reparameterize")
        self.reduction = reduction
        self.logvar_range = logvar_range

    def forward(
        self,
        mu: torch.Tensor,
        logvar: torch.Tensor,
        *,
        seed: int | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return AF.reparameterize(
            mu,
            logvar,
            seed=seed,
            generator=generator,
            reduction=self.reduction,
            logvar_range=self.logvar_range,
        )

    def eager(self) -> nn.Module:
        """The same in plain PyTorch, with noise by `torch.randn_like`."""
        return EagerReparameterize(self.reduction, self.logvar_range).train(self.training)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}, logvar_range={self.logvar_range}"


class EagerReparameterize(nn.Module):
    """`Reparameterize` as it is written without it."""

    def __init__(self, reduction: str, logvar_range: tuple[float, float] | None) -> None:
        super().__init__()
        self.reduction = reduction
        self.logvar_range = logvar_range

    def forward(self, mu: torch.Tensor, logvar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.logvar_range is not None:
            logvar = logvar.clamp(*self.logvar_range)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1)
        return z, _arguments.reduce(kl, self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}, logvar_range={self.logvar_range}"
