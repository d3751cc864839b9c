"""The variational autoencoder: a Gaussian posterior over the latents, and the evidence lower bound as its loss."""

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
from aefast.models._networks import EncoderDecoder, features_of, make_decoder, make_encoder
from aefast.models._reconstruction import LossConfig, does_without
from aefast.models._warmup import steps_taken, warmed_up
from aefast.nn import GaussianHead
from aefast.nn.linear_act import check_positive_int
from aefast.ops import _registry

LIKELIHOODS = ("mse", "bernoulli", "gaussian")

FORWARD = ("forward", "_pass", "_estimate", "_reconstruction_term")
"""The methods that the loss is made by."""

LOGVAR_RANGE = (-30.0, 10.0)
"""The posterior's logvar counts as its nearest value in it. A deviation of exp(10 / 2) = 148 keeps a sample, its
divergence and their gradients finite in float16 too."""


@dataclasses.dataclass(frozen=True)
class VAEConfig(LossConfig):
    """Options of `VAE`: those of `LossConfig`, and the objective.

    A loss, summed over the features, takes the place of -log p(x|z); then there is no likelihood and no evidence lower
    bound.

    Attributes:
        likelihood: p(x|z), with g the decoder. "mse": N(g(z), I), whose -log is half the sum of squared errors and a
            constant that the loss leaves out. "gaussian": N(g(z), σ² I) with one learnt σ for all features
            (Rybkin, Daniilidis, Levine, Simple and Effective VAE Training with Calibrated Decoders, ICML 2021,
            section 3). "bernoulli": independent features in [0, 1] with the decoder's outputs as logits, which
            takes output_activation "identity".
        beta: weight of the KL divergence (Higgins et al., beta-VAE, ICLR 2017); 1 makes the loss the negative
            evidence lower bound.
        kl_warmup_steps: training steps over which that weight grows linearly from 0 to beta; 0 for none.
    """

    likelihood: str = "mse"
    beta: float = 1.0
    kl_warmup_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.likelihood, "likelihood", LIKELIHOODS)
        if self.loss is not None and self.likelihood != "mse":
            raise InputError(f"loss={self.loss!r}: give either a loss or a likelihood, not both")
        if self.likelihood == "bernoulli" and self.output_activation != "identity":
            raise InputError(
                f"output_activation={self.output_activation!r}: expected 'identity', because the outputs of a "
                "bernoulli decoder are logits; their sigmoid is the reconstruction"
            )
        is_number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        if not is_number or not 0 <= self.beta <= sys.float_info.max:
            raise InputError(f"beta={self.beta!r}: expected a finite number of at least 0")
        is_count = isinstance(self.kl_warmup_steps, int) and not isinstance(self.kl_warmup_steps, bool)
        if not is_count or self.kl_warmup_steps < 0:
            raise InputError(f"kl_warmup_steps={self.kl_warmup_steps!r}: expected an integer of at least 0")
        if self.kl_warmup_steps > 0:
            check_positive_int(self.kl_warmup_steps, "kl_warmup_steps")


