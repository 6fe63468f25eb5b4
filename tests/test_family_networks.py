"""The siblings' networks of our own: their rules, refusals, and files of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_networks import TINY, assert_same, baseline, drawn

from repopt_jax.deploy import fold
from repopt_jax.deploy.onnx_export import onnx_model
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.stablehlo_export import export_stablehlo, load_stablehlo
from repopt_jax.files import load_weights, save_weights, variables
from repopt_jax.pruning.channels import channel_widths, repopt_vgg_channels
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.training.config import PARTS, default_config
from repopt_jax.training.networks import draw_network

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["repvgg_d2se_tiny", "mobileone_se_tiny"])
def test_exported_files_compute_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra deploy is not installed")
    model = drawn(unfilled_model(**TINY[name], kind=baseline(name)))
    model.eval()
    exported = onnx_model(model, Preprocessing(32, 32, inside=False), name=name)
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.transpose(0, 3, 1, 2)})
    wanted = jax.jit(lambda images: model(images))(images)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["replknet_tiny", "repmlpnet_tiny", "efficientrep_bifpan_tiny"])
def test_deployed_as_stablehlo_and_refused_as_onnx(name, tmp_path):
    model = drawn(unfilled_model(**TINY[name]))
    model.eval()
    size = (32, 32) if "repmlp" in name else (64, 64)
    options = {"preprocessing": Preprocessing(*size, inside=False), "name": name}
    with pytest.raises(ValueError, match=r"ONNX.*StableHLO"):
        onnx_model(model, **options)
    path = tmp_path / "net.stablehlo"
    export_stablehlo(path, fold(model), **options, platforms=["cpu"])
    loaded = load_stablehlo(path)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype("float32")
    found, wanted = loaded.call(images), jax.jit(lambda images: model(images))(images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)
    classes = TINY[name].get("num_classes")
    assert loaded.metadata.get("num_classes") == (classes and str(classes))


def test_layers_after_layer_26_are_not_grouped():
    size = {"num_blocks": (8, 14, 24, 1), "widths": (4, 4, 4, 4, 4), "num_classes": 2}
    model = unfilled_model(name="RepVGG", groups=2, **size)
    groups = [block.conv.feature_group_count for _, block in model.layers()]
    assert [i for i, n in enumerate(groups) if n == 2] == list(range(2, 27, 2))


def test_squeeze_excite_before_the_relu_is_pruned_with_its_block():
    model = unfilled_model(**TINY["repvgg_d2se_tiny"])
    groups = repopt_vgg_channels(model)
    assert groups["stage1/0"].readers == ("stage1/0/pre_se/down", "stage1/1/conv")
    assert set(groups["stage1/0"].layers) == {"stage1/0/conv", "stage1/0/pre_se/up"}
    widths = channel_widths(model, groups)
    assert (widths["stage3/0"], widths["stage3/0/pre_se"]) == (32, 2)


def test_search_starts_at_the_published_scales():
    """In a stage of RepVGG by depth; in MobileOne at 1."""
    blocks = unfilled_model(**TINY["repvgg_g4_tiny"]).blocks()
    scales = [block["conv1x1"].scale for block in blocks.values()]
    np.testing.assert_allclose(scales, [1, 1, 2**0.5, 1, 2**0.5, 1, 2**0.5, 1, 1])
    blocks = unfilled_model(**TINY["mobileone_tiny"]).blocks()
    assert {b.scale for block in blocks.values() for b in block.values() if b.scaled} == {1.0}


WRITTEN = [name for name in TINY if TINY[name]["name"] not in ("RepVGG", "MobileOne")]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("kind", ["hs", "baseline"])
def test_weights_files_give_the_same_network(name, kind, tmp_path):
    kind = baseline(name) if kind == "baseline" else kind
    model = drawn(unfilled_model(**TINY[name], kind=kind))
    save_weights(tmp_path / "a.safetensors", model, {**TINY[name], "kind": kind})
    assert_same(variables(load_weights(tmp_path / "a.safetensors")), variables(model))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("repvgg_g4_tiny", {"pre_se": True}, "hidden must be at least 1, got 0 for 8 channels"),
        ("repvgg_g4_tiny", {"groups": 3}, r"groups.*\(8, 16, 16, 32\).*got 3"),
        ("repvgg_g4_tiny", {"groups": 0}, r"groups.*got 0"),
        ("repvgg_g4_tiny", {"kind": "mobileone"}, "'mobileone' must be 'repvgg' for 'RepVGG'"),
        ("repvgg_g4_tiny", {"copies": 2}, "options of 'RepVGG' must be among .*'copies'"),
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
        unfilled_model(**{**TINY[name], **options})


def test_maps_that_patches_do_not_divide_are_refused():
    model = drawn(unfilled_model(**TINY["repmlpnet_tiny"]))
    model.eval()
    with pytest.raises(ValueError, match=r"patches of 4 by 4 divide, got one of 7 by 7"):
        jax.eval_shape(lambda images: model(images), jnp.ones((1, 28, 28, 3)))


def test_training_refuses_a_network_without_logits():
    config = default_config()
    config.model.name = "YOLOv6-N"
    with pytest.raises(ValueError, match=r"^model: name must be of a network with logits"):
        draw_network(config, PARTS["plain"], None, num_classes=2, bn_group=2)
