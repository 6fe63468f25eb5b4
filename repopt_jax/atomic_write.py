"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def atomic_write(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path to write to; it gets the name `path` only when the block ends without error.

    The yielded path has the ending of `path`, by which some writers choose their format.

    Args:
      path: file to write, local or ``gs://``.

    Raises:
      FileNotFoundError: there is no folder for a local `path`.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(f"{folder}/a.txt") as unfinished:
    ...         _ = unfinished.write_text("all of it")
    ...     os.listdir(folder)
    ['a.txt']
    """
    path = epath.Path(path)
    if "://" not in str(path) and not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, got {path}")
    unfinished = path.parent / f".{path.stem}.unfinished{path.suffix}"
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
