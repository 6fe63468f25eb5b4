"""Pickles without their code: Python's own unpickler, led by a short list of instructions.

Every class and function that a pickle names becomes a `Standin`. The few that torch files need,
such as those that make dicts and tensors, are done by functions of ours, found by name in a table.
What is left can make numbers, text, bytes, lists, tuples, dicts, arrays and `Standin`s.
"""

import itertools
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

from repopt_jax.messages import quote

# Each limit is far above what torch writes, and low enough that reading ends soon.
MAX_STEPS = 5_000_000  # instructions; large checkpoints have about 100,000
MAX_LINE = 1024  # characters of a class with its module, or of a number written in digits
MAX_KEY = 4096  # characters of a dict's key: comparing equal keys takes their length
MAX_RARE_KEYS = 10_000  # keys of which a file can choose the hash, so that all of them collide
MAX_DEPTH = 100  # dicts, lists and tuples inside each other

# Bytes of memory -> the allowed instructions that take about so many, but for the text that they
# hold: 16 for its place on the stack and in what it ends up in, and its object.
# LONG4 is not among them: operations on integers above 255 bytes are slow.
_COSTS = {
    600: "EMPTY_DICT DICT EMPTY_SET FROZENSET REDUCE NEWOBJ NEWOBJ_EX OBJ INST BINPERSID "
    "GLOBAL STACK_GLOBAL",
    100: "EMPTY_LIST LIST TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND SETITEM PUT BINPUT LONG_BINPUT MEMOIZE",
    80: "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING "
    "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8",
    64: "INT LONG LONG1 FLOAT BININT BININT2 BINFLOAT",
    16: "PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT1 MARK EMPTY_TUPLE APPENDS SETITEMS ADDITEMS "
    "BUILD POP POP_MARK DUP GET BINGET LONG_BINGET",
}


class TorchFileError(ValueError):
    """A file is no torch checkpoint, is damaged, or asks for too much.

    >>> issubclass(TorchFileError, ValueError)
    True
    """


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

    __slots__ = ("args", "kwargs", "mapping", "name", "sequence", "state")

    def __init__(self, name: str, args: tuple | None = None, sequence: list | None = None):
        self.name = name
        self.args = args
        self.kwargs: dict = {}
        self.state: Any = None
        self.sequence: list = [] if sequence is None else sequence
        self.mapping: dict = {}

    def __repr__(self) -> str:
        # Never shows the contents, which may be nested without end, nor control characters.
        kind = "" if self.args is None else "an object of "
        return f"<stand-in for {kind}{ascii(self.name)[1:-1][:200]}>"


class Budget:
    """What one file may cost: memory in proportion to the file, and a bounded time."""

    def __init__(self, file_size: int):
        self.bytes = (64 << 20) + 16 * file_size
        self.steps = MAX_STEPS
        self.rare_keys = MAX_RARE_KEYS

    def spend(self, count: int) -> None:
        """Take a step that needs `count` bytes; raises TorchFileError when too many were taken."""
        self.bytes -= count
        self.steps -= 1
        if min(self.bytes, self.steps) < 0:
            raise TorchFileError("its pickle describes objects out of all proportion to its size")

    def check_key(self, key: Any) -> None:
        """Refuse keys of a dict that take long to hash or to compare."""
        flat = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
        if not all(part is None or isinstance(part, str | bytes | int | float) for part in flat):
            if not isinstance(key, Standin):
                raise TorchFileError(f"it holds a dict with {quote(key)} as a key")
        elif any(isinstance(part, str | bytes) and len(part) > MAX_KEY for part in flat):
            raise TorchFileError("it holds a dict with a key of absurd length")
        self.rare_keys -= flat is key or (isinstance(key, int) and key.bit_length() > 60)
        if self.rare_keys < 0:
            raise TorchFileError("it holds too many dict keys other than text")


