"""CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# From here on graphs of torch leave the pool of a capture that failed by themselves.
_LEAVES_POOL = (2, 13, 1)


@contextlib.contextmanager
def recording(
    graph: torch.cuda.CUDAGraph,
    stream: torch.cuda.Stream,
    error_mode: str = "global",
    pool: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Context of the calls that `graph` records, on `stream`; one in which something raises leaves nothing behind.

    torch leaves the stream of a failed capture the current one, its allocator may go on as if the capture did, and its
    generators refuse to draw outside of graphs until another capture has succeeded.

    Args:
        error_mode: `capture_error_mode` of ``torch.cuda.graph``: whose calls end the capture.
        pool: ``pool()`` of a graph that was recorded on `stream`, whose memory this one works in too; one of its own by
            default.
    """
    if pool is None:
        pool = torch.cuda.graph_pool_handle()
    # The last one is of the current device, which putting a stream back makes its own the current one.
    before = [torch.cuda.current_stream(stream.device), torch.cuda.current_stream()]
    capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=error_mode)
    is_begun = False
    try:
        capture.__enter__()
        is_begun = True
        try:
            yield
        except BaseException:
            # Of an error that has ended the capture, its end can tell only that there was one.
            with contextlib.suppress(RuntimeError):
                capture.__exit__(None, None, None)
            raise
        capture.__exit__(None, None, None)
    except BaseException:
        for one in before:
            torch.cuda.set_stream(one)
        torch.cuda.synchronize(stream.device)
        if is_begun:
            _leave_pool(graph, pool, stream.device)
        with (
            torch.cuda.device(stream.device),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode=error_mode),
        ):
            torch.ones(1, device=stream.device)
        raise


def _leave_pool(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device) -> None:
    """Leave the pool of memory that `graph` entered for a capture that something raised in.

    One that is left twice is an error of the allocator for good, so that this does what torch does not.
    """
    is_left = torch.__version__ >= _LEAVES_POOL or _is_recorded(graph)
    graph.reset()
    if is_left:
        return
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError as error:
        # From 2.12 on the end of a capture does so, well or not. The second words are those of cudaMallocAsync.
        if not any(words in str(error) for words in ("not currently recording", "capture_underway is false")):
            raise
    torch._C._cuda_releasePool(device.index, pool)


def _is_recorded(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether its capture was ended, as after an error that is not of CUDA."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True
