"""Hostile pickles: they run no code, expand nothing, and end in TorchFileError at worst."""

import copyreg
import os
import pickle
import struct
import sys

import pytest
import torch_file_builder as build
from test_torch_reader_bad_files import refuse

from repopt_jax.torch_files import Standin, TorchFileError, read_torch_file, state_dict


@pytest.fixture(params=["archive", "legacy"])
def packed(request):
    """Put a pickle without tensors into a file of either format."""
    write = {"archive": build.write_archive, "legacy": build.write_legacy}[request.param]
    return lambda pickled: write(pickled, {})


EXTENSION = 0xF1  # a code of pickle's extension registry that is free for private use


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def payloads(mark: str) -> dict[str, tuple[bytes, bool]]:
    """Pickles by opcode, each with whether Python's own unpickler falls for it."""
    touch = _text(f"touch {mark}")
    write = _text(f"open({mark!r}, 'w').close()")
    importing = b"cbuiltins\n__import__\n" + _text("os") + b"\x85R"
    chain = b"cbuiltins\ngetattr\n" + importing + _text("system") + b"\x86R" + touch + b"\x85R"
    lazy = b"cbuiltins\nmap\ncos\nsystem\n]" + touch + b"a\x86\x81"
    settable = b"cargparse\nNamespace\n)\x81}" + _text("__setstate__") + b"cos\nsystem\nsb"
    extension = bytes([EXTENSION])
    return {
        "REDUCE system": (b"cos\nsystem\n" + touch + b"\x85R.", True),
        "REDUCE eval": (b"cbuiltins\neval\n" + write + b"\x85R.", True),
        "REDUCE exec": (b"cbuiltins\nexec\n" + write + b"\x85R.", True),
        "REDUCE getattr": (chain + b".", True),
        "REDUCE torch": (b"ctorch.hub\nload\n" + touch + b"\x85R.", False),
        "STACK_GLOBAL": (_text("os") + _text("system") + b"\x93" + touch + b"\x85R.", True),
        "INST": (b"(" + touch + b"ios\nsystem\n.", True),
        "OBJ": (b"(cos\nsystem\n" + touch + b"o.", True),
        "NEWOBJ": (b"cbuiltins\nlist\n)R0cbuiltins\ntuple\n" + lazy + b"\x85\x81.", True),
        "NEWOBJ_EX": (b"cbuiltins\ntuple\n" + lazy + b"\x85}\x92.", True),
        "BUILD": (settable + touch + b"b.", True),
        "EXT1": (b"\x82" + extension + touch + b"\x85R.", True),
        "EXT2": (b"\x83" + extension + b"\0" + touch + b"\x85R.", True),
        "EXT4": (b"\x84" + extension + b"\0\0\0" + touch + b"\x85R.", True),
        "PERSID": (b"P" + f"touch {mark}".encode() + b"\n.", False),
        "BINPERSID": (b"cos\nsystem\n" + touch + b"\x86Q.", False),
        "helpers": (b"ccopyreg\n__newobj__\ncos\nsystem\n" + touch + b"\x86R.", False),
    }


@pytest.fixture
def extension():
    copyreg.add_extension("os", "system", EXTENSION)
    yield
    copyreg.remove_extension("os", "system", EXTENSION)


@pytest.mark.parametrize("name", payloads("x"))
def test_no_opcode_runs_code(tmp_path, packed, extension, name):
    """Python's unpickler leaves the mark (the payloads are live); the reader never does."""
    mark = tmp_path / "mark"
    pickled, live = payloads(str(mark))[name]
    if live:
        try:
            pickle.loads(b"\x80\x04" + pickled)
        except Exception as error:
            assert "persistent" not in str(error)
        assert mark.exists(), "the payload is harmless, so the test would show nothing"
        mark.unlink()
    path = tmp_path / "file.pth"
    path.write_bytes(packed(b"\x80\x04" + pickled))
    try:
        read_torch_file(path)
    except TorchFileError:
        assert "PERSID" in name or "EXT" in name
    assert os.listdir(tmp_path) == ["file.pth"]


def test_names_are_not_imported(tmp_path, packed):
    path = tmp_path / "file.pth"
    path.write_bytes(packed(b"\x80\x02cthis\ns\n."))
    assert repr(read_torch_file(path)) == "<stand-in for this.s>"
    assert "this" not in sys.modules


