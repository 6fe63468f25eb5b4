"""RepLKNet, RepMLPNet and YOLOv6's backbone and necks: the numbers of the authors' own code."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_file_builder as build
from flax import nnx

from repopt_jax import Scales, create_model, load_scales, searched_scales
from repopt_jax.check_equivalence.layers import METHODS
from repopt_jax.check_equivalence.training import differences, start
from repopt_jax.deploy import fold
from repopt_jax.deploy.onnx_export import onnx_model
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.stablehlo_export import export_stablehlo, load_stablehlo
from repopt_jax.files import load_weights, save_weights, variables
from repopt_jax.models.create import FAMILIES
from repopt_jax.models.replknet import REPLKNET_SIZES
from repopt_jax.models.repmlpnet import REPMLPNET_SIZES
from repopt_jax.models.yolov6 import YOLOV6_SIZES
from repopt_jax.torch_files import TorchFileError, export_weights, import_weights, recognize
from repopt_jax.torch_files.names import DIALECTS, to_torch, torch_name
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.training.config import PARTS, default_config
from repopt_jax.training.networks import draw_network

WIDTHS = (4, 6, 8, 10, 12, 6, 4, 4, 6, 6, 8)
REPEATS = (1, 2, 2, 3, 1, 2, 1, 2, 1)
TINY = {
    "replknet_tiny": {
        "name": "RepLKNet",
        "num_blocks": (1, 1, 2, 1),
        "widths": (8, 12, 16, 20),
        "kernel_sizes": (11, 9, 7, 5),
        "ratio": 1.0,
        "num_classes": 5,
    },
    "repmlpnet_tiny": {
        "name": "RepMLPNet",
        "num_blocks": (1, 2),
        "widths": (8, 16),
        "patches": (4, 2),
        "sets": (2, 4),
        "num_classes": 5,
    },
    "efficientrep_reppan_tiny": {
        "name": "YOLOv6",
        "num_blocks": REPEATS,
        "widths": WIDTHS,
        "bifpan": False,
    },
    "efficientrep_bifpan_tiny": {
        "name": "YOLOv6",
        "num_blocks": REPEATS,
        "widths": WIDTHS,
        "bifpan": True,
    },
}


def baseline(name):
    return FAMILIES[TINY[name]["name"]].baseline


def maps(outputs):
    """What a network gives, in torch's layout."""
    several = isinstance(outputs, (list, tuple))
    return [np.asarray(y).transpose(0, 3, 1, 2) for y in outputs] if several else [outputs]


def assert_outputs(model, golden):
    outputs = maps(model(golden["input"].transpose(0, 2, 3, 1)))
    names = ["output"] if "output" in golden else ["output0", "output1", "output2"]
    for found, name in zip(outputs, names, strict=True):
        wanted = golden[name]
        assert np.abs(found - wanted).max() <= 1e-10 * np.abs(wanted).max()


@pytest.fixture
def golden(request, golden_family):
    return np.load(golden_family / f"{request.param}.npz")


def state_dict(golden, part):
    return {k.removeprefix(f"{part}/"): golden[k] for k in golden if k.startswith(f"{part}/")}


def deploy(golden):
    """The state dict of the deploy form; RepLKNet's file has its merged kernels alone."""
    if found := state_dict(golden, "deploy"):
        return found
    train = state_dict(golden, "train")
    rest = {k: v for k, v in train.items() if not re.search(r"lkb_origin|small_conv", k)}
    return rest | state_dict(golden, "merged")


def read(weights):
    model = import_weights(unfilled_model(**recognize(weights), param_dtype=jnp.float64), weights)
    model.eval()
    return model


cases = pytest.mark.parametrize(("golden", "name"), [(n, n) for n in TINY], indirect=["golden"])


@cases
def test_training_form_gives_the_authors_outputs_unfolded_and_folded(golden, name, x64, strict):
    weights = state_dict(golden, "train")
    found = recognize(weights)
    assert found.pop("small", 5) == 5
    assert found == {**TINY[name], "kind": baseline(name)}
    model = read(weights)
    assert_outputs(model, golden)
    assert_outputs(fold(model), golden)


