"""Options and networks of the models whose encoder and decoder are dense stacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from aefast.errors import InputError
from aefast.models._base import ModelConfig
from aefast.nn import MLP
from aefast.nn.linear_act import check_activation, check_positive_int


@dataclasses.dataclass(frozen=True)
class DenseConfig(ModelConfig):
    """Options of a dense encoder and decoder.

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
    """

    input_size: int
    hidden: tuple[int, ...] = (512,)
    latent: int = 16
    activation: str = "relu"
    decoder_hidden: tuple[int, ...] | None = None
    linear_decoder: bool = False
    output_activation: str = "identity"

    def __post_init__(self) -> None:
        check_positive_int(self.input_size, "input_size")
        check_positive_int(self.latent, "latent")
        # The dataclass is frozen; a list given for a tuple is settled here once.
        object.__setattr__(self, "hidden", check_sizes(self.hidden, "hidden"))
        if self.decoder_hidden is not None:
            object.__setattr__(self, "decoder_hidden", check_sizes(self.decoder_hidden, "decoder_hidden"))
        check_activation(self.activation)
        check_activation(self.output_activation, "output_activation")
        if not isinstance(self.linear_decoder, bool):
            raise InputError(f"linear_decoder={self.linear_decoder!r}: expected true or false")
        if self.linear_decoder and self.decoder_hidden:
            raise InputError(
                f"decoder_hidden={self.decoder_hidden!r}: a linear decoder has no hidden layers, "
                "so give either decoder_hidden or linear_decoder"
            )

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Widths of the decoder's hidden layers, from the latent to the reconstruction."""
        if self.linear_decoder:
            return ()
        return self.hidden[::-1] if self.decoder_hidden is None else self.decoder_hidden


def check_sizes(value: object, argument: str) -> tuple[int, ...]:
    """Return `value` as a tuple of positive integers; raise `InputError` naming `argument` otherwise."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InputError(f"{argument}={value!r}: expected a sequence of positive integers")
    return tuple(check_positive_int(size, f"{argument}[{index}]") for index, size in enumerate(value))


def make_encoder(config: DenseConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> MLP:
    """From the input to the latent."""
    features = (config.input_size, *config.hidden, config.latent)
    return MLP(features, config.activation, device=device, dtype=dtype)


def make_decoder(config: DenseConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> MLP:
    """From the latent to the reconstruction."""
    features = (config.latent, *config.decoder_widths, config.input_size)
    return MLP(features, config.activation, config.output_activation, device=device, dtype=dtype)
