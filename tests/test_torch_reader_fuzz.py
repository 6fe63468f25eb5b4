"""Whatever bytes it is given, `read_torch_file` returns or raises TorchFileError.

Sound torch files are damaged at random, and every one is read, with the state dicts in it.
"""

import collections
import contextlib
import faulthandler
import functools
import io
import json
import os
import pathlib
import pickle
import random
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch_file_builder as build

from repopt_jax.torch_files import Standin, TorchFileError, read_torch_file, state_dict
from repopt_jax.torch_files.pickles import Budget, unpickle
from repopt_jax.torch_files.tensors import Storages

# Where counts and sizes go wrong: around the powers of two that formats and machines care for.
NUMBERS = [0, 1, 2, 3, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63]
OPCODES = [
    value
    for name, value in vars(pickle).items()
    if name.isupper() and isinstance(value, bytes) and len(value) == 1
]


@functools.cache
def seed_objects() -> list:
    """Objects that use every part of the reader; the files are a few kilobytes each."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3)).astype(np.float32)
    shared = build.Storage(rng.normal(size=24).astype(np.float16))
    state = {
        "conv.weight": build.tensor(weight),
        "bn.count": build.tensor(np.int64(7)),
        "half": build.tensor(weight.astype(ml_dtypes.bfloat16)),
        "view": build.tensor(shared.data, (2, 3), (12, 2), 1, shared),
        "other": build.tensor(shared.data, (24,), (1,), 0, shared),
        "unsigned": build.untyped(np.arange(5, dtype=np.uint16)),
        "parameter": build.parameter(build.tensor(weight * 1j)),
    }
    block = build.module(
        "yolov6.layers.Block",
        {"scale_conv": build.parameter(build.tensor(weight[0])), "bias": None},
        {"mean": build.tensor(weight[1])},
        _non_persistent_buffers_set={"mask"},
    )
    net = build.module("yolov6.Model", modules={"a": block, "b": block}, names=["x", "y"])
    config = build.Call(
        build.Name("yacs.config", "CfgNode"),
        state={"__immutable__": True},
        items={"LR": 0.1, "SIZES": (224, [1, 2**70])},
        opcode=pickle.NEWOBJ,
    )
    return [
        build.Call(build.Name("collections", "OrderedDict"), items=state),
        {"model": state, "epoch": 3, "config": config, "text": "é", "blob": b"\0\xff", "loss": 0.5},
        {"ema": net, "model": None, "best": {1, 2}, "nested": [[(1, (2,))], {"k": {3: None}}]},
    ]


def _flip_bits(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _cut(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def _splice(rng: random.Random, data: bytearray) -> bytearray:
    """Copy a piece of the file over, or between, other bytes of it."""
    at, source = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    piece = data[source : source + rng.choice([1, 4, 30, 200])]
    data[at : at + rng.choice([0, len(piece)])] = piece * rng.choice([1, 1, 1, 50])
    return data


def _write_number(rng: random.Random, data: bytearray) -> bytearray:
    at, size = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8])
    number = rng.choice(NUMBERS) + rng.choice([0, 0, -1, 1])
    data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return data


def _write_opcode(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.choice([1, 1, 3])):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.choice([0, 1])] = rng.choice(OPCODES) * rng.choice([1, 1, 1, 300])
    return data


MUTATORS = [_flip_bits, _cut, _splice, _write_number, _write_opcode]


def _forge_directory(rng: random.Random, data: bytearray) -> bytearray:
    """Falsify a field of one entry of a zip directory, of its end, or of a record's header."""
    magic, fields = rng.choice(
        [
            (b"PK\1\2", [(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)]),
            (b"PK\5\6", [(8, 2), (10, 2), (12, 4), (16, 4), (20, 2)]),
            (b"PK\3\4", [(6, 2), (8, 2), (18, 4), (22, 4), (26, 2), (28, 2)]),
        ]
    )
    places = [found.start() for found in re.finditer(re.escape(magic), data[:-43])]
    if places:
        offset, size = rng.choice(fields)
        at = rng.choice(places) + offset
        old = int.from_bytes(data[at : at + size], "little")
        number = rng.choice([*NUMBERS, old + 1, old - 1, 2 * old, rng.randrange(len(data))])
        data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return data


