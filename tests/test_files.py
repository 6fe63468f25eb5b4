"""Files are opened by what they hold, wherever they lie and whichever version wrote them."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch_file_builder as build
from family_networks import drawn
from flax import nnx

import repopt_jax
from repopt_jax import Scales, load_scales, load_weights, save_scales
from repopt_jax.files import save_arrays, save_weights, variables
from repopt_jax.models.checks import check_numbers
from repopt_jax.torch_files import export_weights, official_names
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.tree_paths import layer_at

SIZE = {"num_blocks": (1, 1, 1, 1), "widths": (2, 2, 4, 4, 4), "num_classes": 3}
GHOST = {"name": "RepOpt-GhostNet", "width": 0.1, "kind": "target", "num_classes": 3}


def network(kind="hs"):
    return drawn(unfilled_model(name="RepOpt-VGG", kind=kind, **SIZE))


def torch_bytes(arrays):
    return build.archive_of({name: build.tensor(value) for name, value in arrays.items()})


@pytest.fixture
def bucket(monkeypatch):
    """A bucket in memory."""
    fsspec = pytest.importorskip("fsspec", reason="buckets need fsspec, which is not installed")
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(
        "etils.epath.backend._FileSystemSpecBackend._get_filesystem",
        lambda backend, name: fsspec.filesystem("memory"),
    )
    yield "gs://bucket"
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pth.tar", ".PTH", ".ckpt", ""])
def test_scales_are_opened_by_their_content(tmp_path, suffix):
    scales = repopt_jax.searched_scales(network())
    path = tmp_path / f"scales{suffix}"
    save_scales(path, scales)
    assert load_scales(path).flat().keys() == scales.flat().keys()
    path.write_bytes(torch_bytes(official_names(scales)))
    assert load_scales(path).metadata["source"] == "converted from torch"
    for key, vector in scales.flat().items():
        np.testing.assert_array_equal(load_scales(path).flat()[key], vector)


def test_weights_are_opened_by_their_content(tmp_path):
    model = network("target")
    arguments = {"name": "RepOpt-VGG", "kind": "target", "se": False, **SIZE}
    save_weights(tmp_path / "a.pth", model, arguments)
    (tmp_path / "b.safetensors").write_bytes(torch_bytes(export_weights(model)))
    for name in ("a.pth", "b.safetensors"):
        found = variables(load_weights(tmp_path / name))
        assert found.keys() == variables(model).keys()
        for path, value in variables(model).items():
            np.testing.assert_array_equal(found[path], value)


@pytest.mark.parametrize(("path", "value"), [("linear/bias", np.nan), ("stage0/bn/var", -1.0)])
def test_weights_that_no_network_has_are_refused_by_path(tmp_path, path, value):
    model = network("target")
    layer, name = path.rsplit("/", 1)
    getattr(layer_at(model, layer), name)[...] = value
    arguments = {"name": "RepOpt-VGG", "kind": "target", "se": False, **SIZE}
    save_weights(tmp_path / "broken", model, arguments)
    with pytest.raises(ValueError, match=f"broken.*{path} must"):
        load_weights(tmp_path / "broken")


def test_weights_of_two_types_keep_their_numbers(tmp_path):
    """Neither of these types holds the numbers of the other."""
    arrays = {k: np.asarray(v, ml_dtypes.bfloat16) for k, v in variables(network("target")).items()}
    arrays |= {"stage0/bn/mean": np.float16([1.001, 1.001])}
    arrays["stage1/0/bn/mean"] = np.array([1e30, 1.0], ml_dtypes.bfloat16)
    facts = {"num_blocks": "[1, 1, 1, 1]", "widths": "[2, 2, 4, 4, 4]", "num_classes": "3"}
    facts |= {"format_version": "1", "name": "RepOpt-VGG", "kind": "target"}
    save_arrays(tmp_path / "a", arrays, facts)
    found = variables(load_weights(tmp_path / "a"))
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value.astype(np.float32))


def test_a_network_of_nan_alone_is_refused_in_a_short_sentence():
    model = network("target")
    nnx.update(model, jax.tree.map(lambda x: x * jnp.nan, nnx.state(model)))
    with pytest.raises(ValueError, match=r"linear/bias must be finite.* and \d+ more") as error:
        check_numbers(model)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("load", [load_scales, load_weights])
@pytest.mark.parametrize("content", [b"", b"epoch 3", b"\x89HDF\r\n\x1a\n" * 9])
def test_other_files_are_refused_by_name(tmp_path, load, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.pth"):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"nope\.pth"):
        load(tmp_path / "nope.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_both_formats_are_read_from_a_bucket(bucket, name):
    from etils import epath

    path = epath.Path(bucket) / name
    scales = repopt_jax.searched_scales(network())
    if name == "a.pth":
        path.write_bytes(torch_bytes(official_names(scales)))
    else:
        save_scales(path, scales)
    assert load_scales(str(path)).flat().keys() == scales.flat().keys()
    if name == "a.pth":
        path.write_bytes(torch_bytes(export_weights(network())))
        assert variables(load_weights(str(path))).keys() == variables(network()).keys()


def test_files_of_earlier_versions_name_the_stages_blocks(tmp_path):
    model = drawn(unfilled_model(**GHOST))
    old = {k.replace("stages/", "blocks/"): v for k, v in variables(model).items()}
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in GHOST.items()}
    save_arrays(tmp_path / "w", old, {"format_version": "1", **metadata})
    assert variables(load_weights(tmp_path / "w")).keys() == variables(model).keys()
    scales = Scales.initial(model)
    old = {k.replace("stages/", "blocks/"): v for k, v in scales.flat().items()}
    save_arrays(tmp_path / "s", old, {"format_version": "1"})
    load_scales(tmp_path / "s").check(model)


def test_scales_of_any_float_become_float32(tmp_path):
    for kind, name in ((ml_dtypes.bfloat16, "BF16"), (np.float16, "F16"), (np.float64, "F64")):
        data = np.array([1.5, -2.0], kind).tobytes()
        entry = {"dtype": name, "shape": [2], "data_offsets": [0, len(data)]}
        header = json.dumps({"__metadata__": {"format_version": "1"}, "conv/full": entry}).encode()
        (tmp_path / "s").write_bytes(len(header).to_bytes(8, "little") + header + data)
        found = load_scales(tmp_path / "s")["conv"]["full"]
        np.testing.assert_array_equal(found, np.array([1.5, -2.0], np.float32), strict=True)


def test_scales_show_themselves_in_one_line():
    scales = Scales({f"stage1/{i}/conv": {"full": np.ones(99)} for i in range(40)}, {"top1": "70"})
    assert repr(scales) == "<Scales of 40 blocks, top1 '70'>"
