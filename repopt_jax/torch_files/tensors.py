"""Storages of a torch file, the arrays that view them, and the objects that hold these."""

import math
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from repopt_jax.torch_files.pickles import MAX_NAME, Budget, Standin, TorchFileError, quote

MAX_DEPTH = 100  # dicts, lists and tuples inside each other
MAX_EXPANSION = 1 << 26  # bytes by which all broadcast tensors may exceed their storages
MAX_DIMENSIONS = 32

# torch's name -> dtype; ml_dtypes has those that numpy lacks, complex32 from version 0.6 on.
_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128", "bfloat16"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *(["complex32"] if hasattr(ml_dtypes, "complex32") else []),
    )
}
# Class of a storage -> dtype; quantized storages yield their integers.
_STORAGES = {
    f"{prefix}.{kind}Storage": _DTYPES[name]
    for kind, name in (
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("Bool", "bool")),
        *(("BFloat16", "bfloat16"), ("Long", "int64"), ("Int", "int32"), ("Short", "int16")),
        *(("Char", "int8"), ("Byte", "uint8"), ("Untyped", "uint8"), ("_Untyped", "uint8")),
        *(("ComplexFloat", "complex64"), ("ComplexDouble", "complex128"), ("QInt8", "int8")),
        *(("QUInt8", "uint8"), ("QInt32", "int32"), ("QUInt4x2", "uint8"), ("QUInt2x4", "uint8")),
    )
    for prefix in ("torch", "torch.cuda", "torch.storage")
}


def _swap_unit(dtype: np.dtype) -> int:
    """Bytes that change places between the byte orders: a complex number's parts swap apart."""
    return dtype.itemsize // 2 if "complex" in dtype.name else dtype.itemsize


class Storage:
    """Memory that tensors view.

    Attributes:
      data: its bytes; empty until the file's reader fills them in.
      unit: bytes per number, for swapping; None until a tensor gives an untyped storage a type.
    """

    def __init__(self, dtype: np.dtype, numel: int, typed: bool):
        self.dtype = dtype
        self.numel = numel
        self.size = numel * dtype.itemsize
        self.data = np.empty(0, np.uint8)
        self.unit = _swap_unit(dtype) if typed else None

    def view(self, dtype: np.dtype | None) -> np.ndarray:
        """All elements, of the storage's own type (None) or of another."""
        if dtype is None:
            return self.data.view(self.dtype)
        self.unit = self.unit or _swap_unit(dtype)
        if self.unit != _swap_unit(dtype):
            raise TorchFileError("it holds a storage that tensors give different types")
        return self.data[: self.size // dtype.itemsize * dtype.itemsize].view(dtype)


class Storages(dict):
    """The storages of one file by key, as its pickle describes them.

    Args:
      file_size: bytes; the storages cannot hold more.
    """

    def __init__(self, file_size: int):
        self.file_size = file_size
        self.room = file_size

    def load(self, pid: Any) -> Standin:
        """A stand-in of the storage with that persistent id, noted under its key.

        In the old format it may be a part of the storage, and a class with its source, too.
        """
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        if not (
            isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] in ("storage", b"storage")
        ):
            raise TorchFileError("its pickle refers to something outside it that is no storage")
        _, kind, key, _, numel, part = (*pid, None)[:6]
        name = kind.name if isinstance(kind, Standin) and kind.args is None else kind
        if not isinstance(name, str) or name not in _STORAGES:
            raise TorchFileError(f"it holds a storage of the unknown type {quote(name)}")
        if not isinstance(key, str) or len(key) > MAX_NAME:
            raise TorchFileError(f"the key of a storage is {quote(key)}")
        if type(numel) is not int or numel < 0:
            raise TorchFileError(f"storage {quote(key)} has {quote(numel)} elements")
        storage = Storage(_STORAGES[name], numel, typed="Untyped" not in name)
        if key not in self:
            if storage.size > self.room:
                raise TorchFileError(
                    f"storage {quote(key)} of {quote(storage.size)} bytes does not fit in the "
                    f"file, which has {self.file_size}"
                )
            self.room -= storage.size
            self[key] = storage
        elif (self[key].dtype, self[key].numel) != (storage.dtype, numel):
            raise TorchFileError(f"storage {quote(key)} is described in two ways")
        _, start, count = part if part is not None else (None, 0, numel)
        if not all(type(n) is int and n >= 0 for n in (start, count)) or start + count > numel:
            raise TorchFileError(f"a part of storage {quote(key)} has no proper bounds")
        return Standin("storage", (key, start, count))

    def swap_bytes(self, order: str) -> None:
        """Bring the numbers from that byte order into this machine's."""
        for storage in self.values() if order != sys.byteorder else ():
            if storage.unit is not None and storage.unit > 1:
                whole = storage.size // storage.unit * storage.unit
                storage.data[:whole].view(f"u{storage.unit}").byteswap(inplace=True)