@cases
def test_folded_kernels_are_the_authors(golden, name, x64):
    folded = fold(read(state_dict(golden, "train")))
    plain = read(deploy(golden))
    layers = {p: layer for p, layer in nnx.iter_modules(folded) if isinstance(layer, nnx.Conv)}
    compared = 0
    for path, layer in nnx.iter_modules(fold(plain)):
        if isinstance(layer, nnx.Conv):
            compared += 1
            np.testing.assert_allclose(layers[path].kernel, layer.kernel, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(layers[path].bias, layer.bias, rtol=1e-10, atol=1e-12)
    assert compared == len(layers)


@cases
def test_deploy_form_is_read_as_the_plain_network(golden, name, x64, strict):
    found = recognize(deploy(golden))
    assert found == {**TINY[name], "kind": "target"}
    assert_outputs(read(deploy(golden)), golden)


@cases
def test_as_many_layers_have_branches_as_the_authors_have(golden, name):
    layer = r"train/.*\.(rbr_dense\.conv|lkb_origin\.conv|fc3)\.weight"
    wanted = [k for k in golden if re.fullmatch(layer, k)]
    blocks = unfilled_model(**TINY[name]).blocks()
    assert len(blocks) == len(wanted)
    identities = sum("identity" in block for block in blocks.values())
    assert identities == sum(k.endswith("rbr_identity.weight") for k in golden)


@cases
def test_training_form_is_exported_under_its_authors_names(golden, name, x64):
    weights = state_dict(golden, "train")
    exported = export_weights(read(weights))
    exported = {k: v for k, v in exported.items() if not k.endswith("num_batches_tracked")}
    assert exported.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(exported[key], value)


# Millions of parameters as published: of RepMLPNet in training form, of RepLKNet and YOLOv6 in
# deploy form, of YOLOv6 with its head.
MILLIONS = {
    **{"RepLKNet-31B": 79, "RepLKNet-31L": 172, "RepLKNet-XL": 335},
    **{"RepMLPNet-T224": 38.3, "RepMLPNet-T256": 58.7, "RepMLPNet-B224": 68.2},
    **{"RepMLPNet-B256": 96.5, "RepMLPNet-D256": 86.9, "RepMLPNet-L256": 117.7},
    **{"YOLOv6-N": 4.3, "YOLOv6-S": 17.2, "YOLOv6-v3-N": 4.7, "YOLOv6-v3-S": 18.5},
}
NAMES = [*REPLKNET_SIZES, *REPMLPNET_SIZES, *YOLOV6_SIZES]


@functools.cache
def published(name):
    """The training form of a published size, or the plain network where they are the same."""
    kind = next(f.baseline for f in FAMILIES.values() if name in f.sizes)
    return unfilled_model(name=name, kind="target" if name == "RepLKNet-XL" else kind)


def count(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def yolov6_head(widths):
    """Parameters of a detector's head for 80 classes, its BatchNorms folded: per map a 1x1 and two
    3x3 convolutions, then 1x1 ones to classes and boxes."""
    return sum(19 * c * c + 3 * c + 84 * c + 84 for c in (widths[6], widths[8], widths[10]))


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_the_published_ones(name):
    family = next(f for f in FAMILIES.values() if name in f.sizes)
    if name.startswith("RepMLPNet"):
        found, bound = count(published(name)), 0.06
    else:
        found = count(nnx.eval_shape(lambda: fold_shapes(published(name))))
        found += yolov6_head(family.sizes[name]["widths"]) if family.baseline == "repvgg" else 0
        bound = 0.06 if name.startswith("YOLOv6") else 0.5
    assert abs(found / 1e6 - MILLIONS[name]) <= bound


def fold_shapes(model):
    graphdef, state = nnx.split(model)
    return fold(nnx.merge(graphdef, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)))


@pytest.mark.parametrize("name", ["RepLKNet-31B", "RepMLPNet-L256", "YOLOv6-N", "YOLOv6-v3-N"])
def test_published_sizes_are_recognized(name):
    model = published(name)
    official = {
        torch_name(p): to_torch(np.broadcast_to(np.float32(1), v.shape))
        for p, v in variables(model).items()
    }
    dialect = next(d for d in DIALECTS if d.family == type(model).__name__)
    facts = recognize({dialect.own(n): value for n, value in official.items()})
    family = next(f for f in FAMILIES.values() if name in f.sizes)
    assert facts["name"] == name
    assert facts["kind"] == ("target" if name == "RepLKNet-XL" else family.baseline)


def tiny(name, kind="target", **options):
    return create_model(**{"kind": kind, **TINY[name], **options}, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY if "bifpan" not in name])
