"""Optional packages: one sentence with the command that installs them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(extra: str, *, command: str | None = None) -> Iterator[None]:
    """Tell how to install the extra that the imports inside the block need.

    Blocks nest: the outermost one names the extra, because it knows what the user asked for.

    Args:
      extra: name of the extra, such as ``train``.
      command: name of the program that is starting, which a missing package ends with the sentence
        and status 1. None: the block raises.

    Raises:
      ModuleNotFoundError: a package is missing.

    >>> with needs_extra("train"):
    ...     import a_package_that_nobody_has
    Traceback (most recent call last):
    ModuleNotFoundError: a_package_that_nobody_has is missing: pip install 'repopt_jax[train]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "repopt_jax":
            raise  # a mistake of ours
        sentence = f"{error.name} is missing: pip install 'repopt_jax[{extra}]'"
        if command is None:
            raise ModuleNotFoundError(sentence, name=error.name) from error
        print(f"{command}: {sentence}", file=sys.stderr)
        sys.exit(1)