_COUNT = {"collections.defaultdict": 1}  # arguments before a dict's first items
_DICTS = ("builtins.dict", "__builtin__.dict", "collections.OrderedDict", *_COUNT)
_SETS = tuple(f"{m}.{s}" for m in ("builtins", "__builtin__") for s in ("set", "frozenset"))
# Python's helpers that call their first argument -> the arguments it gets.
_FORWARDED: dict[str, Callable[..., tuple]] = {
    "copyreg.__newobj__": lambda kind, *args: args,
    "copyreg._reconstructor": lambda *args: (),
    "copy_reg._reconstructor": lambda *args: (),
}
# All keep the tensor as their first argument; the last two were classes before torch 0.4.
_PARAMETERS = (
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *("torch.nn.parameter.Parameter", "torch.autograd.variable.Variable"),
)
_TENSORS = tuple(f"torch._utils._rebuild_tensor{v}" for v in ("", "_v2", "_v3"))
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"


class Rebuilder:
    """Puts arrays, dicts and parameters in the place of the stand-ins that stand for them.

    It looks at every object once, however often it is referred to. Dicts, lists and tuples must
    not hold themselves nor lie too deep in each other, so that whoever walks the result by
    recursion is safe. References through a `Standin` may be cyclic, as those of modules are; each
    one's contents are checked on their own.

    Args:
      storages: with their bytes.
      budget: memory for everything else.
    """

    def __init__(self, storages: Storages, budget: Budget):
        self.storages = storages
        self.budget = budget
        self.expansion = MAX_EXPANSION
        # id -> the object, which keeps its id in use; what takes its place; its depth.
        self.done: dict[int, tuple[Any, Any, int]] = {}
        self.pending: list[Standin] = []

    def rebuild(self, root: Any) -> Any:
        """The object that the file holds."""
        result, _ = self._value(root, 0)
        while self.pending:
            item = self.pending.pop()
            for part in ("args", "kwargs", "state", "sequence", "mapping"):
                if getattr(item, part):
                    setattr(item, part, self._value(getattr(item, part), 0)[0])
        return result

    def _value(self, value: Any, depth: int) -> tuple[Any, int]:
        """What takes the place of a value, and the depth of that."""
        if not isinstance(value, list | tuple | dict | Standin):
            return value, 0
        if id(value) not in self.done:
            if depth > MAX_DEPTH:
                raise TorchFileError(f"its objects are nested more than {MAX_DEPTH} deep")
            self.done[id(value)] = value, None, -1
            make = self._standin if isinstance(value, Standin) else self._container
            self.done[id(value)] = value, *make(value, depth)
        _, result, below = self.done[id(value)]
        if below < 0:
            raise TorchFileError("it holds a dict, list or tuple that contains itself")
        if depth + below > MAX_DEPTH:
            raise TorchFileError(f"its objects are nested more than {MAX_DEPTH} deep")
        return result, below

    def _container(self, value: list | tuple | dict, depth: int) -> tuple[Any, int]:
        target = list(value) if isinstance(value, tuple) else value
        below = 0
        for key, part in target.items() if isinstance(target, dict) else enumerate(target):
            target[key], height = self._value(part, depth + 1)
            below = max(below, height)
        return tuple(target) if isinstance(value, tuple) else target, below + 1

    def _standin(self, value: Standin, depth: int) -> tuple[Any, int]:
        called = value.args[0] if value.name in _FORWARDED and value.args else None
        if isinstance(called, Standin) and called.args is None:
            value.name, value.args = called.name, _FORWARDED[value.name](*value.args)
        if value.args is None:
            return value, 0
        if value.name == "storage":
            return self._part(value), 0
        if value.name in _DICTS:
            return self._container(self._items(value), depth)
        if value.name in _PARAMETERS:
            return self._value(value.args[0], depth + 1)
        if value.name in _TENSORS and not value.kwargs:
            return self._tensor(value.name, *value.args), 0
        if value.name == _SUBCLASS and getattr(value.args[0], "name", None) in _TENSORS:
            return self._tensor(value.args[0].name, *value.args[2]), 0
        if value.name == "torch.Size":
            sizes = value.args[0] if value.args else ()
            if not isinstance(sizes, list | tuple) or len(sizes) > MAX_DIMENSIONS:
                raise TorchFileError("it holds a torch.Size that is no list of sizes")
            return self._value(tuple(sizes), depth)
        if value.name == "_codecs.encode" and value.args[1:] == ("latin1",):
            self.budget.spend(len(value.args[0]))
            return value.args[0].encode("latin1"), 0
        if value.name in _SETS and value.args and isinstance(value.args[0], list):
            # Shared lists stay shared, as copies of one might be without end.
            value.name = value.name.replace("__builtin__", "builtins")
            value.sequence, value.args = value.sequence or value.args[0], ()
        self.pending.append(value)
        return value, 0

    def _items(self, value: Standin) -> dict:
        """The items of a dict's stand-in: those of its arguments, then those set later."""
        later, value.mapping = value.mapping, {}
        for pairs in value.args[_COUNT.get(value.name, 0) :]:
            self.budget.spend(100 * len(pairs))
            for key, item in pairs:
                value[key] = item
        value.mapping.update(later)
        self.pending.extend(key for key in value.mapping if isinstance(key, Standin))
        return value.mapping

    def _part(self, value: Any, dtype: np.dtype | None = None) -> np.ndarray:
        if not isinstance(value, Standin) or value.name != "storage":
            raise TorchFileError("it holds a tensor without a storage")
        key, start, count = value.args
        unit = self.storages[key].dtype.itemsize
        part = self.storages[key].view(dtype)
        if (start, count) == (0, self.storages[key].numel):
            return part
        return part[start * unit // part.itemsize : (start + count) * unit // part.itemsize]

    def _tensor(
        self, function, storage, offset, size, stride, grad=None, hooks=None, *rest
    ) -> np.ndarray:
        """The array of a call of torch's function that makes tensors."""
        dtype = None
        if function.endswith("_v3"):
            kind, *rest = rest
            name = kind.name if isinstance(kind, Standin) else kind
            dtype = _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
            if dtype is None:
                raise TorchFileError(f"it holds a tensor of the unsupported type {quote(name)}")
        if rest and getattr(rest[0], "mapping", rest[0]):
            raise TorchFileError(
                "it holds a lazily conjugated or negated tensor (torch's resolve_conj() and "
                "resolve_neg() store the numbers themselves)"
            )
        array = self._part(storage, dtype)
        for values in (size, stride):
            if not (isinstance(values, tuple) and len(values) <= MAX_DIMENSIONS):
                raise TorchFileError("it holds a tensor without a proper shape")
        numbers = (*size, *stride, offset)
        if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise TorchFileError(
                "it holds a tensor whose sizes, strides or offset are no counts: "
                f"{_show(size)}, {_show(stride)}, {quote(offset)}"
            )
        if math.prod(size) == 0:
            if any(n >= 1 << 31 for n in size):
                raise TorchFileError(f"it holds an empty tensor of absurd shape {_show(size)}")
            return np.empty(size, array.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= array.size:
            raise TorchFileError(
                f"a tensor of shape {_show(size)} reaches past the {array.size} elements of its "
                "storage"
            )
        self.expansion -= max(0, math.prod(size) - array.size) * array.itemsize
        if self.expansion < 0:
            raise TorchFileError(f"a tensor of shape {_show(size)} repeats its storage without end")
        # The stride of an axis of length 1 is never used, and may be too large for numpy.
        steps = (step if n > 1 else 1 for n, step in zip(size, stride, strict=True))
        strides = tuple(step * array.itemsize for step in steps)
        return np.ndarray(size, array.dtype, array, offset * array.itemsize, strides)


def _show(values: tuple) -> str:
    return "(" + ", ".join(quote(value) for value in values[:8]) + ")"