def test_gr_follows_the_branches(name, x64):
    """The plain network under its RepOptimizer, against the network of branches."""
    plain = tiny(name, param_dtype=jnp.float64)
    assert all(len(block) > 1 for block in plain.blocks().values())
    started = start(plain, plain.blocks(), mixed=True, rngs=nnx.Rngs(1))
    images = jnp.asarray(np.random.default_rng(2).normal(size=(2, 2, 32, 32, 3)))

    def loss(network, batch):
        return sum(jnp.square(y - 1).mean() for y in jax.tree.leaves(network(batch)))

    found = differences(*started, METHODS["multiplier: SGD"], loss, images)
    assert len(found) == len(plain.blocks())
    assert max(found.values()) < 1e-10


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["hs", "baseline"])
def test_weights_files_give_the_same_network(name, kind, tmp_path):
    kind = baseline(name) if kind == "baseline" else kind
    model = tiny(name, kind)
    save_weights(tmp_path / "a.safetensors", model, {**TINY[name], "kind": kind})
    found = variables(load_weights(tmp_path / "a.safetensors"))
    for path, value in variables(model).items():
        np.testing.assert_array_equal(found[path], value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("replknet_tiny", {"kernel_sizes": (11, 9, 8, 5)}, r"kernel_sizes.*odd.*\[8\]"),
        ("replknet_tiny", {"ratio": 0.5}, r"ratio.*got 0\.5"),
        ("replknet_tiny", {"small": 0, "kind": "hs"}, "kind 'hs' needs branches"),
        ("repmlpnet_tiny", {"sets": (2, 3)}, r"sets.*\(8, 16\).*got \(2, 3\)"),
        ("repmlpnet_tiny", {"patches": (4,)}, r"patches.*2 whole numbers.*got \(4\)"),
        ("efficientrep_reppan_tiny", {"bifpan": "BiFPAN"}, r"bifpan.*got 'BiFPAN'"),
        ("efficientrep_reppan_tiny", {"kind": "replknet"}, "kind 'replknet' must be 'repvgg'"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_deployed_as_stablehlo_and_refused_as_onnx(name, tmp_path):
    model = tiny(name)
    model.eval()
    size = (32, 32) if "repmlp" in name else (64, 64)
    options = {"preprocessing": Preprocessing(*size, inside=False), "name": name}
    with pytest.raises(ValueError, match=r"ONNX.*StableHLO"):
        onnx_model(model, **options)
    path = tmp_path / "net.stablehlo"
    export_stablehlo(path, fold(model), **options, platforms=["cpu"])
    loaded = load_stablehlo(path)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype("float32")
    for found, wanted in zip(maps(loaded.call(images)), maps(model(images)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    classes = TINY[name].get("num_classes")
    assert loaded.metadata.get("num_classes") == (classes and str(classes))


def test_maps_that_patches_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"patches of 4 by 4 divide, got one of 7 by 7"):
        tiny("repmlpnet_tiny")(jnp.ones((1, 28, 28, 3)))


def test_biases_that_differ_within_a_set_are_refused(golden_family):
    weights = dict(state_dict(np.load(golden_family / "repmlpnet_tiny.npz"), "deploy"))
    name = "stages.0.0.repmlp_block.fc3.bias"
    weights[name] = weights[name] + np.arange(32)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*16 pixels"):
        recognize(weights)


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("replknet_tiny", r"stages\.2\.", r"like RepLKNet, but stages\.2\.blocks\.0\.pw1\.conv"),
        ("repmlpnet_tiny", r"head\.", r"like RepMLPNet, but head\.weight is missing"),
        (
            "efficientrep_reppan_tiny",
            r"neck\.Rep_n3",
            r"YOLOv6, but neck\.Rep_n3\.conv1\.rbr_dense",
        ),
    ],
)
def test_refusals_name_the_family_and_what_is_missing(name, missing, message, golden_family):
    weights = state_dict(np.load(golden_family / f"{name}.npz"), "train")
    with pytest.raises(TorchFileError, match=message):
        recognize({k: v for k, v in weights.items() if not re.match(missing, k)})


def pickled(weights, kinds=("yolov6.models.yolo.Model", "yolov6.layers.common.LinearAddBlock")):
    """A whole module of YOLOv6 in half precision that has these weights."""
    own, parts = {}, {}
    for name, value in weights.items():
        first, _, rest = name.partition(".")
        (parts.setdefault(first, {}) if rest else own)[rest or first] = value
    tensors = {k: build.tensor(np.asarray(v, np.float16)) for k, v in own.items()}
    buffers = {k: v for k, v in tensors.items() if k.startswith("running_")}
    parameters = {k: build.parameter(v) for k, v in tensors.items() if k not in buffers}
    modules = {k: pickled(v, kinds[1:] or kinds) for k, v in parts.items()}
    return build.module(kinds[0], parameters, buffers, modules)


def yolov6_file(path, weights):
    """A checkpoint as YOLOv6 writes it, with a detection head and averages."""
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    model = pickled({**weights, "detect.stems.0.conv.weight": np.ones((4, 4, 1, 1))})
    path.write_bytes(build.archive_of({"model": model, "ema": None, "epoch": 299}))
    return path


def drawn(name, kind):
    """A tiny network, every number of which is another one that float16 has."""
    model = unfilled_model(**TINY[name], kind=kind)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.integers(256, 1024, x.shape) / 512, x.dtype), nnx.state(model)
    )
    nnx.update(model, state)
    return model


