"""The stochastic autoencoder: encoder and decoder are Gaussians of unit covariance around dense networks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from aefast.models._base import ModelOutput, register
from aefast.models._networks import EncoderDecoder, make_decoder, make_encoder
from aefast.models._reconstruction import LossConfig, does_without
from aefast.nn import Corrupt


@dataclasses.dataclass(frozen=True)
class StochasticConfig(LossConfig):
    """Options of `StochasticAutoencoder`: those of `LossConfig`. A loss, summed over the features, takes the place of
    -log p(x|h)."""


@register("stochastic")
class StochasticAutoencoder(EncoderDecoder):
    """Autoencoder with p(h|x) = N(f(x), I) and p(x|h) = N(g(h), I), f and g being dense networks.

    The loss is the expectation of -log p(x|h) over p(h|x), up to its constant, half of log 2π a feature, and
    estimated with one sample of h::

        1/2 ‖x - g(h)‖²,    h = f(x) + eps,    eps from N(0, I)

    in nats: summed over features, averaged over the batch. Goodfellow, Bengio, Courville, Deep Learning (MIT Press,
    2016), section 14.4. Nothing holds f(x) down, so that training spreads the latents out until the noise between them
    matters little; `aefast.models.VAE` adds the prior that prevents it.

    In training mode ``latent`` is the sample h, and ``reconstruction`` is g(h). In eval mode they are f(x) and g(f(x)),
    and do not change from call to call. The loss is the same one-sample estimate in both, so that losses on training
    and held-out samples compare, at the price of a second pass through the decoder in eval mode.

    Args:
        config: the options; or give them by name: ``StochasticAutoencoder(input_size=784, latent=16)``.
        encoder, decoder: modules in the place of its own (docs/models.md, "Networks of your own").
        device: where the parameters live.
        dtype: their floating-point type.

    Shape:
        input (B, ...) with input_size features a sample; latent (B, latent); reconstruction as the input.
    """

    config_class = StochasticConfig
    config: StochasticConfig

    def __init__(
        self,
        config: StochasticConfig | None = None,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, options, encoder, decoder)
        self.encoder = make_encoder(self.config, encoder, device, dtype)
        self.noise = Corrupt("gaussian", std=1.0)
        self.decoder = make_decoder(self.config, decoder, device, dtype)
        # -log p(x|h) without its constant.
        self.decoder_loss = self.config.decoder_loss("batchmean", "mse", loss_weight=0.5)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The means f(x) of p(h|x): x (B, ...) to (B, latent)."""
        return self._features(self.flatten(x))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """The means g(h) of p(x|h): (B, latent) to (B, input_size)."""
        return self.decoder_loss.mean_of(self._output(latent))

    def sample_latent(self, x: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """A draw of h from p(h|x) for each row of x (B, ...): (B, latent)."""
        return self.noise.corrupt(self.encode(x), generator=generator)

    def sample_reconstruction(
        self, x: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """A draw of h from p(h|x) for each row of x (B, ...), and then one from p(x|h), in the shape of x."""
        mean = self.decode(self.sample_latent(x, generator=generator))
        return self.noise.corrupt(mean, generator=generator).reshape(x.shape)

    def forward(self, x: torch.Tensor) -> ModelOutput:
        flat = self.flatten(x)
        mean = self._features(flat)
        latent = self.noise.corrupt(mean)
        if does_without(self, flat.shape[0]):
            loss = self.decoder_loss.of_latent(self.decoder, latent, flat)
            made = functools.partial(self._decoded, latent, x.shape)
            return ModelOutput(made, latent, loss, {"reconstruction": loss})
        output = self._output(latent)
        loss = self.decoder_loss(output, flat)
        if not self.training:
            latent, output = mean, self._output(mean)
        made = self.decoder_loss.mean_of(output).reshape(x.shape)
        return ModelOutput(made, latent, loss, {"reconstruction": loss})

    def eager_twin(self) -> nn.Module:
        return self._in_mode(_EagerStochastic(self))

    def eager_loss(self, twin: nn.Module, x: torch.Tensor) -> torch.Tensor:
        mean = twin.encoder(x)
        return self.decoder_loss.eager(twin.decoder(mean + torch.randn_like(mean)), x)


class _EagerStochastic(nn.Module):
    """`StochasticAutoencoder` in plain PyTorch."""

    def __init__(self, model: StochasticAutoencoder) -> None:
        super().__init__()
        self.encoder, self.decoder = model._eager_networks()
        self.mean_of = model.decoder_loss.mean_of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encoder(x)
        return self.mean_of(self.decoder(h + torch.randn_like(h) if self.training else h))
