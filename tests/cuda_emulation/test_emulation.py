"""The emulation itself: barriers, shuffles, poisoned shared memory, deadlocks."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

THREADS = 96


@pytest.fixture(scope="module")
def run(compile_emulated):
    library = ctypes.CDLL(str(compile_emulated(Path(__file__).parent / "barriers.cpp")))
    library.run.restype = ctypes.c_char_p

    def run(name, seed=0, threads=THREADS):
        numbers, out = np.arange(threads, dtype=np.int32), np.full(threads, -2, np.int32)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (numbers, out))
        error = library.run(name.encode(), ctypes.c_ulong(seed), threads, *pointers)
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    return run


def test_a_barrier_orders_shared_memory(run):
    for seed in range(5):
        assert run("reverse", seed).tolist() == list(range(THREADS))[::-1]


def test_without_it_poison_shows_and_the_order_matters(run):
    outs = [run("reverse without barrier", seed) for seed in range(5)]
    assert all((out == -1).any() for out in outs)  # the bits of the poison
    assert any((out != outs[0]).any() for out in outs)


@pytest.mark.parametrize("threads", [32, 64, 7])
def test_shuffles(run, threads):
    lanes = np.arange(threads) % 32
    last = min(threads, 32) - 1
    up = np.maximum(lanes - 1, 0)
    down = np.minimum(lanes + 1, 31)
    out = run("shuffles", threads=threads)
    whole = lanes < last if threads < 32 else lanes >= 0  # beyond a partial warp there is no lane to read
    assert (out == 100 * up + down)[whole].all()


def test_a_barrier_that_some_never_reach_is_a_deadlock(run):
    with pytest.raises(RuntimeError, match="deadlock"):
        run("half a warp")


def test_finished_threads_do_not_hold_a_barrier(run):
    run("half the block", threads=128)
