"""How a damaged checkpoint shows itself, and how Orbax is kept from telling it a dozen times."""

from __future__ import annotations

import contextlib
import logging
import sys

import jax


class DamagedError(Exception):
    """A checkpoint's files are incomplete or not what was written."""


@contextlib.contextmanager
def failure_is_damage():
    """Raise `DamagedError` for whatever Orbax raises inside."""
    # Orbax raises errors of a dozen types for damaged files, plain Exception among them.
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # the device's trouble, not the files'
        raise
    except Exception as error:
        raise DamagedError(in_short(error)) from error


def in_short(error: BaseException) -> str:
    """Type and first line of an error."""
    line = (str(error).splitlines() or [""])[0]
    if len(line) > 300:  # Orbax repeats long paths; the reason stands at either end
        line = f"{line[:150]} ... {line[-150:]}"
    return f"{type(error).__name__}: {line}"


def quieten_orbax():
    """Leave out what Orbax logs and prints of failures that it raises as exceptions anyway."""
    logging.getLogger("absl").addFilter(_warnings_of_orbax_only)
    logging.getLogger("asyncio").addFilter(_no_read_abandoned)
    _ignore_abandoned_reads()


def _warnings_of_orbax_only(record: logging.LogRecord) -> bool:
    """A filter of log records."""
    # It tells every file at INFO, and at ERROR four tracebacks of what it raises anyway.
    return record.levelno == logging.WARNING or "orbax" not in record.pathname


def _no_read_abandoned(record: logging.LogRecord) -> bool:
    """A filter of log records: not of reads that failed beside the one whose error is raised."""
    text = record.getMessage().lower()
    of_orbax = any(name in text for name in ("orbax", "ocdbt", "tensorstore"))
    return not (of_orbax and "exception was never retrieved" in text)


def _ignore_abandoned_reads():
    """Leave out the tracebacks of reads that Orbax abandons when another one has failed.

    They come from threads of TensorStore, at any time later, that find the event loop closed; the
    failure itself is raised as an exception.
    """
    before = sys.unraisablehook
    if getattr(before, "ignores_abandoned_reads", False):
        return

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    hook.ignores_abandoned_reads = True
    sys.unraisablehook = hook
