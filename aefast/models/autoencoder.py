"""The plain autoencoder: encoder, decoder, reconstruction loss."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from aefast.errors import InputError
from aefast.models._base import ModelOutput, register
from aefast.models._networks import EncoderDecoder, make_decoder, make_encoder
from aefast.models._reconstruction import LOSSES, LossConfig, does_without


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(LossConfig):
    """Options of `Autoencoder`: those of `LossConfig`, with "mse" as the loss; all are means over all elements."""

    loss: str = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss is None:
            raise InputError(f"loss=None: expected one of {', '.join(LOSSES)}")


@register("autoencoder")
class Autoencoder(EncoderDecoder):
    """Autoencoder, under- or overcomplete, with a symmetric decoder unless told otherwise.

    Args:
        config: the options; or give them by name: ``Autoencoder(input_size=784, latent=16)``.
        encoder, decoder: modules in the place of its own (docs/models.md, "Networks of your own").
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
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, options, encoder, decoder)
        self.encoder = make_encoder(self.config, encoder, device, dtype)
        self.decoder = make_decoder(self.config, decoder, device, dtype)
        self.decoder_loss = self.config.decoder_loss("mean")

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self._features(self.flatten(x))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.decoder_loss.mean_of(self._output(latent))

    def forward(self, x: torch.Tensor) -> ModelOutput:
        return self._reconstruct(x, x)

    def _reconstruct(self, seen: torch.Tensor, target: torch.Tensor) -> ModelOutput:
        """What the model makes of `seen`, at the cost of its difference to `target`."""
        latent = self.encode(seen)
        flat = self.flatten(target)
        if does_without(self, flat.shape[0]):
            loss = self.decoder_loss.of_latent(self.decoder, latent, flat)
            made = functools.partial(self._decoded, latent, target.shape)
        else:
            output = self._output(latent)
            loss = self.decoder_loss(output, flat)
            made = self.decoder_loss.mean_of(output).reshape(target.shape)
        return ModelOutput(made, latent, loss, {self.config.loss: loss})

    def eager_twin(self) -> nn.Sequential:
        return self._eager_twin()

    def _eager_twin(self, **first: nn.Module) -> nn.Sequential:
        """With modules before the encoder."""
        last = {"mean": nn.Sigmoid()} if self._has_logits else {}
        encoder, decoder = self._eager_networks()
        stack = OrderedDict(first, encoder=encoder, decoder=decoder, **last)
        return self._in_mode(nn.Sequential(stack))

    def eager_loss(self, twin: nn.Module, x: torch.Tensor) -> torch.Tensor:
        output = twin[:-1](x) if self._has_logits else twin(x)
        return self.decoder_loss.eager(output, x)

    @property
    def _has_logits(self) -> bool:
        return self.config.loss == "bce_with_logits"
