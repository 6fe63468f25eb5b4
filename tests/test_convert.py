"""The command from a run's checkpoint to torch and back, and half-precision files."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_cases
from family_networks import drawn
from flax import nnx
from safetensors.numpy import save
from small_run import small_config

from repopt_jax.convert import main
from repopt_jax.deploy import fold
from repopt_jax.files import load_network, load_weights, save_weights
from repopt_jax.torch_files import export_weights
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.training.checkpoints import Checkpoints

CLASSES = 4


def network(config, kind, seed, **options):
    size = {name: value for name, value in config.model.items() if value is not None}
    model = drawn(unfilled_model(kind=kind, num_classes=CLASSES, **size, **options), seed=seed)
    model.eval()
    return model


def state_of(model, averages=None):
    """What a checkpoint holds of a network, and of its averages."""
    state = dict(zip(("params", "stats"), nnx.split(model, nnx.Param, ...)[1:], strict=True))
    return state if averages is None else {**state, "ema": nnx.split(averages, nnx.Param, ...)[1:]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two parts, and the networks that its checkpoints hold."""
    workdir = tmp_path_factory.mktemp("run")
    config = small_config(model__strides=(1, 1, 2, 2, 1))
    (workdir / "config.json").write_text(config.to_json_best_effort())
    classes = {"num_classes": CLASSES}
    (workdir / "data.json").write_text(json.dumps({"search": classes, "target": classes}))
    kept = {}
    for part, kind in (("target", "target"), ("csla", "csla")):
        checkpoints = Checkpoints(workdir / part)
        for step, which in enumerate(("best", "latest"), 1):
            model = network(config, kind, seed=step)
            averages = network(config, kind, seed=step + 10) if part == "target" else None
            kept[part, which] = model
            kept[part, which, "averaged"] = averages
            checkpoints.save(step, state_of(model, averages), metrics={"top1": 1.0 / step})
        checkpoints.close()
    return workdir, kept


@nnx.jit
def evaluate(model, images):
    return model(images)


def logits(model):
    model.eval()
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("f4")
    return np.asarray(evaluate(model, images))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_run_goes_to_torch_and_back(run, tmp_path, capsys, suffix):
    """With strides of 1, which a target of torch does not show."""
    if suffix == ".pth":
        pytest.importorskip("torch", reason="writing .pth needs torch, which is not installed")
    workdir, kept = run
    theirs, ours = tmp_path / f"a{suffix}", tmp_path / "b.safetensors"
    assert main(["--from-run", "--to-torch", str(workdir), str(theirs)]) == 0
    said = capsys.readouterr().out
    assert "took the best checkpoint of target; --part takes csla; --averaged takes" in said
    told = ["--strides", *"11221"] if suffix == ".pth" else []
    assert (" --strides 1 1 2 2 1" in said) == bool(told)
    assert main(["--weights", *told, str(theirs), str(ours)]) == 0
    wanted = logits(kept["target", "best"])
    np.testing.assert_array_equal(logits(load_weights(ours)), wanted)
    if not told:
        np.testing.assert_array_equal(logits(load_weights(theirs)), wanted)


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ([], ("target", "best")),
        (["--weights", "--checkpoint=latest"], ("target", "latest")),
        (["--averaged"], ("target", "best", "averaged")),
        (["--part=csla"], ("csla", "best")),
    ],
)
def test_flags_choose_what_is_taken_of_a_run(run, tmp_path, flags, chosen):
    workdir, kept = run
    target = tmp_path / "a.safetensors"
    assert main(["--from-run", *flags, str(workdir), str(target)]) == 0
    model, arguments = load_network(target)
    assert arguments["kind"] == chosen[0] and arguments["num_classes"] == CLASSES
    np.testing.assert_array_equal(logits(model), logits(kept[chosen]))


