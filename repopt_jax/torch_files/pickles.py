"""Pickles without their code: Python's own unpickler, behind a scan, with inert stand-ins.

The scan reads a pickle's instructions with `pickletools` before anything is unpickled. It refuses
those that no torch file needs, bounds what the others declare, and rewrites those that would make
a dict, a set or an object into calls of stand-ins. What is left can make numbers, text, bytes,
lists, tuples and `Standin`s, and can call `Standin`s only.
"""

import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

# Each limit is far above what torch writes, and low enough that reading ends soon.
MAX_OPCODES = 5_000_000  # large checkpoints have about 100,000
MAX_INT_BITS = 8192  # operations on larger integers are slow
MAX_NAME = 1024  # characters of a class with its module
MAX_KEY = 4096  # characters of a dict's key: comparing equal keys takes their length
MAX_RARE_KEYS = 10_000  # keys of which a file can choose the hash, so that all of them collide

_NEW_DICT, _NEW_SET = b"cbuiltins\ndict\n)R", b"cbuiltins\nset\n)R"
_REWRITTEN = {
    "EMPTY_DICT": _NEW_DICT,
    "EMPTY_SET": _NEW_SET,
    "NEWOBJ": pickle.REDUCE,  # it wants a class, which no stand-in is
    # Both hand their operands to `persistent_load`, as one list or tuple.
    "FROZENSET": pickle.LIST + pickle.BINPERSID,
    "NEWOBJ_EX": pickle.TUPLE3 + pickle.BINPERSID,
    "FRAME": b"",  # its length would be wrong
}
_PYTHON2_TEXT = ("STRING", "BINSTRING", "SHORT_BINSTRING")
# The instructions that are allowed -> about the bytes of memory that each takes, but for the text
# that it holds: 16 for its place on the stack and in what it ends up in, and its object.
_COSTS = {
    name: cost
    for cost, names in {
        600: "EMPTY_DICT DICT EMPTY_SET FROZENSET REDUCE NEWOBJ NEWOBJ_EX OBJ INST BINPERSID",
        100: "EMPTY_LIST LIST TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND SETITEM "
        "PUT BINPUT LONG_BINPUT MEMOIZE",
        80: "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING "
        "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8",
        64: "INT LONG LONG1 LONG4 FLOAT BININT BININT2 BINFLOAT",
        16: "PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT1 MARK EMPTY_TUPLE APPENDS SETITEMS "
        "ADDITEMS BUILD GLOBAL STACK_GLOBAL POP POP_MARK DUP GET BINGET LONG_BINGET",
    }.items()
    for name in names.split()
}


class TorchFileError(ValueError):
    """A file is no torch checkpoint, is damaged, or asks for too much.

    >>> issubclass(TorchFileError, ValueError)
    True
    """


class Budget:
    """Bytes of memory that one file's objects may take: in proportion to the file."""

    def __init__(self, file_size: int):
        self.left = (64 << 20) + 16 * file_size

    def spend(self, count: int) -> None:
        """Subtract `count` bytes; raises TorchFileError when none are left."""
        self.left -= count
        if self.left < 0:
            raise TorchFileError("its pickle describes objects out of all proportion to its size")


class Standin:
    """A name found in a pickle, or an object that the pickle would have made with it.

    Nothing of that name is imported or called: the stand-in only keeps what the file says.

    Attributes:
      name: module and name joined by a dot, such as `yacs.config.CfgNode`.
      args: arguments of the call; None for the bare class or function.
      kwargs: keyword arguments of the call, {} where there are none.
      state: what pickle would have handed to `__setstate__`, an object's attributes as a rule;
        None where the file gives none.
      sequence: elements, where the class is a kind of list or set.
      mapping: items, where the class is a kind of dict.

    >>> Standin("torch.device", ("cpu",))
    <stand-in for an object of torch.device>
    """

    __slots__ = ("_rare_keys", "args", "kwargs", "mapping", "name", "sequence", "state")

    def __init__(self, name: str, args: tuple | None = None, kwargs: dict | None = None):
        self.name = name
        self.args = args
        self.kwargs = {} if kwargs is None else kwargs
        self.state: Any = None
        self.sequence: list = []
        self.mapping: dict = {}
        self._rare_keys = [0]  # one count for all stand-ins of a file

    def __repr__(self) -> str:
        # Never shows the contents, which may be nested without end, nor control characters.
        kind = "" if self.args is None else "an object of "
        return f"<stand-in for {kind}{ascii(self.name)[1:-1][:200]}>"

    def __call__(self, *args: Any) -> "Standin":
        """The object that a call would have made."""
        bare = self.args is None  # else the result of a call is called, as in getattr(x, y)(z)
        result = Standin(self.name, args) if bare else Standin("call", (self, args))
        result._rare_keys = self._rare_keys
        return result

    def __setstate__(self, state: Any) -> None:
        if self.args is not None:
            self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        flat = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
        if not all(part is None or isinstance(part, str | bytes | int | float) for part in flat):
            if not isinstance(key, Standin) or key.name == "builtins.dict":
                raise TorchFileError(f"it holds a dict with {quote(key)} as a key")
        elif any(isinstance(part, str | bytes) and len(part) > MAX_KEY for part in flat):
            raise TorchFileError("it holds a dict with a key of absurd length")
        if flat is key or (isinstance(key, int) and key.bit_length() > 60):
            self._rare_keys[0] += 1
            if self._rare_keys[0] > MAX_RARE_KEYS:
                raise TorchFileError("it holds too many dict keys other than text")
        self.mapping[key] = value

    def extend(self, values: list) -> None:
        """Append every one of the values."""
        self.sequence.extend(values)

    def add(self, value: Any) -> None:
        """Append a value; a set's elements are never hashed."""
        self.sequence.append(value)

    append = add


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


