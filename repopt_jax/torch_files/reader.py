"""Reads PyTorch checkpoints with numpy and ml_dtypes alone.

PyTorch itself is not used: its wheels take hundreds of megabytes, with CUDA gigabytes, and its
safe mode (`weights_only`) refuses the very files of interest here: pickled yacs configurations
beside the weights, and whole pickled modules, as YOLOv6 writes them. Its unsafe mode runs
whatever the file says. This reader opens both kinds, runs nothing that a file names, and needs
none of the packages that wrote it.

Known are the zip archives of torch 1.6 and later and the older format of pickles and raw
storages. The tar files of the first torch releases are refused.
"""

import os
import stat
from typing import Any, BinaryIO

from repopt_jax.torch_files.archive import Archive
from repopt_jax.torch_files.legacy import read_legacy
from repopt_jax.torch_files.limits import Budget, TorchFileError, check_nesting, quote
from repopt_jax.torch_files.tensors import Storages
from repopt_jax.torch_files.unpickler import Unpickler


def read_torch_file(path: str | os.PathLike) -> Any:
    """Read what `torch.save` wrote.

    Tensors, parameters and storages become numpy arrays; those that share memory in torch share
    it here. Dicts of every kind that Python knows become dicts. Other objects become `Standin`s:
    use `state_dict` on a pickled module.

    Args:
      path: the file, usually named `.pth` or `.pt`.

    Returns:
      Nested dicts, lists and tuples of arrays, numbers, text and `Standin`s. None of them holds
      itself except through a `Standin`.

    Raises:
      TorchFileError: there is no such file, it is of another kind, or it is damaged.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "notes.pth"
      >>> _ = path.write_text("no checkpoint")
      >>> try:
      ...     read_torch_file(path)
      ... except TorchFileError as error:
      ...     print(str(error).replace(str(path), "notes.pth"))
      notes.pth cannot be read: it is no torch file, as it starts with b'no checkpoint'
    """
    path = os.fspath(path)
    try:
        result = _read(path)
        check_nesting(result)
    except TorchFileError as error:
        raise TorchFileError(f"{_name(path)} cannot be read: {error}") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TorchFileError(f"{_name(path)} cannot be read: {reason}") from None
    except Exception as error:  # no file, however made, may raise anything else
        raise TorchFileError(
            f"{_name(path)} cannot be read: it is damaged ({type(error).__name__})"
        ) from error
    return result


def _name(path: str | bytes) -> str:
    # A path that cannot be printed would hide the message that names it.
    return os.fsdecode(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _read(path: str | bytes) -> Any:
    # Checked before opening, as opening a named pipe would wait for a writer.
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise TorchFileError("it is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise TorchFileError("it is not a regular file")
    with open(path, "rb") as stream:
        file_size = os.fstat(stream.fileno()).st_size
        if file_size == 0:
            raise TorchFileError("it is empty")
        head = stream.read(262)
        stream.seek(0)
        budget = Budget(file_size)
        if head.startswith(b"PK"):
            return _read_archive(stream, file_size, budget)
        if head[257:] == b"ustar":
            raise TorchFileError(
                "it is a tar file of a torch release before 0.2; a later release can save it anew"
            )
        if not head.startswith(b"\x80"):
            raise TorchFileError(f"it is no torch file, as it starts with {quote(head[:16])}")
        return read_legacy(stream, file_size, budget)


def _read_archive(stream: BinaryIO, file_size: int, budget: Budget) -> Any:
    archive = Archive(stream, file_size, budget)

    def check(key: str, size: int) -> None:
        stored = archive.size_of(f"data/{key}")
        if stored != size:
            raise TorchFileError(
                f"storage {quote(key)} has {stored} bytes where its tensors say {size}"
            )

    storages = Storages(file_size, budget, check)
    order = _read_byte_order(archive)
    length = archive.seek("data.pkl")
    root = Unpickler(
        stream, length, budget, storages.load_persistent, storages.rebuild_functions()
    ).load()
    for key, storage in storages.by_key.items():
        archive.read_into(f"data/{key}", memoryview(storage.data))
    storages.swap_bytes(order)
    return root


def _read_byte_order(archive: Archive) -> str:
    # Absent before torch 2.1, which read and wrote little-endian files only.
    if "byteorder" not in archive.records:
        return "little"
    order = archive.stream.read(min(archive.seek("byteorder"), 16))
    if order not in (b"little", b"big"):
        raise TorchFileError(f"its byte order is {quote(order)}, not b'little' or b'big'")
    return order.decode()
