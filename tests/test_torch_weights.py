"""Scales and weights between torch files and ours, and the command that converts them."""

import itertools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch_file_builder as build
from flax import nnx

import repopt_jax
from repopt_jax.convert import main
from repopt_jax.files import load_weights, save_weights, variables
from repopt_jax.torch_files import (
    Standin,
    TorchFileError,
    export_weights,
    import_weights,
    recognize,
)
from repopt_jax.torch_files.modules import find_weights
from repopt_jax.torch_files.scales import official_names, scales_in

SIZE = {"num_blocks": (1, 2, 1, 1), "widths": (4, 4, 6, 8, 8), "num_classes": 3}
SCRIPT = pathlib.Path(__file__).parents[1] / "convert_torch_scales.py"


def network(kind, *, se=False, seed=0):
    return repopt_jax.create_model("RepOpt-VGG", kind, se=se, rngs=nnx.Rngs(seed), **SIZE)


@pytest.mark.parametrize("se", [False, True])
@pytest.mark.parametrize("kind", ["target", "hs", "csla", "repvgg"])
def test_round_trip_is_bit_exact(kind, se):
    model = network(kind, se=se)
    exported = export_weights(model, num_batches_tracked=7)
    other = import_weights(network(kind, se=se, seed=5), exported)
    for name, value in variables(model).items():
        np.testing.assert_array_equal(variables(other)[name], value)
    again = export_weights(other, num_batches_tracked=7)
    assert again.keys() == exported.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(again[name], value)


def test_export_has_the_official_names_and_layout():
    exported = export_weights(network("target", se=True))
    assert exported["stage2.0.conv.weight"].shape == (6, 4, 3, 3)
    assert exported["linear.weight"].shape == (3, 8)
    assert exported["stage2.1.post_se.down.weight"].shape == (1, 6, 1, 1)
    assert exported["stage0.bn.num_batches_tracked"].dtype == np.int64
    assert {n.split(".")[-1] for n in exported if ".bn." in n} == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip


def test_import_reports_all_problems_and_changes_nothing():
    model = network("target")
    before = variables(model)
    weights = export_weights(network("target", seed=1))
    del weights["stage0.bn.bias"]
    weights["extra"] = np.ones(1)
    weights["linear.bias"] = np.ones(9)
    with pytest.raises(ValueError) as error:
        import_weights(model, weights)
    assert str(error.value) == (
        "weights do not fit the model: linear.bias must give linear/bias the shape (3,), got (9,); "
        "missing stage0.bn.bias for stage0/bn/bias; surplus extra"
    )
    for name, value in before.items():
        np.testing.assert_array_equal(variables(model)[name], value)


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
        assert found.flat().keys() == expected.keys()
        for key, vector in expected.items():
            np.testing.assert_array_equal(found.flat()[key], vector)


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
    with pytest.raises(TorchFileError, match="it has no scales"):
        scales_in({"linear.weight": np.ones((2, 2))})


def test_weights_file_round_trip(tmp_path):
    model = network("csla")
    save_weights(tmp_path / "w", model, {"name": "RepOpt-VGG", "kind": "csla", "se": False, **SIZE})
    loaded = load_weights(tmp_path / "w")
    for name, value in variables(model).items():
        np.testing.assert_array_equal(variables(loaded)[name], value)
    assert loaded(jnp.ones((2, 32, 32, 3))).shape == (2, 3)


def run(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent)


def test_command_converts_released_scales(official_scales, tmp_path):
    source, target = official_scales / "RepOpt-VGG-B1-scales.pth", tmp_path / "b1.safetensors"
    done = run(source, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("RepOpt-VGG-B1, 28 blocks")
    assert f"--config.scales={target}" in done.stdout
    direct = repopt_jax.load_scales(source).flat()
    for key, vector in repopt_jax.load_scales(target).flat().items():
        np.testing.assert_array_equal(direct[key], vector)
    again = run(source, target)
    assert again.returncode == 1
    assert again.stderr.endswith(f"target must not exist unless --force is given, got {target}\n")
    back = tmp_path / "back.safetensors"
    assert run("--to-torch", target, back).returncode == 0
    assert run("--force", source, target).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{tmp}/nope.pth", "{tmp}/a.safetensors"), "source must be an existing file"),
        (("{tmp}/text.pth", "{tmp}/a.safetensors"), "it is no torch file"),
        (("{tmp}/text.pth", "{tmp}/a.bin"), "target must end in .safetensors"),
        (("{tmp}/text.pth", "{tmp}/text.pth", "--force"), "target must be another file"),
        (("{tmp}/text.pth", "{tmp}/no/a.safetensors"), "target must lie in an existing folder"),
    ],
)
def test_command_refuses_in_one_sentence(arguments, message, tmp_path):
    (tmp_path / "text.pth").write_text("text")
    done = run(*(a.format(tmp=tmp_path) for a in arguments))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.pth"]


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
        import_weights(network("target"), weights)


