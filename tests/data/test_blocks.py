"""The order of blocks: every row once, the same for the same seed, from any batch on."""

import numpy as np
import pytest
import torch

from aefast.data import Batches, Blocks, Dataset
from aefast.data import blocks as blocks_module


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(blocks_module, "WINDOW_BLOCKS", 3)


def make(total=103, size=4, seed=0, batch_size=10, numbers=None):
    """Batches of samples that are their row numbers."""
    numbers = torch.arange(-(-total // size)) if numbers is None else numbers
    samples = torch.arange(float(total))[:, None]
    return Batches(samples, Blocks(numbers, size, total), batch_size=batch_size, seed=seed)


def order(batches, epoch=0, first=0):
    return torch.cat(list(batches.epoch(epoch, first)))[:, 0].long().tolist()


@pytest.mark.parametrize("batch_size", [1, 7, 10, 12, 103, 500])
@pytest.mark.parametrize("size", [1, 4, 13, 103])
def test_every_row_comes_once_in_batches_of_one_size(size, batch_size):
    batches = make(size=size, batch_size=batch_size)
    sizes = [len(batch) for batch in batches.epoch(0)]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert len(sizes) == len(batches)
    assert sorted(order(batches)) == list(range(103))


def test_only_the_rows_of_the_blocks_come():
    numbers = torch.tensor([0, 5, 25])
    expected = [*range(4), *range(20, 24), *range(100, 103)]
    batches = make(numbers=numbers)
    assert len(batches.rows) == 11
    assert sorted(order(batches)) == expected
    assert torch.cat(list(batches.in_order()))[:, 0].tolist() == expected
    assert batches.spread(100)[:, 0].tolist() == expected
    assert batches.spread(3)[:, 0].tolist() == [0, 21, 102]


def test_the_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = order(make())
    torch.manual_seed(2)
    assert order(make()) == first
    assert len({tuple(order(make(seed=seed), epoch)) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize("batch_size", [5, 12, 40])
def test_an_epoch_can_begin_at_any_batch(batch_size):
    batches = make(batch_size=batch_size)
    whole = list(batches.epoch(2))
    for first in range(len(whole) + 1):
        rest = list(batches.epoch(2, first))
        assert len(rest) == len(whole) - first
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[first:], strict=True))


def test_beginning_late_makes_no_earlier_window(monkeypatch):
    made = []
    original = Blocks._rows
    monkeypatch.setattr(
        Blocks, "_rows", lambda self, numbers: made.append(numbers) or original(self, numbers)
    )
    # Rows 84 to 89 of an epoch, which are in the eighth window, of 12 rows like the others.
    next(make(batch_size=6).epoch(0, first=14))
    assert len(made) == 1


def test_rows_of_a_window_are_mixed():
    """Neighbours in a file are no neighbours in the order, and windows hold blocks from everywhere."""
    positions = np.array(order(make(total=1200, size=10)))
    assert (np.abs(np.diff(positions)) == 1).mean() < 0.1
    windows = positions.reshape(-1, 30)
    for window in windows:
        assert len(set(window // 10)) == 3
        # Of three blocks of ten rows in a row, the first ten rows come from more than one.
        assert len(set(window[:10] // 10)) > 1
    # By their places in their blocks, rows come in an order of its own in each window.
    assert len({tuple(window % 10) for window in windows}) == len(windows)
    assert abs(np.corrcoef(np.arange(1200), positions)[0, 1]) < 0.2


def test_split_holds_out_whole_blocks():
    dataset = Dataset("x", torch.rand(103, 2), (2,), block_rows=4)
    training, held_out = dataset.split()
    assert len(training) + len(held_out) == 103
    assert len(held_out.numbers) == 3
    assert torch.equal(torch.cat([training.numbers, held_out.numbers]).sort().values, torch.arange(26))
    assert torch.equal(dataset.split()[1].numbers, held_out.numbers)
    assert not torch.equal(dataset.split(seed=1)[1].numbers, held_out.numbers)
    assert torch.cat(list(dataset.rows().in_order())).tolist() == list(range(103))


def test_row_numbers_take_the_memory_of_a_window():
    """A data set of 10⁹ rows, whose row numbers would take 8 GB."""
    blocks = Blocks(torch.arange(125_000), 8000, 10**9)
    assert len(blocks) == 10**9
    rows = next(blocks.shuffled(torch.Generator().manual_seed(0), first=10**9 - 5000))
    assert len(rows) == 5000
    assert rows.max() < 10**9
