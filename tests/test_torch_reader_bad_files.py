"""Damaged and foreign files end in TorchFileError, soon, within memory of the file's order."""

import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch_file_builder as build

from repopt_jax.torch_files import TorchFileError, read_torch_file


def refuse(path: pathlib.Path, data: bytes, match: str) -> None:
    """The file is refused with one line that names it and says `match`."""
    path.write_bytes(data)
    with pytest.raises(TorchFileError, match=match) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_other_kinds_are_named(tmp_path):
    path = tmp_path / "file.pth"
    refuse(path, b"", "is empty")
    refuse(path, b"epoch: 3\n" * 9, "no torch file, as it starts with b'epoch: 3")
    refuse(path, b"\x89HDF\r\n\x1a\n" * 9, "no torch file")
    refuse(path, pickle.dumps({"a": 1}), "a pickle, but not one that torch wrote")
    refuse(path, bytes(257) + b"ustar" + bytes(300), "tar file")
    refuse(path, build.write_legacy(b"N.", {}, magic=7), "not one that torch wrote")
    refuse(path, build.write_legacy(b"N.", {}, version=1000), "version 1000")
    script = build.write_archive(b"N.", {}, records={"constants.pkl": b"N."})
    refuse(path, script, "TorchScript")
    refuse(path, build.write_archive(b"N.", {}, root="a/b"), "with 0 files FOLDER/data.pkl, where")
    refuse(path, build.write_archive(b"N.", {}, order="middle"), "byte order is b'middle'")


def test_paths_without_a_regular_file_are_refused(tmp_path):
    with pytest.raises(TorchFileError, match="is a directory"):
        read_torch_file(tmp_path)
    with pytest.raises(TorchFileError, match=r"absent\.pth cannot be read: No such file"):
        read_torch_file(tmp_path / "absent.pth")
    with pytest.raises(TorchFileError, match="is damaged"):
        read_torch_file("a\0b")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(TorchFileError, match="not a regular file"):
        read_torch_file(tmp_path / "pipe")


@pytest.mark.parametrize("write", [build.archive_of, build.legacy_of])
def test_every_truncation_is_refused(tmp_path, write):
    path = tmp_path / "file.pth"
    data = write({"a": build.tensor(np.arange(9.0)), "b": ["c", 1]})
    for end in range(len(data)):
        refuse(path, data[:end], "cannot be read")


@pytest.mark.parametrize("write", [build.archive_of, build.legacy_of])
def test_tensors_must_lie_in_their_storage(tmp_path, write):
    path, data = tmp_path / "file.pth", np.arange(6, dtype=np.float32)

    def forged(size=(6,), stride=(1,), offset=0, **storage):
        return write(build.tensor(data, size, stride, offset, build.Storage(data, **storage)))

    for view in [((7,), (1,), 0), ((6,), (1,), 1), ((2, 2), (5, 1), 0), ((), (), 6)]:
        refuse(path, forged(*view), "reaches past the 6 elements")
    refuse(path, forged((2**62, 2**62), (1, 1)), "reaches past")
    refuse(path, forged((2,), (2**70,)), "reaches past")
    for view in [((-1,), (1,), 0), ((6,), (-1,), 5), ((6,), (1,), -1), ((1.5,), (1,), 0)]:
        refuse(path, forged(*view), "are no counts")
    refuse(path, forged((1,), (1, 1)), "are no counts")
    refuse(path, forged((1,) * 99, (1,) * 99), "are no counts")
    refuse(path, forged((0, 2**40), (1, 1)), "absurd shape")
    refuse(path, forged((2**40,), (0,)), "repeats its storage without end")
    refuse(path, forged(numel=2**61), "does not fit in the file")
    refuse(path, forged(numel=-1), "has -1 elements")
    refuse(path, forged((5,), numel=5), "where its tensors say|the length that its tensors")
    refuse(path, forged(kind="Odd"), "unknown type 'torch.OddStorage'")


