"""Files of RepVGG, MobileOne and RepGhostNet as their authors and timm name them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_file_builder as build
from flax import nnx

from repopt_jax.convert import main
from repopt_jax.deploy import fold
from repopt_jax.files import load_weights, save_arrays, variables
from repopt_jax.torch_files import TorchFileError, export_weights, import_weights, recognize
from repopt_jax.torch_files.names import to_torch, torch_name
from repopt_jax.torch_files.weights import unfilled_model

SIZES = {
    "RepVGG": {
        "num_blocks": (1, 2, 1, 1),
        "widths": (16, 16, 16, 16, 32),
        "groups": 2,
        "pre_se": True,
    },
    "MobileOne": {
        "num_blocks": (1, 2, 1, 1),
        "widths": (16, 16, 16, 16, 32),
        "copies": 2,
        "se_blocks": (0, 0, 0, 1),
    },
    "RepOpt-GhostNet": {"width": 0.1},
}
KINDS = {"RepVGG": "repvgg", "MobileOne": "mobileone", "RepOpt-GhostNet": "rep"}
# What the other code calls a part of our exported names.
OTHERS = {
    "the authors' RepVGG": {
        **{r"conv_3x3\.": "rbr_dense.conv.", r"bn_3x3\.": "rbr_dense.bn."},
        **{r"conv_1x1\.": "rbr_1x1.conv.", r"bn_1x1\.": "rbr_1x1.bn."},
        **{r"bn_identity\.": "rbr_identity."},
    },
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
    model = unfilled_model(name=family, kind=KINDS[family], num_classes=3, **SIZES[family])
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype), nnx.state(model)
    )
    nnx.update(model, state)
    model.eval()
    return model


def renamed(weights, words):
    """Part by part, left to right, as the other code has them."""
    result = {}
    for name, value in weights.items():
        for ours, theirs in words.items():
            name = re.sub(rf"(^|\.){ours}", rf"\g<1>{theirs}", name, count=1)
        result[name] = value
    return result


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
    assert {k: v for k, v in found.items() if k != "se"} == wanted
    wanted = variables(model)
    for name, value in variables(import_weights(unfilled_model(**found), weights)).items():
        np.testing.assert_array_equal(value, wanted[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["RepVGG-A0", "RepVGG-B1g4", "RepVGG-D2se", "MobileOne-S0", "MobileOne-S4"]
)
def test_published_sizes_are_recognized(name):
    family = "MobileOne" if name.startswith("MobileOne") else "RepVGG"
    model = unfilled_model(name=name, kind=KINDS[family])
    one = np.float32(1)
    weights = {torch_name(p): np.broadcast_to(one, v.shape) for p, v in variables(model).items()}
    weights = {n: to_torch(value) for n, value in weights.items()}
    facts = recognize(renamed(weights, OTHERS[f"the authors' {family}"]))
    assert (facts["name"], facts["kind"]) == (name, KINDS[family])


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
    kept = {k: v for k, v in weights.items() if ".se." in k or k.startswith("linear.")}
    for path, block in folded.layers():
        place = f"{path.replace('/', '.')}.reparam_conv"
        kept[f"{place}.weight"] = to_torch(np.asarray(block.conv.kernel[...]))
        kept[f"{place}.bias"] = np.asarray(block.conv.bias[...])
    return kept


GHOST = pytest.param("RepOpt-GhostNet", marks=pytest.mark.slow)


@pytest.mark.parametrize("code", [*(code for code in OTHERS if "Ghost" not in code), GHOST])
def test_every_codes_deploy_form_is_read(code, x64):
    """As a plain network, with the same outputs."""
    family = FAMILY[code]
    model = trained(family)
    weights = renamed(deployed(model, family), OTHERS[code])
    if code == "the authors' RepVGG":
        weights = renamed(weights, {r"reparam_conv\.": "rbr_reparam."})
    found = recognize(weights)
    assert (found["name"], found["kind"]) == (family, "target")
    plain = import_weights(unfilled_model(**found), weights)
    plain.eval()
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(plain(images), model(images), rtol=2e-4)


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
        ("timm's MobileOne", r"head\.", r"timm's MobileOne, but head\.fc\.weight is missing"),
        ("RepOpt-GhostNet", r"classifier\.", r"RepGhostNet, but classifier\.weight is missing"),
        ("RepOpt-GhostNet", r"blocks\.7\.", r"RepGhostNet, but blocks\.7\.0\.ghost1 is missing"),
    ],
)
def test_refusals_name_the_family_and_what_is_missing(code, pattern, message):
    weights = renamed(export_weights(trained(FAMILY[code])), OTHERS[code])
    with pytest.raises(TorchFileError, match=message):
        recognize(without(weights, pattern))


def test_problems_are_told_in_the_names_of_the_file():
    model = trained("RepVGG")
    weights = renamed(export_weights(model), OTHERS["timm's RepVGG"])
    weights = without(weights, r"stages\.0\.0\.conv_kxk\.bn\.bias") | {"stages.0.9.x": np.ones(1)}
    weights["head.fc.bias"] = np.ones(9)
    with pytest.raises(ValueError) as error:
        import_weights(model, weights)
    assert str(error.value) == (
        "weights do not fit the model: "
        "head.fc.bias must give linear/bias the shape (3,), got (9,); "
        "missing stages.0.0.conv_kxk.bn.bias for stage1/0/bn3x3/bias; surplus stages.0.9.x"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["backbone.ERBlock_2.0.rbr_dense.conv.weight", "backbone.stem.x"], "looks like YOLOv6"),
        (["model.11.rbr_dense.0.weight", "model.11.rbr_1x1.0.weight"], "looks like YOLOv7"),
        (["stage1.blocks.0.rbr_dense.conv.weight", "stage0.rbr_dense.x"], "looks like RepVGGplus"),
        (["stages.0.blocks.0.large_kernel.lkb_origin.conv.weight"], "looks like RepLKNet"),
        (["layer1.0.conv1.weight", "fc.weight"], "it is no RepOpt-VGG, .*'layer1.0.conv1.weight'"),
        (["conv_stem.weight", "blocks.0.0.conv_dw.weight"], "it is no RepOpt-VGG, .*GhostNet"),
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
        found = variables(load_weights(target))
        for name, value in variables(model).items():
            np.testing.assert_array_equal(found[name], value)


def test_mobileone_is_exported_under_its_authors_names(tmp_path):
    weights = export_weights(trained("MobileOne"))
    assert weights["stage4.0.se.reduce.weight"].shape == (1, 16, 1, 1)
    assert weights["stage1.0.rbr_conv.1.conv.weight"].shape == (16, 1, 3, 3)
    save_arrays(tmp_path / "a.safetensors", weights)
    assert recognize(export_weights(load_weights(tmp_path / "a.safetensors")))["copies"] == 2
