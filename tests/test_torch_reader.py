"""What sound torch files hold, `read_torch_file` and `state_dict` return."""

import collections
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch_file_builder as build

from repopt_jax.torch_files import Standin, TorchFileError, read_torch_file, state_dict
from repopt_jax.torch_files.modules import find_weights

FORMATS = {"archive": build.archive_of, "legacy": build.legacy_of}
DTYPES = [*build.STORAGE_KINDS]
NEWER_DTYPES = [
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
]


def numbers(dtype: str, *shape: int) -> np.ndarray:
    """Arbitrary bits, and for bool arbitrary truths, so that each number reveals a lost byte."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.random.default_rng(3).integers(0, 2 if dtype == "bool" else 256, size, np.uint8)
    return raw.view(kind).reshape(shape)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Equality of type, shape and every bit, as arbitrary bits include NaN."""
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


@pytest.fixture(params=FORMATS)
def read(request, tmp_path):
    """Write an object in one of the two formats and read it."""

    def roundtrip(obj, **options):
        path = tmp_path / "file.pth"
        path.write_bytes(FORMATS[request.param](obj, **options))
        return read_torch_file(path)

    return roundtrip


@pytest.mark.parametrize("dtype", [*DTYPES, *NEWER_DTYPES])
def test_every_dtype_keeps_its_bits(read, dtype):
    write = build.tensor if dtype in DTYPES else build.untyped
    arrays = {"matrix": numbers(dtype, 3, 5), "scalar": numbers(dtype), "none": numbers(dtype, 0)}
    result = read({key: write(value) for key, value in arrays.items()})
    assert all(same(result[key], value) for key, value in arrays.items())


@pytest.mark.parametrize("dtype", [*DTYPES, *NEWER_DTYPES])
def test_big_endian_archives_give_the_same_numbers(tmp_path, dtype):
    path, value = tmp_path / "file.pth", numbers(dtype, 3, 5)
    if dtype in DTYPES:
        path.write_bytes(build.archive_of(build.tensor(value), order="big"))
    else:
        swapped = value.view(f"u{value.itemsize}").byteswap().view(value.dtype)
        tensor = build.untyped(swapped)
        data = build.write_archive(*build.dump(tensor), order=None, records={"byteorder": b"big"})
        path.write_bytes(data)
    assert same(read_torch_file(path), value)


def test_archives_without_a_byte_order_are_little_endian(tmp_path):
    path, value = tmp_path / "file.pth", numbers("float32", 7)
    path.write_bytes(build.archive_of(build.tensor(value), order=None))
    assert same(read_torch_file(path), value)


def test_legacy_files_of_big_endian_machines_hold_little_endian_numbers(tmp_path):
    """torch always wrote these numbers little-endian; only the count in front of them varied."""
    path, value = tmp_path / "file.pth", numbers("float32", 7)
    path.write_bytes(build.legacy_of(build.tensor(value), little_endian=False))
    assert same(read_torch_file(path), value)


def test_views_take_offset_and_strides_from_the_file_and_share_memory(read):
    data = np.arange(24, dtype=np.float32)
    storage = build.Storage(data)
    views = {
        "whole": build.tensor(data, (24,), (1,), 0, storage),
        "transposed": build.tensor(data, (4, 6), (1, 4), 0, storage),
        "strided": build.tensor(data, (2, 3), (12, 2), 5, storage),
        "scalar": build.tensor(data, (), (), 7, storage),
        "single": build.tensor(data, (1, 2), (2**62, 1), 22, storage),
        "repeated": build.tensor(data, (3, 2), (0, 1), 4, storage),
    }
    result = read(views)
    expected = {
        "whole": data,
        "transposed": data.reshape(6, 4).T,
        "strided": np.array([[5, 7, 9], [17, 19, 21]], np.float32),
        "scalar": np.float32(7),
        "single": data[None, 22:],
        "repeated": np.array([[4, 5]] * 3, np.float32),
    }
    for key, value in expected.items():
        np.testing.assert_array_equal(result[key], value, strict=key != "scalar")
        assert np.shares_memory(result[key], result["whole"])


def test_legacy_storages_can_be_parts_of_others(tmp_path):
    path, data = tmp_path / "file.pth", np.arange(10, dtype=np.int16)
    part = build.Storage(data, view=("part", 4, 3))
    path.write_bytes(build.legacy_of(build.tensor(data, (3,), (1,), 0, part)))
    np.testing.assert_array_equal(read_torch_file(path), data[4:7])


def test_storages_themselves_become_arrays(read):
    data = np.arange(6, dtype=np.int32)
    result = read([build.Storage(data), build.Storage(data.view(np.uint8), "Untyped")])
    np.testing.assert_array_equal(result[0], data, strict=True)
    np.testing.assert_array_equal(result[1], data.view(np.uint8), strict=True)