@pytest.mark.parametrize(("kind", "old"), [("hs", True), ("target", False), ("repvgg", True)])
def test_yolov6s_checkpoints_are_read_by_name(kind, old, tmp_path):
    """Under the names of today's code and of the releases before version 0.3."""
    model = drawn("efficientrep_reppan_tiny", kind)
    weights = export_weights(model)
    if old:
        layers = r"(neck\.(?:reduce_layer|downsample)\d|ERBlock_5\.2)\.(?:sppf\.(cv\d)\.)?block\."
        weights = {re.sub(layers, r"\1.\2.", k).replace("..", "."): v for k, v in weights.items()}
        assert "neck.reduce_layer1.bn.bias" in weights
        assert "backbone.ERBlock_5.2.cv2.conv.weight" in weights
    file = yolov6_file(tmp_path / "yolov6s_opt.pt", weights)
    found = load_weights(file)
    assert bool(found.blocks()) == (kind != "repvgg")
    for path, value in variables(model).items():
        np.testing.assert_array_equal(variables(found)[path], value)


def test_yolov6s_scales_go_into_backbone_and_neck_by_name(tmp_path):
    search = drawn("efficientrep_reppan_tiny", "hs")
    scales = load_scales(yolov6_file(tmp_path / "yolov6s_scale.pt", export_weights(search)))
    plain = unfilled_model(**TINY["efficientrep_reppan_tiny"])
    scales.check(plain)
    assert scales == Scales(searched_scales(search).vectors, scales.metadata)
    names = scales["backbone/ERBlock_4/1/block/1/conv"], scales["neck/Rep_n3/conv1/conv"]
    assert [list(block) for block in names] == [
        ["conv3x3", "conv1x1", "identity"],
        ["conv3x3", "conv1x1"],
    ]


def test_training_refuses_a_network_without_logits():
    config = default_config()
    config.model.name = "YOLOv6-N"
    with pytest.raises(ValueError, match=r"^model: name must be of a network with logits"):
        draw_network(config, PARTS["plain"], None, num_classes=2, bn_group=2)
