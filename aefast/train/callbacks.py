"""What else happens while a model is trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aefast.errors import InputError
from aefast.models._files import named_errors
from aefast.ops._arguments import did_you_mean

if TYPE_CHECKING:
    from aefast.train.trainer import Trainer, TrainResult


class Callback:
    """Base class: a method that a subclass overrides is called at its moment; `Trainer.stop` ends the run there.

    A `Trainer` refuses callbacks with other methods whose names begin with "on_", which nobody would call.
    """

    def on_start(self, trainer: Trainer) -> None:
        """The first step is about to be taken."""

    def on_log(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """`record` was written to ``metrics.jsonl``, with names that begin with "val_" if it tells of a validation."""

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """An epoch was validated and logged as `record`."""

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        """The run has ended, by itself or interrupted."""


_MOMENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """That they are callbacks, of whose methods none is named like a moment that there is not."""
    for callback in callbacks:
        if not isinstance(callback, Callback):
            kind = f"the class {callback.__name__}" if isinstance(callback, type) else type(callback).__name__
            raise InputError(f"callbacks: expected a Callback, got {kind}")
        for name in dir(callback):
            if name.startswith("on_") and name not in _MOMENTS and callable(getattr(callback, name)):
                raise InputError(
                    f"callbacks: {type(callback).__name__}.{name} would never be called, expected one of "
                    f"{', '.join(_MOMENTS)}{did_you_mean(name, _MOMENTS)}"
                )


class TensorBoard(Callback):
    """Writes every number of ``metrics.jsonl`` for TensorBoard too.

    Args:
        directory: where its files go; show them with ``tensorboard --logdir``.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                f'tensorboard: needs TensorBoard ({error}); install it with: pip install "aefast[train]"'
            ) from None
        self._make_writer = SummaryWriter
        self.directory = Path(directory)

    def on_start(self, trainer: Trainer) -> None:
        self._writer = None
        # Of a run that goes on, what comes after the step it goes on from is written again.
        self._first_step = trainer.steps_taken + 1

    def on_log(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if not trainer.processes.is_first:
            return
        # What its thread could not write is told with what comes next.
        with named_errors(self.directory):
            if self._writer is None:
                self._writer = self._make_writer(str(self.directory), purge_step=self._first_step)
            for name, value in record.items():
                if name not in ("step", "epoch"):
                    self._writer.add_scalar(name, value, record["step"])
            self._writer.add_scalar("epoch", record["epoch"], record["step"])
            # A run that fails ends without `on_end`.
            self._writer.flush()

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        if self._writer is not None:
            with named_errors(self.directory):
                self._writer.close()
