"""The denoising autoencoder: it sees noisy samples and is to give back the clean ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from aefast.errors import InputError
from aefast.models._base import ModelOutput, check_choice, register
from aefast.models.autoencoder import Autoencoder, AutoencoderConfig
from aefast.nn import Corrupt
from aefast.ops import corrupt as op


@dataclasses.dataclass(frozen=True)
class DenoisingConfig(AutoencoderConfig):
    """Options of `DenoisingAutoencoder`: those of `Autoencoder`, and the noise.

    Attributes:
        noise: "gaussian", "salt_and_pepper", "masking" or "dropout", as `aefast.functional.corrupt` defines them.
        noise_mean, noise_std: of the gaussian.
        noise_p: the chance of the other noises.
        noise_low, noise_high: what salt and pepper set.
        noise_block: side of masking's squares, in pixels. Above 1 it needs image_shape.

    An option of the noise that is None has the default that `aefast.functional.corrupt` gives it.
    """

    noise: str = "gaussian"
    noise_mean: float | None = None
    noise_std: float | None = None
    noise_p: float | None = None
    noise_low: float | None = None
    noise_high: float | None = None
    noise_block: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.noise, "noise", op.NOISES)
        takes = op.NOISES[self.noise]
        for name, value in self.noise_options.items():
            if name not in takes:
                listed = ", ".join(f"noise_{taken}" for taken in takes)
                raise InputError(
                    f"noise_{name}={value!r}: {self.noise} noise has no such option; it takes {listed}"
                )
            op.noise_of(self.noise, {name: value}, f"noise_{name}={value!r}")
        if self.image_shape is None and (self.noise_block or 1) > 1:
            raise InputError(
                f"noise_block={self.noise_block}: needs image_shape, the (C, H, W) of a sample, to cut squares out of"
            )

    @property
    def noise_options(self) -> dict[str, Any]:
        """The noise's options that are not None, as `aefast.functional.corrupt` calls them."""
        names = ("mean", "std", "p", "low", "high", "block")
        values = {name: getattr(self, f"noise_{name}") for name in names}
        return {name: value for name, value in values.items() if value is not None}


@register("denoising")
class DenoisingAutoencoder(Autoencoder):
    """Autoencoder that learns to undo noise (Vincent et al., JMLR 11, 2010, section 3).

    In training mode the input gets noise, and the loss compares what the model makes of it with the input as it was
    given. In eval mode the model reconstructs what it is given, so that noisy samples come out denoised; `corrupt`
    makes noisy samples in either mode.

    Args:
        config: the options; or give them by name: ``DenoisingAutoencoder(input_size=784, noise_std=0.2)``.
        encoder, decoder: modules in the place of its own (docs/models.md, "Networks of your own").
        device: where the parameters live.
        dtype: their floating-point type.

    Shape:
        input (B, ...) with input_size features a sample; latent (B, latent); reconstruction as the input.
    """

    config_class = DenoisingConfig
    config: DenoisingConfig

    def __init__(
        self,
        config: DenoisingConfig | None = None,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, encoder=encoder, decoder=decoder, device=device, dtype=dtype, **options)
        self.noise = Corrupt(self.config.noise, **self.config.noise_options)

    def corrupt(
        self,
        x: torch.Tensor,
        *,
        seed: int | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Samples x (B, ...) with the noise the model is trained for, in the shape of x.

        Args:
            x: the samples.
            seed: an int, or an int64 tensor of one element; the same seed gives the same noise.
            generator: where the seed comes from instead; torch's own by default.
        """
        return self.noise.corrupt(self._shaped(x), seed=seed, generator=generator).reshape(x.shape)

    def forward(self, x: torch.Tensor) -> ModelOutput:
        return self._reconstruct(self.noise(self._shaped(x)), x)

    def evaluate(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `Model.evaluate`, of noisy samples: "loss" and "mse" are between the denoised and x, "noisy_mse" is
        between the noisy and x. Of a subclass with a `forward` of its own, as `Model.evaluate` alone."""
        if self.has_own("forward"):
            return super().evaluate(x)
        noisy = self.corrupt(x)
        output = self._reconstruct(noisy, x)
        return {
            "loss": output.loss,
            "mse": F.mse_loss(output.reconstruction, x),
            "noisy_mse": F.mse_loss(noisy, x),
        }

    def illustrate(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        noisy = self.corrupt(x)
        return {"original": x, "noisy": noisy, "denoised": self._reconstruct(noisy, x).reconstruction}

    def _shaped(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, ...) in the shape that the noise needs."""
        flat, shape = self.flatten(x), self.config.image_shape
        return flat if shape is None else flat.unflatten(1, shape)

    def eager_twin(self) -> nn.Sequential:
        noise, shape = self.noise.eager(), self.config.image_shape
        if shape is not None:
            noise = nn.Sequential(nn.Unflatten(1, shape), noise, nn.Flatten())
        return self._eager_twin(noise=noise)