def _forge_tensor(rng: random.Random) -> dict:
    """A tensor whose sizes, strides, offset or number of elements are absurd."""

    def number() -> int:
        return rng.choice([*range(6), *range(6), *NUMBERS, -1, -(2**63), 2**100])

    data = np.arange(12, dtype=rng.choice(["f4", "i8", "u1", "c8"]))
    kind = rng.choice([None, None, "Untyped", "Double", "Bool", "Odd"])
    numel = rng.choice([None, None, None, number()])
    storage = build.Storage(data, kind, numel)
    rank = rng.choice([0, 1, 2, 2, 3, 40])
    size, stride = (tuple(number() for _ in range(rank)) for _ in range(2))
    return {"a": build.tensor(data, size, stride, number(), storage), "b": [storage]}


@functools.cache
def sound_pickle(index: int, protocol: int, legacy: bool) -> tuple:
    """A seed object as torch pickles it; thousands of damaged files start from the same."""
    return build.dump(seed_objects()[index], protocol, legacy)


def mutate(rng: random.Random) -> bytes:
    """One damaged file.

    Pickles are damaged before they are packed half of the time, as an archive's checksums would
    keep nearly all others from being interpreted.
    """
    legacy = rng.random() < 0.4
    forged = rng.random() < 0.1
    source = _forge_tensor(rng) if forged else rng.randrange(len(seed_objects()))
    protocol = rng.choice([2, 2, 3, 4, 5])
    dump = build.dump if forged else sound_pickle
    pickled, storages = dump(source, protocol, legacy)
    inside = rng.random() < 0.5
    if inside and not forged:
        for _ in range(rng.choice([1, 1, 2, 4])):
            pickled = bytes(rng.choice(MUTATORS)(rng, bytearray(pickled)))
    if legacy:
        data = build.write_legacy(pickled, storages, little_endian=rng.random() < 0.9)
    else:
        data = build.write_archive(pickled, storages, rng.choice(["little", "big", None]))
    if not inside and not forged:
        mutators = MUTATORS if legacy else [*MUTATORS, _forge_directory, _forge_directory]
        data = bytes(rng.choice(mutators)(rng, bytearray(data)))
    return data


def outcome(path: pathlib.Path) -> str:
    """Read a file, with the state dicts of what looks like modules: what came of it."""
    try:
        result = read_torch_file(path)
        for value in result.values() if isinstance(result, dict) else [result]:
            state = value.state if isinstance(value, Standin) else None
            if isinstance(state, dict) and "_modules" in state:
                state_dict(value)
    except TorchFileError:
        return "TorchFileError"
    except Exception as error:
        return type(error).__name__
    return "result"


def replace(file: io.FileIO, data: bytes) -> None:
    """Give an open file other content: to make it anew takes longer than to read it."""
    file.seek(0)
    file.truncate(file.write(data))


def read_mutants(folder: str, mutants: int, seed: int) -> None:
    """Print what came of every file, and the system's facts at the end; what escapes is kept."""
    rng, path = random.Random(seed), pathlib.Path(folder, "mutant.pth")
    counts: collections.Counter = collections.Counter()
    with path.open("wb", buffering=0) as file:
        for index in range(mutants):
            if index % 100 == 0:  # which take a second
                faulthandler.dump_traceback_later(60, exit=True)
            data = mutate(rng)
            replace(file, data)
            name = outcome(path)
            counts[name] += 1
            if name not in ("result", "TorchFileError"):
                pathlib.Path(folder, f"escaped-{index}.pth").write_bytes(data)
    faulthandler.cancel_dump_traceback_later()
    # getrusage would count what the parent had in memory when it started this process.
    status = pathlib.Path("/proc/self/status")
    print(json.dumps([counts, status.read_text() if status.exists() else ""]))


