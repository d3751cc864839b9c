"""Batches cut from a tensor in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Spreads (seed, epoch) over the 64-bit seeds of torch's generator: an odd constant near 2**64 / golden ratio.
_SEED_STRIDE = 0x9E3779B97F4A7C15


class Batches:
    """Shuffled batches of the rows of a tensor, a new order each epoch.

    The order is a function of (seed, epoch) alone, so any batch of any epoch can be reached again. A batch is
    one `index_select` on the whole tensor; samples are never collated one by one.

    Args:
        samples: (N, features).
        rows: (M,) int64, the row numbers that make up an epoch.
        batch_size: rows of a batch; the last batch of an epoch keeps the rest.
        seed: decides the order.
        device: where batches go; that of `samples` by default.
    """

    def __init__(
        self,
        samples: torch.Tensor,
        rows: torch.Tensor,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.samples = samples
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.device = samples.device if device is None else device

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
        """The batches (≤ batch_size, features) of an epoch, from batch number `first` on."""
        generator = torch.Generator().manual_seed((self.seed + (epoch + 1) * _SEED_STRIDE) % 2**63)
        order = self.rows[torch.randperm(len(self.rows), generator=generator)]
        return self._cut(order, first)

    def in_order(self) -> Iterator[torch.Tensor]:
        """The batches of all rows in the order of `rows`."""
        return self._cut(self.rows, 0)

    def _cut(self, order: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        order = order.to(self.samples.device)
        for start in range(first * self.batch_size, len(order), self.batch_size):
            batch = self.samples.index_select(0, order[start : start + self.batch_size])
            yield batch.to(self.device, non_blocking=True)
