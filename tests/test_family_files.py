"""Files of the siblings' networks as their authors and timm name them."""

import functools
import re

import numpy as np
import pytest
import torch_file_builder as build
from family_networks import (
    RBR,
    TINY,
    assert_same,
    baseline,
    drawn,
    outputs,
    plus_stages,
    renamed,
)
from pruning_networks import load_golden, section

from repopt_jax.convert import main
from repopt_jax.deploy import fold
from repopt_jax.files import load_weights, save_arrays, variables
from repopt_jax.torch_files import TorchFileError, export_weights, import_weights, recognize
from repopt_jax.torch_files.names import to_torch
from repopt_jax.torch_files.weights import unfilled_model

pytestmark = pytest.mark.slow

SIZES = {
    "RepVGGplus": {
        "name": "RepVGG",
        "num_blocks": (1, 2, 3, 1),
        "widths": (16, 16, 16, 16, 32),
        "se": True,
    },
    "RepVGG": {
        "num_blocks": (1, 2, 1, 1),
        "widths": (16, 16, 16, 16, 32),
        "groups": 2,
        "pre_se": True,
        "se": False,
    },
    "MobileOne": {
        "num_blocks": (1, 2, 1, 1),
        "widths": (16, 16, 16, 16, 32),
        "copies": 2,
        "se_blocks": (0, 0, 0, 1),
    },
    "RepOpt-GhostNet": {"width": 0.1},
}
KINDS = {
    "RepVGG": "repvgg",
    "RepVGGplus": "repvgg",
    "MobileOne": "mobileone",
    "RepOpt-GhostNet": "rep",
}
# What the other code calls a part of our exported names.
OTHERS = {
    "the authors' RepVGG": RBR,
    "the authors' RepVGGplus": {**RBR, **plus_stages(3)},
    "timm's RepVGG": {
        **{r"stage0\.": "stem.", r"stage1\.": "stages.0.", r"stage2\.": "stages.1."},
        **{r"stage3\.": "stages.2.", r"stage4\.": "stages.3.", r"linear\.": "head.fc."},
        **{r"conv_3x3\.": "conv_kxk.conv.", r"bn_3x3\.": "conv_kxk.bn."},
        **{r"conv_1x1\.": "conv_1x1.conv.", r"bn_1x1\.": "conv_1x1.bn."},
        **{r"bn_identity\.": "identity.", r"se\.down\.": "attn.fc1.", r"se\.up\.": "attn.fc2."},
    },
    "the authors' MobileOne": {},
    "timm's MobileOne": {
        **{r"stage0\.": "stem.", r"stage1\.": "stages.0.", r"stage2\.": "stages.1."},
        **{r"stage3\.": "stages.2.", r"stage4\.": "stages.3.", r"linear\.": "head.fc."},
        **{r"rbr_conv\.": "conv_kxk.", r"rbr_scale\.": "conv_scale.", r"rbr_skip\.": "identity."},
        **{r"se\.reduce\.": "attn.fc1.", r"se\.expand\.": "attn.fc2."},
    },
    "RepOpt-GhostNet": {r"fusion_bn\.": "fusion_bn.0."},
}
FAMILY = {code: next(f for f in SIZES if f in code) for code in OTHERS}


@functools.cache
def trained(family, seed=0):
    """A network in training form, every number of which is another."""
    size = {"name": family, "kind": KINDS[family], "num_classes": 3, **SIZES[family]}
    model = drawn(unfilled_model(**size), lambda rng, shape: rng.uniform(0.5, 1.5, shape), seed)
    model.eval()
    return model


@pytest.mark.parametrize("code", OTHERS)
def test_every_codes_names_are_read(code):
    model = trained(FAMILY[code])
    weights = renamed(export_weights(model), OTHERS[code])
    found = recognize(weights)
    wanted = {
        "name": FAMILY[code],
        "kind": KINDS[FAMILY[code]],
        "num_classes": 3,
        **SIZES[FAMILY[code]],
    }
    assert found == wanted
    assert_same(variables(import_weights(unfilled_model(**found), weights)), variables(model))


def deployed(model, family):
    """The state dict of the deploy form, as the authors' conversion leaves it."""
    weights = export_weights(model)
    folded = fold(model)
    if family == "RepOpt-GhostNet":
        kept = {k: v for k, v in weights.items() if not re.search(r"cheap_operation|fusion_bn", k)}
        for s, stage in enumerate(folded.stages[:-1]):
            for b, bottleneck in enumerate(stage):
                for name in ("ghost1", "ghost2"):
                    layer = getattr(bottleneck, name).cheap_conv
                    place = f"blocks.{s}.{b}.{name}.cheap_operation"
                    kept[f"{place}.weight"] = to_torch(np.asarray(layer.kernel[...]))
                    kept[f"{place}.bias"] = np.asarray(layer.bias[...])
        return kept
    kept = {k: v for k, v in weights.items() if re.search(r"^linear\.|\.(post_)?se\.", k)}
    for path, block in folded.layers():
        place = f"{path.replace('/', '.')}.reparam_conv"
        kept[f"{place}.weight"] = to_torch(np.asarray(block.conv.kernel[...]))
        kept[f"{place}.bias"] = np.asarray(block.conv.bias[...])
    return kept


