"""The plain autoencoder: dense encoder, dense decoder, reconstruction loss."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from aefast.errors import InputError
from aefast.models._base import (
    RECONSTRUCTION_LOSSES,
    Model,
    ModelConfig,
    ModelOutput,
    did_you_mean,
    register,
)
from aefast.nn import MLP
from aefast.nn.linear_act import check_activation, check_positive_int


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(ModelConfig):
    """Options of `Autoencoder`.

    Attributes:
        input_size: features of a sample.
        hidden: widths of the encoder's hidden layers, from the input to the latent; may be empty.
        latent: latent size. Smaller than input_size makes an undercomplete autoencoder, larger an
            overcomplete one.
        activation: activation of the hidden layers; the latent itself has none.
        decoder_hidden: widths of the decoder's hidden layers, from the latent to the reconstruction; None
            mirrors the encoder.
        linear_decoder: makes the decoder a single linear layer.
        output_activation: activation of the reconstruction, such as "sigmoid" for data in [0, 1].
        loss: reconstruction loss: "mse", the mean over all elements.
    """

    input_size: int
    hidden: tuple[int, ...] = (512,)
    latent: int = 16
    activation: str = "relu"
    decoder_hidden: tuple[int, ...] | None = None
    linear_decoder: bool = False
    output_activation: str = "identity"
    loss: str = "mse"

    def __post_init__(self) -> None:
        check_positive_int(self.input_size, "input_size")
        check_positive_int(self.latent, "latent")
        # The dataclass is frozen; a list given for a tuple is settled here once.
        object.__setattr__(self, "hidden", _widths(self.hidden, "hidden"))
        if self.decoder_hidden is not None:
            object.__setattr__(self, "decoder_hidden", _widths(self.decoder_hidden, "decoder_hidden"))
        check_activation(self.activation)
        check_activation(self.output_activation, "output_activation")
        if not isinstance(self.linear_decoder, bool):
            raise InputError(f"linear_decoder={self.linear_decoder!r}: expected true or false")
        if self.linear_decoder and self.decoder_hidden:
            raise InputError(
                f"decoder_hidden={self.decoder_hidden!r}: a linear decoder has no hidden layers, "
                "so give either decoder_hidden or linear_decoder"
            )
        if not isinstance(self.loss, str) or self.loss not in RECONSTRUCTION_LOSSES:
            raise InputError(
                f"loss={self.loss!r}: expected one of {', '.join(RECONSTRUCTION_LOSSES)}"
                f"{did_you_mean(self.loss, RECONSTRUCTION_LOSSES)}"
            )

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Widths of the decoder's hidden layers, from the latent to the reconstruction."""
        if self.linear_decoder:
            return ()
        return self.hidden[::-1] if self.decoder_hidden is None else self.decoder_hidden


def _widths(value: object, argument: str) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InputError(f"{argument}={value!r}: expected a sequence of positive integers")
    return tuple(check_positive_int(width, f"{argument}[{index}]") for index, width in enumerate(value))


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
        if config is not None and options:
            raise InputError(f"{next(iter(options))}: give either a config or options by name, not both")
        super().__init__(AutoencoderConfig.from_dict(options, "Autoencoder") if config is None else config)
        config = self.config
        self.encoder = MLP(
            (config.input_size, *config.hidden, config.latent),
            config.activation,
            device=device,
            dtype=dtype,
        )
        self.decoder = MLP(
            (config.latent, *config.decoder_widths, config.input_size),
            config.activation,
            config.output_activation,
            device=device,
            dtype=dtype,
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.flatten(x))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.decoder(latent)

    def forward(self, x: torch.Tensor) -> ModelOutput:
        latent = self.encode(x)
        reconstruction = self.decode(latent).reshape(x.shape)
        loss = RECONSTRUCTION_LOSSES[self.config.loss](reconstruction, x)
        return ModelOutput(reconstruction, latent, loss, {self.config.loss: loss})

    def eager_twin(self) -> nn.Sequential:
        return nn.Sequential(OrderedDict(encoder=self.encoder.eager(), decoder=self.decoder.eager()))

    def eager_loss(self, twin: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return RECONSTRUCTION_LOSSES[self.config.loss](twin(x), x)
