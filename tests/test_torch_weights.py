"""Scales and weights between torch's state dicts and ours."""

import numpy as np
import pytest
from family_networks import assert_same, outputs
from flax import nnx
from torch_cases import SIZE, network

import repopt_jax
from repopt_jax.files import load_weights, save_weights, variables
from repopt_jax.torch_files import (
    Standin,
    TorchFileError,
    export_weights,
    import_weights,
    recognize,
)
from repopt_jax.torch_files.modules import find_weights
from repopt_jax.torch_files.names import DIALECTS, OFFICIAL
from repopt_jax.torch_files.scales import official_names, scales_in
from repopt_jax.torch_files.weights import unfilled_model


@pytest.mark.parametrize("se", [False, True])
@pytest.mark.parametrize("kind", ["target", "hs", "csla", "repvgg"])
def test_round_trip_is_bit_exact(kind, se):
    model = network(kind, se=se)
    exported = export_weights(model, num_batches_tracked=7)
    other = import_weights(nnx.clone(network(kind, seed=5, se=se)), exported)
    assert_same(variables(other), variables(model))
    assert_same(export_weights(other, num_batches_tracked=7), exported)


def test_export_has_the_official_names_and_layout():
    exported = export_weights(network("target", se=True))
    assert exported["stage2.0.conv.weight"].shape == (6, 4, 3, 3)
    assert exported["linear.weight"].shape == (3, 8)
    assert exported["stage2.1.post_se.down.weight"].shape == (1, 6, 1, 1)
    assert exported["stage0.bn.num_batches_tracked"].dtype == np.int64
    assert {n.split(".")[-1] for n in exported if ".bn." in n} == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "RepOptimizers",
            "linear.bias must give linear/bias the shape (3,), got (9,); "
            "missing stage1.0.bn_3x3.bias for stage1/0/bn3x3/bias; surplus stage1.9.x",
        ),
        (
            "timm's RepVGG",
            "head.fc.bias must give linear/bias the shape (3,), got (9,); "
            "missing stages.0.0.conv_kxk.bn.bias for stage1/0/bn3x3/bias; surplus stages.0.9.x",
        ),
    ],
)
def test_import_reports_all_problems_and_changes_nothing(code, message):
    """In the names of the file."""
    own = next(d.own for d in (OFFICIAL, *DIALECTS) if d.family == code)
    model, weights = network("repvgg"), export_weights(network("repvgg", seed=1))
    before = variables(model)
    del weights["stage1.0.bn_3x3.bias"]
    weights["stage1.9.x"] = np.ones(1)
    weights["linear.bias"] = np.ones(9)
    with pytest.raises(ValueError) as error:
        import_weights(model, {own(name): value for name, value in weights.items()})
    assert str(error.value) == f"weights do not fit the model: {message}"
    assert_same(variables(model), before)


@pytest.mark.parametrize("kind", ["target", "hs", "repvgg"])
def test_recognize(kind):
    found = recognize(export_weights(network(kind, se=True)))
    assert found == {"name": "RepOpt-VGG", "kind": kind, "se": True, **SIZE}


