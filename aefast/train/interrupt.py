"""Ctrl-C and SIGTERM as a request to stop at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """Context in which the first SIGINT or SIGTERM only sets `signal`, and the second ends the process.

    Outside the main thread, where Python does not let signal handlers be set, it does nothing.

    Attributes:
        signal: the signal that arrived, or None.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in self._SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = signal.Signals(number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # Python knows none that it has not set itself. Left as it is, the next signal would ask nobody to stop.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
