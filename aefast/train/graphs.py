"""CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, error_mode: str = "global"
) -> Iterator[None]:
    """Context of the calls that `graph` records, on `stream`; one in which something raises leaves nothing behind.

    torch leaves the stream of a failed capture the current one, and its generators refuse to draw outside of graphs
    until another capture has succeeded.

    Args:
        error_mode: `capture_error_mode` of ``torch.cuda.graph``: whose calls end the capture.
    """
    # The last one is of the current device, which putting a stream back makes its own the current one.
    before = [torch.cuda.current_stream(stream.device), torch.cuda.current_stream()]
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=error_mode):
            yield
    except BaseException:
        for one in before:
            torch.cuda.set_stream(one)
        torch.cuda.synchronize(stream.device)
        with torch.cuda.device(stream.device), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.ones(1, device=stream.device)
        raise
