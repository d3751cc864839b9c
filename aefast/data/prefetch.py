"""Work that is done ahead of time by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

# Batches that wait for the step, one being made beside them.
_AHEAD = 2


def prefetched(items: Iterator[T], ahead: int = _AHEAD) -> Iterator[T]:
    """The items, each made while those before it are in use, at most `ahead` of them waiting.

    A thread makes them, from when the first is asked for until the last, or until the iterator that is returned is
    closed, which dropping it does. What making an item raises is raised where the item would have come.
    """
    made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(ahead)
    stopped = threading.Event()

    def work() -> None:
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    return
                made.put((next(items), None))
        except BaseException as error:
            # StopIteration among them.
            made.put((None, error))

    # A daemon, so that a process whose main thread has ended does not wait for it.
    thread = threading.Thread(target=work, name="aefast-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        # Garbage is collected in whichever thread makes it, maybe in this one.
        if thread is not threading.current_thread():
            thread.join()
