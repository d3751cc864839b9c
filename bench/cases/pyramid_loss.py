"""`pyramid_loss` beside the pyramid of the images' difference in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import aefast.functional as AF
from aefast.bench.case import OpCase, dtypes, training_inputs

LEVELS = 4
# (pyramid, p) at (batch, channels, height, width): batches of small pictures, and few large ones.
MAIN = (64, 3, 128, 128)
LARGE = (8, 3, 512, 512)
CASES = (
    ("average", 1, MAIN),
    ("average", 2, MAIN),
    ("average", 1, LARGE),
    ("gaussian", 1, MAIN),
    ("laplacian", 1, MAIN),
    ("laplacian", 1, LARGE),
)
QUICK_CASES = (("average", 1, MAIN), ("laplacian", 1, MAIN))
TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def cases(device: torch.device, quick: bool) -> Iterator[OpCase]:
    for dtype in dtypes(device):
        for pyramid, p, shape in QUICK_CASES if quick else CASES:
            is_compiled = not quick and shape == MAIN and p == 1
            yield case(pyramid, p, shape, dtype, device, is_compiled=is_compiled)
    if not quick:
        last = torch.channels_last
        yield case("average", 1, MAIN, dtypes(device)[0], device, layout=last)


def case(
    pyramid: str,
    p: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
    is_compiled: bool = False,
) -> OpCase:
    penalty: Callable[[Tensor], Tensor] = torch.abs if p == 1 else torch.square

    def aefast(input: Tensor, target: Tensor) -> Tensor:
        return AF.pyramid_loss(input, target, levels=LEVELS, p=p, pyramid=pyramid)

    def eager(input: Tensor, target: Tensor) -> Tensor:
        # Pyramids are linear: one of the difference does.
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        return sum(penalty(level).mean(dtype=wide) for level in PYRAMIDS[pyramid](input - target))

    def make() -> list[Tensor]:
        # Of 8 bits, as pictures have. The finest levels of their differences are exact then, and so are the signs that
        # are the gradient for p = 1: rounding would turn one in some million, which is a wrong element.
        input, target = (
            ((one.detach() * 32).round() / 32).contiguous(memory_format=layout)
            for one in training_inputs(device, dtype, shape, shape, scales=(1.0, 1.0))
        )
        return [input.requires_grad_(), target]

    def arguments(input: Tensor, target: Tensor) -> dict[str, Any]:
        return {"input": input, "target": target}

    of_layout = "-channels_last" if layout is torch.channels_last else ""
    return OpCase(
        "pyramid_loss",
        f"{pyramid}-l{LEVELS}-p{p}",
        "x".join(map(str, shape)) + of_layout,
        {"batch": shape[0], "features": shape[1] * shape[2] * shape[3]},
        dtype,
        device,
        make=make,
        aefast=aefast,
        eager=eager,
        arguments=arguments,
        is_compiled=is_compiled,
    )


def averages(images: Tensor) -> list[Tensor]:
    levels = [images]
    for _ in range(LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def gaussians(images: Tensor) -> list[Tensor]:
    levels = [images]
    for _ in range(LEVELS - 1):
        levels.append(_reduced(levels[-1]))
    return levels


def laplacians(images: Tensor) -> list[Tensor]:
    levels = gaussians(images)
    bands = [fine - _expanded(coarse, fine.shape[-2:]) for fine, coarse in itertools.pairwise(levels)]
    return [*bands, levels[-1]]


def _reduced(images: Tensor) -> Tensor:
    """Blurred, and of that every second element: by one convolution, of each channel as an image of its own."""
    taps = images.new_tensor(TAPS)
    planes = F.pad(images.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="reflect")
    reduced = F.conv2d(planes, (taps[:, None] * taps)[None, None], stride=2)
    return reduced[:, 0].unflatten(0, images.shape[:2])


def _expanded(images: Tensor, size: torch.Size) -> Tensor:
    """At the finer size: no zeros are put between the elements, since most of their products are known."""
    for dim, length in ((-1, size[-1]), (-2, size[-2])):
        count = images.shape[dim]
        first, last = images.narrow(dim, 1, 1), images.narrow(dim, count - 1 - length % 2, 1)
        padded = torch.cat((first, images, last), dim)
        left, right = padded.narrow(dim, 0, count), padded.narrow(dim, 2, count)
        pairs = torch.stack(((left + right) / 8 + images * 0.75, (images + right) / 2), dim)
        images = pairs.flatten(dim - 1, dim).narrow(dim, 0, length)
    return images


PYRAMIDS = {"average": averages, "gaussian": gaussians, "laplacian": laplacians}
