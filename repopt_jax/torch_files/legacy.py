"""The format that torch wrote before version 1.6: pickles in a row, then raw storages.

The pickles are a magic number, the version of the format, facts about the writing machine, the
object, and the keys of its storages. Each storage follows as a count and its bytes.
"""

from typing import Any, BinaryIO

from repopt_jax.torch_files.limits import Budget, TorchFileError, quote
from repopt_jax.torch_files.tensors import Storage, Storages
from repopt_jax.torch_files.unpickler import Unpickler

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001


def read_legacy(stream: BinaryIO, file_size: int, budget: Budget) -> Any:
    """The object in such a file; raises TorchFileError for damage."""
    storages = Storages(file_size, budget, check=lambda key, size: None)

    def load(storages: Storages | None = None) -> Any:
        left = file_size - stream.tell()
        persistent = storages.load_persistent if storages else _refuse_persistent
        rebuild = storages.rebuild_functions() if storages else {}
        return Unpickler(stream, left, budget, persistent, rebuild).load()

    magic = load()
    if type(magic) is not int or magic != MAGIC:
        raise TorchFileError("it is a pickle, but not one that torch wrote")
    version = load()
    if type(version) is not int or version != VERSION:
        raise TorchFileError(f"it has version {quote(version)} of the old format, not {VERSION}")
    machine = load()
    if not isinstance(machine, dict):
        raise TorchFileError("it does not describe the machine that wrote it")
    root = load(storages)
    keys = load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise TorchFileError("its list of storages is damaged")
    if len(set(keys)) != len(keys) or set(keys) != set(storages.by_key):
        raise TorchFileError("its list of storages does not match the tensors")
    for key in keys:
        _read_storage(stream, key, storages.by_key[key], machine.get("little_endian") is not False)
    # Whatever the machine, torch writes these numbers in little-endian order.
    storages.swap_bytes("little")
    return root


def _read_storage(stream: BinaryIO, key: str, storage: Storage, little_endian: bool) -> None:
    count = stream.read(8)
    # Big-endian machines wrote the count, and only the count, in their own order for a while.
    orders = ("little",) if little_endian else ("little", "big")
    if storage.numel not in (int.from_bytes(count, order, signed=True) for order in orders):
        raise TorchFileError(f"storage {quote(key)} does not have the length that its tensors say")
    if len(count) != 8 or stream.readinto(storage.data) != len(storage.data):
        raise TorchFileError(f"it is cut off inside storage {quote(key)}")


def _refuse_persistent(pid: Any) -> Any:
    raise TorchFileError("its header is damaged")
