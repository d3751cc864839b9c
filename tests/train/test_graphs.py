"""What a failed capture leaves behind, in torch's allocator as its versions have it, and on a GPU."""

import contextlib
import gc

import pytest
import torch
from torch.torch_version import TorchVersion

from aefast.train.graphs import recording


class Allocator:
    """What torch counts of pools: how many graphs are in each, and which of them captures take memory from."""

    def __init__(self):
        self.users = {}
        self.captured = set()

    def begin(self, pool):
        assert pool not in self.captured
        self.users[pool] = self.users.get(pool, 0) + 1
        self.captured.add(pool)

    def end(self, device, pool):
        if pool not in self.captured:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.captured.remove(pool)

    def release(self, device, pool):
        assert self.users[pool] > 0, "left twice"
        self.users[pool] -= 1


class Stream:
    device = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """Makes an allocator, and graphs that record as those of a version of torch do."""

    def make(version):
        allocator, numbers = Allocator(), iter(range(100))
        version = TorchVersion(version)

        class Graph:
            is_invalid = is_recorded = is_inside = False

            def begin(self, pool):
                self.memory = pool
                self.is_inside = True
                allocator.begin(pool)

            def end(self):
                if not self.is_invalid or version >= (2, 12):
                    allocator.end(0, self.memory)
                if self.is_invalid:
                    raise RuntimeError("operation failed due to a previous error during capture")
                self.is_recorded = True

            def pool(self):
                if not self.is_recorded:
                    raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
                return self.memory

            def reset(self):
                if self.is_recorded or (self.is_inside and version >= (2, 14)):
                    allocator.release(0, self.memory)
                self.is_recorded = self.is_inside = False

        class Capture:
            modes = []  # noqa: RUF012

            def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
                self.graph = graph
                self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
                self.modes.append(capture_error_mode)

            def __enter__(self):
                assert not allocator.captured
                self.graph.begin(self.pool)

            def __exit__(self, *error):
                self.graph.end()

        ones = torch.ones
        for name, value in {
            "CUDAGraph": Graph,
            "graph": Capture,
            "graph_pool_handle": lambda: (0, next(numbers)),
            "current_stream": lambda device=None: Stream(),
            "set_stream": lambda stream: None,
            "synchronize": lambda device: None,
            "device": lambda device: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", allocator.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", allocator.release, raising=False)
        return allocator, Graph, Capture

    return make


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("is_of_cuda", [False, True])
@pytest.mark.parametrize("version", ["2.10.0", "2.11.0+cu130", "2.12.1", "2.13.0", "2.14.0", "2.15.0"])
def test_a_capture_that_fails_leaves_the_allocator_as_it_was(cuda, version, is_of_cuda, is_shared):
    allocator, make, capture = cuda(version)
    stream, other, pool = Stream(), make(), None
    if is_shared:
        with recording(other, stream, "thread_local"):
            pass
        pool = other.pool()
    graph = make()
    error = RuntimeError("not permitted when stream is capturing") if is_of_cuda else TypeError("of the loss")
    with pytest.raises(type(error)) as raised, recording(graph, stream, "thread_local", pool):
        graph.is_invalid = is_of_cuda
        raise error
    # What the end of the capture says of it is less.
    assert raised.value is error
    assert set(capture.modes) == {"thread_local"}
    assert not allocator.captured
    assert allocator.users[graph.memory] == int(is_shared)
    # As at its end.
    graph.reset()
    assert allocator.users[graph.memory] == int(is_shared)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0", "2.15.0"])
def test_a_capture_whose_end_fails_leaves_the_allocator_as_it_was(cuda, version):
    allocator, make, _ = cuda(version)
    graph = make()
    with pytest.raises(RuntimeError, match="previous error"), recording(graph, Stream()):
        graph.is_invalid = True
    assert not allocator.captured
    assert allocator.users[graph.memory] == 0


def test_graphs_that_are_recorded_keep_their_pool(cuda):
    allocator, make, _ = cuda("2.11.0")
    first, second = make(), make()
    with recording(first, Stream()):
        pass
    with recording(second, Stream(), pool=first.pool()):
        pass
    assert allocator.users == {first.pool(): 2}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_that_fails_gives_its_memory_back():
    stream, side = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        recording(graph, stream, "thread_local"),
    ):
        torch.ones(1 << 24, device="cuda").sum().item()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 1 << 25
    # While a capture goes on, memory that another stream has used is not given to anyone.
    one = torch.ones(1 << 24, device="cuda")
    one.record_stream(side)
    place = one.data_ptr()
    del one
    torch.cuda.synchronize()
    assert torch.ones(1 << 24, device="cuda").data_ptr() == place
    del graph
    torch.cuda.empty_cache()
