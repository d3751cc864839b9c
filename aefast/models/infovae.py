"""InfoVAE: a variational autoencoder whose codes, taken together, are held to the prior by an MMD."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.models._base import ModelOutput, check_choice, register
from aefast.models._reconstruction import LossConfig
from aefast.models.vae import FORWARD, VAE, EagerVAE, VAEConfig, weighted_kl
from aefast.nn import LinearAct, MMDLoss
from aefast.ops import _arguments, _pairwise, _philox, _registry, mmd_to_normal

PRIORS = ("samples", "closed_form")


@dataclasses.dataclass(frozen=True)
class InfoVAEConfig(LossConfig):
    """Options of `InfoVAE`: those of `LossConfig`, and the objective; of a loss as in `aefast.models.VAEConfig`.

    The paper's α and λ are α = 1 - kl_weight and λ = kl_weight + mmd_weight, that is, kl_weight = 1 - α and
    mmd_weight = α + λ - 1.

    Attributes:
        likelihood: as in `aefast.models.VAEConfig`.
        kl_weight: weight of the KL divergence of each sample's codes to the prior. 0, α = 1, leaves the whole
            distribution of codes to the MMD: the MMD-VAE, or the Wasserstein autoencoder (WAE-MMD).
        kl_warmup_steps: training steps over which that weight grows linearly from 0; 0 for none.
        mmd_weight: weight of the MMD². What is enough depends on the scale of the reconstruction term; the code of the
            Wasserstein autoencoder has, in the units of "mse", 100 for MNIST. The MMD² of a batch of B samples is
            uncertain by the order of 1 / B. A weight that makes this outgrow what can be reconstructed leaves
            stochastic codes the noise that they begin as, which is the prior's.
        mmd_kernel: "rbf", "laplacian", "imq", "rational_quadratic" or "energy", of `aefast.functional.mmd`. rbf and
            laplacian are flat far outside of the prior and hardly pull codes back from there; the others do.
        mmd_bandwidth: one bandwidth or several. None takes the multiples that `aefast.functional.mmd` takes of what the
            data say, but of the prior's own mean squared distance m = 2 latent: for imq these are the seven kernels of
            the Wasserstein autoencoder. Widths that followed the codes would change the loss from step to step, and
            judge codes that have spread or shrunk by a measure that has done so with them.
        mmd_alpha: alpha of rational_quadratic.
        mmd_estimator: "unbiased" or "biased". The unbiased one of a batch of one sample does not exist; there the MMD
            counts as 0.
        mmd_prior: what codes are compared with. "samples": as many draws from N(0, I), new ones at each pass;
            "closed_form": N(0, I) itself, as `aefast.functional.mmd_to_normal` does.
        stochastic: whether codes are drawn from N(mu, exp(logvar)), or are points that the encoder gives, as in the
            Wasserstein autoencoder; points take kl_weight 0, since their KL divergence is infinite.
    """

    likelihood: str = "mse"
    kl_weight: float = 0.0
    kl_warmup_steps: int = 0
    mmd_weight: float = 10.0
    mmd_kernel: str = "imq"
    mmd_bandwidth: float | tuple[float, ...] | None = None
    mmd_alpha: float = 1.0
    mmd_estimator: str = "unbiased"
    mmd_prior: str = "samples"
    stochastic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("kl_weight", self.kl_weight)
        _check_weight("mmd_weight", self.mmd_weight)
        shared = {field.name for field in dataclasses.fields(VAEConfig)} - {"beta"}
        VAEConfig(**{name: getattr(self, name) for name in shared}, beta=self.kl_weight)
        if self.kl_warmup_steps and not self.kl_weight:
            raise InputError(f"kl_warmup_steps={self.kl_warmup_steps!r}: expected 0, because kl_weight is 0")
        if not isinstance(self.stochastic, bool):
            raise InputError(f"stochastic={self.stochastic!r}: expected true or false")
        if self.kl_weight and not self.stochastic:
            raise InputError(
                f"kl_weight={self.kl_weight!r}: expected 0, because codes that are points (stochastic=False) have an "
                "infinite KL divergence"
            )
        self._check_mmd()

    def _check_mmd(self) -> None:
        check_choice(self.mmd_kernel, "mmd_kernel", _pairwise.KERNELS)
        check_choice(self.mmd_estimator, "mmd_estimator", _pairwise.ESTIMATORS)
        check_choice(self.mmd_prior, "mmd_prior", PRIORS)
        # The dataclass is frozen; a list given for a tuple is settled here once.
        if isinstance(self.mmd_bandwidth, list):
            object.__setattr__(self, "mmd_bandwidth", tuple(self.mmd_bandwidth))
        if self.mmd_bandwidth is not None and self.mmd_kernel == "energy":
            raise InputError(f"mmd_bandwidth={self.mmd_bandwidth!r}: the energy kernel has no bandwidth")
        _pairwise.kernel_of(f"mmd_bandwidth={self.mmd_bandwidth!r}", self.mmd_kernel, self.mmd_bandwidth, 1.0)
        _pairwise.kernel_of(f"mmd_alpha={self.mmd_alpha!r}", self.mmd_kernel, None, self.mmd_alpha)
        if self.mmd_prior == "closed_form" and self.mmd_kernel not in mmd_to_normal.KERNELS:
            raise InputError(
                f"mmd_kernel={self.mmd_kernel!r}: expected one of {', '.join(mmd_to_normal.KERNELS)}, which have the "
                "expectations over the prior that mmd_prior='closed_form' takes"
            )
        if self.mmd_alpha != 1 and self.mmd_kernel != "rational_quadratic":
            raise InputError(f"mmd_alpha={self.mmd_alpha!r}: the {self.mmd_kernel} kernel has no alpha")

    @property
    def beta(self) -> float:
        """`kl_weight`, by the name it has in `aefast.models.VAEConfig`."""
        return self.kl_weight

    @property
    def mmd_bandwidths(self) -> float | tuple[float, ...] | None:
        """The bandwidths that the kernels have; None for the energy kernel alone."""
        if self.mmd_bandwidth is not None or self.mmd_kernel == "energy":
            return self.mmd_bandwidth
        root = math.sqrt(2.0 * self.latent)
        return tuple(root * factor for factor in _pairwise.DEFAULT_BANDWIDTHS[self.mmd_kernel])


def _check_weight(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:
        raise InputError(f"{name}={value!r}: expected a finite number of at least 0")


@register("infovae")
class InfoVAE(VAE):
    """Variational autoencoder that compares the codes of a whole batch with the prior.

    The loss (Zhao, Song, Ermon, InfoVAE: Balancing Learning and Inference in Variational Autoencoders,
    arXiv:1706.02262, with the MMD as the divergence)::

        E_q(z|x) [-log p(x|z)] + kl_weight KL(q(z|x) ‖ N(0, I)) + mmd_weight MMD²(q(z), N(0, I))

    q(z) is the distribution of the codes of all samples, of which a batch has one each. The first two terms are in nats
    as in `VAE`; the MMD² is a plain number. With kl_weight 0 this is the Wasserstein autoencoder with an MMD
    (Tolstikhin, Bousquet, Gelly, Schölkopf, ICLR 2018, algorithm 2), whose encoder mostly has no noise:
    stochastic=False. The terms are "reconstruction", "kl" and "mmd", the latter two with their weights.

    Training and eval mode differ as those of `VAE` do: the loss is an estimate from samples in both, and in eval mode
    latent and reconstruction do not change from call to call.

    Args:
        config: the options; or give them by name: ``InfoVAE(input_size=784, latent=16, mmd_weight=50)``.
        encoder, decoder: modules in the place of its own (docs/models.md, "Networks of your own").
        device: where the parameters live.
        dtype: their floating-point type.

    Shape:
        As in `VAE`.

    Attributes:
        mmd: the `aefast.nn.MMDLoss`. Its ``group`` may be set to a torch.distributed process group, whose ranks draw
            from different seeds; then the codes of all ranks are compared with the prior samples of all ranks.
        log_variance, training_steps: as in `VAE`.

    Raises:
        InputError: data outside of [0, 1] for "bernoulli", on the CPU in eager mode; a group with mmd_prior
            "closed_form".
    """

    config_class = InfoVAEConfig
    config: InfoVAEConfig

    def __init__(
        self,
        config: InfoVAEConfig | None = None,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, encoder=encoder, decoder=decoder, device=device, dtype=dtype, **options)
        config = self.config
        if not config.stochastic:
            self.head = _PointHead(self.head.in_features, config.latent, device, dtype)
        self.mmd = MMDLoss(
            config.mmd_kernel, config.mmd_bandwidths, config.mmd_estimator, alpha=config.mmd_alpha
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The posterior means, or the codes that are points, of a batch: x (B, ...) to (B, latent)."""
        if self.config.stochastic:
            return super().encode(x)
        return self.head(self._features(self.flatten(x)))[0]

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_stochastic("posterior")
        return super().posterior(x)

    def elbo(
        self, x: torch.Tensor, *, reduction: str = "mean", noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._check_stochastic("elbo")
        return super().elbo(x, reduction=reduction, noise=noise)

    def _check_stochastic(self, what: str) -> None:
        if not self.config.stochastic:
            raise InputError(f"{what}: this model's codes are points (stochastic=False), which have none")

    def prior_mmd(self, z: torch.Tensor) -> torch.Tensor:
        """MMD²(z, N(0, I)) of codes z (B, latent), a scalar without its weight, estimated as in the loss."""
        config, group = self.config, self.mmd.group
        is_closed = config.mmd_prior == "closed_form"
        if is_closed and group is not None:
            raise InputError("mmd.group: expected None, because mmd_prior 'closed_form' has no group")
        if _has_too_few(z.shape[0], config.mmd_estimator) and (group is None or group.size() == 1):
            _say_once_of_few(self.training)
            return z.new_zeros((), dtype=_arguments.accumulator(z.dtype))
        if is_closed:
            return _to_normal(AF.mmd_to_normal, config, z)
        # Compiled code draws other numbers by torch.randn_like than eager code does. It draws seeds in any order that
        # their arguments allow: this one behind that of z.
        seed = _philox.seed_of(None, None, z, "corrupt")
        return self.mmd(z, AF.corrupt(torch.zeros_like(z), "gaussian", std=1.0, seed=seed))

    def forward(self, x: torch.Tensor) -> ModelOutput:
        reconstruction, kl, made, latent, z = self._pass(x)
        kl = weighted_kl(self, kl)
        mmd = self.config.mmd_weight * self.prior_mmd(z)
        terms = {"reconstruction": reconstruction, "kl": kl, "mmd": mmd}
        return ModelOutput(made, latent, reconstruction + kl + mmd, terms)

    def evaluate(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `VAE.evaluate`, the term "kl" with the weight kl_weight, and with the "mmd" of the same codes, without its
        weight; no "elbo" of points. Of a subclass with a `forward` of its own, as `VAE.evaluate` alone."""
        if self.has_own(*FORWARD):
            return super().evaluate(x)
        config, flat = self.config, self.flatten(x)
        reconstruction, kl, _, z, mu = self._estimate(flat)
        mmd = self.prior_mmd(z)
        measures = {
            "loss": reconstruction + config.kl_weight * kl + config.mmd_weight * mmd,
            "reconstruction": reconstruction,
            "kl": config.kl_weight * kl,
            "mse": F.mse_loss(self.decode(mu), flat),
            "mmd": mmd,
        }
        if config.stochastic and config.loss is None:
            measures["elbo"] = self._elbo(reconstruction, kl)
        return measures

    def eager_twin(self) -> nn.Module:
        return self._in_mode(_EagerInfoVAE(self))

    def eager_loss(self, twin: nn.Module, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        z, kl, _, _ = twin.head(twin.encoder(x))
        value = self.decoder_loss.eager(twin.decoder(z), x)
        loss = self._reconstruction_term(value, twin.log_variance) + weighted_kl(twin, kl)
        if _has_too_few(z.shape[0], config.mmd_estimator):
            return loss
        if config.mmd_prior == "closed_form":
            mmd = _to_normal(mmd_to_normal.reference, config, z)
        else:
            mmd = twin.mmd(z, torch.randn_like(z))
        return loss + config.mmd_weight * mmd


class _PointHead(LinearAct):
    """The dense layer to codes, in the place of a `aefast.nn.GaussianHead` and with results like its."""

    def __init__(
        self, in_features: int, latent: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(in_features, latent, activation="identity", device=device, dtype=dtype)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        return _as_head(super().forward(h))

    def eager(self) -> nn.Linear:
        return self._copied_into(_EagerPointHead)


class _EagerPointHead(nn.Linear):
    """`_PointHead` in plain PyTorch."""

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        return _as_head(super().forward(h))


def _as_head(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """Codes as a Gaussian head's z, kl, mu and logvar. The divergence, whose weight is 0, is 0 for infinity."""
    return z, z.new_zeros((), dtype=_arguments.accumulator(z.dtype)), z, None


class _EagerInfoVAE(EagerVAE):
    """`InfoVAE` in plain PyTorch."""

    def __init__(self, model: InfoVAE) -> None:
        super().__init__(model)
        self.mmd = model.mmd.eager()


def _to_normal(function: Any, config: InfoVAEConfig, z: torch.Tensor) -> torch.Tensor:
    """`aefast.functional.mmd_to_normal`, or its reference, with the options of `config`."""
    return function(
        z,
        kernel=config.mmd_kernel,
        bandwidth=config.mmd_bandwidths,
        estimator=config.mmd_estimator,
        alpha=config.mmd_alpha,
    )


def _has_too_few(rows: int, estimator: str) -> bool:
    """Whether there is no MMD of so many codes. The last batch of an epoch may be of any size."""
    return rows < _pairwise.fewest_points(estimator)


def _say_once_of_few(is_training: bool) -> None:
    """A model that is trained on single samples would never see its MMD."""
    if is_training and not torch.compiler.is_compiling():
        _warn_of_few()


@functools.cache
def _warn_of_few() -> None:
    _registry.logger.warning(
        "infovae: a batch of one sample has no unbiased MMD, and its term is 0 there; where all batches are so small, "
        "take larger ones or mmd_estimator='biased'"
    )
