"""Files that are complete or not there."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def finished_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a path to write to; it gets the name `path` only when the block ends without error.

    The yielded path has the ending of `path`, by which some writers choose their format.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with finished_file(f"{folder}/a.txt") as unfinished:
    ...         _ = unfinished.write_text("all of it")
    ...     os.listdir(folder)
    ['a.txt']
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_output(path: str | os.PathLike, *, force: bool) -> None:
    """Refuse, before any work, a file that could not be written or is there already.

    Raises:
      ValueError: `path` exists and `force` is not set, is a folder, or has no folder.

    >>> check_output("nowhere/a.onnx", force=False)
    Traceback (most recent call last):
    ValueError: output must lie in an existing folder, got nowhere/a.onnx
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"output must be a file, got the folder {path}")
    if path.exists() and not force:
        raise ValueError(f"output must not exist unless --force is given, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"output must lie in an existing folder, got {path}")
