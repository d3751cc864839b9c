"""Draws from the prior, or from the box that codes lie in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aefast.models import VAE, Model
from aefast.models._base import check_choice
from aefast.sampling._base import Sampler, register

PRIORS = ("normal", "box")


@register("prior")
class PriorSampler(Sampler):
    """N(0, I), or the uniform distribution over the box that the codes of real data lie in.

    The box is what is left of a model without a prior: the least and the largest value of each latent.

    Args:
        prior: "normal" or "box".
    """

    option_names = ("prior",)

    def __init__(self, prior: str = "normal") -> None:
        self.prior = check_choice(prior, "prior", PRIORS)

    @classmethod
    def of(cls, model: Model) -> PriorSampler:
        """The one that suits a model: "normal" for those trained with that prior, `VAE` and `InfoVAE`, else "box"."""
        return cls("normal" if isinstance(model, VAE) else "box")

    def _fit(self, codes: Tensor) -> None:
        self._low, self._high = (bound.float().cpu() for bound in codes.aminmax(dim=0))

    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        shape = (count, len(self._low))
        if self.prior == "normal":
            return torch.randn(shape, generator=generator)
        return torch.lerp(self._low, self._high, torch.rand(shape, generator=generator))

    def _log_prob(self, codes: Tensor) -> Tensor:
        codes = codes.double()
        if self.prior == "normal":
            return -0.5 * (codes.square() + math.log(2 * math.pi)).sum(1)
        is_inside = ((self._low <= codes) & (codes <= self._high)).all(1)
        volume = (self._high.double() - self._low).log().sum()
        return torch.where(is_inside, -volume, -math.inf)

    def _state(self) -> dict[str, Tensor]:
        return {"low": self._low, "high": self._high}

    def _shapes(self, latent: int) -> dict[str, tuple[int, ...]]:
        return {"low": (latent,), "high": (latent,)}

    def _restore(self, state: dict[str, Tensor], latent: int) -> None:
        self._low, self._high = state["low"], state["high"]