def test_containers_must_not_hold_themselves(tmp_path, packed):
    path = tmp_path / "file.pth"
    for pickled in (b"]q\0h\0a.", b"}q\0K\1h\0s.", b"]q\0h\0\x85a.", b"]q\0}K\1h\0sa."):
        refuse(path, packed(b"\x80\x02" + pickled), "contains itself")
    # What an object holds is looked at, too: its arguments, state, elements and items.
    for end in (b"]q\0h\0a\x85\x81.", b")\x81]q\0h\0ab.", b")\x81]q\0h\0aa.", b")\x81N]q\0h\0as."):
        refuse(path, packed(b"\x80\x02cmy\nNet\n" + end), "contains itself")


def test_cycles_through_objects_are_kept(tmp_path, packed):
    """Real modules refer to their parents; only `state_dict` objects to parents as children."""
    tables = b"}(X\x0b\0\0\0_parameters}X\x08\0\0\0_buffers}X\x08\0\0\0_modules}X\1\0\0\0ah\0sub."
    path = tmp_path / "file.pth"
    path.write_bytes(packed(b"\x80\x02cmy\nNet\n)\x81q\0" + tables))
    module = read_torch_file(path)
    assert module.state["_modules"]["a"] is module
    with pytest.raises(TorchFileError, match=r"module 'a\.a\..*without end"):
        state_dict(module)


@pytest.mark.parametrize(
    "pickled",
    [
        b"]" * 50_000 + b"a" * 49_999,
        b"N" + b"\x85" * 50_000,
        b"(" * 50_000 + b"t" * 50_000,
        b"}K\1" * 50_000 + b"}" + b"s" * 50_000,
    ],
)
def test_deep_nesting_is_refused(tmp_path, pickled):
    data = build.write_archive(b"\x80\x02" + pickled + b".", {})
    refuse(tmp_path / "file.pth", data, "nested more than 100 deep")


def test_deep_nesting_that_a_shared_part_hides_is_refused(tmp_path, packed):
    """Eighty lists in each other, found once alone and once within eighty more."""
    pickled = b"(" + b"]" * 80 + b"a" * 79 + b"q\0" + b"]" * 80 + b"h\0" + b"a" * 80 + b"t."
    refuse(tmp_path / "file.pth", packed(b"\x80\x02" + pickled), "nested more than 100 deep")


def test_items_of_many_dicts_are_not_multiplied(tmp_path, packed):
    """Thirty dicts, each made of the same 60,000 pairs, in 0.4 MB."""
    pairs = b"".join(b"M" + struct.pack("<H", n) + b"N\x86" for n in range(60_000))
    dicts = b"ccollections\nOrderedDict\nq\1(" + b"h\1h\0\x85R" * 30 + b"l."
    data = packed(b"\x80\x02](" + pairs + b"eq\0" + dicts)
    refuse(tmp_path / "file.pth", data, "out of all proportion")


def test_arguments_of_many_calls_are_not_multiplied(tmp_path, packed):
    """Three hundred calls, each with the same 60,000 arguments, in 0.2 MB."""
    arguments = b"(ca\nb\n" + b"N" * 60_000 + b"tq\x01"
    calls = b"(" + b"ccopyreg\n__newobj__\nh\x01R" * 300 + b"l"
    data = packed(b"\x80\x02" + arguments + calls + b".")
    refuse(tmp_path / "file.pth", data, "out of all proportion")


def test_instructions_are_counted(tmp_path, packed, monkeypatch):
    """Else those that need no memory would keep the reader busy for as long as a file has any."""
    path = tmp_path / "file.pth"
    monkeypatch.setattr("repopt_jax.torch_files.pickles.MAX_STEPS", 1000)
    path.write_bytes(packed(b"\x80\x02" + b"N0" * 400 + b"N."))
    assert read_torch_file(path) is None
    refuse(path, packed(b"\x80\x02" + b"N0" * 600 + b"N."), "out of all proportion")


@pytest.mark.parametrize("what", ["bytes", "names"])
def test_text_is_not_multiplied(tmp_path, packed, what):
    """Two hundred megabytes of bytes, or thirty of names, made of text that the file has once."""
    if what == "bytes":
        start = b"c_codecs\nencode\nq\0" + _text("a" * 1_000_000) + _text("latin1") + b"\x86q\1"
        each, count = b"h\0h\1R", 200
    else:
        start = _text("a" * 500) + b"q\0" + _text("b" * 500) + b"q\1"
        each, count = b"h\0h\1\x93", 30_000
    data = packed(b"\x80\x02" + start + b"(" + each * count + b"l.")
    refuse(tmp_path / "file.pth", data, "out of all proportion")


