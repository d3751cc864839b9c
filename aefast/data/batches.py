"""Batches cut from samples in memory or in files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from aefast.data.blocks import Blocks
from aefast.data.files import FileRows
from aefast.data.prefetch import prefetched
from aefast.errors import InputError

# Spreads (seed, epoch) over the 64-bit seeds of torch's generator: an odd constant near 2**64 / golden ratio.
_SEED_STRIDE = 0x9E3779B97F4A7C15

# The thread gathers as many batches at a time, since handing one over and searching files for its rows takes as long as
# copying half of it.
_GATHERED_BYTES = 4 << 20


class Batches:
    """Shuffled batches of rows, a new order each epoch.

    The order is a function of (seed, epoch) alone, so any batch of any epoch can be reached again. A batch is one
    gather from all samples; they are never collated one by one. Where samples lie in files, or in memory while the
    batches go to a GPU, a thread gathers the next ones during the step.

    Args:
        samples: (N, features).
        rows: which make up an epoch: (M,) int64, row numbers, which are shuffled all together; or blocks, of which
            the rows of some hundred at a time are.
        batch_size: rows of a batch; the last batch of an epoch keeps the rest.
        drop_last: whether that rest is left out instead.
        seed: decides the order.
        device: where batches go; that of `samples` by default, the CPU for files.
        share: (number, count): batches are cut into so many equal shares, and what comes of each is that one. A batch
            loses the rows that are left over, up to count - 1.

    Raises:
        InputError: batches that cannot be cut into equal shares.
    """

    def __init__(
        self,
        samples: torch.Tensor | FileRows,
        rows: torch.Tensor | Blocks,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
        share: tuple[int, int] = (0, 1),
        drop_last: bool = False,
    ) -> None:
        if batch_size % share[1]:
            raise InputError(
                f"batch_size={batch_size}: expected a multiple of the number of processes, {share[1]}"
            )
        self.samples = samples
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.share = share
        self.drop_last = drop_last
        self._home = samples.device if isinstance(samples, torch.Tensor) else torch.device("cpu")
        # A tensor's device has a number, where one that is given may have none.
        self.device = self._home if device is None else torch.empty(0, device=device).device

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (rest >= self.share[1] and not self.drop_last)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
        """The batches (≤ batch_size, features) of an epoch, from batch number `first` on."""
        generator = torch.Generator().manual_seed((self.seed + (epoch + 1) * _SEED_STRIDE) % 2**63)
        skipped = first * self.batch_size
        if isinstance(self.rows, Blocks):
            return self._batches(self.rows.shuffled(generator, skipped))
        order = self.rows[torch.randperm(len(self.rows), generator=generator)]
        return self._batches([order[skipped:]])

    def in_order(self) -> Iterator[torch.Tensor]:
        """The batches of all rows in the order of `rows`."""
        return self._batches(self.rows.in_order() if isinstance(self.rows, Blocks) else [self.rows])

    def spread(self, count: int) -> torch.Tensor:
        """Samples (n, features) of `count` of the rows, or of all if they are fewer, evenly spread, on the device."""
        if isinstance(self.rows, Blocks):
            rows = self.rows.spread(count)
        else:
            rows = self.rows[torch.linspace(0, len(self.rows) - 1, min(count, len(self.rows))).long()]
        return self._gather(rows.to(self._home)).to(self.device)

    def _batches(self, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The samples of row numbers that come in `pieces`."""
        shares = self._shares(_cut((piece.to(self._home) for piece in pieces), self.batch_size))
        if isinstance(self.samples, torch.Tensor) and self.device == self._home:
            yield from map(self._gather, shares)
            return
        rows = self.batch_size // self.share[1]
        together = rows * max(1, _GATHERED_BYTES // (4 * rows * self.samples.shape[1]))
        for batches in prefetched(map(self._gather, _cut(shares, together))):
            for batch in batches.split(rows):
                yield batch.to(self.device, non_blocking=True)

    def _shares(self, batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        number, count = self.share
        for rows in batches:
            if self.drop_last and len(rows) < self.batch_size:
                return
            size = len(rows) // count
            if size:
                yield rows[number * size : (number + 1) * size]

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The samples of row numbers, where all samples are, ready for the way to the device."""
        shape = (len(rows), self.samples.shape[1])
        is_file = isinstance(self.samples, FileRows)
        if self._home.type == "cpu" and self.device.type == "cuda":
            # Such memory is given out again once copies from it are done. It belongs to the current device, which is
            # another in a thread of its own.
            with torch.cuda.device(self.device):
                out = torch.empty(shape, dtype=None if is_file else self.samples.dtype, pin_memory=True)
        elif is_file:
            out = torch.empty(shape)
        else:
            out = None
        if is_file:
            return self.samples.read(rows, out)
        return torch.index_select(self.samples, 0, rows, out=out)


def _cut(pieces: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """The numbers in `pieces`, one piece behind the other, `size` at a time and at last the rest."""
    rest = None
    for piece in pieces:
        numbers = piece if rest is None else torch.cat([rest, piece])
        whole = len(numbers) // size * size
        for start in range(0, whole, size):
            yield numbers[start : start + size]
        rest = numbers[whole:]
    if rest is not None and len(rest):
        yield rest
