"""Storages of a torch file and the numpy arrays that view them."""

import math
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from repopt_jax.torch_files.limits import (
    MAX_EXPANSION,
    MAX_NAME,
    Budget,
    TorchFileError,
    quote,
)
from repopt_jax.torch_files.standin import Standin

# dtype by torch's name; ml_dtypes has the ones that numpy lacks.
_DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
for _name in (
    *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "complex32"),
):
    if hasattr(ml_dtypes, _name):  # complex32 needs version 0.6
        _DTYPES[_name] = np.dtype(getattr(ml_dtypes, _name))

# dtype by the name of the storage's class; quantized storages yield their integers.
_STORAGES = {
    f"{kind}Storage": np.dtype(_DTYPES[name])
    for kind, name in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
        "ComplexFloat": "complex64",
        "ComplexDouble": "complex128",
        "QInt8": "int8",
        "QUInt8": "uint8",
        "QInt32": "int32",
        "QUInt4x2": "uint8",
        "QUInt2x4": "uint8",
        "Untyped": "uint8",
        "_Untyped": "uint8",
    }.items()
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_MAX_DIMENSIONS = 32


def _swap_unit(dtype: np.dtype) -> int:
    """Bytes that change places between the byte orders: a complex number's parts swap apart."""
    return dtype.itemsize // 2 if "complex" in dtype.name else dtype.itemsize


class Storage:
    """Memory that tensors view.

    Attributes:
      data: its bytes. They are read after the pickle, which in the older format comes first.
      array: the same memory as elements of its type.
      unit: bytes per number, for swapping; None until a tensor gives an untyped storage a type.
    """

    def __init__(self, dtype: np.dtype, numel: int, typed: bool):
        self.data = np.empty(numel * dtype.itemsize, np.uint8)
        self.array = self.data.view(dtype)
        self.numel = numel
        self.unit = _swap_unit(dtype) if typed else None

    def swap_bytes(self) -> None:
        """Turn the numbers from the other byte order into this machine's."""
        if self.unit is not None and self.unit > 1:
            whole = len(self.data) // self.unit * self.unit
            self.data[:whole].view(f"u{self.unit}").byteswap(inplace=True)


