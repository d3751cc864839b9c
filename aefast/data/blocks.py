"""The order in which blocks of rows are gone through, for data that memory does not hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

# What a block is at most: of that size, places that are read at random take a disk hardly longer than the whole file.
_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 1 << 13

# Blocks whose rows are mixed with each other.
WINDOW_BLOCKS = 256


def block_rows_of(row_bytes: int) -> int:
    """Rows of a block, for rows that take `row_bytes` in their file."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // row_bytes))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of a data set, told by the blocks they are in.

    It takes 8 bytes a block where row numbers take 8 bytes a row. Block i holds the rows from i·size to (i+1)·size; the
    last one of a data set may hold fewer.

    Attributes:
        numbers: (K,) int64, ascending, which blocks.
        size: rows of a block.
        total: rows of the data set.
    """

    numbers: torch.Tensor
    size: int
    total: int

    def __len__(self) -> int:
        """Rows in the blocks."""
        return int(self._lengths(self.numbers).sum())

    def in_order(self) -> Iterator[torch.Tensor]:
        """All row numbers in their order, int64, some at a time."""
        for window in self.numbers.split(WINDOW_BLOCKS):
            yield self._rows(window)

    def shuffled(self, generator: torch.Generator, first: int = 0) -> Iterator[torch.Tensor]:
        """All row numbers once, int64, some at a time, in an order that depends on the state of `generator` alone.

        The blocks come in a random order; the rows of each `WINDOW_BLOCKS` of them, one window, are mixed.

        Args:
            generator: of the CPU.
            first: how many rows at the beginning are left out. Windows of such rows are not made.
        """
        order = self.numbers[torch.randperm(len(self.numbers), generator=generator)]
        windows = order.split(WINDOW_BLOCKS)
        # A seed of its own for each window, so that any of them can be made without those before it.
        seeds = torch.randint(2**63 - 1, (len(windows),), generator=generator).tolist()
        for window, seed in zip(windows, seeds, strict=True):
            length = int(self._lengths(window).sum())
            if first < length:
                mixed = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
                yield self._rows(window)[mixed[first:]]
            first = max(0, first - length)

    def spread(self, count: int) -> torch.Tensor:
        """The numbers of `count` of the rows, or of all if they are fewer, int64, evenly spread."""
        places = torch.linspace(0, len(self) - 1, min(count, len(self)), dtype=torch.float64).long()
        # Only the last block may be short, and it comes last.
        return self.numbers[places // self.size] * self.size + places % self.size

    def _lengths(self, numbers: torch.Tensor) -> torch.Tensor:
        return (self.total - numbers * self.size).clamp(max=self.size)

    def _rows(self, numbers: torch.Tensor) -> torch.Tensor:
        rows = (numbers[:, None] * self.size + torch.arange(self.size)).flatten()
        return rows[rows < self.total]