def test_scales_come_out_of_every_kind_of_checkpoint():
    model = network("hs")
    weights = export_weights(model)
    expected = repopt_jax.searched_scales(model).flat()
    module = Standin("torch.nn.Module", ())
    module.state = {"_parameters": weights, "_buffers": {}, "_modules": {}}
    config = Standin("yacs.config.CfgNode", ())
    for content in (
        weights,
        {"model": weights, "optimizer": {}, "epoch": 3, "config": config},
        {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
        {"model": None, "ema": module, "updates": 5},
    ):
        found = scales_in(find_weights(content).arrays)
        assert found.metadata["model"] == "RepOpt-VGG"
        assert_same(found.flat(), expected)


def test_scales_of_other_packages_modules_keep_their_names():
    weights = {
        "backbone.ERBlock_2.0.scale_conv.weight": np.ones(2, np.float16),
        "backbone.ERBlock_2.0.scale_1x1.weight": np.ones(2, np.float16),
        "backbone.stem.conv.weight": np.ones((2, 3, 3, 3), np.float16),
    }
    scales = scales_in(weights)
    assert list(scales) == ["backbone/ERBlock_2/0/conv"]
    assert scales["backbone/ERBlock_2/0/conv"]["conv1x1"].dtype == np.float32


def test_half_a_network_is_refused():
    names = official_names(repopt_jax.Scales.initial(network("target")))
    del names["stage2.1.scale_1x1.weight"]
    with pytest.raises(TorchFileError, match="missing stage2/1/conv/conv1x1"):
        scales_in(names)


def test_files_without_weights_are_refused():
    with pytest.raises(TorchFileError, match="it has no weights under any of"):
        find_weights({"epoch": 3})
    with pytest.raises(TorchFileError, match="it holds one tensor and no weights"):
        find_weights(np.ones(2))
    with pytest.raises(TorchFileError, match=r"it has no scales .*\)$"):
        scales_in({"linear.weight": np.ones((2, 2))})
    with pytest.raises(TorchFileError, match="names are those of our files"):
        scales_in({"stage0/conv/conv3x3": np.ones(2)})


def test_scales_are_not_taken_for_weights():
    names = official_names(repopt_jax.Scales.initial(network("target")))
    with pytest.raises(TorchFileError, match="it holds scales alone, which `load_scales`"):
        recognize(names)


def test_weights_file_round_trip(tmp_path):
    model = network("csla")
    save_weights(tmp_path / "w", model, {"name": "RepOpt-VGG", "kind": "csla", "se": False, **SIZE})
    loaded = load_weights(tmp_path / "w")
    assert_same(variables(loaded), variables(model))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("linear.bias", np.array([1, 2, 3]), "linear.bias must hold floats, got int64"),
        ("linear.bias", np.array([True] * 3), "linear.bias must hold floats, got bool"),
        ("linear.bias", np.ones(3, np.complex64), "linear.bias must hold floats, got complex64"),
        ("linear.bias", np.array([1, np.nan, 3]), "linear.bias must be finite"),
        ("stage0.bn.running_var", np.array([1.0, 1, -1, 1]), "running_var must not be negative"),
        ("stage0.bn.running_var", np.array([1.0, 1e-60, 1, 1]), "running_var must fit in float32"),
        ("linear.bias", np.array([1.0, 1e60, 1]), "linear.bias must fit in float32"),
    ],
)
def test_numbers_that_no_network_has_are_refused_by_name(tmp_path, name, value, message):
    weights = export_weights(network("target")) | {name: value}
    with pytest.raises(ValueError, match=message):
        import_weights(nnx.clone(network()), weights)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.net.backbone."]
)
def test_what_wrappers_put_before_every_name_is_left_out(prefix):
    weights = export_weights(network("hs"))
    wrapped = find_weights({prefix + name: value for name, value in weights.items()}).arrays
    assert wrapped.keys() == weights.keys()
    scales = scales_in(official_names(scales_in(wrapped)))
    assert scales.metadata["model"] == "RepOpt-VGG"


@pytest.mark.parametrize("name", ["_orig_mod.neck.rep.0", "neck._orig_mod.rep.0"])
def test_what_compiling_puts_into_names_is_left_out(name):
    """Also of a network of the user's own, and where only a part of it was compiled."""
    assert list(find_weights({f"{name}.scale_conv.weight": np.ones(2)}).arrays) == [
        "neck.rep.0.scale_conv.weight"
    ]


def test_scales_come_in_the_order_of_the_network():
    """Whatever order a safetensors file has."""
    names = [f"stages.{i}" for i in (1, 0, 10, 2)]
    found = scales_in({f"{name}.scale_conv.weight": np.ones(2) for name in names})
    assert list(found) == [f"stages/{i}/conv" for i in (0, 1, 2, 10)]


def test_tensors_beside_a_network_are_named():
    """As Lightning keeps those of a loss or a metric; the names of the network are not at fault."""
    weights = {f"model.{k}": v for k, v in export_weights(network("target")).items()}
    found = find_weights(weights | {"loss.weight": np.ones(3)}).arrays
    with pytest.raises(TorchFileError, match=r"more than the network 'model\.': 'loss\.weight'$"):
        recognize(found)


def test_entries_that_are_no_weights_are_left_out():
    weights = export_weights(network("target"))
    others = {"total_ops": np.ones(1), "stage0.conv.total_params": np.ones(1)}
    others |= {"epoch": 3, "global_step": np.array(7.0), "args": None}
    assert find_weights(weights | others).arrays == weights
    sparse = Standin("torch._utils._rebuild_sparse_tensor", ())
    with pytest.raises(TorchFileError, match=r"'linear\.weight' is a sparse tensor"):
        find_weights(weights | {"linear.weight": sparse})


@pytest.mark.parametrize("kind", ["hs", "repvgg"])
def test_strides_of_1_are_recognized_by_their_identities(kind):
    strides = (2, 1, 1, 2, 2)
    model = network(kind, strides=strides, widths=(4, 4, 4, 4, 8))
    found = recognize(export_weights(model))
    assert found["strides"] == strides
    made = import_weights(unfilled_model(**found), export_weights(model))
    np.testing.assert_array_equal(*outputs(made, model))
