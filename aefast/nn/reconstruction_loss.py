"""How far a reconstruction is from what it was made of, as a module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops import _arguments, _loss


class ReconstructionLoss(nn.Module):
    """`aefast.functional.reconstruction_loss`, which has the formulas.

    Args:
        kind: "mse", "rmse", "l1", "huber", "lp", "charbonnier", "bce" or "bce_with_logits".
        p: of lp, at least 1; other kinds have none.
        eps: of charbonnier, at least 0.
        delta: of huber, above 0.
        reduction: "mean", "sum", "batchmean" or "none".
        loss_weight: at least 0, what the loss is multiplied by.

    Shape:
        input and target of any one shape; the loss is a scalar, or of that shape for "none".

    Raises:
        InputError: an unknown kind or reduction, or a number out of its range.
    """

    def __init__(
        self,
        kind: str = "mse",
        *,
        p: float | None = None,
        eps: float = 1e-3,
        delta: float = 1.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        _loss.loss_of("ReconstructionLoss", kind, p, eps, delta)
        _loss.check_reduction("ReconstructionLoss", reduction)
        _loss.check_weight("ReconstructionLoss", loss_weight)
        if kind == "rmse" and reduction == "none":
            raise InputError(
                "ReconstructionLoss: reduction must be mean, sum or batchmean for rmse, got 'none'"
            )
        self.kind = kind
        self.p = p
        self.eps = eps
        self.delta = delta
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return AF.reconstruction_loss(
            input,
            target,
            self.kind,
            p=self.p,
            eps=self.eps,
            delta=self.delta,
            reduction=self.reduction,
            loss_weight=self.loss_weight,
        )

    def eager(self) -> nn.Module:
        """The same in plain PyTorch."""
        return EagerReconstructionLoss(
            self.kind, self.p, self.eps, self.delta, self.reduction, self.loss_weight
        )

    def extra_repr(self) -> str:
        return _shown(self)


class EagerReconstructionLoss(nn.Module):
    """`ReconstructionLoss` as it is written without it."""

    def __init__(
        self, kind: str, p: float | None, eps: float, delta: float, reduction: str, loss_weight: float
    ) -> None:
        super().__init__()
        self.kind = kind
        self.p = p
        self.eps = eps
        self.delta = delta
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        wide = _arguments.accumulator(input.dtype)
        input, target = input.to(wide), target.to(wide)
        # The sum that PyTorch's own reduction has, where there is one; "batchmean" is none of its losses'.
        reduction = "sum" if self.reduction == "batchmean" else self.reduction
        value = self._reduced(input, target, reduction)
        if self.reduction == "batchmean":
            value = value / input.shape[0]
        value = value.sqrt() if self.kind == "rmse" else value
        return value if self.loss_weight == 1.0 else self.loss_weight * value

    def _reduced(self, input: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        if self.kind in ("mse", "rmse"):
            return F.mse_loss(input, target, reduction=reduction)
        if self.kind == "l1":
            return F.l1_loss(input, target, reduction=reduction)
        if self.kind == "huber":
            return F.huber_loss(input, target, reduction=reduction, delta=self.delta)
        if self.kind == "bce":
            return F.binary_cross_entropy(input, target, reduction=reduction)
        if self.kind == "bce_with_logits":
            return F.binary_cross_entropy_with_logits(input, target, reduction=reduction)
        residual = input - target
        if self.kind == "lp":
            return _arguments.reduce(residual.abs().pow(self.p), reduction)
        return _arguments.reduce((residual.square() + self.eps * self.eps).sqrt(), reduction)

    def extra_repr(self) -> str:
        return _shown(self)


def _shown(loss: ReconstructionLoss | EagerReconstructionLoss) -> str:
    """The kind, the number it has, the reduction, and a weight."""
    name = {"lp": "p", "charbonnier": "eps", "huber": "delta"}.get(loss.kind)
    number = [] if name is None else [f"{name}={getattr(loss, name):g}"]
    weight = [] if loss.loss_weight == 1.0 else [f"loss_weight={loss.loss_weight:g}"]
    return ", ".join([loss.kind, *number, f"reduction={loss.reduction}", *weight])
