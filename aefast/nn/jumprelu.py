"""The activation of JumpReLU sparse autoencoders."""

from __future__ import annotations

import math

import torch
from torch import nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.nn.linear_act import check_positive_int
from aefast.ops import _arguments
from aefast.ops import jumprelu as op


class JumpReLU(nn.Module):
    """x where it is above a learnt threshold, else 0: `aefast.functional.jumprelu`.

    Args:
        features: size of the last dimension of the input.
        threshold: what all thresholds begin with, above 0.
        bandwidth: width in which a threshold gets a gradient, above 0.

    Shape:
        input (\\*, features); h (\\*, features), and how many of a row are not 0 (\\*).

    Attributes:
        log_threshold: (features,), the logarithm of the thresholds, which stay above 0.

    Raises:
        InputError: features is not a positive integer, or threshold or bandwidth is not a number above 0.
    """

    def __init__(
        self,
        features: int,
        threshold: float = 1e-3,
        bandwidth: float = 1e-3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int(features, "features")
        for name, value in (("threshold", threshold), ("bandwidth", bandwidth)):
            _arguments.check_number(name, value, "JumpReLU", 0.0)
            if value == 0:
                raise InputError(f"{name}={value!r}: expected a number above 0")
        self.log_threshold = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.bandwidth = bandwidth
        self._first_threshold = threshold
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all thresholds to the one that they begin with."""
        nn.init.constant_(self.log_threshold, math.log(self._first_threshold))

    @property
    def threshold(self) -> torch.Tensor:
        """(features,), above 0."""
        return self.log_threshold.exp()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return AF.jumprelu(x, self.threshold, self.bandwidth)

    def eager(self) -> nn.Module:
        """The same in plain PyTorch, with copied values."""
        twin = _EagerJumpReLU(len(self.log_threshold), bandwidth=self.bandwidth).to(self.log_threshold)
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)

    def extra_repr(self) -> str:
        return f"features={len(self.log_threshold)}, bandwidth={self.bandwidth:g}"


class _EagerJumpReLU(JumpReLU):
    """`JumpReLU` as it is written without it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return op.reference(x, self.threshold, self.bandwidth)
