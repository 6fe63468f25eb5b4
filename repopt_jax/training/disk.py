"""Whether a checkpoint can be written, before any work is spent on it."""

import shutil

import jax
from etils import epath

from repopt_jax.training.damage import in_short


def require_writable(directory: epath.Path) -> None:
    """Raise OSError where process 0 cannot write a file in `directory`, which it makes."""
    if jax.process_index() != 0:
        return
    probe = directory / ".writable"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # cloud file systems have errors of their own
        raise OSError(
            f"workdir must be writable, {directory} is not ({in_short(error)})"
        ) from error


def require_space(directory: epath.Path, needed: int) -> None:
    """Raise OSError where a local disk has fewer than `needed` bytes left."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError:  # not a local disk
        return
    if free < needed:
        raise OSError(
            f"{directory} has {free / 1e6:.0f} MB left on its disk and a checkpoint takes "
            f"{needed / 1e6:.0f} MB"
        )
