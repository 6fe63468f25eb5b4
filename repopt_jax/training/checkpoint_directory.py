"""Where the checkpoints of a run go, and whether they can be written there."""

import shutil

import jax
from etils import epath

from repopt_jax.training.manifests import in_short


def checkpoint_directory(workdir: epath.PathLike) -> epath.Path:
    """``<workdir>/checkpoints``, absolute.

    Raises:
      ValueError: Orbax looks for its files by patterns and would not find them there again.
    """
    path = epath.Path(workdir) / "checkpoints"
    directory = path if path.is_absolute() else path.absolute()  # gs:// is
    if set(str(directory)) & set("*?["):
        raise ValueError(f"workdir must have none of * ? [ in its path, got {directory.parent}")
    return directory


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
