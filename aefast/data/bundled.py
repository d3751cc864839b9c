"""Real data that comes inside scikit-learn and scikit-image; nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch

from aefast.data.dataset import HELD_OUT_FRACTION, DataError, Dataset
from aefast.data.packages import optional

PATCH_COUNT = 120_000
PATCH_SEED = 0

# Photographs that scikit-image's wheel contains; each is a function of skimage.data.
_PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "moon",
    "rocket",
)


def digits() -> Dataset:
    """1,797 handwritten digits of 8×8 pixels in [0, 1], from scikit-learn."""
    images = optional("sklearn.datasets", "scikit-learn", "digits").load_digits().images
    # The pixels count from 0 to 16.
    samples = torch.from_numpy(images.reshape(len(images), -1) / 16).float()
    return Dataset("digits", samples, images.shape[1:])


def patches(size: int = 16, count: int = PATCH_COUNT) -> Dataset:
    """Grey square patches in [0, 1] cut at random places from photographs.

    Patches of one photograph overlap, so the held-out part is not drawn at random: it is cut from a strip at
    the bottom of every photograph that no training patch touches.

    Args:
        size: side of a patch in pixels, from 2 to 28.
        count: how many patches, held-out ones included.
    """
    # The lowest photograph has 300 rows, its strip 30: a patch must fit with a place to spare.
    if not isinstance(size, int) or isinstance(size, bool) or not 2 <= size <= 28:
        raise DataError(f"patch_size={size!r}: expected an integer from 2 to 28")
    photographs = _photographs()
    held_out = round(HELD_OUT_FRACTION * count)
    generator = np.random.default_rng(PATCH_SEED)
    above, strips = [], []
    for photograph in photographs:
        cut = round(len(photograph) * (1 - HELD_OUT_FRACTION))
        above.append(photograph[:cut])
        strips.append(photograph[cut:])
    pixels = np.concatenate(
        [_cut(above, size, count - held_out, generator), _cut(strips, size, held_out, generator)]
    )
    return Dataset("patches", torch.from_numpy(pixels), (size, size), held_out)


def _cut(images: list[np.ndarray], size: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """(count, size²) patches from random places, all places of all images being equally likely."""
    places = np.array([(h - size + 1) * (w - size + 1) for h, w in (image.shape for image in images)])
    chosen = np.sort(generator.integers(places.sum(), size=count))
    bounds = np.concatenate([[0], np.cumsum(places)])
    cut = []
    for image, first, end in zip(images, bounds, bounds[1:], strict=False):
        place = chosen[(chosen >= first) & (chosen < end)] - first
        windows = np.lib.stride_tricks.sliding_window_view(image, (size, size))
        row, column = np.divmod(place, windows.shape[1])
        cut.append(windows[row, column].reshape(len(place), size * size))
    return generator.permutation(np.concatenate(cut))


def _photographs() -> list[np.ndarray]:
    """The photographs as grey float32 images (H, W) in [0, 1]."""
    skimage_data = optional("skimage.data", "scikit-image", "patches")
    rgb2gray = optional("skimage.color", "scikit-image", "patches").rgb2gray
    sample_images = optional("sklearn.datasets", "scikit-learn", "patches").load_sample_images
    images = [getattr(skimage_data, name)() for name in _PHOTOGRAPHS] + sample_images().images
    return [(rgb2gray(image) if image.ndim == 3 else image / 255).astype(np.float32) for image in images]