@pytest.mark.parametrize("part", [b"\x85R", b"\x85\x81", b"b"])
def test_deeply_nested_objects_do_no_harm(tmp_path, part):
    """Objects inside objects end the reader's checks of depth, and must be freed safely."""
    path, count = tmp_path / "file.pth", 50_000
    start = (b"ca\nb\n)R" if part == b"b" else b"ca\nb\n") * count
    pickled = b"\x80\x02" + start + b"N" + part * count + b"."
    path.write_bytes(build.write_archive(pickled, {}))
    result = read_torch_file(path)
    assert isinstance(result, Standin) and len(repr(result)) < 50


def test_shared_references_are_not_expanded(tmp_path, packed):
    """Ninety lists, each holding the one before ten times: 10^90 elements if written out."""
    laughs = b"]q\0" + b"".join(
        b"]q" + bytes([index + 1]) + b"(" + (b"h" + bytes([index])) * 10 + b"e"
        for index in range(90)
    )
    path = tmp_path / "file.pth"
    path.write_bytes(packed(b"\x80\x02" + laughs + b"."))
    result = read_torch_file(path)
    assert len(result) == 10 and all(part is result[0] for part in result)


@pytest.mark.parametrize(("depth", "width"), [(60, 0), (16, 10_000)])
def test_modules_that_share_submodules_without_end_are_refused(depth, width):
    """Each module holds the next twice: 2^60 modules, or 2^16 with many absent parameters."""
    module = Standin("Net", ())
    module.state = {"_modules": {}, "_parameters": dict.fromkeys(map(str, range(width)))}
    for _ in range(depth):
        outer = Standin("Net", ())
        outer.state = {"_modules": {"a": module, "b": module}}
        module = outer
    with pytest.raises(TorchFileError, match="without end"):
        state_dict(module)


def test_dict_keys_are_short_flat_and_hashable(tmp_path, packed):
    path = tmp_path / "file.pth"
    for key in (b"]", b"}", b"]\x85", b"N\x85\x85"):
        for new in (b"}", b"(d"):
            refuse(path, packed(b"\x80\x02" + new + key + b"Ns."), "as a key")
    refuse(path, packed(b"\x80\x02}" + _text("k" * 5000) + b"Ns."), "key of absurd length")
    # Keys whose hashes a file can choose: 20,000 pairs of numbers, which may all collide.
    pairs = b"".join(b"M" + struct.pack("<H", n) + b"K\1\x86N" for n in range(20_000))
    refuse(path, packed(b"\x80\x02}(" + pairs + b"u."), "too many dict keys")


def test_absurd_declared_sizes_are_refused(tmp_path, packed):
    path = tmp_path / "file.pth"
    huge = struct.pack("<Q", 2**62)
    for code in (b"\x8d", b"\x8e", b"\x96"):
        refuse(path, packed(b"\x80\x04" + code + huge + b"abc."), "4611686018427387904 bytes")
    refuse(path, packed(b"\x80\x02X\xff\xff\xff\xff."), "cut off")
    refuse(path, packed(b"\x80\x02\x8b\xff\xff\xff\x7f."), "instruction 0x8b")
    digits = struct.pack("<i", 5000) + b"\x7f" * 5000
    refuse(path, packed(b"\x80\x02\x8b" + digits + b"."), "instruction 0x8b")
    refuse(path, packed(b"\x80\x02L" + b"9" * 5000 + b"L\n."), "its pickle")
    refuse(path, packed(b"\x80\x02c" + b"m" * 1000 + b"\n" + b"n" * 1000 + b"\n."), "absurd length")
    refuse(path, packed(b"\x80\x09N."), "its pickle is damaged")
    # Python's unpickler in C reserves memory for all objects up to the highest number.
    path.write_bytes(packed(b"\x80\x02]r\xff\xff\xff\xff0j\xff\xff\xff\xff."))
    assert read_torch_file(path) == []


@pytest.mark.parametrize(
    "bad", [b"0.", b"R.", b"K\1R.", b"h\1.", b"t.", b"ca\nb\nK\1R.", b"\xff.", b"]NaK\0Ns."]
)
def test_malformed_pickles_are_refused(tmp_path, packed, bad):
    refuse(tmp_path / "file.pth", packed(b"\x80\x02" + bad), "its pickle")
