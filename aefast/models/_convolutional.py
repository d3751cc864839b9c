"""Convolutions in front of a dense encoder, and their mirror behind a dense decoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from aefast.nn import MLP
from aefast.nn.linear_act import eager_activation

# Of a convolution that halves the sides of an image, strided instead of pooled (Radford, Metz, Chintala,
# arXiv:1511.06434, section 3).
KERNEL, STRIDE, PADDING = 4, 2, 1


def halved(image_shape: tuple[int, int, int], channels: Sequence[int]) -> list[tuple[int, int, int]]:
    """The image's shape (C, H, W) and those that convolutions to so many channels make of it, one of the other."""
    shapes = [image_shape]
    for count in channels:
        _, height, width = shapes[-1]
        shapes.append((count, height // STRIDE, width // STRIDE))
    return shapes


class ConvolutionalEncoder(nn.Module):
    """Convolutions, each of which halves the sides, and dense layers of what they make.

    Args:
        image_shape: (C, H, W) of a sample.
        channels: of what each convolution makes.
        sizes: of what each dense layer makes; may be empty.
        activation: of all convolutions and of all dense layers but the last.
        output_activation: of the last dense layer.

    Shape:
        input (B, C · H · W); output (B, sizes[-1]), without sizes all that the last convolution makes of a sample.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: Sequence[int],
        sizes: Sequence[int],
        activation: str,
        output_activation: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.image_shape = image_shape
        shapes = halved(image_shape, channels)
        layers: list[nn.Module] = []
        for (before, *_), (after, *_) in pairwise(shapes):
            layers += [
                nn.Conv2d(before, after, KERNEL, STRIDE, PADDING, device=device, dtype=dtype),
                eager_activation(activation),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.features = (math.prod(shapes[-1]), *sizes)
        if sizes:
            self.dense = MLP(self.features, activation, output_activation, device=device, dtype=dtype)
        else:
            self.dense = nn.Identity()
        # The format in which images come, the faster one.
        self.convolutions.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x.unflatten(1, self.image_shape).contiguous(memory_format=torch.channels_last)
        # As they lie in memory.
        return self.dense(self.convolutions(images).permute(0, 2, 3, 1).flatten(1))

    def eager(self) -> ConvolutionalEncoder:
        """The same in plain PyTorch, with copied values and the same state dict keys."""
        return _with_eager_layers(self)


class ConvolutionalDecoder(nn.Module):
    """Dense layers, and convolutions that double the sides: the mirror of a `ConvolutionalEncoder`.

    Args:
        image_shape: (C, H, W) of a reconstruction.
        channels: of the encoder's convolutions; these are gone through in reverse.
        sizes: of the code, and of what each dense layer but the last makes of it.
        activation: of all layers but the last convolution.
        output_activation: of that one.

    Shape:
        input (B, sizes[0]); output (B, C · H · W).
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: Sequence[int],
        sizes: Sequence[int],
        activation: str,
        output_activation: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shapes = halved(image_shape, channels)[::-1]
        self.features = (*sizes, math.prod(shapes[0]))
        self.dense = MLP(self.features, activation, activation, device=device, dtype=dtype)
        # (H, W, C), as they lie in memory.
        self.first_shape = (*shapes[0][1:], shapes[0][0])
        layers: list[nn.Module] = []
        for before, after in pairwise(shapes):
            # The row and column that halving has dropped.
            rest = tuple(large % STRIDE for large in after[1:])
            layers += [
                nn.ConvTranspose2d(
                    before[0],
                    after[0],
                    KERNEL,
                    STRIDE,
                    PADDING,
                    output_padding=rest,
                    device=device,
                    dtype=dtype,
                ),
                eager_activation(activation),
            ]
        layers[-1] = eager_activation(output_activation)
        self.convolutions = nn.Sequential(*layers)
        # The format in which images come, the faster one.
        self.convolutions.to(memory_format=torch.channels_last)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        images = self.dense(latent).unflatten(1, self.first_shape).permute(0, 3, 1, 2)
        return self.convolutions(images).flatten(1)

    def eager(self) -> ConvolutionalDecoder:
        """The same in plain PyTorch, with copied values and the same state dict keys."""
        return _with_eager_layers(self)


def _with_eager_layers(module: nn.Module) -> Any:
    twin = copy.deepcopy(module)
    if isinstance(module.dense, MLP):
        twin.dense = module.dense.eager()
    return twin
