"""A set of samples in memory."""

from __future__ import annotations

import dataclasses
import zlib

import torch

from aefast.errors import InputError

HELD_OUT_FRACTION = 0.1


class DataError(InputError):
    """A data source that cannot be read, or holds something that cannot be trained on."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """N samples of the same shape.

    Attributes:
        name: what the data is called in messages and plots.
        samples: (N, features), float32, on the CPU, all finite.
        sample_shape: shape of one sample before it was flattened, such as (8, 8) for a grey image.
        held_out: how many samples at the end are the held-out part, for sources whose samples overlap and
            must not be split at random; None lets `split` draw.
    """

    name: str
    samples: torch.Tensor
    sample_shape: tuple[int, ...]
    held_out: int | None = None

    def __len__(self) -> int:
        return self.samples.shape[0]

    @property
    def features(self) -> int:
        """Values of a sample."""
        return self.samples.shape[1]

    def split(
        self, fraction: float = HELD_OUT_FRACTION, *, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The row numbers of the training part and of the held-out part, both int64.

        Args:
            fraction: share that is held out, at least one sample and never all of them.
            seed: seed of the draw. It is its own, so that runs of different training seeds hold out the same
                samples and their validation losses compare.
        """
        if self.held_out is not None:
            rows = torch.arange(len(self))
            return rows[: -self.held_out], rows[-self.held_out :]
        count = min(max(1, round(fraction * len(self))), len(self) - 1)
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        # Sorted rows read memory-mapped files in order.
        return rows[count:].sort().values, rows[:count].sort().values

    def fingerprint(self) -> str:
        """The size and a checksum of up to 64 rows: tells data sets apart without reading all of them."""
        rows = torch.linspace(0, len(self) - 1, min(64, len(self)), dtype=torch.float64).long()
        checksum = zlib.crc32(self.samples[rows].contiguous().numpy().tobytes())
        return f"{len(self)}x{self.features}-{checksum:08x}"
