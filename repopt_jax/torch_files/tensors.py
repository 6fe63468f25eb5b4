"""Storages of a torch file, and the arrays that view them."""

import math
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from repopt_jax.messages import quote
from repopt_jax.torch_files.pickles import Standin, TorchFileError

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
    for name, kinds in {
        **{"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16"},
        **{"complex64": "ComplexFloat", "complex128": "ComplexDouble", "bool": "Bool"},
        **{"int64": "Long", "int32": "Int QInt32", "int16": "Short", "int8": "Char QInt8"},
        "uint8": "Byte QUInt8 QUInt4x2 QUInt2x4 Untyped _Untyped",
    }.items()
    for kind in kinds.split()
    for prefix in ("torch", "torch.cuda", "torch.storage")
}


class Storage:
    """Memory that tensors view.

    Attributes:
      data: its bytes; zeros until the file's reader fills them in.
      unit: bytes that change places between the byte orders; None until a tensor gives an untyped
        storage a type.
    """

    def __init__(self, dtype: np.dtype, size: int, typed: bool):
        self.dtype = dtype
        self.data = np.zeros(size, np.uint8)
        self.unit: int | None = None
        if typed:
            self.set_unit(dtype)

    def set_unit(self, dtype: np.dtype) -> None:
        """Note the type of the numbers; refuse a second one of another width."""
        # A complex number's parts swap apart.
        unit = dtype.itemsize // 2 if "complex" in dtype.name else dtype.itemsize
        self.unit = self.unit or unit
        if self.unit != unit:
            raise TorchFileError("it holds a storage that tensors give different types")

    def swap_bytes(self) -> None:
        """Bring the numbers into this machine's byte order from the other one."""
        whole = self.data.size // (self.unit or 1) * (self.unit or 1)
        self.data[:whole].view(f"u{self.unit or 1}").byteswap(inplace=True)


class Storages(dict):
    """The storages of one file by key, as its pickle describes them, and the tensors made of them.

    Args:
      file_size: bytes; the storages cannot hold more.

    Attributes:
      functions: torch's name of a function -> what a call of it makes here.
    """

    def __init__(self, file_size: int):
        self.file_size = file_size
        self.room = file_size
        self.expansion = MAX_EXPANSION
        # id -> an array that stands for a storage, which keeps its id in use; that storage.
        self.arrays: dict[int, tuple[np.ndarray, Storage]] = {}
        self.functions: dict[str, Callable] = {
            "torch.Size": self._size,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
            # The last two were classes before torch 0.4.
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
            "torch.nn.parameter.Parameter": lambda tensor, *_: tensor,
            "torch.autograd.variable.Variable": lambda tensor, *_: tensor,
        }

    def load(self, pid: Any) -> np.ndarray | Standin:
        """The array of the storage with that persistent id, noted under its key.

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
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise TorchFileError(f"storage {quote(key)} has {quote(numel)} elements")
        dtype = _STORAGES[name]
        size = numel * dtype.itemsize
        if key not in self:
            self.room -= size
            if self.room < 0:
                raise TorchFileError(
                    f"storage {quote(key)} of {quote(size)} bytes does not fit in the file, "
                    f"which has {self.file_size}"
                )
            self[key] = Storage(dtype, size, typed="Untyped" not in name)
        storage = self[key]
        if (storage.dtype, storage.data.size) != (dtype, size):
            raise TorchFileError(f"storage {quote(key)} is described in two ways")
        _, start, count = part if part is not None else (None, 0, numel)
        if not all(type(n) is int and n >= 0 for n in (start, count)) or start + count > numel:
            raise TorchFileError(f"a part of storage {quote(key)} has no proper bounds")
        array = storage.data.view(dtype)[start : start + count]
        self.arrays[id(array)] = array, storage
        return array

    def swap_bytes(self, order: str) -> None:
        """Bring the numbers from that byte order into this machine's."""
        for storage in self.values() if order != sys.byteorder else ():
            storage.swap_bytes()

    def _size(self, sizes: Any = ()) -> tuple:
        if not isinstance(sizes, list | tuple) or len(sizes) > MAX_DIMENSIONS:
            raise TorchFileError("it holds a torch.Size that is no list of sizes")
        return tuple(sizes)

    def _typed_tensor(
        self, storage, offset, size, stride, grad, hooks, kind, metadata=None
    ) -> np.ndarray:
        """A tensor of another type than its storage."""
        name = kind.name if isinstance(kind, Standin) else kind
        dtype = _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
        if dtype is None:
            raise TorchFileError(f"it holds a tensor of the unsupported type {quote(name)}")
        return self._tensor(storage, offset, size, stride, grad, hooks, metadata, dtype)

    def _tensor(
        self, storage, offset, size, stride, grad=None, hooks=None, metadata=None, dtype=None
    ) -> np.ndarray:
        """The view of a storage that a tensor is, of the storage's own type if `dtype` is None."""
        if metadata:
            raise TorchFileError(
                "it holds a lazily conjugated or negated tensor (torch's resolve_conj() and "
                "resolve_neg() store the numbers themselves)"
            )
        if id(storage) not in self.arrays:
            raise TorchFileError("it holds a tensor without a storage")
        array, memory = self.arrays[id(storage)]
        if dtype is not None:
            memory.set_unit(dtype)
            array = array.view(np.uint8)
            array = array[: array.size // dtype.itemsize * dtype.itemsize].view(dtype)
        shape = "(" + ", ".join(map(quote, size[:8])) + ")"
        paired = type(size) is type(stride) is tuple and len(size) == len(stride) <= MAX_DIMENSIONS
        if not paired or any(type(n) is not int or n < 0 for n in (*size, *stride, offset)):
            raise TorchFileError(
                f"it holds a tensor of shape {shape} whose sizes, strides or offset are no counts"
            )
        if math.prod(size) == 0:
            if any(n >= 1 << 31 for n in size):
                raise TorchFileError(f"it holds an empty tensor of absurd shape {shape}")
            return np.empty(size, array.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= array.size:
            raise TorchFileError(
                f"a tensor of shape {shape} reaches past the {array.size} elements of its storage"
            )
        self.expansion -= max(0, math.prod(size) - array.size) * array.itemsize
        if self.expansion < 0:
            raise TorchFileError(f"a tensor of shape {shape} repeats its storage without end")
        # The stride of an axis of length 1 is never used, and may be too large for numpy.
        steps = (step if n > 1 else 1 for n, step in zip(size, stride, strict=True))
        strides = tuple(step * array.itemsize for step in steps)
        return np.ndarray(size, array.dtype, array, offset * array.itemsize, strides)