@register("vae")
class VAE(EncoderDecoder):
    """Variational autoencoder: an encoder, a Gaussian head and a decoder.

    The loss is the negative evidence lower bound, estimated with one sample of the latents (Kingma and Welling,
    Auto-Encoding Variational Bayes, arXiv:1312.6114, equations 7 and 10)::

        E_q(z|x) [-log p(x|z)] + beta KL(q(z|x) ‖ N(0, I)),    q(z|x) = N(mu, exp(logvar))

    in nats: sums over features and latents, means over the batch. Its terms are "reconstruction" and "kl", the latter
    with its weight.

    In training mode ``latent`` is the sample, and ``reconstruction`` comes from it. In eval mode they are the
    posterior's mean and what the decoder makes of that, and do not change from call to call. The loss is the same
    one-sample estimate in both, so that losses on training and held-out samples compare, at the price of a second
    pass through the decoder in eval mode; there the KL divergence has its full weight.

    Args:
        config: the options; or give them by name: ``VAE(input_size=784, latent=16, likelihood="bernoulli")``.
        encoder, decoder: modules in the place of its own (docs/models.md, "Networks of your own").
        device: where the parameters live.
        dtype: their floating-point type.

    Shape:
        input (B, ...) with input_size features a sample; latent (B, latent); reconstruction as the input: the
        decoder's mean, for "bernoulli" probabilities.

    Attributes:
        log_variance: log σ² of the "gaussian" likelihood, a learnt scalar that begins at 0; None for the others.
        training_steps: forward passes taken in training mode that end a step (`Model.ends_step`), an int64 scalar that
            the state dict keeps, so that a resumed run goes on with its warm-up; None without a warm-up. Passes that
            activation checkpointing repeats do not count; under torch.compile a warm-up and a checkpoint around the
            whole model do not go together.

    Raises:
        InputError: data outside of [0, 1] for "bernoulli", on the CPU in eager mode.
    """

    config_class = VAEConfig
    config: VAEConfig
    _has_head = True

    def __init__(
        self,
        config: VAEConfig | None = None,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, options, encoder, decoder)
        config = self.config
        self.encoder = make_encoder(config, encoder, device, dtype, has_head=True)
        self.head = GaussianHead(
            features_of(config), config.latent, logvar_range=LOGVAR_RANGE, device=device, dtype=dtype
        )
        self.decoder = make_decoder(config, decoder, device, dtype)
        learnt = config.likelihood == "gaussian"
        self.log_variance = nn.Parameter(torch.zeros((), device=device, dtype=dtype)) if learnt else None
        self.register_buffer("training_steps", steps_taken(config.kl_warmup_steps, device))
        kind = "bce_with_logits" if config.likelihood == "bernoulli" else "mse"
        weight = {"loss_weight": 0.5} if config.likelihood == "mse" else {}
        self.decoder_loss = config.decoder_loss("batchmean", kind, **weight)

    def reset_parameters(self) -> None:
        """Set what is no layer's to what it begins with."""
        for one in (self.log_variance, self.training_steps):
            if one is not None:
                nn.init.zeros_(one)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The posterior means of a batch: x (B, ...) to (B, latent)."""
        return self.posterior(x)[0]

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mu and logvar, (B, latent) each, of q(z|x) = N(mu, diag(exp(logvar))); logvar within `LOGVAR_RANGE`."""
        return self.head.moments(self._features(self.flatten(x)))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """The mean of p(x|z): (B, latent) to (B, input_size)."""
        return self.decoder_loss.mean_of(self._output(latent))

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """The decoder's mean for `count` draws from the prior N(0, I): (count, input_size).

        Args:
            count: how many.
            generator: where the draws come from, on the model's device; torch's own by default.
        """
        check_positive_int(count, "count")
        weight = self.head.weight
        shape = (count, self.config.latent)
        return self.decode(torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype))

    def elbo(
        self, x: torch.Tensor, *, reduction: str = "mean", noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The evidence lower bound on log p(x) in nats, of one sample a row of the batch x (B, ...).

        It has all constants of the likelihood, the KL divergence at weight 1 whatever beta and the warm-up are, and the
        same value in training and in eval mode for the same noise. For "bernoulli" it bounds the probability of
        binary data; of values in between it is the usual figure of merit, but no bound.

        Args:
            x: (B, ...) with input_size features a sample.
            reduction: "mean" over the batch, or "none" for each row's, (B,).
            noise: (B, latent) or (latent,): ε of z = mu + exp(logvar / 2) ε, in place of draws from N(0, I). With one ε
                for all rows what a row is given does not depend on the others.

        Returns:
            A scalar, or (B,).

        Raises:
            InputError: the model has a loss in place of a likelihood, or an argument is not as above.
        """
        if self.config.loss is not None:
            raise InputError(f"elbo: this model has no likelihood, but the loss {self.config.loss!r}")
        check_choice(reduction, "reduction", ("mean", "none"))
        flat = self.flatten(x)
        if reduction == "mean" and noise is None:
            return self._elbo(*self._estimate(flat)[:2])
        self.check_samples(flat)
        mu, logvar = self.posterior(flat)
        if noise is None:
            z, kl = AF.reparameterize(mu, logvar, reduction="none")
        else:
            if noise.shape not in (mu.shape, mu.shape[1:]):
                shapes = f"{tuple(mu.shape)} or {tuple(mu.shape[1:])}"
                raise InputError(f"elbo: noise must be of shape {shapes}, got {tuple(noise.shape)}")
            z = mu + torch.exp(0.5 * logvar) * noise
            kl = AF.kl_normal(mu, logvar, reduction="none")
        loss = self.decoder_loss
        value = AF.reconstruction_loss(self._output(z), flat, loss.kind, reduction="none", **loss.options)
        elbo = self._elbo(self._reconstruction_term(value.sum(1), self.log_variance), kl)
        return elbo if reduction == "none" else elbo.mean()

    def forward(self, x: torch.Tensor) -> ModelOutput:
        reconstruction, kl, made, latent, _ = self._pass(x)
        kl = weighted_kl(self, kl)
        return ModelOutput(made, latent, reconstruction + kl, {"reconstruction": reconstruction, "kl": kl})

    def _pass(self, x: torch.Tensor) -> tuple[Any, ...]:
        """The reconstruction's loss and the KL divergence of x (B, ...); the reconstruction, or what makes it, and the
        latent, as the mode has them; and the sample that the former are of."""
        flat = self.flatten(x)
        reconstruction, kl, output, z, mu = self._estimate(flat, not does_without(self, flat.shape[0]))
        if output is None:
            return reconstruction, kl, functools.partial(self._decoded, z, x.shape), z, z
        latent, output = (z, output) if self.training else (mu, self._output(mu))
        return reconstruction, kl, self.decoder_loss.mean_of(output).reshape(x.shape), latent, z

    def evaluate(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `Model.evaluate`, the term "kl" with the weight beta, and with the "elbo" of the same sample, in nats,
        unless there is a loss in its place, or a subclass has a `forward` of its own, whose loss this is then."""
        if self.has_own(*FORWARD):
            return super().evaluate(x)
        flat = self.flatten(x)
        reconstruction, kl, _, _, mu = self._estimate(flat)
        weighted = self.config.beta * kl
        measures = {
            "loss": reconstruction + weighted,
            "reconstruction": reconstruction,
            "kl": weighted,
            "mse": F.mse_loss(self.decode(mu), flat),
        }
        if self.config.loss is None:
            measures["elbo"] = self._elbo(reconstruction, kl)
        return measures

    def check_samples(self, x: torch.Tensor) -> None:
        if self.config.likelihood == "bernoulli":
            _check_probabilities(x)

    def _estimate(self, flat: torch.Tensor, makes_output: bool = True) -> tuple[Any, ...]:
        """-log p(x|z), or the loss in its place, and the KL divergence in nats; the decoder's output for z, if it is to
        be made; z itself, and mu."""
        self.check_samples(flat)
        z, kl, mu, _ = self.head(self._features(flat))
        if makes_output:
            output = self._output(z)
            value = self.decoder_loss(output, flat)
        else:
            output = None
            value = self.decoder_loss.of_latent(self.decoder, z, flat)
        return self._reconstruction_term(value, self.log_variance), kl, output, z, mu

    def _reconstruction_term(self, value: torch.Tensor, log_variance: torch.Tensor | None) -> torch.Tensor:
        """-log p(x|z) in nats, which for "mse" leaves out its constant, half of log 2π a feature; or the loss in its
        place.

        Args:
            value: `decoder_loss` of a batch, which for "mse" has the half in it.
            log_variance: log σ² of "gaussian".
        """
        config = self.config
        if config.loss is not None or config.likelihood != "gaussian":
            return value
        constant = config.input_size * (log_variance + math.log(2 * math.pi))
        return 0.5 * (value * torch.exp(-log_variance) + constant)

    def _elbo(self, reconstruction: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        is_complete = self.config.likelihood != "mse"
        constant = 0.0 if is_complete else 0.5 * self.config.input_size * math.log(2 * math.pi)
        return -(reconstruction + kl) - constant

    def eager_twin(self) -> nn.Module:
        return self._in_mode(EagerVAE(self))

    def eager_loss(self, twin: nn.Module, x: torch.Tensor) -> torch.Tensor:
        z, kl, _, _ = twin.head(twin.encoder(x))
        value = self.decoder_loss.eager(twin.decoder(z), x)
        return self._reconstruction_term(value, twin.log_variance) + weighted_kl(twin, kl)


class EagerVAE(nn.Module):
    """`VAE` in plain PyTorch. The logvar is not clamped, which changes nothing within `LOGVAR_RANGE`."""

    ends_step = True

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.config = model.config
        self.encoder, decoder = model._eager_networks()
        self.head = model.head.eager()
        if isinstance(model.head, GaussianHead):
            self.head.sample.logvar_range = None
        self.decoder = decoder
        learnt = model.log_variance
        self.log_variance = None if learnt is None else nn.Parameter(learnt.detach().clone())
        steps = model.training_steps
        self.register_buffer("training_steps", None if steps is None else steps.clone())
        self.mean_of = model.decoder_loss.mean_of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, _, mu, _ = self.head(self.encoder(x))
        return self.mean_of(self.decoder(z if self.training else mu))


def weighted_kl(module: VAE | EagerVAE, kl: torch.Tensor) -> torch.Tensor:
    """The divergence times its weight in this forward pass, which counts if it ends a step of `module`'s training."""
    return warmed_up(module, kl, module.config.beta, module.config.kl_warmup_steps)


def _check_probabilities(x: torch.Tensor) -> None:
    """That x lies in [0, 1], where looking costs no wait for a device and no compiler looks on."""
    if x.device.type != "cpu" or _registry.is_watched() or x.numel() == 0:
        return
    low, high = (value.item() for value in x.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"x: expected values in [0, 1] for the bernoulli likelihood, got values from {low:g} to {high:g}; "
            "rescale the data, or choose the mse or gaussian likelihood"
        )
