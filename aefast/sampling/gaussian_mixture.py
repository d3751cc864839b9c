"""A mixture of Gaussians over the codes of a model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from aefast.errors import InputError
from aefast.nn.linear_act import check_positive_int
from aefast.sampling._base import Sampler, check_seed, register, standard_scale


@register("gmm")
class GaussianMixtureSampler(Sampler):
    """Gaussians with full covariances, fitted by expectation maximisation.

    The fit is scikit-learn's ``GaussianMixture``, of codes scaled to deviation 1, so that its regularisation of
    the covariances, 1e-6 on their diagonals, means the same for codes of any size. Draws and densities need no
    scikit-learn.

    Args:
        components: how many Gaussians, at most as many as codes.
        seed: of the fit's start, from 0 to 2**32 - 1.

    Raises:
        InputError: of `fit`: scikit-learn is not installed, or there are fewer codes than components.
    """

    option_names = ("components", "seed")

    def __init__(self, components: int = 10, seed: int = 0) -> None:
        self.components = check_positive_int(components, "components")
        self.seed = check_seed(seed)

    def _fit(self, codes: Tensor) -> None:
        if len(codes) < max(2, self.components):
            raise InputError(
                f"components={self.components}: expected at most as many as there are codes, of which there must be "
                f"two or more, got {len(codes)} codes"
            )
        try:
            from sklearn.mixture import GaussianMixture
        except ImportError as error:
            raise InputError(
                f"GaussianMixtureSampler.fit: needs scikit-learn ({error}); install it with: "
                'pip install "aefast[train]"'
            ) from None
        codes = codes.double().cpu()
        mean, scale = standard_scale(codes)
        mixture = GaussianMixture(self.components, max_iter=200, random_state=self.seed)
        mixture.fit(((codes - mean) / scale).numpy())
        self._weights = torch.from_numpy(mixture.weights_)
        self._means = mean + scale * torch.from_numpy(mixture.means_)
        factors = torch.linalg.cholesky(torch.from_numpy(mixture.covariances_))
        self._factors = scale[:, None] * factors

    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        component = torch.multinomial(self._weights, count, replacement=True, generator=generator)
        codes = torch.randn(count, self._means.shape[1], dtype=torch.float64, generator=generator)
        # A component at a time: a factor for each draw would take latent times the memory of the draws.
        for index, (mean, factor) in enumerate(zip(self._means, self._factors, strict=True)):
            rows = component == index
            codes[rows] = torch.addmm(mean, codes[rows], factor.T)
        return codes.float()

    def _log_prob(self, codes: Tensor) -> Tensor:
        gaussians = MultivariateNormal(self._means, scale_tril=self._factors)
        return MixtureSameFamily(Categorical(self._weights), gaussians).log_prob(codes.double())

    def _state(self) -> dict[str, Tensor]:
        return {"weights": self._weights, "means": self._means, "factors": self._factors}

    def _shapes(self, latent: int) -> dict[str, tuple[int, ...]]:
        count = self.components
        return {"weights": (count,), "means": (count, latent), "factors": (count, latent, latent)}

    def _restore(self, state: dict[str, Tensor], latent: int) -> None:
        self._weights, self._means, self._factors = (state[name] for name in ("weights", "means", "factors"))
