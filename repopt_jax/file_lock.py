"""Locks by which one process at a time writes to a folder."""

from __future__ import annotations

from typing import IO

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


def take_lock(file: IO | int) -> bool:
    """Lock an open file or folder until it is closed.

    The system closes it with the process, however that ends. Where there are no locks, as on
    Windows and on some network file systems, nothing is locked.

    Args:
      file: the file, or the descriptor of a file or folder.

    Returns:
      Whether no other process holds the lock.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file, open(file.name) as other:
    ...     take_lock(file), take_lock(other)
    (True, False)
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