def test_many_broadcast_tensors_share_one_allowance(tmp_path):
    """Each may be repeated a little; a file full of them must not ask for gigabytes."""
    data = np.zeros(1, np.float64)
    storage = build.Storage(data)
    views = [build.tensor(data, (2**20,), (0,), 0, storage) for _ in range(9)]
    path = tmp_path / "file.pth"
    path.write_bytes(build.archive_of(views[:7]))
    assert all(view.shape == (2**20,) for view in read_torch_file(path))
    refuse(path, build.archive_of(views), "repeats its storage")


def test_a_storage_has_numbers_of_one_width(tmp_path):
    """Else no one could tell which bytes change places on a machine of the other byte order."""
    first, second = build.untyped(np.zeros(4, np.uint16)), build.untyped(np.zeros(2, np.uint32))
    second.args = (first.args[0], *second.args[1:])
    refuse(tmp_path / "file.pth", build.archive_of([first, second]), "different types")


def test_a_tensor_is_no_storage(tmp_path):
    """A broadcast tensor has more numbers than it has memory."""
    outer, inner = build.tensor(np.ones(2)), build.tensor(np.ones(2), (9,), (0,))
    outer.args = (inner, *outer.args[1:])
    refuse(tmp_path / "file.pth", build.archive_of(outer), "without a storage")


def test_lazy_and_unknown_tensors_are_refused(tmp_path):
    path = tmp_path / "file.pth"
    tensor = build.tensor(np.ones(2, np.complex64))
    tensor.args += ({"conj": True},)
    refuse(path, build.archive_of(tensor), "lazily conjugated")
    tensor = build.untyped(np.ones(2, np.uint16))
    tensor.args = (*tensor.args[:-1], build.Name("torch", "float3"))
    refuse(path, build.archive_of(tensor), "unsupported type 'torch.float3'")


@pytest.mark.parametrize("keys", [[], ["0", "0"], ["0", "1"], ["1"], "0", [0]])
def test_legacy_files_must_list_each_storage_once(tmp_path, keys):
    """A storage that is not listed has no numbers: what memory held before must not be returned."""
    obj = {"a": build.tensor(np.arange(6.0))}
    refuse(tmp_path / "file.pth", build.legacy_of(obj, keys=keys), "list of storages")


def _patch(data: bytes, magic: bytes, field: int, value: bytes, index: int = 0) -> bytes:
    """Write a field of the index-th zip structure with that magic."""
    at = -1
    for _ in range(index + 1):
        at = data.index(magic, at + 1)
    return data[: at + field] + value + data[at + field + len(value) :]


def test_zip_archives_must_be_what_torch_writes(tmp_path):
    path = tmp_path / "file.pth"
    obj = {"a": build.tensor(np.zeros(5000, np.float32))}
    sound = build.archive_of(obj)
    names = [info.filename for info in zipfile.ZipFile(_on_disk(path, sound)).infolist()]
    data0 = names.index("archive/data/0")
    entry = b"PK\1\2"
    packed = build.archive_of(obj, compression=zipfile.ZIP_DEFLATED)
    refuse(path, packed, "'byteorder' is compressed")
    refuse(path, _patch(sound, entry, 8, b"\1", data0), "'data/0' is compressed or encrypted")
    refuse(path, _patch(sound, entry, 16, b"\1\2\3\4", data0), "CRC-32 for file 'archive/data/0'")
    refuse(path, _patch(sound, entry, 16, b"\1\2\3\4"), "CRC-32 for file 'archive/data.pkl'")
    for huge in (b"\xff\xff\xff\x7f", b"\0\0\0\0"):
        refuse(path, _patch(sound, entry, 24, huge, data0), "'data/0' has")
        refuse(path, _patch(sound, entry, 24, huge, names.index("archive/data.pkl")), "cannot be")
    both = _patch(sound, entry, 20, b"\xff\xff\xff\x7f" * 2, data0)
    refuse(path, both, "'data/0' has 2147483647 bytes where its tensors say 20000")
    pickled = _patch(sound, entry, 20, b"\xff\xff\xff\x7f" * 2, names.index("archive/data.pkl"))
    refuse(path, pickled, "cannot be read")
    smaller = _patch(sound, entry, 20, struct.pack("<2I", 19996, 19996), data0)
    refuse(path, smaller, "'data/0' has 19996 bytes where its tensors say 20000")
    refuse(path, _patch(sound, entry, 42, b"\7\0\0\0", data0), "its zip archive is damaged")
    refuse(path, _patch(sound, b"PK\5\6", 12, b"\xff\xff\xff\x7f"), "damaged")
    refuse(path, _patch(sound, b"PK\5\6", 16, b"\xff\xff\xff\x7f"), "cannot be read")
    flipped = bytearray(sound)
    flipped[sound.index(bytes(5000))] ^= 1
    refuse(path, bytes(flipped), "CRC-32 for file 'archive/data/0'")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("archive/data.pkl", b"N.")
    refuse(path, path.read_bytes(), "holds a record twice")
    refuse(path, sound.replace(b"archive/data/0", b"archive/data/9"), "lacks the record 'data/0'")


