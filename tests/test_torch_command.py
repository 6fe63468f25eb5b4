"""The command that converts torch files, from the file to what it prints."""

import itertools
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import torch_file_builder as build
from family_networks import assert_same, outputs
from flax import nnx
from torch_cases import network, tensors

import repopt_jax
from repopt_jax.convert import main
from repopt_jax.files import load_weights, variables
from repopt_jax.torch_files import export_weights

SCRIPT = pathlib.Path(__file__).parents[1] / "convert_torch_scales.py"


def test_command_converts_released_scales(official_scales, tmp_path, capsys):
    """Refused as a program of its own, which also tells its status."""
    source, target = official_scales / "RepOpt-VGG-B1-scales.pth", tmp_path / "b1.safetensors"
    assert main([str(source), str(target)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("RepOpt-VGG-B1, 28 blocks") and said.err == ""
    assert f"--config.scales={target}" in said.out
    assert_same(repopt_jax.load_scales(target).flat(), repopt_jax.load_scales(source).flat())
    command = [sys.executable, SCRIPT, source, target]
    again = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.endswith(f"target must not exist unless --force is given, got {target}\n")
    assert main(["--to-torch", str(target), str(tmp_path / "back.safetensors")]) == 0
    assert main(["--force", str(source), str(target)]) == 0


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
def test_command_refuses_in_one_sentence(arguments, message, tmp_path, capsys):
    (tmp_path / "text.pth").write_text("text")
    assert main([a.format(tmp=tmp_path) for a in arguments]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.pth"]


def convert(tmp_path, weights, *flags):
    """The file that the command makes of a torch file with these tensors, or its message."""
    source, target = tmp_path / "a.pth", tmp_path / "b.safetensors"
    source.write_bytes(build.archive_of(tensors(weights)))
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


def test_one_of_several_state_dicts_is_chosen_and_told(tmp_path, capsys):
    """Weights come before their averages, unless --key says otherwise."""
    raw, average = (export_weights(network("target", seed=seed)) for seed in (0, 1))
    source = tmp_path / "a.pth"
    dicts = {"state_dict_ema": tensors(average), "state_dict": tensors(raw)}
    source.write_bytes(build.archive_of(dicts))
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
    assert_same(found, wanted)


def test_strides_and_kind_that_are_told_stay_in_the_file(tmp_path, capsys):
    strides = (1, 1, 2, 2, 2)
    model = network(strides=strides, widths=(4, 4, 4, 4, 8))
    for flags, told in (([], True), (["--strides", *map(str, strides)], False)):
        (tmp_path / "b.safetensors").unlink(missing_ok=True)
        loaded = load_weights(convert(tmp_path, export_weights(model), "--weights", *flags))
        assert np.array_equal(*outputs(loaded, model)) != told
        assert ("took strides of 2 2 2 2 2" in capsys.readouterr().out) == told
    (tmp_path / "b.safetensors").unlink()
    target = convert(tmp_path, export_weights(network("csla")), "--weights", "--kind=csla")
    params = nnx.state(load_weights(target), nnx.Param)
    assert jax.tree.structure(params) == jax.tree.structure(nnx.state(network("csla"), nnx.Param))