class _Source:
    """What `pickletools` reads from: no more bytes than there are, whatever is declared."""

    def __init__(self, stream: BinaryIO, left: int):
        self.stream = stream
        self.left = left
        self.taken = b""

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise TorchFileError(f"its pickle is cut off: {count} bytes are due, {self.left} left")
        return self._note(self.stream.read(count))

    def readline(self) -> bytes:
        return self._note(self.stream.readline(min(self.left, MAX_NAME)))

    def _note(self, data: bytes) -> bytes:
        self.left -= len(data)
        self.taken += data
        return data

    def take(self) -> bytes:
        """What was read since the last call."""
        taken, self.taken = self.taken, b""
        return taken


def scan(stream: BinaryIO, left: int, budget: Budget) -> bytes:
    """Read one pickle, of at most `left` bytes, and return a harmless one of the same meaning.

    Raises TorchFileError for an instruction that is not allowed or declares too much.
    """
    source, result, total, before = _Source(stream, left), bytearray(), 0, ""
    for count, (opcode, arg, _) in enumerate(pickletools.genops(source)):
        name, raw = opcode.name, source.take()
        if name not in _COSTS or count >= MAX_OPCODES:
            raise TorchFileError(f"its pickle has the instruction {name} at place {count}")
        total += _COSTS[name]
        if arg is not None:
            total += _check_argument(name, arg, count)
        if name in _PYTHON2_TEXT:
            raw = _python2_text(arg.encode("latin-1"))
        elif name == "BYTEARRAY8":
            raw = pickle.BINBYTES8 + raw[1:]
        elif name == "DICT":
            if before != "MARK":
                raise TorchFileError("its pickle makes a dict as no version of Python does")
            raw = pickle.POP + _NEW_DICT
        result += _REWRITTEN.get(name, raw)
        before = name
    budget.spend(total)
    return bytes(result)


def _check_argument(name: str, arg: Any, count: int) -> int:
    """Refuse what would take much time or memory; returns the bytes that the argument takes."""
    if isinstance(arg, int):
        if arg.bit_length() > MAX_INT_BITS:
            raise TorchFileError(f"its pickle holds an integer of {arg.bit_length()} bits")
        if name in ("PUT", "BINPUT", "LONG_BINPUT") and arg > count:
            raise TorchFileError(f"its pickle numbers object {quote(arg)} after {count} others")
        return arg.bit_length() // 8
    return 0 if isinstance(arg, float) else (4 if isinstance(arg, str) else 1) * len(arg)


def _python2_text(data: bytes) -> bytes:
    """Python 2 wrote text and bytes alike; what is not UTF-8 stays bytes."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return pickle.BINBYTES + struct.pack("<I", len(data)) + data
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, to which every name is a stand-in."""

    def __init__(self, data: bytes, budget: Budget, load_storage: Callable[[Any], Any]):
        super().__init__(io.BytesIO(data))
        self.budget = budget
        self.load_storage = load_storage
        self.names: dict[str, Standin] = {}
        self.rare_keys = [0]

    def find_class(self, module: str, name: str) -> Standin:
        if len(module) + len(name) > MAX_NAME:
            raise TorchFileError("its pickle holds a class name of absurd length")
        full = f"{module}.{name}"
        if full not in self.names:
            self.budget.spend(500 + 4 * len(full))
            self.names[full] = Standin(full)
            self.names[full]._rare_keys = self.rare_keys
        return self.names[full]

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, list):
            return self.find_class("builtins", "frozenset")(pid)
        if isinstance(pid, tuple) and len(pid) == 3 and isinstance(pid[0], Standin):
            function, args, kwargs = pid
            result = function(*args)
            result.kwargs = kwargs
            return result
        return self.load_storage(pid)


def unpickle(
    stream: BinaryIO, left: int, budget: Budget, load_storage: Callable[[Any], Any]
) -> Any:
    """Read one pickle, of at most `left` bytes; the stream is then just behind it.

    Args:
      stream: at the pickle's first byte.
      left: bytes of the pickle at most.
      budget: memory that the objects may take.
      load_storage: persistent id -> value. The id is whatever the file says.

    Returns:
      Numbers, text, bytes, lists, tuples and `Standin`s. Dicts and sets are stand-ins, too.
    """
    start = stream.tell()
    try:
        return _Unpickler(scan(stream, left, budget), budget, load_storage).load()
    except TorchFileError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the code above
        at = stream.tell() - start
        raise TorchFileError(
            f"its pickle is damaged before byte {at} ({type(error).__name__})"
        ) from None
