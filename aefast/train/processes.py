"""The processes of a run: one, or those of torch.distributed, whose first writes what the run leaves behind."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from aefast.errors import AefastError, InputError
from aefast.train.interrupt import Interrupt

if dist.is_available():
    # DistributedDataParallel imports it. Its functions have the group that there is by then for a default, which would
    # keep that group, and gloo's threads with it, to the end of the interpreter.
    import torch.distributed.nn.functional

# After so long without an answer a process is given up.
_TIMEOUT = datetime.timedelta(minutes=10)

# What errors of a communication that broke off say, by gloo and by NCCL.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "socket")

T = TypeVar("T")


class Request(Protocol):
    """What a run sees of `Interrupt`."""

    signal: signal.Signals | None


class Processes:
    """This process among those of the run. With one process nothing is sent anywhere."""

    def __init__(self) -> None:
        is_group = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_group else 0
        self.count = dist.get_world_size() if is_group else 1

    @property
    def is_one(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, of tensors of one shape; `values` becomes it."""
        if not self.is_one:
            dist.all_reduce(values)
        return values

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The same of the maximum."""
        if not self.is_one:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gathered(self, value: T) -> list[T]:
        """What each process has, in the order of their ranks; values are pickled on the way."""
        if self.is_one:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def first(self, action: Callable[[], T]) -> T | None:
        """`action()` in the first process, while the others wait; an error of aefast in it is raised in all."""
        result, error = None, None
        if self.is_first:
            try:
                result = action()
            except AefastError as raised:
                error = raised
        if not self.is_one:
            (error, *_) = self.gathered(error)
        if error is not None:
            raise error
        return result

    def wait(self) -> None:
        """Until all processes have come here."""
        self.gathered(None)

    def is_loss(self, error: RuntimeError) -> bool:
        """Whether `error` tells that another process does not answer any more."""
        return not self.is_one and any(word in str(error).lower() for word in _LOST)


class AgreedInterrupt:
    """An `Interrupt` of several processes: what one of them was asked counts once they have agreed on it.

    Attributes:
        signal: the signal that they agreed on, or None.
    """

    def __init__(self, own: Interrupt, processes: Processes, device: torch.device) -> None:
        self.signal: signal.Signals | None = None
        self._own = own
        self._processes = processes
        self._device = device

    def agree(self, *asked: bool) -> list[bool]:
        """Take over the signal that any process got; of the rest that is asked, whether some process does."""
        own = 0 if self._own.signal is None else int(self._own.signal)
        number, *agreed = self._processes.largest(
            torch.tensor([own, *map(int, asked)], device=self._device)
        ).tolist()
        self.signal = signal.Signals(number) if number else None
        return [bool(one) for one in agreed]


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Within it this process is one of those that torchrun has started, if it has, on a GPU of its own.

    What was made for the group within, such as a Trainer, is to be out of reach at the end.

    Args:
        device: "cpu", "cuda" or "auto".

    Raises:
        InputError: the environment that torchrun sets is incomplete.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected {', '.join(missing)} too; use torchrun"
        )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    try:
        yield
        # Gloo's threads are joined once nothing has the group, as a DistributedDataParallel in a cycle still does. One
        # that frees the tensors of the last exchange while the interpreter ends would abort the process.
        gc.collect()
    finally:
        dist.destroy_process_group()
