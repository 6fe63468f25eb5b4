"""What error messages say of a file's contents: short, and without control characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAX_PROBLEMS = 8
MAX_NAME = 200


def quote(value: Any) -> str:
    """Show a value from a file in one short line of ASCII.

    >>> quote("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'"
    """
    if isinstance(value, str | bytes):
        rest = "..." if isinstance(value, str) else b"..."
        return ascii(value if len(value) <= 40 else value[:40] + rest)
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else "a huge integer"
    return f"a {type(value).__name__}"  # anything else may be nested without end


def listed(problems: Iterable[str], separator: str = "; ") -> str:
    """Join the first few problems, and say how many more there are.

    >>> listed([f"missing {i}" for i in range(100)])[-22:]
    'missing 7; and 92 more'
    """
    problems = list(problems)
    more = len(problems) - MAX_PROBLEMS
    return separator.join(problems[:MAX_PROBLEMS] + [f"and {more} more"] * (more > 0))


def check_names(names: Iterable[str]) -> None:
    r"""Refuse names of arrays that would spoil a terminal or a message.

    Raises:
      ValueError: a name is too long, or has characters that cannot be printed.

    >>> check_names(["\x1b[31m"])
    Traceback (most recent call last):
    ValueError: names must be printable text of at most 200 characters, got '\x1b[31m'
    """
    for name in names:
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(
                f"names must be printable text of at most {MAX_NAME} characters, got {quote(name)}"
            )
