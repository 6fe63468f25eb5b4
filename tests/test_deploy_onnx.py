"""ONNX and StableHLO files compute what the network computes, from a clean graph."""

import collections
import datetime
import functools
import json
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_networks import drawn
from flax import nnx

import repopt_jax
from repopt_jax.data import load_dataset
from repopt_jax.deploy import fold
from repopt_jax.deploy.graph import GraphWriter
from repopt_jax.deploy.onnx_export import WRITERS, export_onnx, onnx_model
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.runtime import OnnxNetwork, read_onnx
from repopt_jax.deploy.stablehlo_export import export_stablehlo, load_stablehlo
from repopt_jax.models import repopt_ghost
from repopt_jax.models.layers import BatchNorm
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.tree_paths import layer_at, path_str

pytestmark = pytest.mark.slow

IMAGES = load_dataset("digits").eval.images[:32]
SIZE = {"num_blocks": (1, 1, 1, 1), "widths": (8, 8, 8, 8, 8), "strides": (1, 1, 2, 2, 1)}
DIGITS = {"mean": (0.3, 0.25, 0.2), "std": (0.35, 0.3, 0.4)}
LAYERS = 5


@nnx.jit
def run(model, images):
    return model(images)


@functools.cache
def network(kind="target", *, se=False):
    """Tests share it: none changes it."""
    size = {"name": "RepOpt-VGG", "kind": kind, "num_classes": 10, "se": se, **SIZE}
    return randomized(drawn(unfilled_model(**size)))


def randomized(model):
    """`model` with statistics of the images, and biases and scales that are not initial."""
    rng = np.random.default_rng(2)

    def drawn(path, value):
        if value.ndim != 1:
            return value
        if path_str(path).endswith(("/scale", "/conv3x3", "/conv1x1", "/conv")):
            return jnp.asarray(rng.uniform(0.5, 1.5, value.shape), value.dtype)
        return jnp.asarray(rng.normal(0, 0.2, value.shape), value.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(drawn, nnx.state(model, nnx.Param)))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    run(model, jnp.asarray(Preprocessing(8, 8, **DIGITS)(IMAGES)))
    model.eval()
    return model


def logits(model, preprocessing):
    return np.asarray(run(model, jnp.asarray(preprocessing(IMAGES))))


def assert_agree(found, expected):
    assert np.ptp(expected, axis=0).min() > 0.05 * np.abs(expected).max()  # images differ
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("se", [False, True], ids=["plain", "se"])
@pytest.mark.parametrize("kind", ["target", "hs", "csla", "repvgg"])
def test_onnxruntime_agrees_with_jax_on_images(kind, se):
    """Every kind of network, preprocessing inside the graph or outside, at two batch sizes."""
    model = network(kind, se=se)
    for inside in (True, False):
        preprocessing = Preprocessing(8, 8, inside=inside, **DIGITS)
        run = OnnxNetwork(onnx_model(model, preprocessing, name="tiny"))
        expected = logits(model, preprocessing)
        assert_agree(run(IMAGES), expected)
        np.testing.assert_allclose(run(IMAGES[:1]), expected[:1], atol=1e-4)


@pytest.mark.parametrize("kind", ["target", "hs", "rep"])
def test_ghost_networks_are_exported_too(kind, monkeypatch):
    """Depthwise convolutions, squeeze-excite with a hard sigmoid, shortcuts; two stages."""
    stages = repopt_ghost.STAGES
    monkeypatch.setattr(repopt_ghost, "STAGES", (stages[3], stages[4]))
    size = {"name": "RepOpt-GhostNet", "kind": kind, "width": 0.1, "num_classes": 10}
    model = randomized(drawn(unfilled_model(**size)))
    preprocessing = Preprocessing(8, 8, **DIGITS)
    exported = onnx_model(model, preprocessing, name="ghost")
    assert_agree(OnnxNetwork(exported)(IMAGES), logits(model, preprocessing))
    count = collections.Counter(node.op_type for node in exported.graph.node)
    assert (count["HardSigmoid"], count["Add"], count["Transpose"]) == (2, 2, 1)


