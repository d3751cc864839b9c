"""A reconstruction loss at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import aefast.functional as AF
from aefast.ops import _arguments
from aefast.ops import pyramid_loss as op


class PyramidLoss(nn.Module):
    """Σ_l w_l · mean |P_l(input) - P_l(target)|^p over the levels of an image pyramid.

    The function is `aefast.functional.pyramid_loss`, which says more of each argument. The loss has no parameters.

    Args:
        levels: how many, the full resolution among them.
        p: the power, at least 1, or "charbonnier".
        pyramid: "average", "gaussian" or "laplacian".
        weights: w_l, one a level; None for 1.
        reduction: "mean", "sum" or "none".
        eps: of charbonnier.

    Shape:
        input and target (B, C, H, W); the loss is a scalar, or (B,) for "none".

    Raises:
        InputError: an unknown name, or a number out of its range.
    """

    def __init__(
        self,
        levels: int = 4,
        p: float | str = 1,
        pyramid: str = "average",
        weights: Sequence[float] | None = None,
        reduction: str = "mean",
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        op.checked("PyramidLoss", levels, p, pyramid, weights, reduction, eps)
        self.levels = levels
        self.p = p
        self.pyramid = pyramid
        self.weights = None if weights is None else tuple(weights)
        self.reduction = reduction
        self.eps = eps

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return AF.pyramid_loss(
            input,
            target,
            levels=self.levels,
            p=self.p,
            pyramid=self.pyramid,
            weights=self.weights,
            reduction=self.reduction,
            eps=self.eps,
        )

    def eager(self) -> nn.Module:
        """The same in plain PyTorch."""
        return _EagerPyramidLoss(
            self.levels, self.p, self.pyramid, self.weights, self.reduction, self.eps
        ).train(self.training)

    def extra_repr(self) -> str:
        return _shown(self)


class _EagerPyramidLoss(nn.Module):
    """`PyramidLoss` as it is written without it: a pyramid of either image."""

    def __init__(
        self,
        levels: int,
        p: float | str,
        pyramid: str,
        weights: tuple[float, ...] | None,
        reduction: str,
        eps: float,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.p = p
        self.pyramid = pyramid
        self.weights = weights
        self.reduction = reduction
        self.eps = eps

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        wide = _arguments.accumulator(input.dtype)
        of_input, of_target = (
            op.levels_of(images.to(wide), self.levels, self.pyramid) for images in (input, target)
        )
        weights = self.weights or (1.0,) * self.levels
        terms = [
            weight * self._reduced(one - other)
            for weight, one, other in zip(weights, of_input, of_target, strict=True)
        ]
        return sum(terms[1:], start=terms[0])

    def _reduced(self, residual: torch.Tensor) -> torch.Tensor:
        if self.p == "charbonnier":
            values = (residual.square() + self.eps * self.eps).sqrt()
        elif self.p == 1:
            values = residual.abs()
        else:
            values = residual.square() if self.p == 2 else residual.abs().pow(self.p)
        if self.reduction == "none":
            return values.mean((1, 2, 3))
        return values.sum() if self.reduction == "sum" else values.mean()

    def extra_repr(self) -> str:
        return _shown(self)


def _shown(loss: PyramidLoss | _EagerPyramidLoss) -> str:
    """The options that are not the defaults, after the pyramid and its levels."""
    parts = [loss.pyramid, f"levels={loss.levels}"]
    if loss.p == "charbonnier":
        parts.append(f"charbonnier, eps={loss.eps:g}")
    elif loss.p != 1:
        parts.append(f"p={loss.p:g}")
    if loss.weights is not None:
        parts.append(f"weights={' '.join(f'{weight:g}' for weight in loss.weights)}")
    if loss.reduction != "mean":
        parts.append(loss.reduction)
    return ", ".join(parts)