@pytest.mark.parametrize(
    "name",
    [
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_parameter_with_state",
        "torch.nn.parameter Parameter",
        "torch.autograd.variable Variable",
    ],
)
def test_parameters_become_their_arrays(read, name):
    value = numbers("float64", 2, 2)
    call = build.Call(build.Name(*name.split()), (build.tensor(value), True, {}, {"note": 1}))
    assert same(read(call), value)


def test_first_version_of_the_tensor_function_and_tensor_subclasses(read):
    value = numbers("float32", 2, 3)
    old = build.tensor(value)
    old.function, old.args = build.Name("torch._utils", "_rebuild_tensor"), old.args[:4]
    new = build.tensor(value)
    kind = build.Name("torch", "Tensor")
    wrap = build.Name("torch._tensor", "_rebuild_from_type_v2")
    subclass = build.Call(wrap, (new.function, kind, new.args, {"_is_buffer": True}))
    result = read([old, subclass])
    assert same(result[0], value) and same(result[1], value)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_plain_values_survive_in_every_protocol(tmp_path, protocol):
    value = {
        "numbers": [0, 255, 65535, -1, 2**31, -(2**31), 2**100, 0.5, float("inf"), True, None],
        "text": ["", "é" * 300, "\N{GRINNING FACE}"],
        1: ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        (3, "pair"): b"\0\xff" * 200 if protocol > 1 else b"",
    }
    if protocol == 1:
        del value[3, "pair"]
    path = tmp_path / "file.pth"
    path.write_bytes(build.write_archive(pickle.dumps(value, protocol), {}))
    assert read_torch_file(path) == value


def test_dicts_of_the_standard_library_become_dicts(tmp_path):
    value = {
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, x=[1]),
    }
    path = tmp_path / "file.pth"
    path.write_bytes(build.write_archive(pickle.dumps(value), {}))
    result = read_torch_file(path)
    assert result == {"ordered": {"b": 1, "a": 2}, "default": {"x": [1]}}
    assert all(type(part) is dict for part in result.values())
    assert list(result["ordered"]) == ["b", "a"]


def test_sets_and_calls_of_newer_protocols_are_recorded(tmp_path):
    """Instructions that Python writes rarely, among them those of its first protocol."""
    path = tmp_path / "file.pth"
    call = b"cmy\nNet\nK\1\x85}X\1\0\0\0nK\2s\x92"
    pickled = b"\x80\x04](" + b"(K\1\x91(K\2lq\0(dq\1X\1\0\0\0kNs" + call + b"h\1e."
    path.write_bytes(build.write_archive(pickled, {}))
    frozen, numbers, items, net, same = read_torch_file(path)
    assert (frozen.name, frozen.sequence, numbers) == ("builtins.frozenset", [1], [2])
    assert items == {"k": None} and same is items
    assert (net.name, net.args, net.kwargs) == ("my.Net", (1,), {"n": 2})


