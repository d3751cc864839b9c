"""CUDA graphs without a GPU: calls that are recorded, and made again on the memory that they were recorded with."""

import contextlib

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from aefast.train import step as steps
from aefast.train import update


class Graph:
    """Calls with their numbers and tensors."""

    def __init__(self):
        self.calls = []
        self.replays = 0
        self.memory = None

    def pool(self):
        return self.memory

    def replay(self):
        self.replays += 1
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in self.calls:
                again = function(*args, **kwargs)
                for kept, one in zip(pytree.tree_leaves(results), pytree.tree_leaves(again), strict=True):
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != one.data_ptr():
                        kept.copy_(one)


class _Recorder(TorchDispatchMode):
    """Notes all calls, and what each tensor held that one of them has changed."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.before = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = function._schema.arguments
        given = [*args, *(kwargs.get(argument.name) for argument in arguments[len(args) :])]
        for argument, value in zip(arguments, given, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for one in pytree.tree_leaves(value):
                    self.before.setdefault(one.data_ptr(), (one.detach(), one.detach().clone()))
        results = function(*args, **kwargs)
        kept = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs, results))
        self.graph.calls.append((function, *kept))
        return results


@contextlib.contextmanager
def _recording(graph, stream, error_mode, pool):
    graph.memory = object() if pool is None else pool
    recorder = _Recorder(graph)
    try:
        with recorder:
            yield
    finally:
        # Recording takes no step.
        with torch.no_grad():
            for one, value in recorder.before.values():
                one.copy_(value)


class _Stream:
    device = torch.device("cpu")

    def wait_stream(self, other):
        pass


def emulate(monkeypatch):
    """`as_on_cuda(step, steps_per_replay)`: lets a `CapturedStep` on the CPU record and replay as one on CUDA does.

    The update is torch's then.
    """
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(steps, "recording", _recording)
    monkeypatch.setattr(update, "_takes_kernels", lambda tensors: False)

    def as_on_cuda(step, steps_per_replay):
        step.device = torch.device("cuda")
        step._replay = None
        step._stream = _Stream()
        step._prepare(steps_per_replay)
        return step

    return as_on_cuda
