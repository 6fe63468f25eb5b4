"""How a run ends before its time: with a message, or at a signal that lets it save first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class RunStopped(Exception):
    """The run ended early, for the reason that the message gives."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors of the user's input and of files into `RunStopped`: a message, no traceback.

    Only around code that reads input and files: an error of the computation is a bug, whose
    traceback is wanted.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunStopped(str(error), 2) from error


# What ends a run that should save first: a scheduler's warning (Slurm's is often SIGUSR1), Ctrl-C,
# a closed terminal. Windows has not all of them.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]


class StopSignal:
    """While entered, `SIGNALS` only set `received`; a SIGINT after another signal interrupts."""

    def __enter__(self) -> StopSignal:
        self.received: signal.Signals | None = None
        self._before = {s: signal.signal(s, self._receive) for s in SIGNALS}
        hangup = getattr(signal, "SIGHUP", None)
        if self._before.get(hangup) == signal.SIG_IGN:  # as nohup wants it
            signal.signal(hangup, signal.SIG_IGN)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        del frame
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