def convert(tmp_path, weights, *flags):
    """The file that the command makes of a torch file with these tensors, or its message."""
    source, target = tmp_path / "a.pth", tmp_path / "b.safetensors"
    source.write_bytes(build.archive_of({k: build.tensor(v) for k, v in weights.items()}))
    status = main([*flags, str(source), str(target)])
    assert (status == 0) == target.exists()
    return target


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        (["float16"], "float16"),
        (["bfloat16"], "bfloat16"),
        (["float16", "float32"], "float32"),
        (["bfloat16", "float16"], "float32"),
        (["float32", "float64"], "float64"),
    ],
)
def test_weights_of_mixed_types_lose_no_number(tmp_path, capsys, kinds, wanted):
    """Half convolutions and a variance of 1e5 in float32 are common in checkpoints."""
    weights = export_weights(network("target"))
    rng = np.random.default_rng(0)
    types = itertools.cycle(np.dtype(getattr(ml_dtypes, kind, kind)) for kind in kinds)
    for name, value in weights.items():
        if value.dtype.kind == "f":
            weights[name] = rng.uniform(0.1, 1, value.shape).astype(next(types))
    if wanted == "float32":
        weights["stage0.bn.running_var"] = np.array([1e5, 1e-8, 1, 1], np.float32)
    target = convert(tmp_path, weights, "--weights")
    with jax.enable_x64(True):
        found = export_weights(load_weights(target))
    for name, value in weights.items():
        assert name.endswith("tracked") or found[name].dtype.name == wanted
        np.testing.assert_array_equal(found[name].astype(np.float64), value.astype(np.float64))


def test_vectors_of_two_lengths_are_refused_and_nothing_is_written(tmp_path, capsys):
    for one, other in ((4, 5), (0, 0)):
        names = {
            "a.scale_conv.weight": np.ones(one, "f4"),
            "a.scale_1x1.weight": np.ones(other, "f4"),
        }
        assert not convert(tmp_path, names).exists()
        assert f"'conv3x3': {one}, 'conv1x1': {other}" in capsys.readouterr().err


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


def test_one_of_several_state_dicts_is_chosen_and_told(tmp_path, capsys):
    """Weights come before their averages, unless --key says otherwise."""
    raw, average = (export_weights(network("target", seed=seed)) for seed in (0, 1))
    source = tmp_path / "a.pth"
    tensors = [{k: build.tensor(v) for k, v in weights.items()} for weights in (average, raw)]
    source.write_bytes(build.archive_of({"state_dict_ema": tensors[0], "state_dict": tensors[1]}))
    for flags, weights in (([], raw), (["--key", "state_dict_ema"], average)):
        target = tmp_path / f"{len(flags)}.safetensors"
        assert main(["--weights", *flags, str(source), str(target)]) == 0
        found = export_weights(load_weights(target))["linear.weight"]
        np.testing.assert_array_equal(found, weights["linear.weight"])
        told = capsys.readouterr().out
        assert bool(flags) or ("took state_dict;" in told and "state_dict_ema" in told)
    assert main(["--weights", "--key=nope", str(source), str(tmp_path / "c.safetensors")]) == 1
    assert "got 'nope'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--weights"]])
def test_the_command_reads_what_it_has_written_for_torch(tmp_path, capsys, flags):
    weights = export_weights(network("hs"))
    ours = convert(tmp_path, weights, *flags)
    theirs, again = tmp_path / "c.safetensors", tmp_path / "d.safetensors"
    assert main([*flags, "--to-torch", str(ours), str(theirs)]) == 0
    assert main([*flags, str(theirs), str(again)]) == 0
    if flags:
        found, wanted = (variables(load_weights(path)) for path in (theirs, ours))
    else:
        found, wanted = (repopt_jax.load_scales(path).flat() for path in (theirs, ours))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


EQUAL = {"num_blocks": (1, 2, 1, 1), "widths": (4, 4, 4, 4, 8), "num_classes": 3}


@pytest.mark.parametrize("kind", ["hs", "repvgg"])
def test_strides_of_1_are_recognized_by_their_identities(kind):
    strides = (2, 1, 1, 2, 2)
    model = repopt_jax.create_model("RepOpt-VGG", kind, strides=strides, rngs=nnx.Rngs(0), **EQUAL)
    found = recognize(export_weights(model))
    assert found["strides"] == strides
    made = repopt_jax.create_model(**found, rngs=nnx.Rngs(1))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    import_weights(made, export_weights(model))
    np.testing.assert_array_equal(made(images), model(images))


def test_strides_and_kind_that_are_told_stay_in_the_file(tmp_path, capsys):
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    strides = (1, 1, 2, 2, 2)
    model = repopt_jax.create_model("RepOpt-VGG", strides=strides, rngs=nnx.Rngs(0), **EQUAL)
    model.eval()
    for flags, told in (([], True), (["--strides", *map(str, strides)], False)):
        (tmp_path / "b.safetensors").unlink(missing_ok=True)
        loaded = load_weights(convert(tmp_path, export_weights(model), "--weights", *flags))
        loaded.eval()
        assert np.array_equal(loaded(images), model(images)) != told
        assert ("took strides of 2 2 2 2 2" in capsys.readouterr().out) == told
    (tmp_path / "b.safetensors").unlink()
    target = convert(tmp_path, export_weights(network("csla")), "--weights", "--kind=csla")
    params = nnx.state(load_weights(target), nnx.Param)
    assert jax.tree.structure(params) == jax.tree.structure(nnx.state(network("csla"), nnx.Param))