def _on_disk(path: pathlib.Path, data: bytes) -> pathlib.Path:
    path.write_bytes(data)
    return path


def test_overlapping_records_cannot_multiply_the_file(tmp_path):
    """A thousand records over the same bytes: a bomb of which each part looks sound."""
    path = tmp_path / "file.pth"
    data = np.zeros(20_000, np.float64)
    pickled, storages = build.dump([build.tensor(data) for _ in range(50)])
    first = dict(list(storages.items())[:1])
    sound = build.write_archive(pickled, first)
    start = sound.index(b"PK\1\2")
    end = sound.index(b"PK\5\6")
    with zipfile.ZipFile(_on_disk(path, sound)) as archive:
        index = archive.namelist().index("archive/data/0")
    at = start
    for _ in range(index):
        at = sound.index(b"PK\1\2", at + 1)
    entry = sound[at : at + 46 + len("archive/data/0")]
    extra = b"".join(
        entry[:28] + struct.pack("<H", 14 + len(key) - 1) + entry[30:-1] + key.encode()
        for key in list(storages)[1:]
    )
    count = struct.unpack_from("<H", sound, end + 10)[0] + 49
    size = struct.unpack_from("<I", sound, end + 12)[0] + len(extra)
    tail = sound[end : end + 8] + struct.pack("<HHI", count, count, size) + sound[end + 16 :]
    refuse(path, sound[:end] + extra + tail, "does not fit in the file")


PEAK = """
import pathlib, sys
from repopt_jax.torch_files import TorchFileError, read_torch_file

def peak():
    # getrusage would count what the parent had in memory when it started this process.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

start = peak()
for path in sys.argv[1:]:
    try:
        result = read_torch_file(path)
        print(type(result).__name__, len(result))
    except TorchFileError as error:
        assert "out of all proportion" in str(error), error
    result = None
print(start, peak())
"""


def peak_mib(*paths: pathlib.Path) -> tuple[int, int]:
    """Peak memory of a process before and after it reads the files."""
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system lacks")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, paths)],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = (int(value) >> 10 for value in done.stdout.split()[-2:])
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize("write", [build.archive_of, build.legacy_of])
def test_a_file_of_300_mb_is_read_within_700_mb(tmp_path, write):
    path = tmp_path / "large.pth"
    path.write_bytes(write({key: build.tensor(np.zeros(25_000_000, np.float32)) for key in "abc"}))
    assert path.stat().st_size > 300_000_000
    _, after = peak_mib(path)
    path.unlink()
    assert 300 < after < 700


def test_dense_pickles_take_memory_in_proportion_to_the_file(tmp_path):
    """Opcodes of one byte that make objects of hundreds: a long row of each."""
    paths = []
    for index, code in enumerate([b"\x8f", b"}", b"N\x85\x94", b"}K\1Ns"]):
        path = tmp_path / f"{index}.pth"
        path.write_bytes(
            build.write_archive(b"\x80\x04" + code * (400_000 // len(code)) + b".", {})
        )
        paths.append(path)
    before, after = peak_mib(*paths)
    assert after - before < 100
