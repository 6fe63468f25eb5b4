"""An interpreter for pickles that imports nothing and calls nothing.

Python's own unpickler resolves names and calls what it finds, and guards only the first step;
it also lets one opcode reserve gigabytes. This one knows the opcodes of protocols 0 to 5 and
turns every name into a `Standin`. Values are None, bool, int, float, str, bytes, list, dict,
tuple, `Standin`, and whatever the two callbacks return. Sets are stand-ins as well, so that
hashing is confined to dict keys, which are short and flat.
"""

from collections.abc import Callable
from typing import Any, BinaryIO

from repopt_jax.torch_files.limits import (
    MAX_KEY,
    MAX_NAME,
    MAX_OPCODES,
    MAX_RARE_KEYS,
    Budget,
    TorchFileError,
    quote,
)
from repopt_jax.torch_files.opcodes import OPCODES
from repopt_jax.torch_files.standin import Standin


class Unpickler:
    """Read one pickle from a stream.

    Args:
      stream: at the pickle's first byte; afterwards just behind its last.
      length: bytes that may be read.
      budget: memory that the objects may take.
      load_persistent: persistent id -> value.
      rebuild: dotted name -> what takes the place of a call of that name. These functions get
        arguments from the file, unchecked.
    """

    def __init__(
        self,
        stream: BinaryIO,
        length: int,
        budget: Budget,
        load_persistent: Callable[[Any], Any],
        rebuild: dict[str, Callable],
    ):
        self.stream = stream
        self.left = length
        self.budget = budget
        self.load_persistent = load_persistent
        self.rebuild = rebuild
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, Standin] = {}
        self.rare_keys = 0

    def load(self) -> Any:
        """The pickled value; raises TorchFileError for anything but a well-formed pickle."""
        length = self.left
        try:
            for _ in range(MAX_OPCODES):
                code = self.read(1)
                if code == b".":
                    return self.stack.pop()
                self.budget.spend(16)  # a place on the stack and in the list it ends up in
                if code not in OPCODES:
                    raise TorchFileError(f"its pickle has the unknown instruction {quote(code)}")
                OPCODES[code](self)
        except TorchFileError:
            raise
        except Exception as error:  # whatever a damaged pickle makes of the handlers below
            at = length - self.left
            raise TorchFileError(
                f"its pickle is damaged near byte {at} ({type(error).__name__})"
            ) from None
        raise TorchFileError(f"its pickle has more than {MAX_OPCODES} instructions")

    def read(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        if not 0 <= count <= self.left:
            raise TorchFileError(
                f"its pickle is cut off: {count} bytes are due where {self.left} are left"
            )
        self.left -= count
        data = self.stream.read(count)
        if len(data) != count:
            raise TorchFileError("it became shorter while it was read")
        return data

    def line(self) -> bytes:
        """The next line of the pickle, without its end."""
        data = self.stream.readline(min(self.left, MAX_NAME))
        self.left -= len(data)
        if not data.endswith(b"\n"):
            raise TorchFileError("its pickle is cut off inside a line of text")
        return data[:-1]

    def push(self, value: Any, cost: int) -> None:
        """Put a new object of about `cost` bytes on the stack."""
        self.budget.spend(cost)
        self.stack.append(value)

    def pop_mark(self) -> list:
        """Remove and return what lies above the topmost mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def name(self, module: Any, name: Any) -> Standin:
        """The stand-in of a class or function."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TorchFileError("its pickle names a class by something other than text")
        if len(module) + len(name) > MAX_NAME:
            raise TorchFileError("its pickle holds a class name of absurd length")
        full = f"{module}.{name}"
        if full not in self.names:
            self.budget.spend(4 * len(full) + 500)
            self.names[full] = Standin(full)
        return self.names[full]

    def call(self, function: Any, args: Any, kwargs: dict | None = None) -> Any:
        """What the file means as a call; only functions of `rebuild` are ever run."""
        if not (isinstance(function, Standin) and isinstance(args, tuple)):
            raise TorchFileError(f"its pickle calls {quote(function)}")
        self.budget.spend(400 + 8 * len(args))
        if function.args is not None:  # the result of another call, as in getattr(x, y)(z)
            return Standin("call", (function, args), kwargs)
        if function.name in _FORWARDED and args and isinstance(args[0], Standin):
            forwarded = _FORWARDED[function.name](args)
            if args[0].name in _FORWARDED:  # never written; one step of recursion is enough
                return Standin(args[0].name, forwarded, kwargs)
            return self.call(args[0], forwarded, kwargs)
        if function.name in _CONTAINERS:
            return _CONTAINERS[function.name](self, *args)
        if function.name in self.rebuild and not kwargs:
            return self.rebuild[function.name](*args)
        return Standin(function.name, args, kwargs)

    def set_items(self, target: Any, pairs: list[tuple[Any, Any]]) -> None:
        """Store items in a dict, or in the stand-in of some kind of dict."""
        items = target.mapping if isinstance(target, Standin) else target
        if not isinstance(items, dict):
            raise TorchFileError(f"its pickle stores items in {quote(target)}")
        self.budget.spend(100 * len(pairs))
        for key, value in pairs:
            self.check_key(key)
            items[key] = value

    def extend(self, target: Any, values: list) -> None:
        """Append to a list, or to the stand-in of some kind of list or set."""
        items = target.sequence if isinstance(target, Standin) else target
        if not isinstance(items, list):
            raise TorchFileError(f"its pickle appends to {quote(target)}")
        items.extend(values)

    def build(self, target: Any, state: Any) -> None:
        """Record an object's state; attributes of dicts, lists and tensors are dropped."""
        if isinstance(target, Standin) and target.args is not None:
            target.state = state

    def check_key(self, key: Any) -> None:
        """Refuse keys that are unhashable or could make a dict slow."""
        if isinstance(key, str | bytes):
            if len(key) > MAX_KEY:
                raise TorchFileError("it holds a dict with a key of absurd length")
        elif not ((isinstance(key, int) and abs(key) < 1 << 31) or isinstance(key, Standin)):
            flat = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
            if not all(isinstance(part, _SCALARS) for part in flat):
                raise TorchFileError(f"it holds a dict with {quote(key)} as a key")
            for part in flat:
                if isinstance(part, str | bytes):
                    self.check_key(part)
            self.rare_keys += 1
            if self.rare_keys > MAX_RARE_KEYS:
                raise TorchFileError("it holds too many dict keys other than text")


_SCALARS = (str, bytes, int, float, type(None))


def _dict_from(unpickler: Unpickler, pairs: Any = ()) -> dict:
    result: dict = {}
    unpickler.set_items(result, [(key, value) for key, value in pairs])
    return result


def _set_from(kind: str) -> Callable:
    def build(unpickler: Unpickler, values: Any = ()) -> Standin:
        unpickler.budget.spend(16 * len(values))
        result = Standin(kind, ())
        result.sequence = list(values)
        return result

    return build


def _bytes_from(unpickler: Unpickler, text: Any = "", encoding: Any = "latin1") -> Any:
    if not isinstance(text, str) or encoding != "latin1":
        return Standin("_codecs.encode", (text, encoding))
    unpickler.budget.spend(len(text))
    return text.encode("latin1")


# Containers, and bytes before protocol 3, that Python writes as calls.
_CONTAINERS: dict[str, Callable] = {
    "collections.OrderedDict": _dict_from,
    "collections.defaultdict": lambda unpickler, factory=None, pairs=(): _dict_from(
        unpickler, pairs
    ),
    "_codecs.encode": _bytes_from,
}
for _module in ("builtins", "__builtin__"):
    for _kind in ("set", "frozenset"):
        _CONTAINERS[f"{_module}.{_kind}"] = _set_from(f"builtins.{_kind}")

# Python's helpers that call their first argument; the lambdas pick the arguments it gets.
_FORWARDED: dict[str, Callable[[tuple], tuple]] = {
    "copyreg.__newobj__": lambda args: args[1:],
    "copyreg._reconstructor": lambda args: (),
    "copy_reg._reconstructor": lambda args: (),
}
