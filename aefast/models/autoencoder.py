"""The plain autoencoder: dense encoder, dense decoder, reconstruction loss."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from aefast.models._base import RECONSTRUCTION_LOSSES, Model, ModelOutput, check_choice, register
from aefast.models._dense import DenseConfig, make_decoder, make_encoder


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(DenseConfig):
    """Options of `Autoencoder`: those of `DenseConfig`, and the loss.

    Attributes:
        loss: reconstruction loss: "mse", the mean over all elements.
    """

    loss: str = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.loss, "loss", RECONSTRUCTION_LOSSES)


@register("autoencoder")
class Autoencoder(Model):
    """Dense autoencoder, under- or overcomplete, with a symmetric decoder unless told otherwise.

    Args:
        config: the options; or give them by name: ``Autoencoder(input_size=784, latent=16)``.
        device: where the parameters live.
        dtype: their floating-point type.

    Shape:
        input (B, ...) with input_size features a sample; latent (B, latent); reconstruction as the input.
    """

    config_class = AutoencoderConfig
    config: AutoencoderConfig

    def __init__(
        self,
        config: AutoencoderConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        self.encoder = make_encoder(self.config, device, dtype)
        self.decoder = make_decoder(self.config, device, dtype)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.flatten(x))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.decoder(latent)

    def forward(self, x: torch.Tensor) -> ModelOutput:
        return self._reconstruct(x, x)

    def _reconstruct(self, seen: torch.Tensor, target: torch.Tensor) -> ModelOutput:
        """What the model makes of `seen`, at the cost of its difference to `target`."""
        latent = self.encode(seen)
        reconstruction = self.decode(latent).reshape(target.shape)
        loss = RECONSTRUCTION_LOSSES[self.config.loss](reconstruction, target)
        return ModelOutput(reconstruction, latent, loss, {self.config.loss: loss})

    def eager_twin(self) -> nn.Sequential:
        return nn.Sequential(OrderedDict(encoder=self.encoder.eager(), decoder=self.decoder.eager()))

    def eager_loss(self, twin: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return RECONSTRUCTION_LOSSES[self.config.loss](twin(x), x)
