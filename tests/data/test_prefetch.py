"""The thread that works ahead: order, errors, and its end."""

import gc
import subprocess
import sys
import threading
import time

import pytest
import torch

from aefast.data import Batches, prefetch
from aefast.data.files import FileRows
from aefast.data.prefetch import prefetched


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "aefast-prefetch"]


@pytest.fixture(autouse=True)
def no_thread_stays():
    assert threads() == []
    yield
    gc.collect()
    assert threads() == []


def test_items_come_in_order_and_the_thread_ends():
    assert list(prefetched(iter(range(100)))) == list(range(100))
    assert list(prefetched(iter([]))) == []


def test_items_are_made_ahead_but_not_further():
    made = []
    items = prefetched((made.append(number) or number for number in range(10)), ahead=2)
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    # Time enough for a fourth, which must not be made before the second is taken.
    time.sleep(0.05)
    assert made == [0, 1, 2]


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise ValueError("the second cannot be read")

    found = prefetched(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="the second cannot be read"):
        next(found)


def test_dropping_the_iterator_ends_the_thread():
    items = prefetched(iter(range(1000)))
    next(items)
    assert len(threads()) == 1
    del items
    assert threads() == []


def test_leaving_a_loop_ends_the_thread():
    for _ in prefetched(iter(range(1000))):
        assert len(threads()) == 1
        break
    assert threads() == []
    with pytest.raises(KeyboardInterrupt):
        for _ in prefetched(iter(range(1000))):
            raise KeyboardInterrupt


class Counting(FileRows):
    """Samples that are their row numbers."""

    def __init__(self):
        super().__init__((50, 3))

    def _fill(self, rows, out):
        assert threading.current_thread().name == "aefast-prefetch"
        out[:] = rows[:, None]


def test_files_are_read_by_the_thread(monkeypatch):
    # A batch at a time, so that some are left to be read.
    monkeypatch.setattr("aefast.data.batches._GATHERED_BYTES", 1)
    batches = Batches(Counting(), torch.arange(50), batch_size=8, seed=0)
    whole = list(batches.epoch(1))
    memory = Batches(torch.arange(50.0)[:, None].expand(50, 3), torch.arange(50), batch_size=8, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(whole, memory.epoch(1), strict=True))
    rest = batches.epoch(1, first=1)
    assert torch.equal(next(rest), whole[1])
    assert len(threads()) == 1
    del rest
    assert threads() == []


@pytest.mark.parametrize("gathered_bytes", [1, 100, 4 << 20])
def test_shares_of_batches_of_files(monkeypatch, gathered_bytes):
    monkeypatch.setattr("aefast.data.batches._GATHERED_BYTES", gathered_bytes)
    options = {"batch_size": 8, "seed": 0, "share": (1, 2)}
    files = list(Batches(Counting(), torch.arange(50), **options).epoch(1))
    samples = torch.arange(50.0)[:, None].expand(50, 3)
    memory = Batches(samples, torch.arange(50), **options)
    assert [len(batch) for batch in files] == [4] * 6 + [1]
    assert all(torch.equal(a, b) for a, b in zip(files, memory.epoch(1), strict=True))


@pytest.mark.parametrize("end", ["pass", "raise SystemExit", "os.kill(os.getpid(), signal.SIGINT)"])
def test_a_process_ends_in_the_middle_of_an_epoch(end):
    # The module by itself, which needs no PyTorch.
    script = f"""
import itertools, os, runpy, signal
# A shell's background processes are born to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
items = runpy.run_path({prefetch.__file__!r})["prefetched"](itertools.count())
kept = [items, next(items)]
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True)
    assert done.returncode in ((0,) if "kill" not in end else (-2, 130))
