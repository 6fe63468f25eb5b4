"""When images are made, by whom, and what share of the time the device waits for them."""

import itertools
import subprocess
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image
from small_run import small_config

from repopt_jax.data import Dataset
from repopt_jax.data.sources import ArraySource
from repopt_jax.training import evaluation, inputs, loop
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.devices import Profile, make_mesh
from repopt_jax.training.evaluation import evaluate_state
from repopt_jax.training.inputs import InputWait, slow_input_sentence
from repopt_jax.training.parts import Part, prepare
from repopt_jax.training.report import read_metrics
from repopt_jax.training.step import EvalMetrics


def part_of(**changes):
    return prepare(small_config(parts=("plain",), **changes), "plain", make_mesh())


class Clock:
    """Stands in for `time`; the device's work says when it is finished."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(
    ("finished", "given", "expected"),
    [
        (3.0, 10.0, 6.0),  # idle before the host began to look for the next input
        (6.0, 10.0, 4.0),  # idle from 6 on
        (None, 10.0, 0.0),  # at work all the time
    ],
)
def test_only_the_time_of_an_idle_device_counts(monkeypatch, finished, given, expected):
    """The host looks for the next input from 4 to 10."""
    clock = Clock()
    monkeypatch.setattr(inputs, "time", clock)
    wait = InputWait()
    wait.given(1.0)
    wait._finished.result()
    if finished is None:
        wait._finished = types.SimpleNamespace(done=lambda: False)
    else:
        wait._finished = types.SimpleNamespace(done=lambda: True, result=lambda: finished)
    clock.now = 4.0
    with wait:
        clock.now = given
    assert wait.seconds == expected
    assert wait.share(20.0) == expected / 20
    assert wait.share(20.0) == 0  # counts anew
    wait.seconds = 3.0
    assert wait.share(2.0) == 1  # what the clocks disagree about is no wait


def test_the_end_of_the_work_is_taken_down_by_another_thread(monkeypatch):
    """The caller does not wait for it; an error of the computation stays with the caller."""
    done = types.SimpleNamespace(block_until_ready=lambda: 1 / 0)
    monkeypatch.setattr(inputs, "time", Clock())
    wait = InputWait()
    wait.given(done)
    assert wait._finished.result() == 0.0


def test_the_process_that_waits_most_counts(monkeypatch):
    """With one that is slow, all are."""
    monkeypatch.setattr(inputs, "agreed", lambda values: [max(*values, 5.0)])
    wait = InputWait()
    wait.seconds = 1.0
    assert wait.share(10.0) == 0.5


@pytest.mark.parametrize(
    ("decoded", "augment", "share", "named"),
    [
        (False, "weak", 0.43, ["plain", "43%", "target.data.workers", "target.data.fast"]),
        (True, "weak", 0.43, ["plain", "43%", "target.data.workers", "target.data.fast"]),
        (True, "crop", 0.11, ["plain", "11%", "target.data.on_device"]),
        (True, "crop", 0.1, None),
        (None, "crop", 0.43, None),  # nothing but draws to wait for
    ],
)
def test_a_slow_input_is_told_with_what_to_change(decoded, augment, share, named):
    source = ArraySource(np.zeros((1, 8, 8, 3), np.uint8), [0]) if decoded else [{}]
    section = small_config(target__data__augment=augment).target
    part = types.SimpleNamespace(
        name="plain",
        spec=types.SimpleNamespace(section="target"),
        section=section,
        dataset=Dataset("set", 1, source, source),
        on_device=decoded is None,
    )
    said = slow_input_sentence(part, share)
    assert said is None if named is None else all(word in said for word in named)


@pytest.fixture
def fake_step(monkeypatch):
    """The loop without compilation."""

    def step(graphdef, tx, options, state, batch):
        return state._replace(step=state.step + 1), {"loss": 1.0}

    found = {"eval/top1": 0.0, "eval/top5": 0.0, "eval/loss": 1.0}
    monkeypatch.setattr(inputs, "jitted_train_step", step)
    monkeypatch.setattr(loop, "evaluate_state", lambda *_: found)


@pytest.mark.parametrize(("seconds", "told"), [(2.0, 1), (0.5, 0)])
def test_reports_have_the_wait_and_the_log_says_it_once(
    tmp_path, fake_step, monkeypatch, seconds, told
):
    """If it is worth a change."""
    monkeypatch.setattr(InputWait, "seconds", property(lambda _: seconds, lambda *_: None), False)
    monkeypatch.setattr(InputWait, "share", lambda *_: 0.25)
    loop.train(part_of(target__epochs=1.0), tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert {r["train/input_wait"] for r in records} == {0.25}
    assert records[-1]["eval/input_wait"] == 0.25
    assert (tmp_path / "train.log").read_text().count("waits for images 25%") == told


def test_the_wait_is_a_share_of_the_time_since_the_last_report(tmp_path, fake_step, monkeypatch):
    """Two steps of 128 images at 512 images/s take half a second; evaluations count by the same."""
    waits, shares = [], []

    def evaluate(part, state, stop, wait):
        waits.append(wait)
        return {"eval/top1": 0.0, "eval/top5": 0.0, "eval/loss": 1.0}

    monkeypatch.setattr(loop, "evaluate_state", evaluate)
    monkeypatch.setattr(loop.Progress, "report", lambda *_, **__: 512.0)
    monkeypatch.setattr(
        InputWait, "share", lambda wait, seconds: shares.append((wait, seconds)) or 0.0
    )
    changes = {"log_every": 2, "checkpoint__every": 9.0}
    loop.train(part_of(target__epochs=1.0, **changes), tmp_path)
    assert [seconds for _, seconds in shares[:5]] == [0.5] * 5  # of 11 steps
    assert shares[5][1] == 0.25
    assert len(waits) == 1 and {id(wait) for wait, _ in shares} == {id(waits[0])}


def test_evaluation_counts_the_wait_for_every_batch(monkeypatch):
    events = []

    class Wait(InputWait):
        def __enter__(self):
            events.append("wait")

        def given(self, results):
            events.append("given")

    monkeypatch.setattr(evaluation, "jitted_eval_step", lambda *_: EvalMetrics.empty())
    part = part_of(target__eval_batch_size=120, target__ema_decay=0.0)
    state = types.SimpleNamespace(params=None, stats=None, ema=None)
    evaluate_state(part, state, None, Wait())
    assert events == ["wait", "given"] * 3 + ["wait"]  # of 360 images


def test_several_steps_are_one_program_where_loops_are_fast():
    meshes = [types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=name)]))
              for name in ("cpu", "gpu", "tpu")]  # fmt: skip
    steps = [inputs.most_steps(mesh) for mesh in meshes]
    assert steps[0] == 1 and min(steps[1:]) > 1


def test_first_batches_are_made_while_the_network_is_compiled(tmp_path, fake_step, monkeypatch):
    """On resuming once the position is known, so that no image is read in vain."""
    events = []
    real, restore, init = Part.train_batches, Checkpoints.restore, Part.init

    def train_batches(part, **arguments):
        batches = real(part, **arguments)
        start = batches.start_prefetch
        monkeypatch.setattr(
            batches, "start_prefetch", lambda: (events.append("start"), start()), False
        )
        return batches

    def told(name, function):
        return lambda *arguments: (events.append(name), function(*arguments))[1]

    part = part_of(target__epochs=1.0)
    monkeypatch.setattr(Part, "train_batches", train_batches)
    monkeypatch.setattr(Part, "init", told("init", init))
    monkeypatch.setattr(Checkpoints, "restore", told("restore", restore))
    loop.train(part, tmp_path)
    assert events == ["start", "init", "restore", "start"]
    events.clear()
    loop.train(part, tmp_path)
    assert events == ["init", "restore", "start"]


def test_images_that_are_bad_while_the_network_is_compiled_are_in_the_log(
    tmp_path, fake_step, monkeypatch
):
    for split, name in itertools.product(("train", "val"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "a" / "3.png").write_bytes(b"no image")
    changes = {"name": "folder", "data_dir": str(tmp_path), "image_size": 8, "skip_bad": True}
    changes = {f"target__data__{key}": value for key, value in changes.items()}
    part = part_of(target__batch_size=16, target__bn_group=2, target__epochs=1.0, **changes)
    init = Part.init

    def slow(part):
        deadline = time.monotonic() + 60
        while not part.dataset.bad_images and time.monotonic() < deadline:
            time.sleep(0.01)
        return init(part)

    monkeypatch.setattr(Part, "init", slow)
    loop.train(part, tmp_path / "run")
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("skipping") == log.count("a/3.png") == 1


def test_evaluations_share_their_worker_processes(monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            started.append(self)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    part = part_of(target__data__workers=1)
    state = part.init()
    assert evaluate_state(part, state) == evaluate_state(part, state)
    assert len(started) == 1


def test_the_profile_holds_whole_chunks(tmp_path, monkeypatch):
    """Chunks begin at steps 1, 9, 17, 25, 33: from the first at or past the 11th, to the end."""
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    profile = Profile(tmp_path, 0, 2)
    for step in range(1, 34, 8):
        events.append(step)
        profile.step(step, None)
    assert events == [1, 9, 17, "start", 25, "stop", 33]