class _Source:
    """The bytes of a pickle: never more than there are, whatever it declares."""

    def __init__(self, stream: BinaryIO, left: int):
        self.stream = stream
        self.left = left

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise TorchFileError(f"its pickle is cut off: {count} bytes are due, {self.left} left")
        self.left -= count
        return self.stream.read(count)

    def readline(self) -> bytes:
        line = self.stream.readline(min(self.left, MAX_LINE))
        self.left -= len(line)
        return line


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, written in Python: `dispatch` is its table of instructions.

    Unlike the one written in C, it numbers objects in a dict, so that no number reserves memory.
    """

    def __init__(self, source: _Source, budget: Budget, load_storage: Callable, functions: Mapping):
        super().__init__(source)
        self.budget = budget
        self.persistent_load = load_storage
        self.functions = {
            "builtins.dict": self._dict,
            "__builtin__.dict": self._dict,
            "collections.OrderedDict": self._dict,
            "collections.defaultdict": lambda factory=None, *pairs: self._dict(*pairs),
            "copyreg.__newobj__": lambda kind, *args: self._call(kind, args),
            "copyreg._reconstructor": lambda kind, *args: self._call(kind, ()),
            "copy_reg._reconstructor": lambda kind, *args: self._call(kind, ()),
            "torch._tensor._rebuild_from_type_v2": lambda f, kind, args, *_: self._call(f, args),
            "_codecs.encode": self._encode,
            **functions,
        }

    def find_class(self, module: str, name: str) -> Standin:
        if len(module) + len(name) > MAX_LINE:
            raise TorchFileError("its pickle holds a class name of absurd length")
        self.budget.spend(4 * (len(module) + len(name)))
        return Standin(f"{module}.{name}")

    def _call(self, function: Standin, args: tuple) -> Any:
        """What a call of the named function makes: most often a stand-in."""
        self.budget.spend(8 * len(args))
        if function.args is not None:  # the result of a call is called, as in getattr(x, y)(z)
            return Standin("call", (function, args))
        if function.name in self.functions:
            return self.functions[function.name](*args)
        kind = function.name.replace("__builtin__", "builtins")
        if kind in ("builtins.set", "builtins.frozenset") and args and isinstance(args[0], list):
            # Shared lists stay shared, as copies of one might be without end.
            return Standin(kind, (), args[0])
        return Standin(function.name, args)

    def _dict(self, pairs: list | tuple = ()) -> dict:
        self.budget.spend(100 * len(pairs))
        return self._update({}, pairs)

    def _update(self, mapping: dict, pairs: Iterable[tuple]) -> dict:
        for key, value in pairs:
            self.budget.check_key(key)
            mapping[key] = value
        return mapping

    def _encode(self, text: str, encoding: str) -> bytes:
        # Protocols before 3 write bytes as a call of this function.
        if encoding != "latin1":
            raise TorchFileError(f"it holds bytes encoded as {quote(encoding)}, not 'latin1'")
        self.budget.spend(len(text))
        return text.encode("latin1")

    def _decode_string(self, value: bytes) -> str | bytes:
        # Python 2 wrote text and bytes alike.
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value

    def load_frame(self) -> None:
        self.read(8)  # the length is for faster reading only

    def load_empty_set(self) -> None:
        self.append(Standin("builtins.set", ()))

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(Standin("builtins.frozenset", (), items))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], tuple(args))

    load_newobj = load_reduce

    def load_newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        self.load_reduce()
        self.stack[-1].kwargs = kwargs

    def _instantiate(self, kind: Standin, args: list) -> None:
        self.append(self._call(kind, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Standin):  # else a dict or an array, whose notes are dropped
            self.stack[-1].state = state

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list) -> None:
        target = self.stack[-1]
        mapping = target if isinstance(target, dict) else target.mapping
        self._update(mapping, zip(items[::2], items[1::2], strict=True))

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    load_additems = load_appends  # the elements of a set are never hashed

    def _extend(self, items: list) -> None:
        target = self.stack[-1]
        (target if isinstance(target, list) else target.sequence).extend(items)

    load_bytearray8 = pickle._Unpickler.load_binbytes8


class _Instructions(dict):
    """Code of an instruction -> what carries it out, for those that are allowed."""

    def __missing__(self, code: int) -> None:
        raise TorchFileError(
            f"its pickle has the instruction {code:#x}, which torch does not write"
        )


def _charged(name: str, cost: int) -> Callable[[_Unpickler], None]:
    """Python's way to carry out an instruction, or ours, once its cost is paid."""
    own = pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
    load = vars(_Unpickler).get(f"load_{name.lower()}", own)

    def carry_out(unpickler: _Unpickler) -> None:
        unpickler.budget.spend(cost)
        load(unpickler)

    return carry_out


_Unpickler.dispatch = _Instructions(
    (getattr(pickle, name)[0], _charged(name, cost))
    for cost, names in _COSTS.items()
    for name in names.split()
)


def unpickle(
    stream: BinaryIO,
    left: int,
    budget: Budget,
    load_storage: Callable[[Any], Any],
    functions: Mapping[str, Callable],
) -> Any:
    """Read one pickle, of at most `left` bytes; the stream is then just behind it.

    `load_storage` makes a value of a persistent id, which is whatever the file says. `functions`
    has what is called in the place of a function of that name.
    """
    start = stream.tell()
    try:
        return _Unpickler(_Source(stream, left), budget, load_storage, functions).load()
    except TorchFileError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the code above
        at = stream.tell() - start
        raise TorchFileError(
            f"its pickle is damaged before byte {at} ({type(error).__name__})"
        ) from None


def check_nesting(root: Any) -> None:
    """Refuse dicts, lists and tuples that hold themselves or lie too deep in each other.

    Whoever walks the result by recursion is then safe. References through a `Standin` may be
    cyclic, as those of modules are; the contents of each are checked on their own.
    """
    heights: dict[int, int] = {}  # of each object met so far; -1 while its parts are looked at
    pending = [root]

    def height(value: Any, depth: int) -> int:
        known = heights.get(id(value))
        if depth + (known or 0) > MAX_DEPTH:
            raise TorchFileError(f"its objects are nested more than {MAX_DEPTH} deep")
        if known == -1:
            raise TorchFileError("it holds a dict, list or tuple that contains itself")
        if isinstance(value, Standin) and known is None:
            heights[id(value)] = 0
            pending.extend(getattr(value, part) for part in Standin.__slots__)
        elif isinstance(value, dict | list | tuple) and known is None:
            heights[id(value)] = -1
            parts = itertools.chain(value, value.values() if isinstance(value, dict) else ())
            heights[id(value)] = 1 + max((height(part, depth + 1) for part in parts), default=0)
        return heights.get(id(value), 0)

    while pending:
        height(pending.pop(), 0)