def test_constant_scales_stay_constant_in_every_direction(run, tmp_path, capsys):
    """From a run, to torch's names and back, scales never become parameters."""
    workdir, kept = run
    ours, theirs, again = (str(tmp_path / f"{n}.safetensors") for n in "abc")
    assert main(["--from-run", "--part=csla", str(workdir), ours]) == 0
    assert main(["--weights", "--to-torch", ours, theirs]) == 0
    assert main(["--weights", theirs, again]) == 0
    wanted = jax.tree.structure(nnx.state(kept["csla", "best"], nnx.Param))
    for path in (ours, theirs, again):
        assert jax.tree.structure(nnx.state(load_weights(path), nnx.Param)) == wanted
    assert "kind csla" in capsys.readouterr().out.splitlines()[-3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from-run", "--part=plain"], "part must have checkpoints in .*, got 'plain'"),
        (["--from-run", "--part=csla", "--averaged"], "averaged must be False for 'csla'"),
        (["--from-run", "--key=ema"], "--key must be given with a source of torch only"),
        (
            ["--from-run", "--strides", *"11221"],
            "--strides must be given with --weights from torch",
        ),
        (["--averaged", "--part=csla"], "--part and --averaged must be given with --from-run only"),
        (["--weights"], "it is a directory"),
    ],
)
def test_what_a_run_does_not_have_is_refused(run, tmp_path, capsys, flags, message):
    target = tmp_path / "a.safetensors"
    assert main([*flags, str(run[0]), str(target)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said), said
    assert not target.exists()


def test_a_part_must_be_named_where_none_is_the_target(run, tmp_path, capsys):
    for part in ("search", "csla"):
        (tmp_path / part / "checkpoints").mkdir(parents=True)
    shutil.copy(run[0] / "config.json", tmp_path)
    arguments = ["--from-run", str(tmp_path), str(tmp_path / "a.safetensors")]
    assert main(arguments) == 1
    assert "--part must be one of ['search', 'csla']" in capsys.readouterr().err
    for part in ("search", "csla"):
        (tmp_path / part / "checkpoints").rmdir()
    assert main(arguments) == 1
    assert "source must hold a run with checkpoints" in capsys.readouterr().err


def test_a_run_in_float64_keeps_its_digits(tmp_path):
    config = small_config(dtype="float64")
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    (tmp_path / "data.json").write_text(json.dumps({"target": {"num_classes": CLASSES}}))
    with jax.enable_x64(True):
        model = network(config, "target", 0, param_dtype=jnp.float64)
        checkpoints = Checkpoints(tmp_path / "target")
        checkpoints.save(1, state_of(model), metrics={"top1": 1.0})
        checkpoints.close()
    assert main(["--from-run", str(tmp_path), str(tmp_path / "a.safetensors")]) == 0
    with jax.enable_x64(True):
        found = load_weights(tmp_path / "a.safetensors").linear.kernel[...]
        np.testing.assert_array_equal(found, model.linear.kernel[...], strict=True)
    assert found.dtype == jnp.float64


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_weights_are_written_for_torch(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="writing .pth needs torch, which is not installed")
    weights = torch_cases.half(export_weights(torch_cases.network()), jnp.dtype(dtype))
    (tmp_path / "a").write_bytes(torch_cases.archive(weights))
    assert main(["--weights", str(tmp_path / "a"), str(tmp_path / "b.safetensors")]) == 0
    arguments = ["--weights", "--to-torch", str(tmp_path / "b.safetensors"), str(tmp_path / "c.pt")]
    assert main(arguments) == 0
    found = torch.load(tmp_path / "c.pt")
    assert found["linear.weight"].dtype == getattr(torch, dtype)
    wanted = weights["linear.weight"].astype(np.float32)
    np.testing.assert_array_equal(found["linear.weight"].float().numpy(), wanted)


def test_other_folders_are_no_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for source in (tmp_path, tmp_path / "file"):
        assert main(["--from-run", str(source), str(tmp_path / "a.safetensors")]) == 1
        assert "workdir must hold a run with its config.json" in capsys.readouterr().err
    assert main([str(tmp_path / "of two\nlines"), str(tmp_path / "a.safetensors")]) == 1
    assert capsys.readouterr().err.endswith("of two lines\n")


@pytest.mark.parametrize("kind", ["target", "repvgg", "hs"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_files_fold_as_their_torch_file_does(tmp_path, capsys, kind, dtype):
    """In float32: half a file's digits would be lost by folding it in its own type."""
    weights = export_weights(torch_cases.network(kind, se=True))
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        if name.endswith(("running_mean", "running_var", ".bias")):
            weights[name] = rng.uniform(0.1, 2, value.shape).astype(np.float32)
    weights = torch_cases.half(weights, jnp.dtype(dtype))
    source, target = tmp_path / "a.pth", tmp_path / "b.safetensors"
    source.write_bytes(torch_cases.archive(weights))
    assert main(["--weights", str(source), str(target)]) == 0
    wanted, found = (logits(fold(evaluated(load_weights(path)))) for path in (source, target))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    (tmp_path / "c").write_bytes(save(weights))
    np.testing.assert_array_equal(logits(fold(evaluated(load_weights(tmp_path / "c")))), wanted)


def evaluated(model):
    model.eval()
    return model


def test_metadata_is_what_the_network_needs(tmp_path):
    """Options that say how a network is run are not in its file."""
    model = torch_cases.network()
    facts = {"name": "RepOpt-VGG", "kind": "target", **torch_cases.SIZE}
    save_weights(tmp_path / "a", model, facts)
    assert load_network(tmp_path / "a", bn_group=2)[1]["bn_group"] == 2
    save_weights(tmp_path / "a", model, {**facts, "bn_group": 2})
    with pytest.raises(ValueError, match="must state its network, got 'bn_group': '2'"):
        load_weights(tmp_path / "a")
