"""What a run shows on the terminal while it trains."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

# Between two updates of the bar, and between two lines where there is no terminal to draw a bar on.
_BAR_SECONDS = 0.1
_LINE_SECONDS = 2.0


class ProgressView:
    """Context with a progress bar on a terminal, and a line at the end of an epoch elsewhere.

    Args:
        console: where to draw.
        epochs: epochs of the whole run, or None if that is not known.
        steps: steps of the whole run, or None if that is not known.
        step: steps taken before.
    """

    def __init__(self, console: Console, *, epochs: int | None, steps: int | None, step: int) -> None:
        self._console = console
        self._epochs = epochs
        self._bar: Progress | None = None
        self._next_update = 0.0
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[metrics]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(
                "", total=steps, completed=step, epoch=self._epoch(1), metrics="loss …"
            )

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _epoch(self, number: int) -> str:
        return f"{number}" if self._epochs is None else f"{number}/{self._epochs}"

    def advance(self, step: int, epoch: int) -> None:
        """`step` steps are taken, the last of them in epoch number `epoch` (from 0)."""
        if self._bar is None:
            return
        now = time.monotonic()
        if now >= self._next_update:
            self._next_update = now + _BAR_SECONDS
            self._bar.update(self._task, completed=step, epoch=self._epoch(epoch + 1))

    def log(self, record: dict[str, Any], ends_epoch: bool) -> None:
        """A line of metrics is known, with which an epoch may end."""
        text = f"loss {record['loss']:.5f}"
        if "val_loss" in record:
            text += f" · held out {record['val_loss']:.5f}"
        if "samples_per_s" in record:
            text += f" · {record['samples_per_s']:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=record["step"],
                epoch=self._epoch(record["epoch"]),
                metrics=text,
            )
        elif ends_epoch:
            now = time.monotonic()
            if now >= self._next_update or record["epoch"] == self._epochs:
                self._next_update = now + _LINE_SECONDS
                self._console.print(
                    f"epoch {self._epoch(record['epoch'])} · step {record['step']:,} · {text}",
                    highlight=False,
                    soft_wrap=True,
                )