class Storages:
    """All storages of one file, and the functions that its pickle names to make tensors.

    Args:
      file_size: the storages cannot hold more bytes than that.
      budget: memory for everything but the storages' bytes.
      check: called with the key and number of bytes of each new storage; may refuse.
    """

    def __init__(self, file_size: int, budget: Budget, check: Callable[[str, int], None]):
        self.by_key: dict[str, Storage] = {}
        self._of_array: dict[int, tuple[np.ndarray, Storage]] = {}  # by id of the array
        self._file_size = file_size
        self._room = file_size
        self._expansion = MAX_EXPANSION
        self._budget = budget
        self._check = check

    def load_persistent(self, pid: Any) -> Any:
        """The array of a storage, or the class that the older format notes with its source."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        if not (
            isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] in ("storage", b"storage")
        ):
            raise TorchFileError("its pickle refers to something outside it that is no storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        dtype = self._storage_dtype(kind)
        if not isinstance(key, str) or len(key) > MAX_NAME:
            raise TorchFileError(f"the key of a storage is {quote(key)}")
        if type(numel) is not int or numel < 0:
            raise TorchFileError(f"storage {quote(key)} has {quote(numel)} elements")
        storage = self.by_key.get(key)
        if storage is None:
            size = numel * dtype.itemsize
            if size > self._room:
                raise TorchFileError(
                    f"storage {quote(key)} of {quote(size)} bytes does not fit in the file, "
                    f"which has {self._file_size}"
                )
            self._check(key, size)
            self._room -= size
            self._budget.spend(1000)
            storage = Storage(dtype, numel, typed="Untyped" not in kind.name)
            self.by_key[key] = storage
            self._of_array[id(storage.array)] = storage.array, storage
        elif (storage.array.dtype, storage.numel) != (dtype, numel):
            raise TorchFileError(f"storage {quote(key)} is described in two ways")
        if len(pid) == 6 and pid[5] is not None:
            return self._part(key, storage, pid[5])
        return storage.array

    def _storage_dtype(self, kind: Any) -> np.dtype:
        if isinstance(kind, Standin) and kind.args is None:
            module, _, name = kind.name.rpartition(".")
            if module in _STORAGE_MODULES and name in _STORAGES:
                return _STORAGES[name]
        name = kind.name if isinstance(kind, Standin) else kind
        raise TorchFileError(f"it holds a storage of the unknown type {quote(name)}")

    def _part(self, key: str, storage: Storage, view: Any) -> np.ndarray:
        """A storage that is a piece of another one: only in the older format."""
        _, offset, numel = view if isinstance(view, tuple) and len(view) == 3 else (0, 0, -1)
        if not all(type(value) is int and value >= 0 for value in (offset, numel)):
            raise TorchFileError(f"a part of storage {quote(key)} has no proper bounds")
        if offset + numel > storage.numel:
            raise TorchFileError(f"a part of storage {quote(key)} reaches past its end")
        self._budget.spend(400)
        array = storage.array[offset : offset + numel]
        self._of_array[id(array)] = array, storage
        return array

    def _view(self, source: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
        known = self._of_array.get(id(source))
        if known is None:
            raise TorchFileError("it holds a tensor without a storage")
        array, storage = known
        if dtype is not None:
            storage.unit = storage.unit or _swap_unit(dtype)
            if storage.unit != _swap_unit(dtype):
                raise TorchFileError("it holds a storage that tensors give different types")
            array = array.view(np.uint8)
            array = array[: len(array) // dtype.itemsize * dtype.itemsize].view(dtype)
        for values in (size, stride):
            if not (isinstance(values, tuple) and len(values) <= _MAX_DIMENSIONS):
                raise TorchFileError("it holds a tensor without a proper shape")
        numbers = (*size, *stride, offset)
        if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise TorchFileError(
                "it holds a tensor whose sizes, strides or offset are no counts: "
                f"{_show(size)}, {_show(stride)}, {quote(offset)}"
            )
        self._budget.spend(300)
        count = math.prod(size)
        if count == 0:
            if any(n >= 1 << 31 for n in size):
                raise TorchFileError(f"it holds an empty tensor of absurd shape {_show(size)}")
            return np.empty(size, array.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= len(array):
            raise TorchFileError(
                f"a tensor of shape {_show(size)} reaches past the {len(array)} elements of its "
                "storage"
            )
        self._expansion -= max(0, count - len(array)) * array.itemsize
        if self._expansion < 0:
            raise TorchFileError(f"a tensor of shape {_show(size)} repeats its storage without end")
        # The stride of an axis of length 1 is never used, and may be too large for numpy.
        steps = (step if n > 1 else 1 for n, step in zip(size, stride, strict=True))
        return np.ndarray(
            size,
            array.dtype,
            buffer=array,
            offset=offset * array.itemsize,
            strides=tuple(step * array.itemsize for step in steps),
        )

    def _tensor(
        self, storage, offset, size, stride, requires_grad=False, hooks=None, lazy=None
    ) -> np.ndarray:
        _refuse_lazy(lazy)
        return self._view(storage, None, offset, size, stride)

    def _tensor_with_dtype(
        self, storage, offset, size, stride, requires_grad, hooks, dtype, lazy=None
    ) -> np.ndarray:
        _refuse_lazy(lazy)
        name = dtype.name if isinstance(dtype, Standin) else dtype
        if not isinstance(name, str) or name.removeprefix("torch.") not in _DTYPES:
            raise TorchFileError(f"it holds a tensor of the unsupported type {quote(name)}")
        return self._view(storage, _DTYPES[name.removeprefix("torch.")], offset, size, stride)

    def _tensor_of_class(self, function, kind, args, state) -> Any:
        name = function.name if isinstance(function, Standin) else None
        if name in _TENSORS and isinstance(args, tuple):
            return _TENSORS[name](self, *args)
        return Standin("torch._tensor._rebuild_from_type_v2", (function, kind, args, state))

    def rebuild_functions(self) -> dict[str, Callable]:
        """Functions that the pickle may call, by their names in torch."""
        functions = {
            name: lambda *args, function=function: function(self, *args)
            for name, function in _TENSORS.items()
        }
        functions["torch._tensor._rebuild_from_type_v2"] = self._tensor_of_class
        functions["torch.Size"] = self._size
        for name in _PARAMETERS:
            functions[name] = lambda data, *rest: data
        return functions

    def _size(self, values=()) -> tuple:
        if not isinstance(values, list | tuple) or len(values) > _MAX_DIMENSIONS:
            raise TorchFileError("it holds a torch.Size that is no list of sizes")
        return tuple(values)

    def swap_bytes(self, order: str) -> None:
        """Bring the storages, once read, from that byte order into this machine's."""
        if order != sys.byteorder:
            for storage in self.by_key.values():
                storage.swap_bytes()


def _refuse_lazy(operations: Any) -> None:
    if operations:
        raise TorchFileError(
            "it holds a lazily conjugated or negated tensor (torch's resolve_conj() and "
            "resolve_neg() store the numbers themselves)"
        )


def _show(values: tuple) -> str:
    return "(" + ", ".join(quote(value) for value in values[:8]) + ")"


_TENSORS = {
    "torch._utils._rebuild_tensor": Storages._tensor,
    "torch._utils._rebuild_tensor_v2": Storages._tensor,
    "torch._utils._rebuild_tensor_v3": Storages._tensor_with_dtype,
}
# All keep the tensor as their first argument; the last two were classes before torch 0.4.
_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    "torch.autograd.variable.Variable",
)