def test_strings_of_python_2_become_text_where_they_are_utf8(tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(build.write_archive(b"\x80\x02]q\0(U\x02\xc3\xa9T\1\0\0\0\xffS'a'\ne.", {}))
    assert read_torch_file(path) == ["é", b"\xff", "a"]


@pytest.mark.parametrize("protocol", [2, 4])
def test_unknown_classes_record_arguments_state_and_items(tmp_path, protocol):
    """As in the checkpoints of the official script, which hold a yacs configuration."""
    config = build.Call(
        build.Name("yacs.config", "CfgNode"),
        state={"__immutable__": True},
        items={"TRAIN": build.Call(build.Name("yacs.config", "CfgNode"), items={"EPOCHS": 240})},
        opcode=pickle.NEWOBJ,
    )
    checkpoint = {"model": {"w": build.tensor(np.ones(2, np.float32))}, "config": config}
    checkpoint["device"] = build.Call(build.Name("torch", "device"), ("cpu",))
    checkpoint["chosen"] = {"a"}
    path = tmp_path / "file.pth"
    path.write_bytes(build.write_archive(*build.dump(checkpoint, protocol)))
    result = read_torch_file(path)
    assert result["model"]["w"].tolist() == [1, 1]
    config = result["config"]
    assert isinstance(config, Standin) and config.name == "yacs.config.CfgNode"
    assert config.state == {"__immutable__": True}
    assert config.mapping["TRAIN"].mapping == {"EPOCHS": 240}
    assert (result["device"].name, result["device"].args) == ("torch.device", ("cpu",))
    assert (result["chosen"].name, result["chosen"].sequence) == ("builtins.set", ["a"])


def test_pickled_modules_yield_the_state_dict_that_torch_would_list(read):
    """Parameters, then persistent buffers, then children, depth first; None left out."""
    weight, mean = numbers("float16", 3), numbers("float16", 2)
    block = build.module(
        "yolov6.layers.LinearAddBlock",
        {"scale_conv": build.parameter(build.tensor(weight)), "bias": None},
        {"mask": build.tensor(mean), "mean": build.tensor(mean)},
        {"act": build.module("torch.nn.modules.activation.ReLU"), "none": None},
        _non_persistent_buffers_set={"mask"},
    )
    net = build.module("yolov6.Model", {"g": build.tensor(mean)}, None, {"b": block, "a": block})
    result = read({"model": net, "ema": None})
    assert result["model"].name == "yolov6.Model" and result["model"].state["training"] is False
    names = state_dict(result["model"])
    assert list(names) == ["g", "b.scale_conv", "b.mean", "a.scale_conv", "a.mean"]
    assert same(names["a.scale_conv"], weight) and same(names["b.mean"], mean)


def test_modules_that_the_old_format_notes_with_their_source_are_read(tmp_path):
    pickled, _ = build.dump(("module", build.Name("my", "Net"), "net.py", "class Net: ..."))
    tables = pickle.dumps({"_parameters": {}, "_buffers": {}, "_modules": {}}, 2)
    pickled = pickled[:-1] + pickle.BINPERSID + b")" + pickle.NEWOBJ + tables[2:-1] + b"b."
    path = tmp_path / "file.pth"
    path.write_bytes(build.write_legacy(pickled, {}))
    result = read_torch_file(path)
    assert result.name == "my.Net" and state_dict(result) == {}


def test_modules_written_with_checksums_switched_off_are_read(tmp_path):
    path, value = tmp_path / "file.pth", numbers("float32", 7)
    data = bytearray(build.archive_of(build.tensor(value)))
    at = data.find(b"PK\1\2")
    while at >= 0:
        data[at + 16 : at + 20] = bytes(4)
        at = data.find(b"PK\1\2", at + 1)
    path.write_bytes(data)
    assert same(read_torch_file(path), value)


def test_released_scales_are_read(official_scales):
    files = sorted(official_scales.glob("*.pth"))
    assert files
    for file in files:
        scales = read_torch_file(file)
        assert len(scales) > 60
        for key, value in scales.items():
            assert key.endswith(".weight") and value.dtype == np.float32 and value.ndim == 1
            assert np.isfinite(value).all()


def test_golden_state_dicts_are_read(golden):
    files = sorted(golden.glob("*.pth"))
    assert files
    for file in files:
        for key, value in read_torch_file(file).items():
            count = key.endswith("num_batches_tracked")
            assert value.dtype == (np.int64 if count else np.float64)
            assert value.ndim == (0 if count else value.ndim) and np.isfinite(value).all()


def test_files_written_by_torch_itself_give_its_numbers(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).half()
    base = torch.randn(6, 4)
    tensors = {"t": base.t(), "part": base[2:, ::2], "bf16": base.bfloat16(), "one": base[1, 1]}
    for zipped in (True, False):
        path = tmp_path / "file.pth"
        torch.save({"net": net, "tensors": tensors}, path, _use_new_zipfile_serialization=zipped)
        result = read_torch_file(path)
        names = state_dict(result["net"])
        assert list(names) == list(net.state_dict())
        for key, value in net.state_dict().items():
            np.testing.assert_array_equal(names[key], value.numpy(), strict=True)
        for key, value in tensors.items():
            array = result["tensors"][key]
            assert array.dtype.name == str(value.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(array.astype(np.float32), value.float().numpy())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_that_numpy_pickles_are_weights(tmp_path, protocol):
    """Of all types of numbers, in both orders of bytes and of axes; other types stay stand-ins."""
    arrays = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in ("?", "u1", "<i2", ">i8")}
    arrays |= {kind: np.linspace(-1, 1, 6).reshape(2, 3).astype(kind) for kind in ("<f4", ">f8")}
    arrays |= {"columns": np.asfortranarray(arrays["<f4"]), "complex": arrays["<f4"] * 1j}
    others = {"text": np.array(["a"]), "objects": np.array([{}]), "accuracy": np.float64(0.5)}
    others["record"] = np.zeros(2, [("a", "f4")])
    path = tmp_path / "file.pth"
    path.write_bytes(build.write_archive(pickle.dumps(arrays | others, protocol), {}))
    found = find_weights(read_torch_file(path))
    assert found.arrays.keys() == arrays.keys() and found.left_out == list(others)
    for name, value in arrays.items():
        native = value.astype(value.dtype.newbyteorder("="))
        np.testing.assert_array_equal(found.arrays[name], native, strict=True)


def test_tensors_without_numbers_that_torch_writes_are_told_by_their_kind(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    path = tmp_path / "file.pth"
    tensors = {"meta": torch.empty(2, device="meta"), "sparse": torch.eye(2).to_sparse()}
    for kind, value in tensors.items():
        torch.save({"weight": value}, path)
        with pytest.raises(TorchFileError, match=f"'weight' is a {kind} tensor"):
            find_weights(read_torch_file(path))


def test_state_dict_refuses_what_is_no_module():
    with pytest.raises(TorchFileError, match="needs a module, got a dict"):
        state_dict({"weight": np.ones(2)})
