"""What cannot be run is refused in one sentence, before any work and before anything is written."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from small_run import small_config

from repopt_jax import data
from repopt_jax.scales import Scales, save_scales
from repopt_jax.training import run
from repopt_jax.training.interruption import RunStopped


def refused(config, workdir, action=run.run):
    """The sentence with which a run is refused."""
    with pytest.raises(RunStopped) as stopped:
        action(config, workdir)
    assert stopped.value.exit_code == 2
    sentence = str(stopped.value)
    assert sentence and "\n" not in sentence
    return sentence


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch):
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("a part was trained"))


CONFIGS = [
    ({"parts": ()}, r"^parts must .*, got \(\)$"),
    ({"parts": ("search", "nope")}, "^parts must .* got .*'nope'"),
    ({"parts": ("target",)}, "the part 'target' needs scales: .* got parts .'target',."),
    ({"parts": ("plain", "csla")}, "the part 'csla' needs scales"),
    ({"seed": -1}, "seed must be .* got -1"),
    (
        {"scales": "nowhere.safetensors"},
        "scales must be 'initial' or an existing file, got .*nowhere",
    ),
    ({"scales": "initial", "parts": ("search",)}, "parts must name another part .*'initial'"),
    ({"identity": "two"}, "identity must be 'searched' or 'one', got 'two'"),
    ({"model.name": "VGG"}, "model: name must be one of .* got 'VGG'"),
    (
        {"model.name": "VGG", "search.data.name": "folder"},
        "model: name must be one of .* got 'VGG'",
    ),
    ({"model.widths": (4, 4)}, r"model: widths must be 5 whole numbers .*got \(4, 4\)"),
    ({"model.widths": (4, 4, 4, 8, "8")}, "model.widths must be whole numbers above 0"),
    ({"model.num_blocks": (1, 1, 0, 1)}, "model.num_blocks must be whole numbers above 0"),
    ({"model.strides": (1, 2, 2, 1, -1)}, "model.strides must be whole numbers above 0"),
    ({"search.bn_group": 5}, "bn_group must divide the 16 samples .* got 5"),
    (
        {"target.bn_group": 1, "target.mix.cutmix": 1.0},
        "mix.mixup and mix.cutmix need BatchNorm groups of at least 2 images, .* groups of 1",
    ),
    ({"dtype": "float16"}, "dtype must be one of .* got 'float16'"),
    ({"dtype": "float64"}, "dtype 'float64' needs JAX_ENABLE_X64"),
    ({"fsdp": 3}, "fsdp must divide the number of devices 8, got 3"),
    ({"log_every": 0}, "log_every must be a number above 0, got 0"),
    ({"eval_every": math.nan}, "eval_every must be a number above 0, got nan"),
    ({"checkpoint.every": -1.0}, "checkpoint.every must be a number above 0, got -1.0"),
    ({"checkpoint.keep": 0}, "checkpoint.keep must be a number above 0, got 0"),
    ({"checkpoint.minutes": -1.0}, "checkpoint.minutes must be a number of at least 0, got -1.0"),
    ({"profile_steps": -3}, "profile_steps must be a number of at least 0, got -3"),
]

# Fields of a part's section; of "target" above all, because a search would come before it.
SECTIONS = [
    ({"data.name": "nonesuch"}, r"target.data: name must be .* got 'nonesuch'"),
    ({"data.train_split": "test"}, "train_split .* must be None for digits"),
    ({"data.classes": (3, 99)}, "classes must lie in 0..9 for 'digits'"),
    ({"data.image_size": 0}, "image_size must be .* got 0"),
    ({"data.augment": "heavy"}, "augment must be one of .* got 'heavy'"),
    ({"data.on_device": "yes"}, "data.on_device must be one of .* got 'yes'"),
    ({"data.on_device_bytes": -1}, "data.on_device_bytes must be at least 0, got -1"),
    ({"data.augment_on": "gpu"}, "data.augment_on must be one of .* got 'gpu'"),
    ({"data.threads": -1}, "threads must be .* got -1"),
    ({"data.workers": -1}, "workers must be .* got -1"),
    ({"data.mean": (0.5,)}, r"data.mean must be 3 numbers, one per channel, got \(0.5,\)"),
    ({"data.std": (0.5, 0.5, 0.0)}, "data.std must be 3 numbers above 0"),
    ({"data.std": ("a", "b", "c")}, "data.std must be 3 numbers above 0"),
    (
        {"batch_size": 100},
        "batch_size must be divisible by 8 devices times accumulation 1, got 100",
    ),
    ({"batch_size": 2048}, "batch_size must be in 1..1437, .* got 2048"),
    ({"batch_size": 0}, "batch_size and accumulation must be at least 1, got 0"),
    ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
    ({"epochs": 0.0}, "target.schedule: epochs must be .* got 0.0"),
    ({"accumulation": 3}, "accumulation 3"),
    ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ({"ema_decay": 1.5}, r"ema_decay must be in \[0, 1\), got 1.5"),
    ({"optimizer.name": "lars"}, "optimizer.name must be one of .* got 'lars'"),
    ({"optimizer.momentum": 1.0}, r"momentum must .*, got 1\.0$"),
    ({"optimizer.weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
    ({"optimizer.clip_norm": 5.0}, "optimizer.clip_norm must be 0 for the part 'target'"),
    ({"schedule.name": "exponential"}, "target.schedule: name must be .* got 'exponential'"),
    ({"schedule.warmup_epochs": 9.0}, r"warmup_epochs must be at most epochs \(3.0\); got 9.0"),
    ({"schedule.base_lr": float("nan")}, "base_lr must be a finite number .* got nan"),
]
CASES = CONFIGS + [({f"target.{k}": v for k, v in c.items()}, m) for c, m in SECTIONS]


@pytest.mark.parametrize(("changes", "message"), CASES, ids=lambda x: str(x)[:50])
def test_a_configuration_that_cannot_be_is_refused_before_the_search(changes, message, tmp_path):
    config = small_config()
    config.update_from_flattened_dict(changes)
    sentence = refused(config, tmp_path / "new")
    assert re.search(message, sentence), sentence
    assert not (tmp_path / "new").exists()


def test_csla_can_be_run_after_a_search(monkeypatch, tmp_path):
    """Everything is prepared; the part itself does not start here."""

    class Started(Exception):
        pass

    def start(*_):
        raise Started

    monkeypatch.setattr(run, "train", start)
    with pytest.raises(Started):
        run.run(small_config(parts=("search", "target", "csla")), tmp_path)


@pytest.mark.parametrize("action", [run.run, lambda config, _: run.throughput(config)])
def test_scales_of_another_model_are_refused(tmp_path, action):
    wrong = Scales({"stage0/conv": {"conv3x3": np.ones(4, np.float32)}})
    save_scales(tmp_path / "s.safetensors", wrong)
    config = small_config(scales=str(tmp_path / "s.safetensors"))
    sentence = refused(config, tmp_path / "new", action)
    assert "scales do not fit the model: missing stage0/conv/conv1x1; " in sentence
    assert not (tmp_path / "new").exists()


def test_a_file_that_holds_no_scales_is_refused(tmp_path):
    path = tmp_path / "notes.safetensors"
    path.write_text("no scales")
    sentence = refused(small_config(scales=str(path)), tmp_path / "new")
    assert re.search(f"{path}.* must be a safetensors", sentence)


def test_scales_leave_nothing_of_a_search_alone(tmp_path):
    save_scales(tmp_path / "s.safetensors", Scales({"a": {"b": np.ones(2, np.float32)}}))
    config = small_config(parts=("search",), scales=str(tmp_path / "s.safetensors"))
    assert "another part than 'search' where scales are given" in refused(config, tmp_path / "new")


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_workdir_of_another_run_is_refused_and_names_what_differs(tmp_path):
    (tmp_path / "config.json").write_text(small_config(seed=7).to_json())
    before = snapshot(tmp_path)
    sentence = refused(small_config(), tmp_path)
    assert sentence.endswith("seed (7 there, 0 here)")
    assert snapshot(tmp_path) == before


def test_a_workdir_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    sentence = refused(small_config(), tmp_path)
    assert sentence == f"workdir must be empty, absent or a run's own, got {tmp_path}"
    assert snapshot(tmp_path) == before


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("years of work")
    sentence = refused(small_config(), path)
    assert sentence == f"workdir must be a directory, got the file {path}"
    assert path.read_text() == "years of work"


@pytest.mark.parametrize("name", ["lr=[0.1]", "a*", "what?"])
def test_a_workdir_whose_checkpoints_orbax_would_not_find_again_is_refused(tmp_path, name):
    """Orbax looks for the parts of a checkpoint by a pattern that begins with the path."""
    sentence = refused(small_config(), tmp_path / name)
    assert sentence == f"workdir must have none of * ? [ in its path, got {tmp_path / name}"
    assert not (tmp_path / name).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_workdir_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert "ermission" in refused(small_config(), tmp_path / "new")


def test_a_workdir_that_the_system_refuses_to_make_is_told(tmp_path, monkeypatch):
    """The same for root too, whom no permission stops."""

    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "mkdir", refuse)
    assert "Permission denied" in refused(small_config(), tmp_path / "new")


class Started(Exception):
    """Raised instead of training."""


@pytest.fixture(scope="module")
def first_begun(tmp_path_factory):
    """The working directory of a run that stopped where its training would begin."""

    def start(*_):
        raise Started

    workdir = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train", start)
        with pytest.raises(Started):
            run.run(small_config(), workdir)
    return workdir


@pytest.fixture
def begun(first_begun, tmp_path):
    """A copy of it for each test."""
    return shutil.copytree(first_begun, tmp_path / "begun")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("training_images", 1429, "training_images (1429 there, 1437 here)"),
        ("evaluation_images", 352, "evaluation_images (352 there, 360 here)"),
        ("num_classes", 11, "num_classes (11 there, 10 here)"),
    ],
)
def test_a_run_whose_images_changed_is_refused(begun, key, value, told):
    """Its steps and rates would be others; the directory stays as it is."""
    path = begun / "data.json"
    images = json.loads(path.read_text())
    assert images["search"] == images["target"]
    path.write_text(json.dumps(images | {"target": images["target"] | {key: value}}))
    before = snapshot(begun)
    assert refused(small_config(), begun).startswith("target.data must be the images")
    assert refused(small_config(), begun).endswith(told)
    assert snapshot(begun) == before


def test_a_run_without_fields_that_came_later_goes_on_with_their_defaults(begun):
    """With another value it would be another run."""
    path = begun / "config.json"
    present = json.loads(path.read_text())
    del present["target"]["label_smoothing"]
    path.write_text(json.dumps(present))
    other = small_config(target__label_smoothing=0.3)
    assert "target.label_smoothing (0.1 there, 0.3 here)" in refused(other, begun)
    with pytest.raises(pytest.fail.Exception, match="a part was trained"):
        run.run(small_config(), begun)


ELSEWHERE = {"augment_on": "device", "threads": 1, "workers": 2, "on_device_bytes": 5}
ELSEWHERE |= {"data_dir": "other", "skip_bad": True}


@pytest.mark.parametrize("field", ELSEWHERE)
def test_a_run_goes_on_where_others_make_its_images(begun, field):
    """They are the same images."""
    value = ELSEWHERE[field]
    with pytest.raises(pytest.fail.Exception, match="a part was trained"):
        run.run(small_config(**{f"target__data__{field}": value}), begun)


def test_a_run_whose_classes_have_other_names_is_refused(begun, monkeypatch):
    def renamed(*names):
        load = data.load_dataset
        return lambda **arguments: dataclasses.replace(load(**arguments), class_names=names)

    (begun / "data.json").unlink()  # as in a run of an earlier version, which is gone on with
    for last in ("cat", "cow"):
        with monkeypatch.context() as patch:
            patch.setattr(data, "load_dataset", renamed(*"abcdefghi", last))
            if last == "cat":
                with pytest.raises(pytest.fail.Exception):
                    run.run(small_config(), begun)
            else:
                sentence = refused(small_config(), begun)
    assert sentence.endswith("class_names (['cat', 'cow'] differ)")


def test_a_run_whose_class_names_are_not_known_any_more_goes_on(begun):
    path = begun / "data.json"
    images = json.loads(path.read_text())
    images["target"]["class_names"] = list("abcdefghij")  # digits has none
    path.write_text(json.dumps(images))
    with pytest.raises(pytest.fail.Exception, match="a part was trained"):
        run.run(small_config(), begun)


def test_a_workdir_in_which_another_process_trains_is_refused_until_that_is_killed(begun):
    """Evaluation beside the training goes on."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(); input()"
    arguments = [sys.executable, "-c", code, str(begun / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, **pipes) as other:
        other.stdout.readline()
        before = snapshot(begun)
        sentence = refused(small_config(), begun)
        assert re.search(f"workdir must not be in use, got {begun}", sentence)
        assert snapshot(begun) == before
        assert "with checkpoints" in refused(small_config(), begun, run.evaluate)
        other.kill()
    with pytest.raises(pytest.fail.Exception, match="a part was trained"):
        run.run(small_config(), begun)


def test_what_a_kill_left_of_a_configuration_does_not_bar_the_run(tmp_path, monkeypatch):
    """The very first file of a run is written under another name first."""
    (tmp_path / ".config.unfinished.json").write_text('{"parts"')
    config = small_config(parts=("plain",))
    parts = run.prepare_parts(config, ("plain",), run.make_mesh())
    monkeypatch.setattr(run, "prepare_parts", lambda *_: parts)

    def start(*_):
        raise RunStopped("started", 2)

    monkeypatch.setattr(run, "train", start)
    assert refused(config, tmp_path) == "started"
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


@pytest.mark.parametrize("made", [(), ("target",), ("target/checkpoints",)])
def test_eval_mode_without_a_checkpoint_is_refused(tmp_path, made):
    for folder in made:
        (tmp_path / folder).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    sentence = refused(small_config(), tmp_path, run.evaluate)
    assert sentence == f"workdir must hold a run with checkpoints, got {tmp_path}"
    assert sorted(tmp_path.rglob("*")) == before


def test_eval_mode_without_a_workdir_makes_none(tmp_path):
    assert "workdir must hold a run" in refused(small_config(), tmp_path / "new", run.evaluate)
    assert not (tmp_path / "new").exists()
