"""Noise on the input of a denoising autoencoder."""

from __future__ import annotations

import torch
from torch import nn

import aefast.functional as AF
from aefast.ops import corrupt as op


class Corrupt(nn.Module):
    """Noise in training mode and the identity in eval mode, as with `torch.nn.Dropout`.

    The function is `aefast.functional.corrupt`, which says what each noise does; `corrupt` applies it in either mode.
    It has no parameters.

    Args:
        noise: "gaussian", "salt_and_pepper", "masking" or "dropout".
        mean, std: of the gaussian; 0 and 0.1 unless given.
        p: the chance of the other noises; 0.1 unless given.
        low, high: what salt and pepper set; 0 and 1 unless given.
        block: side of masking's squares, in elements; 1 unless given.

    Shape:
        input and output of any one shape; (..., C, H, W) for masking with a block above 1.

    Raises:
        InputError: an unknown noise, an option of another noise, or a value out of its range.
    """

    def __init__(
        self,
        noise: str,
        *,
        mean: float | None = None,
        std: float | None = None,
        p: float | None = None,
        low: float | None = None,
        high: float | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__()
        options = {"mean": mean, "std": std, "p": p, "low": low, "high": high, "block": block}
        op.noise_of(noise, options, "Corrupt")
        self.noise = noise
        given = {name: value for name, value in options.items() if value is not None}
        self.options = op.NOISES[noise] | given

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.corrupt(x) if self.training else x

    def corrupt(
        self,
        x: torch.Tensor,
        *,
        seed: int | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """x with noise on it, whatever the mode; the same seed gives the same noise."""
        return AF.corrupt(x, self.noise, seed=seed, generator=generator, **self.options)

    def eager(self) -> nn.Module:
        """The same in plain PyTorch, with noise by torch's generator."""
        if self.noise == "dropout":
            return nn.Dropout(self.options["p"]).train(self.training)
        return _EagerCorrupt(self.noise, self.options).train(self.training)

    def extra_repr(self) -> str:
        return ", ".join([self.noise, *(f"{name}={value:g}" for name, value in self.options.items())])


class _EagerCorrupt(nn.Module):
    """`Corrupt` as it is written without it."""

    def __init__(self, noise: str, options: dict[str, float]) -> None:
        super().__init__()
        self.noise = noise
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        options = self.options
        if self.noise == "gaussian":
            noisy = torch.add(x, torch.randn_like(x), alpha=options["std"])
            return noisy + options["mean"] if options["mean"] else noisy
        p = options["p"]
        if self.noise == "salt_and_pepper":
            u = torch.rand_like(x)
            return torch.where(u < p / 2, options["low"], torch.where(u < p, options["high"], x))
        block = options["block"]
        if block == 1:
            return x.masked_fill(torch.rand_like(x) < p, 0.0)
        height, width = x.shape[-2:]
        squares = x.new_empty(*x.shape[:-3], 1, -(-height // block), -(-width // block))
        mask = (torch.rand_like(squares) < p).repeat_interleave(block, -2).repeat_interleave(block, -1)
        return x.masked_fill(mask[..., :height, :width], 0.0)

    def extra_repr(self) -> str:
        return ", ".join([self.noise, *(f"{name}={value:g}" for name, value in self.options.items())])
