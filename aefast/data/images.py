"""Image files as samples."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aefast.data.dataset import DataError
from aefast.data.files import BYTE_SCALE, FileRows
from aefast.data.packages import optional

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Pillow's modes of grey images with 8 bits or fewer, and with 16. The others are colour, but for those of 32 bits.
_GREY = ("1", "L", "LA", "La")
_WORDS = ("I;16", "I;16B", "I;16L", "I;16N")
_UNBOUNDED = ("I", "F")

_WORD_SCALE = np.float32(1 / 65535)

# Where EXIF data keep how a camera was held, and what they say of one that was upright.
_ORIENTATION, _UPRIGHT = 0x0112, 1


class ImageRows(FileRows):
    """Image files, each a sample with values from 0 to 1, decoded when it is read.

    Args:
        paths: the files, all of one size, and either all grey or all of colour.

    Attributes:
        sample_shape: (H, W) of grey images, (3, H, W) of those with colours. Transparency is left out.
        turned: the first file whose EXIF data ask whoever shows it to turn or mirror it, which is not done; or None.

    Raises:
        DataError: a file that cannot be read or differs from the first one; Pillow is not installed.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._pillow = optional("PIL.Image", "Pillow", str(paths[0].parent))
        self.turned: Path | None = None
        with self._open(paths[0]) as image:
            self.sample_shape = _shape(image, paths[0])
        for path in paths:
            with self._open(path) as image:
                if self.turned is None and _is_turned(image):
                    self.turned = path
        super().__init__((len(paths), math.prod(self.sample_shape)))

    def _open(self, path: Path) -> Image:
        """The image, not decoded yet, once it is known to have the shape of the others."""
        try:
            image = self._pillow.open(path)
        except Exception as error:
            raise _unreadable(path, error) from None
        shape = _shape(image, path)
        if path != self._paths[0] and shape != self.sample_shape:
            raise DataError(
                f"data={str(path)!r}: expected {_described(self.sample_shape)}, which {self._paths[0].name} is, got "
                f"{_described(shape)}"
            )
        return image

    def _fill(self, rows: np.ndarray, out: np.ndarray) -> None:
        for row, sample in zip(rows, out, strict=True):
            with self._open(self._paths[row]) as image:
                try:
                    sample[:] = _values(image).reshape(-1)
                except Exception as error:
                    # What decoders raise over a damaged file is of no fixed set of types.
                    raise _unreadable(self._paths[row], error) from None


def _shape(image: Image, path: Path) -> tuple[int, ...]:
    if image.mode in _UNBOUNDED and not _has_words(image):
        raise DataError(
            f"data={str(path)!r}: expected pixels of 8 or 16 bits, got Pillow's mode {image.mode!r}"
        )
    size = (image.height, image.width)
    return size if image.mode in _GREY or _has_words(image) else (3, *size)


def _has_words(image: Image) -> bool:
    """Whether pixels have 16 bits, which Pillow widens to 32 when it reads a .pgm file."""
    return image.mode in _WORDS or (image.mode == "I" and image.format == "PPM")


def _is_turned(image: Image) -> bool:
    """Whether its EXIF data, as far as they are known before the pixels are read, have it shown turned or mirrored."""
    if "exif" not in image.info:
        return False
    try:
        return image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT
    except (SyntaxError, ValueError, struct.error):
        # Damaged notes beside an image that can be read.
        return False


def _described(shape: tuple[int, ...]) -> str:
    kind = "colour" if len(shape) == 3 else "grey"
    return f"a {kind} image of {shape[-1]}×{shape[-2]} pixels"


def _values(image: Image) -> np.ndarray:
    """The pixels in [0, 1], float32, in the order of a sample's shape."""
    if _has_words(image):
        return np.asarray(image).astype(np.float32) * _WORD_SCALE
    if image.mode in _GREY:
        return np.asarray(image.convert("L")).astype(np.float32) * BYTE_SCALE
    return np.asarray(image.convert("RGB")).astype(np.float32).transpose(2, 0, 1) * BYTE_SCALE


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"data={str(path)!r}: expected an image that can be read ({reason})")
