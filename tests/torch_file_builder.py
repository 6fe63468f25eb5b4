"""Writes torch files without torch, sound or damaged: for tests and the robustness script.

    python_object -> dump() -> a pickle and storages -> write_archive() or write_legacy()

`Name`, `Call`, `Storage` and `tensor` stand for what torch would put into the pickle.
"""

import dataclasses
import io
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGE_KINDS = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
    "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
}


@dataclasses.dataclass(eq=False)
class Name:
    """A class or function of some module; calling it is for pickle's checks only."""

    module: str
    name: str


@dataclasses.dataclass(eq=False)
class Call:
    """An object made by calling a name: `opcode` is REDUCE or NEWOBJ."""

    function: Any
    args: tuple = ()
    state: Any = None
    items: dict | None = None
    opcode: bytes = pickle.REDUCE


@dataclasses.dataclass(eq=False)
class Storage:
    """Numbers in torch's keeping; the overrides describe them otherwise than they are."""

    data: np.ndarray
    kind: str | None = None
    numel: int | None = None
    view: tuple | None = None


def tensor(
    data: Any, size=None, stride=None, offset: Any = 0, storage: Storage | None = None
) -> Call:
    """A tensor of the array's shape and strides, or of those given."""
    data = np.asarray(data)
    if storage is None:
        storage = Storage(np.ascontiguousarray(data).reshape(-1))
    if size is None:
        size = data.shape
    if stride is None:
        contiguous = np.empty(data.shape, np.int8)
        stride = contiguous.strides
    hooks = Call(Name("collections", "OrderedDict"))
    args = (storage, offset, size, stride, False, hooks)
    if storage.kind == "Untyped":
        dtype = Name("torch", data.dtype.name)
        return Call(Name("torch._utils", "_rebuild_tensor_v3"), (*args, dtype))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), args)


def untyped(data: np.ndarray) -> Call:
    """A tensor as torch writes the types that have no storage class of their own."""
    flat = np.ascontiguousarray(data).reshape(-1)
    return tensor(data, storage=Storage(flat.view(np.uint8), "Untyped"))


def parameter(value: Call) -> Call:
    """A parameter that holds this tensor."""
    hooks = Call(Name("collections", "OrderedDict"))
    return Call(Name("torch._utils", "_rebuild_parameter"), (value, True, hooks))


def module(kind: str, parameters=None, buffers=None, modules=None, **state: Any) -> Call:
    """A whole pickled module of the class `kind`, such as "my.Net"."""
    tables = {
        f"_{table}": Call(Name("collections", "OrderedDict"), items=dict(values or {}))
        for table, values in (
            ("parameters", parameters),
            ("buffers", buffers),
            ("modules", modules),
        )
    }
    name = Name(*kind.rsplit(".", 1))
    return Call(name, state={"training": False, **tables, **state}, opcode=pickle.NEWOBJ)


class _Pickler(pickle._Pickler):
    """Python's pickler, which can be taught to write names that cannot be imported."""

    def __init__(self, stream, protocol: int, legacy: bool):
        super().__init__(stream, protocol)
        self.legacy = legacy
        self.storages: dict[str, Storage] = {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Name | Call | Storage):
            super().save(obj, save_persistent_id)
        elif id(obj) in self.memo:
            self.write(self.get(self.memo[id(obj)][0]))
        else:
            {Name: self.save_name, Call: self.save_call, Storage: self.save_storage}[type(obj)](obj)

    def save_name(self, obj: Name) -> None:
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_call(self, obj: Call) -> None:
        self.save(obj.function)
        self.save(obj.args)
        self.write(obj.opcode)
        self.memoize(obj)
        for key, value in (obj.items or {}).items():
            self.save(key)
            self.save(value)
            self.write(pickle.SETITEM)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def save_storage(self, obj: Storage) -> None:
        known = [key for key, storage in self.storages.items() if storage is obj]
        key = known[0] if known else str(len(self.storages))
        self.storages[key] = obj
        kind = obj.kind or STORAGE_KINDS[obj.data.dtype.name]
        numel = obj.data.size if obj.numel is None else obj.numel
        name = Name("torch.storage" if kind == "Untyped" else "torch", f"{kind}Storage")
        pid = ("storage", name, key, "cpu", numel)
        self.save((*pid, obj.view) if self.legacy else pid)
        self.write(pickle.BINPERSID)


def dump(obj: Any, protocol: int = 2, legacy: bool = False) -> tuple[bytes, dict[str, Storage]]:
    """The pickle of an object, and its storages by key."""
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol, legacy)
    pickler.dump(obj)
    return stream.getvalue(), pickler.storages


def _bytes_of(storage: Storage, order: str) -> bytes:
    data = storage.data
    if order == "big":
        data = data.view("u2").byteswap() if data.dtype == ml_dtypes.bfloat16 else data.byteswap()
    return data.tobytes()


def write_archive(
    pickled: bytes,
    storages: dict[str, Storage],
    order: str | None = "little",
    root: str = "archive",
    records: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A file as torch has written it since 1.6; `records` are added to the archive."""
    parts = {"data.pkl": pickled}
    if order is not None:
        parts["byteorder"] = order.encode()
    for key, storage in storages.items():
        parts[f"data/{key}"] = _bytes_of(storage, order or "little")
    parts |= {"version": b"3\n"} | (records or {})
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), data, compression)
    return stream.getvalue()


def write_legacy(
    pickled: bytes,
    storages: dict[str, Storage],
    little_endian: bool = True,
    magic: int = MAGIC,
    version: int = 1001,
    keys: list | None = None,
) -> bytes:
    """A file as torch wrote it before 1.6."""
    machine = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"int": 4}}
    head = b"".join(pickle.dumps(value, 2) for value in (magic, version, machine))
    keys = sorted(storages) if keys is None else keys
    body = b""
    for key in keys:
        storage = storages.get(key)
        if storage is not None:
            body += struct.pack("<q" if little_endian else ">q", storage.data.size)
            body += _bytes_of(storage, "little")
    return head + pickled + pickle.dumps(keys, 2) + body


def archive_of(obj: Any, **options: Any) -> bytes:
    """A sound zip archive of the object."""
    return write_archive(*dump(obj), **options)


def legacy_of(obj: Any, **options: Any) -> bytes:
    """A sound file of the older format."""
    return write_legacy(*dump(obj, legacy=True), **options)
