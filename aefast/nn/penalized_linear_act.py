"""A dense layer and a sparsity penalty of what it gives, in one op."""

from __future__ import annotations

import torch
from torch import nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.kernels.penalty import PENALTIES
from aefast.nn.linear_act import LinearAct
from aefast.ops import _arguments
from aefast.ops import penalized_linear_act as op


class PenalizedLinearAct(LinearAct):
    """``h = activation(x @ weight.T + bias)`` and a penalty of h: `aefast.functional.penalized_linear_act`.

    Initialisation and state dict (``weight``, ``bias``) are those of `torch.nn.Linear`.

    Args:
        in_features, out_features, bias, activation, negative_slope, alpha: as `LinearAct` takes them.
        penalty: "l1", the mean over the batch of Σ_f |h_f|; or "kl", Σ_f KL(rate ‖ mean of h_f over the batch).
        rate: of "kl", the mean that it draws towards.

    Shape:
        input (\\*, in_features); h (\\*, out_features), and the penalty, a scalar.

    Raises:
        InputError: as `LinearAct`; or an unknown penalty, or a rate that is not between 0 and 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "relu",
        *,
        penalty: str = "l1",
        rate: float = 0.05,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if penalty not in PENALTIES:
            hint = _arguments.did_you_mean(penalty, PENALTIES)
            raise InputError(f"penalty={penalty!r}: expected one of {', '.join(PENALTIES)}{hint}")
        _arguments.check_number("rate", rate, "PenalizedLinearAct", 0.0, 1.0)
        if rate in (0, 1):
            raise InputError(f"rate={rate!r}: expected a number between 0 and 1")
        super().__init__(
            in_features,
            out_features,
            bias,
            activation,
            negative_slope=negative_slope,
            alpha=alpha,
            device=device,
            dtype=dtype,
        )
        self.penalty = penalty
        self.rate = rate

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return AF.penalized_linear_act(x, self.weight, self.bias, **self._options())

    def _options(self) -> dict[str, str | float]:
        return {
            "activation": self.activation,
            "penalty": self.penalty,
            "rate": self.rate,
            "negative_slope": self.negative_slope,
            "alpha": self.alpha,
        }

    def eager(self) -> nn.Linear:
        """The layer in plain PyTorch, with copied values, the same state dict keys and the same two results."""
        twin = self._copied_into(_EagerPenalizedLinearAct)
        twin.options = self._options()
        return twin

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, penalty={self.penalty}"
        return f"{text}, rate={self.rate:g}" if self.penalty == "kl" else text


class _EagerPenalizedLinearAct(nn.Linear):
    """`PenalizedLinearAct` as it is written without it."""

    options: dict[str, str | float]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return op.reference(x, self.weight, self.bias, **self.options)
