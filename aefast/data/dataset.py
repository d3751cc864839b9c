"""A set of samples."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import TYPE_CHECKING

import torch

from aefast.data.blocks import Blocks
from aefast.errors import InputError

if TYPE_CHECKING:
    from aefast.data.files import FileRows

HELD_OUT_FRACTION = 0.1


class DataError(InputError):
    """A data source that cannot be read, or holds something that cannot be trained on."""


class DataWarning(UserWarning):
    """Data that can be trained on, and are probably meant to be read otherwise."""


BYTES_ARE_IMAGES = (
    "its uint8 values are read as those of images, 0 to 255 as 0 to 1; for counts give another type, such as int32, "
    "whose values are kept"
)
"""What is warned of where samples of uint8 look like counts."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """N samples of the same shape.

    Attributes:
        name: what the data is called in messages and plots.
        samples: (N, features), float32, on the CPU, all finite: a tensor, which may be memory-mapped, or rows in files
            that become one when they are read.
        sample_shape: shape of one sample before it was flattened, such as (8, 8) for a grey image.
        held_out: how many samples at the end are the held-out part, for sources whose samples overlap and
            must not be split at random; None lets `split` draw.
        block_rows: how many consecutive rows are held out, read and shuffled as one block, for data that memory does
            not hold; None where any order of rows can be read.

    Raises:
        DataError: samples of another type, dtype or number of dimensions, or a sample_shape of another number of
            features.
    """

    name: str
    samples: torch.Tensor | FileRows
    sample_shape: tuple[int, ...]
    held_out: int | None = None
    block_rows: int | None = None

    def __post_init__(self) -> None:
        samples = self.samples
        is_file = hasattr(samples, "read")
        if not is_file and not isinstance(samples, torch.Tensor):
            raise DataError(f"samples: expected a tensor (N, features), got {type(samples).__name__}")
        if not is_file and samples.layout != torch.strided:
            raise DataError(
                f"samples: expected a dense tensor, got layout {samples.layout}; give samples.to_dense()"
            )
        if len(samples.shape) != 2 or not (is_file or samples.dtype == torch.float32):
            dtype = "" if is_file else f"{str(samples.dtype).removeprefix('torch.')} of "
            raise DataError(
                f"samples: expected float32 of shape (N, features), got {dtype}{tuple(samples.shape)}"
            )
        if math.prod(self.sample_shape) != samples.shape[1]:
            raise DataError(
                f"sample_shape={tuple(self.sample_shape)!r}: expected a product of {samples.shape[1]}, the features of "
                "a sample"
            )

    def __len__(self) -> int:
        return self.samples.shape[0]

    @property
    def features(self) -> int:
        """Values of a sample."""
        return self.samples.shape[1]

    def rows(self) -> torch.Tensor | Blocks:
        """All rows: their numbers, int64, or blocks where there are `block_rows`."""
        if self.block_rows is None:
            return torch.arange(len(self))
        return Blocks(torch.arange(-(-len(self) // self.block_rows)), self.block_rows, len(self))

    def split(
        self, fraction: float = HELD_OUT_FRACTION, *, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[Blocks, Blocks]:
        """The training part and the held-out part: row numbers, int64, or blocks where there are `block_rows`.

        Args:
            fraction: share that is held out, at least one sample and never all of them.
            seed: seed of the draw. It is its own, so that runs of different training seeds hold out the same
                samples and their validation losses compare.
        """
        if self.held_out is not None:
            if not 1 <= self.held_out < len(self):
                raise InputError(
                    f"held_out={self.held_out!r}: expected from 1 to below the number of samples, {len(self):,}"
                )
            rows = torch.arange(len(self))
            return rows[: -self.held_out], rows[-self.held_out :]
        size = 1 if self.block_rows is None else self.block_rows
        total = -(-len(self) // size)
        if total < 2:
            what = "samples" if self.block_rows is None else f"blocks of {size:,} samples"
            raise InputError(f"data={self.name!r}: expected at least 2 {what} to split, got {total}")
        count = min(max(1, round(fraction * total)), total - 1)
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        # In order, so that files are read in order.
        parts = drawn[count:].sort().values, drawn[:count].sort().values
        if self.block_rows is None:
            return parts
        training, held_out = (Blocks(numbers, size, len(self)) for numbers in parts)
        return training, held_out

    def fingerprint(self) -> str:
        """The size and a checksum of up to 64 rows: tells data sets apart without reading all of them."""
        rows = torch.linspace(0, len(self) - 1, min(64, len(self)), dtype=torch.float64).long()
        checksum = zlib.crc32(self.samples[rows].contiguous().numpy().tobytes())
        return f"{len(self)}x{self.features}-{checksum:08x}"
