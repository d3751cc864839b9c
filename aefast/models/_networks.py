"""The encoder and the decoder of the models that have them: of given sizes, or modules of the caller's own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from aefast.errors import InputError
from aefast.models._base import Model, ModelConfig
from aefast.models._convolutional import ConvolutionalDecoder, ConvolutionalEncoder, halved
from aefast.nn import MLP
from aefast.nn.linear_act import check_activation, check_positive_int, eager_activation
from aefast.ops import _registry


@dataclasses.dataclass(frozen=True)
class DenseConfig(ModelConfig):
    """Options of an encoder and a decoder.

    Attributes:
        input_size: features of a sample.
        channels: of the convolutions in front of the encoder's dense layers, each of which halves the sides of an
            image; the decoder ends in their mirror. None for dense layers alone.
        hidden: widths of the encoder's hidden dense layers, from the input to the latent; may be empty.
        latent: latent size. Smaller than input_size makes an undercomplete autoencoder, larger an
            overcomplete one.
        activation: activation of the hidden layers, convolutions among them; the latent itself has none.
        decoder_hidden: widths of the decoder's hidden layers, from the latent to the reconstruction; None
            mirrors the encoder.
        linear_decoder: makes the decoder a single linear layer.
        output_activation: activation of the reconstruction, such as "sigmoid" for data in [0, 1].
    """

    input_size: int
    channels: tuple[int, ...] | None = None
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
        if self.channels is not None:
            object.__setattr__(self, "channels", check_sizes(self.channels, "channels") or None)
        if self.linear_decoder and self.channels:
            raise InputError(f"channels={self.channels!r}: a linear decoder has no convolutions")
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


class EncoderDecoder(Model):
    """Base of the models with an encoder and a decoder.

    Either is made of the config's sizes, or a module that is given in its place and becomes part of the model.
    Such an encoder is called with samples (B, input_size), or (B, C, H, W) if the config has an image_shape, and such a
    decoder with codes (B, latent). What they give is flattened, (B, features).

    Args:
        config: the options.
        options: the same, by name.
        encoder, decoder: modules in the place of those of the config's sizes, or None.

    Attributes:
        networks: the names of the classes of the modules that were given, by "encoder" and "decoder".
    """

    # Whether a layer of the model's own makes codes of what the encoder gives.
    _has_head = False

    def __init__(
        self,
        config: ModelConfig | None,
        options: dict[str, Any],
        encoder: nn.Module | None,
        decoder: nn.Module | None,
    ) -> None:
        super().__init__(config, **options)
        given = {"encoder": encoder, "decoder": decoder}
        self.networks = {name: type(one).__name__ for name, one in given.items() if one is not None}
        for name in self.networks:
            _check_network(given[name], name)
        if self.networks:
            self._check_options()

    def _check_options(self) -> None:
        """That no option is of layers that are not there."""
        config = self.config
        if config.channels is not None:
            raise InputError(
                f"channels={config.channels!r}: give either channels or an encoder and a decoder, not both"
            )
        if "decoder" in self.networks:
            if config.decoder_hidden is not None:
                raise InputError(
                    f"decoder_hidden={config.decoder_hidden!r}: the decoder that is given has its own layers"
                )
            if config.linear_decoder:
                raise InputError("linear_decoder=True: the decoder that is given has its own layers")
        if "encoder" in self.networks and self._has_head and len(config.hidden) != 1:
            raise InputError(
                f"hidden={config.hidden!r}: expected one size, how many features the encoder that is given makes of a "
                "sample"
            )
        if len(self.networks) == 2:
            unused = {"activation": config.activation}
            if not self._has_head:
                unused["hidden"] = config.hidden
            for name, value in unused.items():
                if value != _DEFAULTS[name]:
                    raise InputError(
                        f"{name}={value!r}: encoder and decoder are given, and have layers of their own"
                    )

    def _features(self, flat: torch.Tensor) -> torch.Tensor:
        """What the encoder gives for samples (B, input_size): codes (B, latent), or what the head makes them of."""
        if "encoder" not in self.networks:
            return self.encoder(flat)
        # Whether it is written into cannot be told everywhere. A compiler drops the copy if it is not.
        is_told = not (_registry.is_watched() or flat.is_inference())
        seen = flat if is_told else flat.clone()
        version = flat._version if is_told else None
        given = self.encoder(_shaped(seen, self.config.image_shape))
        if is_told and flat._version != version:
            raise InputError(
                "encoder: expected it to leave its input as it is, got one that writes into it, which is what "
                "reconstructions are compared with; give its first layers inplace=False"
            )
        if self._has_head:
            return _rows(given, "encoder", flat.shape[0], self.config.hidden[0], "hidden")
        return _rows(given, "encoder", flat.shape[0], self.config.latent, "latent")

    def _output(self, latent: torch.Tensor) -> torch.Tensor:
        """What the decoder gives for codes (B, latent), behind its activation: (B, input_size)."""
        if "decoder" not in self.networks:
            return self.decoder(latent)
        rows = _rows(self.decoder(latent), "decoder", latent.shape[0], self.config.input_size, "input_size")
        return eager_activation(self.config.output_activation)(rows)

    def _eager_networks(self) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder in plain PyTorch, between rows (B, features), with copied weights and the same keys."""
        copied: dict[int, Any] = {}
        twins = []
        for name in ("encoder", "decoder"):
            network = getattr(self, name)
            if name not in self.networks:
                twins.append(copy.deepcopy(network) if isinstance(network, nn.Identity) else network.eager())
                continue
            # Parameters that both of them have stay one.
            twin = copy.deepcopy(network, copied)
            for module in twin.modules():
                # Of a module that `aefast.patch` has changed.
                module.__class__ = getattr(type(module), "aefast_original", type(module))
            activation = "identity"
            if name == "encoder":
                twin.register_forward_pre_hook(functools.partial(_see_samples, self.config.image_shape))
            else:
                activation = self.config.output_activation
            twin.register_forward_hook(functools.partial(_give_rows, eager_activation(activation)))
            twins.append(twin)
        return tuple(twins)

    def _in_mode(self, twin: nn.Module) -> nn.Module:
        """A twin in the mode of this model, modules of given networks each in its own."""
        twin.train(self.training)
        for name in self.networks:
            pairs = zip(getattr(twin, name).modules(), getattr(self, name).modules(), strict=True)
            for one, other in pairs:
                one.training = other.training
        return twin

    def _blank(self) -> EncoderDecoder:
        return type(self)(self.config, **{name: getattr(self, name) for name in self.networks})


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DenseConfig)}


