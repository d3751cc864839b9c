"""How much memory a call takes beyond what was there before it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch

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
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
