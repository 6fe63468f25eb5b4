"""What a torch file may ask for, and the error that says it asked for more.

A hostile file of a kilobyte can describe a terabyte. Each limit below is far above what torch
writes and low enough that reading ends soon and takes memory in proportion to the file.
"""

from typing import Any

from repopt_jax.torch_files.standin import Standin

MAX_OPCODES = 5_000_000  # a pickle's instructions; large checkpoints have about 100,000
MAX_DEPTH = 100  # dicts, lists and tuples inside each other
MAX_INT_BYTES = 1024  # larger integers make every later operation on them slow
MAX_NAME = 1024  # characters of a module's, class's or record's name, and of a line
MAX_KEY = 4096  # characters of a dict's key: comparing equal keys takes their length
MAX_RARE_KEYS = 10_000  # keys whose hash a file can choose, so that all of them collide
MAX_RECORDS = 1_000_000  # files inside a zip archive
MAX_EXPANSION = 1 << 26  # bytes by which all broadcast tensors may exceed their storages


class TorchFileError(ValueError):
    """A file is no torch checkpoint, is damaged, or asks for too much.

    Example:
      >>> issubclass(TorchFileError, ValueError)
      True
    """


class Budget:
    """Memory, in bytes, that one file's objects may take."""

    def __init__(self, file_size: int):
        self.left = (64 << 20) + 16 * file_size

    def spend(self, count: int) -> None:
        """Subtract `count` bytes; raises TorchFileError when none are left."""
        self.left -= count
        if self.left < 0:
            raise TorchFileError("its pickle describes objects out of all proportion to its size")


def quote(value: Any) -> str:
    """Show a value from a file in one short line of ASCII.

    Example:
      >>> quote("a" * 100)
      "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'"
    """
    if isinstance(value, str):
        return ascii(value if len(value) <= 40 else value[:40] + "...")
    if isinstance(value, bytes):
        return ascii(value if len(value) <= 40 else value[:40] + b"...")
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else "a huge integer"
    return f"a {type(value).__name__}"  # anything else may be nested without end


def _children(value: Any) -> list | tuple:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value


def check_nesting(root: Any) -> None:
    """Refuse dicts, lists and tuples that hold themselves or lie too deep in each other.

    Whoever walks the result by recursion is then safe. References through a `Standin` may be
    cyclic, as those of real modules are; each one's contents are checked on their own.
    Every container is looked at once, however often it is referred to.
    """
    depths: dict[int, int] = {}  # id -> 0 while its contents are being looked at, then its depth
    pending = [root]
    while pending:
        path = []  # [container, iterator over its contents, greatest depth of these]
        below = [iter([pending.pop()]), 0]
        while True:
            child = next(below[0], path)  # the path itself marks the end: no file can hold it
            if child is path:
                if not path:
                    break
                depth = below[1] + 1
                if depth > MAX_DEPTH:
                    raise TorchFileError(f"its objects are nested more than {MAX_DEPTH} deep")
                container, below = path.pop()
                depths[id(container)] = depth
                below[1] = max(below[1], depth)
            elif isinstance(child, Standin):
                if id(child) not in depths:
                    depths[id(child)] = 1
                    parts = (child.args, child.kwargs, child.state, child.sequence, child.mapping)
                    pending.extend(part for part in parts if part)
            elif isinstance(child, dict | list | tuple):
                depth = depths.get(id(child))
                if depth == 0:
                    raise TorchFileError("it holds a dict, list or tuple that contains itself")
                if depth is None:
                    depths[id(child)] = 0
                    path.append((child, below))
                    below = [iter(_children(child)), 0]
                else:
                    below[1] = max(below[1], depth)