def _check_network(network: object, name: str) -> None:
    """That a module can take part in a model, and be saved with it."""
    if isinstance(network, type):
        raise InputError(f"{name}: expected a module, got the class {network.__name__}; make one of it")
    if not isinstance(network, nn.Module):
        raise InputError(f"{name}: expected a torch.nn.Module, got {type(network).__name__}")
    if any(map(is_lazy, (*network.parameters(), *network.buffers()))):
        raise InputError(
            f"{name}: expected parameters of known shapes; call it with samples before it is given"
        )
    for key, value in network.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{name}: expected tensors in its state dict, got {type(value).__name__} as {key!r}"
            )


def _shaped(flat: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    return flat if shape is None else flat.unflatten(1, shape)


def _rows(given: object, name: str, batch: int, features: int, option: str) -> torch.Tensor:
    """What a module gave for a batch, as (batch, features); `option` is the one that says how many these are."""
    if not isinstance(given, torch.Tensor):
        raise InputError(f"{name}: expected it to give a tensor, got {type(given).__name__}")
    if given.dim() < 2 or given.shape[0] != batch or given.shape[1:].numel() != features:
        raise InputError(
            f"{name}: expected it to give ({batch}, ...) with {features} features a sample, as {option} says, got "
            f"{tuple(given.shape)}"
        )
    return given.flatten(1)


def _see_samples(
    shape: tuple[int, ...] | None, module: nn.Module, inputs: tuple[torch.Tensor]
) -> torch.Tensor:
    """A hook: the module gets rows as samples of a shape."""
    return _shaped(*inputs, shape)


def _give_rows(activation: nn.Module, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A hook: what the module gives is flattened and goes through an activation."""
    return activation(output.flatten(1))


def make_encoder(
    config: DenseConfig,
    given: nn.Module | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    *,
    has_head: bool = False,
) -> nn.Module:
    """From the input to the latent, or to what a head makes codes of: the module that is given, or one of the config's
    sizes."""
    if given is not None:
        return given.to(device=device, dtype=dtype)
    sizes = config.hidden if has_head else (*config.hidden, config.latent)
    activations = config.activation, config.activation if has_head else "identity"
    if config.channels is not None:
        return ConvolutionalEncoder(
            config.image_shape, config.channels, sizes, *activations, device=device, dtype=dtype
        )
    if not sizes:
        return nn.Identity()
    return MLP((config.input_size, *sizes), *activations, device=device, dtype=dtype)


def features_of(config: DenseConfig) -> int:
    """How many features of a sample a head makes codes of."""
    if config.hidden:
        return config.hidden[-1]
    return (
        config.input_size
        if config.channels is None
        else math.prod(halved(config.image_shape, config.channels)[-1])
    )


def make_decoder(
    config: DenseConfig, given: nn.Module | None, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """From the latent to the reconstruction: the module that is given, or one of the config's sizes."""
    if given is not None:
        return given.to(device=device, dtype=dtype)
    if config.channels is not None:
        return ConvolutionalDecoder(
            config.image_shape,
            config.channels,
            (config.latent, *config.decoder_widths),
            config.activation,
            config.output_activation,
            device=device,
            dtype=dtype,
        )
    features = (config.latent, *config.decoder_widths, config.input_size)
    return MLP(features, config.activation, config.output_activation, device=device, dtype=dtype)
