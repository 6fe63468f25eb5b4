"""How a run ends before its time: by a sentence, or by a signal that lets it save first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class RunStopped(Exception):
    """The run ended early for a reason that its message tells."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Wrong input and files that fail end the run with their message, and no traceback.

    Only around what reads input and files: an error of the computation is a bug, and its
    traceback is wanted.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunStopped(str(error), 2) from error


class StopSignal:
    """While entered, SIGTERM and SIGINT only set `received`; a second SIGINT interrupts."""

    def __enter__(self) -> StopSignal:
        self.received: signal.Signals | None = None
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        del frame
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