def test_the_graph_is_clean():
    """One convolution per block, and one transpose, of the uint8 images."""

    def count(**options):
        graph = onnx_model(network(se=False), Preprocessing(8, 8, **options), name="tiny").graph
        return collections.Counter(node.op_type for node in graph.node)

    clean = {"Conv": LAYERS, "Relu": LAYERS, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert count(inside=False) == clean
    assert count(inside=True) == clean | {"Transpose": 1, "Cast": 1, "Sub": 1, "Mul": 1}


def test_a_folded_network_gives_the_same_graph():
    model, preprocessing = network("repvgg"), Preprocessing(8, 8)
    given = onnx_model(fold(model), preprocessing, name="tiny")
    assert given == onnx_model(model, preprocessing, name="tiny")


def test_the_file_tells_what_it_holds(tmp_path):
    preprocessing = Preprocessing(8, 8, **DIGITS)
    export_onnx(tmp_path / "a.onnx", network(), preprocessing, name="tiny")
    model, metadata = read_onnx(tmp_path / "a.onnx")
    assert model.producer_version == metadata["repopt_jax_version"] == repopt_jax.__version__
    assert (metadata["model"], metadata["num_classes"]) == ("tiny", "10")
    assert Preprocessing.from_metadata(metadata) == preprocessing
    batch, *image = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [d.dim_value for d in image] == [8, 8, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """And no half of the new one."""

    def write_half(model, path):
        path.write_bytes(model.SerializeToString()[:100])
        raise OSError("disk full")

    monkeypatch.setattr("onnx.save", write_half)
    (tmp_path / "a.onnx").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        export_onnx(tmp_path / "a.onnx", network(), Preprocessing(8, 8), name="x")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.onnx", "old")]


def test_a_network_without_a_writer_is_refused():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^model must be one of \['RepOptVGG'.* got a Linear; "):
        onnx_model(model, Preprocessing(8, 8), name="x")


@pytest.mark.parametrize(
    ("path", "value"),
    [("linear/bias", np.nan), ("stage1/0/conv/kernel", np.inf), ("stage0/bn/var", -1.0)],
)
@pytest.mark.parametrize("how", ["fold", "onnx", "stablehlo"])
def test_a_network_with_numbers_that_none_has_is_refused_by_path(tmp_path, how, path, value):
    """Its logits would be NaN, and folding would move a negative variance to another tensor."""
    model = nnx.clone(network())
    if how == "onnx" and "bn" not in path:
        model = fold(model)  # which is then not done again
    layer, name = path.rsplit("/", 1)
    variable = getattr(layer_at(model, layer), name)
    variable[...] = variable[...].at[0].set(value)
    file, preprocessing = tmp_path / "net", Preprocessing(8, 8)
    use = {
        "fold": lambda: fold(model),
        "onnx": lambda: export_onnx(file, model, preprocessing, name="tiny"),
        "stablehlo": lambda: export_stablehlo(file, model, preprocessing, name="tiny"),
    }[how]
    with pytest.raises(ValueError, match=f"{path} must "):
        use()
    assert not file.exists()


def test_the_package_loads_without_onnx():
    """`fold` is for users who deploy otherwise."""
    code = "import sys, repopt_jax.deploy; print([n for n in sys.modules if 'onnx' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_network_of_other_layers_takes_one_function(monkeypatch):
    """Depthwise and strided convolutions, a sum, a concatenation, and uneven padding."""

    class Mine(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(3, 4, (3, 3), 2, padding=((2, 1), (0, 1)), rngs=rngs)
            self.depthwise = nnx.Conv(4, 4, (3, 3), padding=1, feature_group_count=4, rngs=rngs)
            self.linear = nnx.Linear(8, 3, use_bias=False, rngs=rngs)

        def __call__(self, x):
            x = jax.nn.relu(self.first(x))
            x = jnp.concatenate([x, x + self.depthwise(x)], -1)
            return self.linear(x.mean((1, 2)))

    def write(graph, x, model):
        x = graph.relu(graph.conv(x, model.first, "first"), "relu")
        x = graph.concat([x, graph.add(x, graph.conv(x, model.depthwise, "dw"), "sum")], "both")
        return graph.linear(graph.flatten(graph.pool(x, "pool"), "flat"), model.linear, "linear"), 3

    monkeypatch.setitem(WRITERS, Mine, write)
    model, preprocessing = Mine(nnx.Rngs(0)), Preprocessing(8, 8)
    found = OnnxNetwork(onnx_model(model, preprocessing, name="mine"))(IMAGES)
    np.testing.assert_allclose(found, logits(model, preprocessing), rtol=1e-4, atol=1e-5)


def test_padding_without_numbers_is_refused():
    layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="padding of first must be given by numbers, got 'SAME'"):
        GraphWriter().conv("x", layer, "first")


@pytest.mark.parametrize("images", [IMAGES[:, :4], IMAGES[..., :1]], ids=["size", "grey"])
def test_images_of_another_shape_are_refused(images):
    run = OnnxNetwork(onnx_model(network(), Preprocessing(8, 8), name="tiny"))
    with pytest.raises(ValueError, match=r"images must have the shape \(8, 8, 3\) each, got"):
        run(images)


@pytest.mark.parametrize("content", [b"not ONNX at all", b""], ids=["text", "empty"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"^graph .*a\.onnx"):
        read_onnx(tmp_path / "a.onnx")


@pytest.mark.parametrize("inside", [True, False], ids=["uint8", "float"])
def test_stablehlo_agrees_with_the_network_at_any_batch_size(tmp_path, inside):
    """Of a network with branches and BatchNorm, and of the folded one."""
    model, preprocessing = network("repvgg"), Preprocessing(8, 8, inside=inside, **DIGITS)
    exported = model if inside else fold(model)
    export_stablehlo(tmp_path / "a.zip", exported, preprocessing, name="tiny")
    loaded = load_stablehlo(tmp_path / "a.zip")
    images = jnp.asarray(IMAGES if inside else preprocessing(IMAGES))
    assert_agree(loaded.call(images), logits(model, preprocessing))
    assert loaded.call(images[:3]).shape == (3, 10)
    assert loaded.preprocessing == preprocessing
    assert loaded.metadata["num_classes"] == "10"


def test_stablehlo_files_of_another_version_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"format_version": "99"}')
        archive.writestr("network.bin", b"")
    with pytest.raises(ValueError, match=r"path must have the format version 1, .* has 99$"):
        load_stablehlo(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"format_version": "1"}')
        archive.writestr("network.bin", b"cut off")
    with pytest.raises(ValueError, match="path must be an undamaged file"):
        load_stablehlo(path)
    path.write_text("no archive")
    with pytest.raises(ValueError, match="path must be a file written by export_stablehlo"):
        load_stablehlo(path)


@pytest.mark.parametrize("metadata", [[], "text", {"date": "May"}, {"date": 5}])
def test_stablehlo_files_with_other_metadata_are_refused_by_name(tmp_path, metadata):
    path = tmp_path / "a.stablehlo"
    facts = {"format_version": "1", **metadata} if isinstance(metadata, dict) else metadata
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps(facts))
        archive.writestr("network.bin", b"")
    with pytest.raises(ValueError, match=r"path must be a file written .*a\.stablehlo' is not"):
        load_stablehlo(path)


def test_a_stablehlo_file_of_no_known_version_of_jax_is_refused_when_old(tmp_path):
    path = tmp_path / "a.stablehlo"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"format_version": "1", "date": "2020-02-03"}')
        archive.writestr("network.bin", b"")
    with pytest.raises(ValueError, match="of 2020-02-03 and JAX unknown"):
        load_stablehlo(path)


def dated(path, *, days, jax_version, weights=None):
    """A file that says that another version of JAX wrote it some days ago."""
    export_stablehlo(path, fold(network()), Preprocessing(8, 8), name="tiny", weights=weights)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(entries["metadata.json"])
    today = datetime.datetime.now(datetime.UTC).date()
    assert metadata["date"] == today.isoformat() and metadata["jax_version"] == jax.__version__
    metadata |= {"date": (today - datetime.timedelta(days)).isoformat()}
    metadata["jax_version"] = jax_version
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (entries | {"metadata.json": json.dumps(metadata)}).items():
            archive.writestr(name, content)


def test_old_stablehlo_files_of_another_jax_are_refused_with_the_command(tmp_path):
    """Six months are promised; the version that wrote a file reads it whenever."""
    path = tmp_path / "a.stablehlo"
    for days, version in ((179, "0.1"), (999, jax.__version__)):
        dated(path, days=days, jax_version=version)
        assert load_stablehlo(path).call(jnp.asarray(IMAGES[:2])).shape == (2, 10)
    dated(path, days=181, jax_version="0.1")
    with pytest.raises(ValueError, match=r"JAX 0\.1; make .* NEW\.stablehlo --workdir=RUN"):
        load_stablehlo(path)
    dated(path, days=181, jax_version="0.1", weights=b"kept")
    with pytest.raises(ValueError, match=f"export NEW.stablehlo --weights={path}"):
        load_stablehlo(path)


def test_a_stablehlo_file_without_a_date_has_that_of_its_archive(tmp_path):
    """Versions before this one wrote none."""
    path = tmp_path / "a.stablehlo"
    metadata = {"format_version": "1", "jax_version": "0.1", **Preprocessing(8, 8).metadata()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps(metadata))
        archive.writestr(zipfile.ZipInfo("network.bin", (2020, 2, 3, 0, 0, 0)), b"")
    with pytest.raises(ValueError, match="of 2020-02-03 and JAX"):
        load_stablehlo(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "height and width must be at least 1, got 0 and 8"),
        ({"std": (1.0, 0.0, 1.0)}, "mean and std must be 3 numbers each, those of std above 0"),
        ({"mean": (0.5,)}, "mean and std must be 3 numbers each"),
    ],
)
def test_wrong_preprocessing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"height": 8, "width": 8} | change)
