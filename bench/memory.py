"""How much memory a call takes beyond what was there before it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch._C._profiler import _EventType

from aefast import _library
from aefast.train.step import without_replays


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Within it nothing reaches standard error, where the profiler announces each start and stop at any log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(call: Callable[[int], object], device: torch.device) -> int:
    """The most bytes of tensors that ``call(0)`` has allocated at any time, its results among them.

    On CUDA that is the allocator's own count, of training steps that are not replays. On the CPU it is that of
    PyTorch's profiler, which sees the allocations of the calling thread, and none that is made of kept memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with without_replays():
            call(0)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _silence(),
        _library.without_kept_memory(),
        torch.autograd.profiler.profile(profile_memory=True) as profile,
    ):
        call(0)
    held = most = 0
    sizes: dict[int, int] = {}
    for address, nbytes in _changes(profile):
        if nbytes > 0:
            sizes[address] = nbytes
            held += nbytes
        else:
            # What was there before the call, such as the last step's gradients, is none of its bytes.
            held -= sizes.pop(address, 0)
        most = max(most, held)
    return most


def _changes(profile: torch.autograd.profiler.profile) -> list[tuple[int, int]]:
    """(address, bytes) of each allocation in its order, and of each release, whose bytes are negative."""
    found, waiting = [], list(profile.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    found.sort(key=lambda change: change[0])
    return [change[1:] for change in found]
