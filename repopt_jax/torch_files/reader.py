"""Reads PyTorch checkpoints with numpy and ml_dtypes alone.

PyTorch itself is not used: its wheels take hundreds of megabytes, with CUDA gigabytes, and its
safe mode (`weights_only`) refuses the very files of interest here: pickled yacs configurations
beside the weights, and whole pickled modules, as YOLOv6 writes them. Its unsafe mode runs
whatever the file says. This reader opens both kinds, runs nothing that a file names, and needs
none of the packages that wrote it.

It reads the zip archives of torch 1.6 and later, and the older format of pickles and raw
storages. It refuses the tar files of the first torch releases.
"""

import io
import os
import stat
import zipfile
from typing import Any, BinaryIO

import numpy as np

from repopt_jax.messages import quote
from repopt_jax.torch_files.pickles import Budget, TorchFileError, check_nesting, unpickle
from repopt_jax.torch_files.tensors import Storages

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_CHUNK = 1 << 24


def read_torch_file(path: str | os.PathLike) -> Any:
    """Read what `torch.save` wrote.

    Tensors, parameters and storages become numpy arrays; those that share memory in torch share
    it here. Dicts of every kind that Python knows become dicts. Other objects become `Standin`s:
    use `state_dict` on a pickled module.

    Args:
      path: the file, usually named `.pth` or `.pt`; local or ``gs://``.

    Returns:
      Nested dicts, lists and tuples of arrays, numbers, text and `Standin`s. None of them holds
      itself except through a `Standin`.

    Raises:
      TorchFileError: there is no such file, it is of another kind, or it is damaged.

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
        with _open(path) as stream:
            return _read(stream)
    except TorchFileError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except Exception as error:  # no file, however made, may raise anything else
        reason = f"it is damaged ({type(error).__name__})"
    # A path that cannot be printed would hide the message that names it.
    name = os.fsdecode(path).encode("utf-8", "backslashreplace").decode("utf-8")
    raise TorchFileError(f"{name} cannot be read: {reason}")


def _open(path: str | bytes) -> BinaryIO:
    if isinstance(path, str) and "://" in path:
        from etils import epath

        return io.BytesIO(epath.Path(path).read_bytes())
    # Checked before opening, as opening a named pipe would wait for a writer.
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise TorchFileError(
            "it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file"
        )
    return open(path, "rb")


def _read(stream: BinaryIO) -> Any:
    file_size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(262)
    stream.seek(0)
    if not head:
        raise TorchFileError("it is empty")
    budget, storages = Budget(file_size), Storages(file_size)
    if head.startswith(b"PK"):
        try:
            root, order = _read_archive(stream, storages, budget)
        except zipfile.BadZipFile as error:
            raise TorchFileError(f"its zip archive is damaged: {quote(str(error))}") from None
    elif head.startswith(b"\x80"):
        # Whatever the machine, torch wrote the numbers of this format in little-endian order.
        root, order = _read_legacy(stream, storages, budget), "little"
    elif head[257:] == b"ustar":
        raise TorchFileError(
            "it is a tar file of a torch release before 0.2; load it with a later release and save "
            "it again"
        )
    else:
        raise TorchFileError(f"it is no torch file, as it starts with {quote(head[:16])}")
    check_nesting(root)
    storages.swap_bytes(order)
    return root


def _read_archive(stream: BinaryIO, storages: Storages, budget: Budget) -> tuple[Any, str]:
    """The format since version 1.6: a zip archive of a pickle and storages.

    torch stores its records uncompressed, so that none can unpack to more than its own size.
    """
    archive = zipfile.ZipFile(stream)
    records = {info.filename: info for info in archive.infolist()}
    if len(records) != len(archive.infolist()):
        raise TorchFileError("its zip archive holds a record twice")
    roots = [name[:-8] for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise TorchFileError(
            f"it is a zip archive with {len(roots)} files FOLDER/data.pkl, where torch's have one"
        )
    if f"{roots[0]}constants.pkl" in records:
        raise TorchFileError("it is a TorchScript program, not a checkpoint")

    def read(name: str, data: np.ndarray | None = None) -> np.ndarray:
        info = records.get(roots[0] + name)
        if info is None:
            raise TorchFileError(f"its zip archive lacks the record {quote(name)}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x2041:
            raise TorchFileError(f"its record {quote(name)} is compressed or encrypted")
        if data is None:
            data = np.zeros(info.file_size, np.uint8)
        if data.size != info.file_size:
            raise TorchFileError(
                f"record {quote(name)} has {info.file_size} bytes where its tensors say {data.size}"
            )
        if info.CRC == 0:  # what torch writes when its users switch the checksums off
            del info.CRC
        with archive.open(info) as record:
            _fill(record, data, name)
        return data

    # Absent before torch 2.1, which read and wrote little-endian files only.
    order = read("byteorder").tobytes() if f"{roots[0]}byteorder" in records else b"little"
    if order not in (b"little", b"big"):
        raise TorchFileError(f"its byte order is {quote(order)}, not b'little' or b'big'")
    pickled = read("data.pkl")
    stream = io.BytesIO(pickled)
    root = unpickle(stream, pickled.size, budget, storages.load, storages.functions)
    for key, storage in storages.items():
        read(f"data/{key}", storage.data)
    return root, order.decode()


def _fill(stream: BinaryIO, data: np.ndarray, name: str) -> None:
    for at in range(0, data.size, _CHUNK):
        chunk = data[at : at + _CHUNK]
        if stream.readinto(chunk) != chunk.size:
            raise TorchFileError(f"it is cut off inside {quote(name)}")


def _read_legacy(stream: BinaryIO, storages: Storages, budget: Budget) -> Any:
    """The format before version 1.6: pickles in a row, then raw storages.

    The pickles are a magic number, the version of the format, facts about the writing machine,
    the object, and the keys of its storages. Each storage follows as a count and its bytes.
    """

    def load() -> Any:
        left = storages.file_size - stream.tell()
        return unpickle(stream, left, budget, storages.load, storages.functions)

    magic = load()
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise TorchFileError("it is a pickle, but not one that torch wrote")
    version = load()
    if type(version) is not int or version != _LEGACY_VERSION:
        raise TorchFileError(f"it has version {quote(version)} of the old format, not 1001")
    machine = load()
    root, keys = load(), load()
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise TorchFileError("its list of storages does not match the tensors")
    # Big-endian machines wrote the count, and only the count, in their own order for a while.
    is_big = isinstance(machine, dict) and machine.get("little_endian") is False
    for key in keys:
        storage, count = storages[key], stream.read(8)
        counts = [int.from_bytes(count, order) for order in ("little", "big")[: 1 + is_big]]
        if storage.data.size not in [storage.dtype.itemsize * n for n in counts]:
            raise TorchFileError(
                f"storage {quote(key)} does not have the length that its tensors say"
            )
        _fill(stream, storage.data, key)
    return root
