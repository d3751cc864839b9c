"""The head of a variational encoder in one op: a dense layer to [mu | logvar], a sample, and its KL divergence."""

from __future__ import annotations

import torch
from torch import nn

import aefast.functional as AF
from aefast.nn._hooks import has_hooks
from aefast.nn.linear_act import DenseParameters, check_positive_int
from aefast.nn.reparameterize import EagerReparameterize
from aefast.ops import _arguments
from aefast.ops import reparameterize as op


class GaussianHead(DenseParameters):
    """``[mu | logvar] = h @ weight.T + bias``, a sample z of N(mu, exp(logvar)), and its KL divergence to N(0, I).

    The function is `aefast.functional.gaussian_head`; Kingma and Welling, Auto-Encoding Variational Bayes
    (arXiv:1312.6114), section 2.4 and appendices B and C.2. Initialisation and state dict (``weight``, ``bias``) are
    those of ``torch.nn.Linear(in_features, 2 * latent)``. It samples in training and in eval mode alike.

    Args:
        in_features: size of the last dimension of h.
        latent: size of z, mu and logvar.
        bias: whether the layer adds a learnt bias.
        reduction: of the divergence over the leading dimensions: "mean", "sum" or "none".
        logvar_range: (low, high); logvar counts as its nearest value in it. None sets no limits.

    Shape:
        h (\\*, in_features); z, mu and logvar (\\*, latent), logvar as the layer gives it; the divergence in nats, a
        scalar, or (\\*) for "none". They come in the order z, divergence, mu, logvar.

    Attributes:
        weight: (2 latent, in_features), the rows of mu and then those of logvar.
        bias: (2 latent,), or None.

    Raises:
        InputError: an unknown reduction, a logvar_range that is no pair of numbers in order, or a size that is not
            a positive integer or does not fit into memory.
    """

    def __init__(
        self,
        in_features: int,
        latent: int,
        bias: bool = True,
        *,
        reduction: str = "mean",
        logvar_range: tuple[float, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int(in_features, "in_features")
        check_positive_int(latent, "latent")
        _arguments.check_reduction(reduction, "GaussianHead")
        op.range_of(logvar_range, "GaussianHead")
        sizes = f"in_features={in_features}, latent={latent}"
        super().__init__(in_features, 2 * latent, bias, sizes, device, dtype)
        self.latent = latent
        self.reduction = reduction
        self.logvar_range = logvar_range

    def forward(
        self,
        h: torch.Tensor,
        *,
        seed: int | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return AF.gaussian_head(
            h,
            self.weight,
            self.bias,
            seed=seed,
            generator=generator,
            reduction=self.reduction,
            logvar_range=self.logvar_range,
        )

    def moments(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mu and logvar (\\*, latent) alone, logvar held to logvar_range; draws nothing."""
        if has_hooks(self):
            # Pruning makes the weight in one of them.
            *_, mu, logvar = self(h, seed=0)
        else:
            mu, logvar = AF.linear_act(h, self.weight, self.bias, "identity").chunk(2, -1)
        return mu, logvar if self.logvar_range is None else logvar.clamp(*self.logvar_range)

    def eager(self) -> nn.Linear:
        """The head in plain PyTorch, with copied values, the same state dict keys and the same four results."""
        twin = self._copied_into(_EagerGaussianHead)
        twin.sample = EagerReparameterize(self.reduction, self.logvar_range).train(self.training)
        return twin

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, latent={self.latent}, bias={self.bias is not None}, "
            f"reduction={self.reduction}, logvar_range={self.logvar_range}"
        )


class _EagerGaussianHead(nn.Linear):
    """`GaussianHead` as it is written without it."""

    sample: EagerReparameterize

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = super().forward(h).chunk(2, -1)
        return *self.sample(mu, logvar), mu, logvar