@pytest.mark.parametrize(
    ("mutants", "seed"), [(300, 1), pytest.param(20_000, 0, marks=pytest.mark.slow)]
)
def test_damaged_files_end_in_a_result_or_an_error(tmp_path, mutants, seed):
    """In a process of its own, whose memory nothing else takes; a minute for one file ends it."""
    code = f"import {__name__} as fuzz; fuzz.read_mutants({str(tmp_path)!r}, {mutants}, {seed})"
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    counts, status = json.loads(done.stdout)
    assert counts.keys() == {"result", "TorchFileError"}, f"see {tmp_path}/escaped-*.pth"
    assert counts["result"] > mutants / 15 and counts["TorchFileError"] > mutants / 3
    if peak := re.search(r"VmHWM:\s+(\d+) kB", status):  # on Linux
        assert int(peak[1]) < 1 << 20


# Instructions that together make nearly everything that a pickle can make, often wrongly.
_NAMES = [
    *("a\nb", "builtins\nset", "builtins\ndict", "collections\nOrderedDict", "torch\nSize"),
    *("collections\ndefaultdict", "copyreg\n__newobj__", "copyreg\n_reconstructor"),
    *("torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_tensor_v3"),
    *("torch._utils\n_rebuild_parameter", "torch._tensor\n_rebuild_from_type_v2"),
    *("_codecs\nencode", "torch\nFloatStorage", "torch.storage\nUntypedStorage"),
]
_STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpuK\2tQ"
_PIECES = [
    *(bytes([code]) for code in b"(012N])tlaesubRo}\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94Q"),
    *(
        b"(d",
        b"(ia\nb\n",
        b"U\2\xc3\xa9",
        b"U\1\xff",
        b"X\6\0\0\0latin1",
        b"G" + bytes(8),
        _STORAGE,
    ),
    *(b"\x96" + (2).to_bytes(8, "little") + b"ab", b"X\7\0\0\0storage"),
    *(f"c{name}\n".encode() for name in _NAMES),
    *(code + bytes([n]) for code in (b"K", b"q", b"h") for n in range(6)),
]


class Growing(io.BytesIO):
    """A pickle that gets its next piece once its reader has carried out all that there is.

    Attributes:
      pieces: those that are still to come, the next one last.
      done: the beginning that the reader has carried out.
    """

    def __init__(self, done: bytes, pieces: list[bytes]):
        super().__init__(done)
        self.pieces = pieces

    def read(self, count: int | None = -1) -> bytes:
        at = self.tell()
        if at == self.seek(0, io.SEEK_END):
            self.done = self.getvalue()
            self.write(self.pieces.pop() if self.pieces else b"N.")
        self.seek(at)
        return super().read(count)


def grown_pickle(rng: random.Random) -> bytes:
    """The beginning of a pickle, of instructions that the reader carries out."""
    pieces = [rng.choice(_PIECES) for _ in range(rng.choice([20, 60, 120]))][::-1]
    grown = b"\x80\2"
    while pieces:
        stream, storages = Growing(grown, pieces), Storages(9999)
        with contextlib.suppress(TorchFileError):
            unpickle(stream, 9999, Budget(9999), storages.load, storages.functions)
        grown = stream.done
    return grown


@pytest.mark.parametrize(
    ("pickles", "seed"), [(60, 1), pytest.param(1500, 0, marks=pytest.mark.slow)]
)
def test_pickles_grown_at_random_do_no_harm(tmp_path, pickles, seed):
    """Each instruction that the pickle so far allows is kept: Python's unpickler is led deep."""
    rng, path = random.Random(seed), tmp_path / "grown.pth"
    counts: collections.Counter = collections.Counter()
    storage = build.Storage(np.zeros(2, np.float32))
    with path.open("wb", buffering=0) as file:
        for _ in range(pickles):
            grown = grown_pickle(rng)
            for end in (b".", b"0.", b"(N\x86.", b"1."):
                replace(file, build.write_archive(grown + end, {"0": storage}))
                counts[outcome(path)] += 1
    assert counts.keys() == {"result", "TorchFileError"} and min(counts.values()) > pickles / 2
