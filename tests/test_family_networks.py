"""RepVGG and MobileOne: published sizes, and the numbers of the authors' own code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from repopt_jax import create_model
from repopt_jax.check_equivalence.layers import METHODS
from repopt_jax.check_equivalence.training import differences, start
from repopt_jax.deploy import fold
from repopt_jax.deploy.onnx_export import onnx_model
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.models.mobileone import MOBILEONE_SIZES
from repopt_jax.models.repopt_vgg import REPVGG_SIZES
from repopt_jax.pruning.channels import channel_widths, repopt_vgg_channels
from repopt_jax.torch_files import import_weights, recognize
from repopt_jax.torch_files.names import from_torch
from repopt_jax.torch_files.weights import unfilled_model

# Millions of parameters in training form (as timm counts them) and in deploy form, as published;
# None: not published.
MILLIONS = {
    "RepVGG-A0": (9.11, 8.30),
    "RepVGG-A1": (14.09, 12.78),
    "RepVGG-A2": (28.21, 25.49),
    "RepVGG-B0": (15.82, 14.33),
    "RepVGG-B1": (57.42, 51.82),
    "RepVGG-B1g2": (None, 41.36),
    "RepVGG-B1g4": (39.97, 36.12),
    "RepVGG-B2": (89.02, 80.31),
    "RepVGG-B2g2": (None, None),
    "RepVGG-B2g4": (61.76, 55.77),
    "RepVGG-B3": (123.09, 110.96),
    "RepVGG-B3g2": (None, None),
    "RepVGG-B3g4": (83.83, 75.62),
    "RepVGG-D2se": (133.33, 120.39),
    "RepVGGplus-L2pse": (None, None),
    "MobileOne-S0": (5.29, 2.08),
    "MobileOne-S1": (4.83, 4.76),
    "MobileOne-S2": (7.88, 7.81),
    "MobileOne-S3": (10.17, 10.08),
    "MobileOne-S4": (14.95, 14.84),
}
TINY = {
    "repvgg_g4_tiny": {
        "name": "RepVGG",
        "num_blocks": (2, 2, 3, 1),
        "widths": (8, 8, 16, 16, 32),
        "groups": 4,
    },
    "repvgg_d2se_tiny": {
        "name": "RepVGG",
        "num_blocks": (2, 2, 3, 1),
        "widths": (16, 16, 16, 32, 32),
        "pre_se": True,
    },
    "mobileone_tiny": {
        "name": "MobileOne",
        "num_blocks": (1, 2, 2, 1),
        "widths": (8, 8, 16, 32, 64),
        "copies": 3,
        "se_blocks": (0, 0, 0, 0),
    },
    "mobileone_se_tiny": {
        "name": "MobileOne",
        "num_blocks": (1, 2, 2, 1),
        "widths": (8, 8, 16, 32, 64),
        "copies": 1,
        "se_blocks": (0, 0, 1, 1),
    },
}
BASELINE = {"RepVGG": "repvgg", "MobileOne": "mobileone"}


def baseline(name):
    return "mobileone" if name.startswith("MobileOne") else "repvgg"


def size(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("name", [*REPVGG_SIZES, *MOBILEONE_SIZES])
def test_parameter_counts_are_the_published_ones(name):
    """Of the training form, and of the plain network once its BatchNorms are biases."""
    model = unfilled_model(name=name, kind=baseline(name))
    plain = unfilled_model(name=name, kind="target")
    norms = sum(block.bn.scale.shape[0] for _, block in plain.layers())
    for published, count in zip(MILLIONS[name], (size(model), size(plain) - norms), strict=True):
        assert published is None or abs(count / 1e6 - published) <= 0.01


def split(golden, part):
    """The state dict of one form, and the images in our layout."""
    weights = {k.removeprefix(f"{part}/"): golden[k] for k in golden if k.startswith(f"{part}/")}
    return weights, golden["input"].transpose(0, 2, 3, 1)


@pytest.fixture
def family(request, golden_family):
    return np.load(golden_family / f"{request.param}.npz")


def read(weights, dtype=jnp.float64):
    model = import_weights(unfilled_model(**recognize(weights), param_dtype=dtype), weights)
    model.eval()
    return model


@pytest.mark.parametrize(("family", "options"), TINY.items(), indirect=["family"])
def test_training_form_gives_the_authors_outputs_and_deploy_tensors(family, options, x64):
    weights, images = split(family, "train")
    found = recognize(weights)
    wanted = {**options, "kind": baseline(options["name"]), "num_classes": 5}
    assert {k: v for k, v in found.items() if k != "se"} == wanted
    model = read(weights)
    np.testing.assert_allclose(model(images), family["output"], rtol=1e-10)
    folded = fold(model)
    np.testing.assert_allclose(folded(images), family["output"], rtol=1e-10)
    deploy, _ = split(family, "deploy")
    for path, block in folded.layers():
        place = path.replace("/", ".")
        part = "reparam_conv" if "mobileone" in wanted["kind"] else "rbr_reparam"
        kernel, bias = (deploy[f"{place}.{part}.{name}"] for name in ("weight", "bias"))
        np.testing.assert_allclose(
            block.conv.kernel[...], from_torch(kernel), rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(block.conv.bias[...], bias, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("family", "options"), TINY.items(), indirect=["family"])
def test_deploy_form_is_read_as_the_plain_network(family, options, x64, strict):
    weights, images = split(family, "deploy")
    found = recognize(weights)
    plain = {k: v for k, v in options.items() if k != "copies"}
    wanted = {**plain, "kind": "target", "num_classes": 5}
    assert {k: v for k, v in found.items() if k != "se"} == wanted
    np.testing.assert_allclose(read(weights)(images), family["output"], rtol=1e-10)


def tiny(name, kind="target", **options):
    return create_model(
        **{"kind": kind, "num_classes": 5, **TINY[name], **options},
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize("name", TINY)
def test_gr_follows_the_branches(name, x64):
    """The plain network under its RepOptimizer, against the network of branches."""
    plain = tiny(name, param_dtype=jnp.float64)
    started = start(plain, plain.blocks(), mixed=True, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.normal(size=(3, 4, 16, 16, 3)))
    labels = jnp.asarray(rng.integers(0, 5, (3, 4)))

    def loss(network, batch):
        return optax.softmax_cross_entropy_with_integer_labels(network(batch[0]), batch[1]).mean()

    found = differences(*started, METHODS["multiplier: SGD"], loss, (images, labels))
    assert len(found) == len(plain.blocks())
    assert max(found.values()) < 1e-10


@pytest.mark.parametrize("name", ["repvgg_d2se_tiny", "mobileone_se_tiny"])
def test_exported_files_compute_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny(name, baseline(TINY[name]["name"]))
    model.eval()
    exported = onnx_model(model, Preprocessing(32, 32, inside=False), name=name)
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(logits, model(images), rtol=1e-4, atol=1e-5)


def test_layers_after_layer_26_are_not_grouped():
    size = {"num_blocks": (8, 14, 24, 1), "widths": (4, 4, 4, 4, 4), "num_classes": 2}
    model = unfilled_model(name="RepVGG", groups=2, **size)
    groups = [block.conv.feature_group_count for _, block in model.layers()]
    assert [i for i, n in enumerate(groups) if n == 2] == list(range(2, 27, 2))


def test_squeeze_excite_before_the_relu_is_pruned_with_its_block():
    model = tiny("repvgg_d2se_tiny")
    groups = repopt_vgg_channels(model)
    assert groups["stage1/0"].readers == ("stage1/0/pre_se/down", "stage1/1/conv")
    assert set(groups["stage1/0"].layers) == {"stage1/0/conv", "stage1/0/pre_se/up"}
    widths = channel_widths(model, groups)
    assert (widths["stage3/0"], widths["stage3/0/pre_se"]) == (32, 2)


def test_search_starts_at_the_published_scales():
    """In a stage of RepVGG by depth; in MobileOne at 1."""
    scales = [block["conv1x1"].scale for block in tiny("repvgg_g4_tiny").blocks().values()]
    np.testing.assert_allclose(scales, [1, 1, 2**0.5, 1, 2**0.5, 1, 2**0.5, 1, 1])
    blocks = tiny("mobileone_tiny").blocks()
    assert {b.scale for block in blocks.values() for b in block.values() if b.scaled} == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre_se": True}, r"hidden must be at least 1, got 0 for 8 channels"),
        ({"groups": 3}, r"groups.*\(8, 16, 16, 32\).*got 3"),
        ({"groups": 0}, r"groups.*got 0"),
        ({"kind": "mobileone"}, r"kind 'mobileone' must be 'repvgg' for 'RepVGG'"),
        ({"copies": 2}, r"options of 'RepVGG' must be among .*'copies'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny("repvgg_g4_tiny", **options)