@pytest.mark.parametrize("code", OTHERS)
def test_every_codes_deploy_form_is_read(code, x64):
    """As a plain network, with the same outputs."""
    family = FAMILY[code]
    model = trained(family)
    weights = renamed(deployed(model, family), OTHERS[code])
    if code.startswith("the authors' RepVGG"):
        weights = renamed(weights, {r"reparam_conv\.": "rbr_reparam."})
    if code == "the authors' RepVGGplus":  # converting block by block leaves its heads
        weights["stage2_aux.3.bias"] = np.ones(3, np.float32)
    found = recognize(weights)
    assert (found["name"], found["kind"]) == (SIZES[family].get("name", family), "target")
    plain = import_weights(unfilled_model(**found), weights)
    np.testing.assert_allclose(*outputs(plain, model), rtol=2e-4)


def without(weights, pattern):
    return {name: value for name, value in weights.items() if not re.match(pattern, name)}


@pytest.mark.parametrize(
    ("code", "pattern", "message"),
    [
        ("the authors' RepVGG", r"stage3\.", r"it looks like RepVGG, but stage3\.0 is missing"),
        (
            "timm's RepVGG",
            r"stages\.2\.",
            r"it looks like timm's RepVGG, but stages\.2\.0 is missing",
        ),
        (
            "the authors' RepVGGplus",
            r"stage2\.",
            r"it looks like RepVGGplus, but stage2\.blocks\.0 is missing",
        ),
        (
            "the authors' RepVGGplus",
            r"stage3_first\.",
            r"stage3_first, stage3_second .* got 0, 2",
        ),
        ("timm's MobileOne", r"head\.", r"timm's MobileOne, but head\.fc\.weight is missing"),
        ("RepOpt-GhostNet", r"classifier\.", r"RepGhostNet, but classifier\.weight is missing"),
        ("RepOpt-GhostNet", r"blocks\.7\.", r"RepGhostNet, but blocks\.7\.0\.ghost1 is missing"),
    ],
)
def test_refusals_name_the_family_and_what_is_missing(code, pattern, message):
    weights = renamed(export_weights(trained(FAMILY[code])), OTHERS[code])
    with pytest.raises(TorchFileError, match=message):
        recognize(without(weights, pattern))


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
def test_refusals_of_own_names_do_so_too(name, missing, message):
    weights = export_weights(drawn(unfilled_model(**TINY[name], kind=baseline(name))))
    with pytest.raises(TorchFileError, match=message):
        recognize(without(weights, missing))


def test_biases_that_differ_within_a_set_are_refused():
    weights = section(load_golden("repmlpnet_tiny"), "deploy/")
    name = "stages.0.0.repmlp_block.fc3.bias"
    weights[name] = weights[name] + np.arange(32)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*16 pixels"):
        recognize(weights)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["backbone.ERBlock_2.0.rbr_dense.conv.weight", "backbone.stem.x"], "looks like YOLOv6"),
        (["model.11.rbr_dense.0.weight", "model.11.rbr_1x1.0.weight"], "looks like YOLOv7"),
        (["stages.0.blocks.0.large_kernel.lkb_origin.conv.weight"], "looks like RepLKNet"),
        (
            ["layer1.0.conv1.weight", "fc.weight"],
            "it is no network of RepOpt-VGG, .*'layer1.0.conv1.weight'",
        ),
        (
            ["conv_stem.weight", "blocks.0.0.conv_dw.weight"],
            "it is no network of .*GhostNet, .*RepLKNet",
        ),
    ],
)
def test_networks_that_are_not_read_are_named(names, message):
    with pytest.raises(TorchFileError, match=message):
        recognize({name: np.ones((4, 4, 3, 3), np.float32) for name in names})


def test_the_command_converts_them(tmp_path, capsys):
    """And speaks of strides only where a network has them."""
    for code in ("timm's RepVGG", "timm's MobileOne"):
        model = trained(FAMILY[code])
        weights = renamed(export_weights(model), OTHERS[code])
        source, target = tmp_path / f"{code}.pth", tmp_path / f"{code}.safetensors"
        named = {f"net.backbone.{k}": build.tensor(v) for k, v in weights.items()}
        source.write_bytes(build.archive_of({"state_dict": named}))
        assert main(["--weights", str(source), str(target)]) == 0
        assert ("--strides" in capsys.readouterr().out) == ("RepVGG" in code)
        assert_same(variables(load_weights(target)), variables(model))


def test_mobileone_is_exported_under_its_authors_names(tmp_path):
    weights = export_weights(trained("MobileOne"))
    assert weights["stage4.0.se.reduce.weight"].shape == (1, 16, 1, 1)
    assert weights["stage1.0.rbr_conv.1.conv.weight"].shape == (16, 1, 3, 3)
    save_arrays(tmp_path / "a.safetensors", weights)
    assert recognize(export_weights(load_weights(tmp_path / "a.safetensors")))["copies"] == 2
