"""`run` does every part once, tells what cannot be done before any work, and counts exactly."""

import contextlib
import json
import logging

import jax
import numpy as np
import pytest
from flax import nnx
from small_run import small_config

from repopt_jax.files import load_scales
from repopt_jax.training import parts, run
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.config import PARTS
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.interruption import RunStopped
from repopt_jax.training.loop import scales_by_epoch
from repopt_jax.training.parts import prepare

NAMES = ("search", "target")
CHANGES = {"target__epochs": 2.0, "checkpoint__every": 1.0}


@contextlib.contextmanager
def compilations():
    """The names of the functions that jax compiles meanwhile."""
    names = []
    handler = logging.Handler()
    handler.emit = lambda record: names.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def compiled(messages, name):
    return sum(m.startswith("Compiling") and name in m for m in messages)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of both parts on eight devices; the target with averages."""
    workdir = tmp_path_factory.mktemp("finished")
    config = small_config(**CHANGES)
    jax.clear_caches()  # of other tests' programs
    with compilations() as messages:
        summary = run.run(config, workdir)
    return config, workdir, summary, messages


def restored(config, workdir, name):
    """A part, and the step and state of its newest checkpoint."""
    part = prepare(config, name, make_mesh(), load_scales(workdir / "scales.safetensors"))
    checkpoints = Checkpoints(workdir / name, read_only=True)
    step, state = checkpoints.restore(part.init())
    checkpoints.close()
    return part, step, state


def test_nothing_is_compiled_twice(finished):
    """Two epochs of every part, with partial last evaluation batches, averages and checkpoints."""
    *_, messages = finished
    assert compiled(messages, "train_step") == len(NAMES)
    assert compiled(messages, "eval_step") == len(NAMES)


def test_a_save_slices_no_small_array(finished):
    """Orbax would let the eight devices write an eighth each: a program for every shape."""
    *_, messages = finished
    assert compiled(messages, "fingerprint") > 0
    assert compiled(messages, "slice") == 0


def test_each_part_is_prepared_once_and_their_data_loaded_once(tmp_path, monkeypatch):
    """Before any of them trains."""
    calls = []

    def counted(name, function):
        return lambda *given, **options: calls.append(name) or function(*given, **options)

    def end(*_):
        raise KeyboardInterrupt

    load = counted("load", parts.data_lib.load_dataset)
    monkeypatch.setattr(parts.data_lib, "load_dataset", load)
    monkeypatch.setattr(parts, "prepare", counted("prepare", parts.prepare))
    monkeypatch.setattr(run, "train", end)
    with pytest.raises(KeyboardInterrupt):
        run.run(small_config(), tmp_path)
    assert sorted(calls) == ["load", "prepare", "prepare"]


def test_evaluation_counts_every_image_exactly_once(finished):
    """Equal to plain numpy over all 360 images, with batches of 104 and a partial last one."""
    config, workdir, summary, _ = finished
    part, _, state = restored(config, workdir, "target")
    batches = list(part.eval_batches)
    assert [len(b["mask"]) for b in batches] == [104] * 4
    assert sum(int(b["mask"].sum()) for b in batches) == len(part.dataset.eval) == 360
    data = part.dataset.eval
    images = ((data.images / 255 - 0.3) / 0.35).astype(np.float32)
    forward = nnx.jit(lambda model: model(images))
    for prefix, params, stats in (
        ("eval", state.params, state.stats),
        ("eval_ema", *state.ema),
    ):
        model = nnx.merge(part.graphdef, params, stats)
        model.eval()
        logits = np.asarray(forward(model), np.float64)
        own = logits[np.arange(360), data.labels]
        ranks = (logits > own[:, None]).sum(-1)
        loss = np.log(np.exp(logits).sum(-1)) - own
        expected = {"loss": loss.mean(), "top1": 100 * (ranks < 1).mean()}
        expected["top5"] = 100 * (ranks < 5).mean()
        told = {name: summary["parts"]["target"][f"{prefix}/{name}"] for name in expected}
        assert told == pytest.approx(expected, rel=1e-5)
    averaged = summary["parts"]["target"]
    assert averaged["eval_ema/loss"] != averaged["eval/loss"]


def test_eval_mode_reproduces_the_summary_and_changes_no_file(finished, capsys):
    config, workdir, summary, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    found = run.evaluate(config, workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    for name in NAMES:
        told = summary["parts"][name]
        latest = {key: value for key, value in told.items() if key.startswith("eval")}
        del latest["eval/input_wait"]  # a time
        assert found[f"{name}/latest"] == latest
        assert found[f"{name}/best"]["eval/top1"] == told["best_top1"]
    table = capsys.readouterr().out
    assert f"{summary['parts']['target']['eval_ema/top1']:.2f}" in table
    assert table.count("averaged") == 2


def test_eval_mode_takes_a_part_of_a_finished_run(finished):
    """Its scales are in the working directory."""
    config, workdir, summary, _ = finished
    config = small_config(parts=("target",), **CHANGES)
    found = run.evaluate(config, workdir)
    assert found["target/latest"]["eval/loss"] == summary["parts"]["target"]["eval/loss"]


def test_eval_mode_asks_for_nothing_that_only_training_needs(finished):
    """Neither for a divisible number of devices, nor BN groups, nor the scales file given then."""
    config, workdir, summary, _ = finished
    config = config.copy_and_resolve_references()
    config.fsdp, config.scales = 64, "gone.safetensors"
    config.search.bn_group = config.target.bn_group = 7
    found = run.evaluate(config, workdir)
    assert found["target/latest"]["eval/loss"] == summary["parts"]["target"]["eval/loss"]


def test_a_finished_run_is_not_done_again(finished, monkeypatch, capsys):
    """Its table is printed at once; a last line says that the images may be others by now."""
    config, workdir, summary, _ = finished
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("trained again"))
    assert run.run(config, workdir) == summary
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table[2:4]] == [PARTS[name].title for name in NAMES]
    assert "images were not read" in table[-1]


def test_a_tilde_in_the_working_directory_is_the_home_folder(finished, monkeypatch):
    config, workdir, summary, _ = finished
    monkeypatch.setenv("HOME", str(workdir.parent))
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("trained again"))
    assert run.run(config, f"~/{workdir.name}") == summary
    assert "target/latest" in run.evaluate(config, f"~/{workdir.name}")


def test_a_command_for_one_part_keeps_the_others_in_the_summary(finished):
    _, workdir, summary, _ = finished
    config = small_config(parts=("target",), **CHANGES)
    assert run.run(config, workdir) == summary
    assert json.loads((workdir / "summary.json").read_text()) == summary


def test_a_run_that_a_broken_image_ended_may_go_on_without_it(finished):
    """As the error advises: the working directory takes `skip_bad` later."""
    _, workdir, summary, _ = finished
    config = small_config(target__data__skip_bad=True, **CHANGES)
    assert run.run(config, workdir) == summary


def test_a_part_whose_summary_was_not_written_is_taken_up_at_its_end(finished):
    """A kill may come between the last checkpoint and the summary."""
    config, workdir, summary, _ = finished
    (workdir / "target" / "summary.json").unlink()
    with compilations() as messages:
        assert run.run(config, workdir) == summary
    assert compiled(messages, "train_step") == compiled(messages, "eval_step") == 0


def test_the_scales_file_holds_what_the_search_ended_with(finished):
    config, workdir, summary, _ = finished
    _, _, state = restored(config, workdir, "search")
    scales = load_scales(workdir / "scales.safetensors")
    trained = state.params["stage4"][0]["conv"]["branch_scales"]["conv1x1"][...]
    np.testing.assert_array_equal(scales["stage4/0/conv"]["conv1x1"], trained)
    assert scales.metadata["top1"] == f"{summary['parts']['search']['eval/top1']:.2f}"
    assert scales.metadata["dataset"] == "digits"


def test_the_target_multiplies_with_the_scales_that_the_search_wrote(finished):
    """Read back from the optimizer's state in the target's checkpoint."""
    _, workdir, _, _ = finished
    checkpoints = Checkpoints(workdir / "target", read_only=True)
    _, arrays = checkpoints.restore()
    checkpoints.close()
    found = {path: x for path, x in arrays.items() if "grad_mults" in path}
    for path, block in load_scales(workdir / "scales.safetensors").vectors.items():
        scaled = {name: vector for name, vector in block.items() if name != "identity"}
        kept = {p.split("/")[-1]: found.pop(p) for p in list(found) if f"{path}/kernel/" in p}
        assert kept.keys() == scaled.keys()
        for name, vector in scaled.items():
            np.testing.assert_array_equal(kept[name], vector)
            assert (vector != vector[0]).any()  # else those that the search began with
    assert not found


def test_the_scales_of_every_evaluation_of_the_search_are_kept(finished):
    """By epoch; the last ones are those of the run, the others are others."""
    _, workdir, _, _ = finished
    along = scales_by_epoch(workdir / "search")
    assert list(along) == [1.0, 2.0]
    final = load_scales(workdir / "scales.safetensors")
    name = ("stage4/0/conv", "conv3x3")
    np.testing.assert_array_equal(along[2.0][name[0]][name[1]], final[name[0]][name[1]])
    assert (along[1.0][name[0]][name[1]] != final[name[0]][name[1]]).any()
    assert along[2.0].metadata == final.metadata


def test_the_workdir_holds_what_the_design_says(finished):
    _, workdir, _, _ = finished
    names = {path.name for path in workdir.iterdir()}
    figures = {"scales.png", "scales_by_epoch.png", "curves.png"}
    files = {"config.json", ".lock", "data.json", "scales.safetensors", "summary.json"}
    assert names == {*NAMES, *figures, *files}
    for name in NAMES:
        kept = {path.name for path in (workdir / name).iterdir()}
        files = {"metrics.jsonl", "train.log", "summary.json"}
        files |= {"scales"} if name == "search" else set()
        assert kept == {*files, "checkpoints", "tensorboard"}


def test_initial_scales_take_the_place_of_a_search(tmp_path, monkeypatch):
    """The target and the file of scales have the values with which a search begins."""
    started = []

    def train(part, workdir):
        started.append(part)
        raise RunStopped("enough", 1)

    monkeypatch.setattr(run, "train", train)
    config = small_config(scales="initial")
    with pytest.raises(RunStopped, match="enough"):
        run.run(config, tmp_path / "run")
    (target,) = started
    search = prepare(config, "search", make_mesh())
    start = search.scales_of(search.init(), 0, {"eval/top1": 0.0})
    assert target.name == "target"
    assert target.scales.vectors.keys() == start.vectors.keys()
    kept = load_scales(tmp_path / "run" / "scales.safetensors")
    for scales in (target.scales, kept):
        for name, vector in start.flat().items():
            np.testing.assert_array_equal(scales.flat()[name], vector)
    assert kept.metadata["source"] == "initial values of the search"
