"""The loop of one part: what stops it, what it saves, and in which order."""

import itertools
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config

from repopt_jax.training import evaluation, inputs, loop, run
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.interruption import RunStopped, StopSignal
from repopt_jax.training.parts import Part, prepare
from repopt_jax.training.report import read_metrics


@pytest.fixture
def no_step(monkeypatch):
    """The loop without the compilation of a step: its losses are those that the test appends."""
    losses = []

    def step(graphdef, tx, options, state, batch):
        loss = losses[int(state.step)] if losses else 1.0
        return state._replace(step=state.step + 1), {"loss": jnp.asarray(loss)}

    monkeypatch.setattr(inputs, "jitted_train_step", step)
    return losses


@pytest.fixture
def fake_step(monkeypatch, no_step):
    """Without the evaluation's as well."""
    let_evaluations_find(monkeypatch, itertools.repeat(0.0))
    return no_step


def let_evaluations_find(monkeypatch, top1):
    """These accuracies, one after the other."""
    top1 = iter(top1)
    found = lambda *_: {"eval/top1": next(top1), "eval/top5": 0.0, "eval/loss": 1.0}  # noqa: E731
    monkeypatch.setattr(loop, "evaluate_state", found)


class Loss:
    """A loss that tells when the loop reads it, as a device's would make the loop wait."""

    def __init__(self, step, events):
        self.step, self.events = step, events

    def __array__(self, dtype=None, copy=None):
        self.events.append(("read", self.step))
        return np.ones((), dtype)


def test_the_next_step_has_its_batch_and_is_dispatched_before_a_loss_is_read(
    tmp_path, fake_step, monkeypatch
):
    """Between reports: the device has step n + 1 to do while the loop waits for step n."""
    events = []
    put, placed = inputs.put_batch, [0]

    def put_batch(*arguments):
        placed[0] += 1
        events.append(("put", placed[0]))
        return put(*arguments)

    def step(graphdef, tx, options, state, batch):
        number = int(state.step) + 1
        events.append(("dispatch", number))
        return state._replace(step=state.step + 1), {"loss": Loss(number, events)}

    monkeypatch.setattr(inputs, "put_batch", put_batch)
    monkeypatch.setattr(inputs, "jitted_train_step", step)
    config = small_config(parts=("plain",), target__epochs=1.0, eval_every=1.0, log_every=100)
    config.checkpoint.every, config.target.schedule.warmup_epochs = 1.0, 0.0
    run.run(config, tmp_path)
    expected = [("put", 1), ("dispatch", 1)]
    for number in range(2, 12):  # 11 steps
        expected += [("put", number), ("dispatch", number), ("read", number - 1)]
    assert events[: len(expected)] == expected
    assert ("read", 11) in events[len(expected) :]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, fake_step):
    """Also between two reports, one step late; the step after it is not saved."""
    config = small_config(parts=("plain",), checkpoint__every=0.45, log_every=100)
    fake_step += [1.0, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0]
    with pytest.raises(RunStopped, match=r"^the loss of plain is nan at step 6; ") as stopped:
        run.run(config, tmp_path)
    assert stopped.value.exit_code == 1
    assert f"last good checkpoint: step 5 in {tmp_path / 'plain'}" in str(stopped.value)


def test_a_run_that_cannot_write_ends_with_a_sentence_and_closes_its_files(
    tmp_path, fake_step, monkeypatch
):
    """All of them, though closing fails as well."""
    closed = []

    def fail(*_):
        raise OSError("No space left on device")

    def failing(close):
        def close_and_fail(self):
            closed.append(type(self).__name__)
            close(self)
            fail()

        return close_and_fail

    monkeypatch.setattr(loop.MetricsWriter, "write", fail)
    for kind in (loop.MetricsWriter, loop.Checkpoints, loop.Profile):
        monkeypatch.setattr(kind, "close", failing(kind.close))
    with pytest.raises(RunStopped, match=r"^No space left on device$") as stopped:
        run.run(small_config(parts=("plain",)), tmp_path)
    assert stopped.value.exit_code == 2
    assert closed == ["Profile", "MetricsWriter", "Checkpoints"]


def test_a_broken_state_is_not_saved_over_the_last_good_one(tmp_path):
    """The loss of a step is that before its update, and so was finite here."""
    config = small_config(parts=("plain",), checkpoint__every=0.01, eval_every=100.0)
    config.target.schedule.base_lr = config.target.optimizer.weight_decay = 1e38
    with pytest.raises(RunStopped) as stopped:
        run.run(config, tmp_path)
    assert stopped.value.exit_code == 1
    said = str(stopped.value)
    assert said.startswith("the update of plain at step 3 is not finite; a smaller learning rate")
    checkpoints = Checkpoints(tmp_path / "plain", read_only=True)
    step, state = checkpoints.restore(prepare(config, "plain", make_mesh()).init())
    checkpoints.close()
    assert step == 2 and f"last good checkpoint: step 2 in {tmp_path / 'plain'}" in said
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    told = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    assert all(math.isfinite(record["train/loss"]) for record in told)
    assert not (tmp_path / "plain" / "summary.json").exists()


def test_an_error_of_the_computation_keeps_its_traceback(tmp_path, fake_step, monkeypatch):
    """It is no sentence about the user's input, though it is a ValueError as well."""
    broken = lambda *_: jnp.ones(2) + jnp.ones((2, 2))  # noqa: E731
    monkeypatch.setattr(inputs, "jitted_train_step", broken)
    with pytest.raises(ValueError, match="rank_promotion"):
        run.run(small_config(parts=("plain",)), tmp_path)


@pytest.mark.parametrize("split", ["train_batches", "eval_batches"])
def test_a_broken_image_ends_the_run_with_its_sentence(tmp_path, fake_step, monkeypatch, split):
    class Broken:
        start_prefetch = dict

        def __iter__(self):
            return self

        def __next__(self):
            raise ValueError("image cat.jpg cannot be decoded")

        get_state = dict

    broken = lambda *_, **__: Broken()  # noqa: E731
    monkeypatch.setattr(Part, split, broken if split == "train_batches" else Broken())
    monkeypatch.setattr(
        loop,
        "evaluate_state",
        lambda part, _, __, wait: evaluation._evaluate_network(part, None, None, None, wait),
    )
    with pytest.raises(RunStopped, match=r"^image cat.jpg cannot be decoded$") as stopped:
        run.run(small_config(parts=("plain",)), tmp_path)
    assert stopped.value.exit_code == 2


def test_skipped_images_of_all_processes_are_counted_once_each(tmp_path, fake_step, monkeypatch):
    """Each process reads its own images, in another epoch perhaps another's."""
    config = small_config(parts=("plain",), target__epochs=1.0, target__data__skip_bad=True)

    def one_more(text):
        assert json.loads(text) == ["training image 1", "training image 5"]
        return [text, '["training image 5", "training image 9"]']

    monkeypatch.setattr(loop, "gathered", one_more)
    prepare = run.prepare_parts

    def with_bad_images(*arguments):
        parts = prepare(*arguments)
        parts["plain"].dataset.bad_images.update({"training image 1", "training image 5"})
        return parts

    monkeypatch.setattr(run, "prepare_parts", with_bad_images)
    run.run(config, tmp_path)
    records = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    assert {record["data/bad_images"] for record in records} == {3}


def test_a_signal_at_the_last_step_keeps_the_next_part_from_starting(
    tmp_path, monkeypatch, fake_step
):
    """The same command then goes on with the next part."""
    config = small_config(search__epochs=0.2, target__epochs=0.2)
    config.search.schedule.warmup_epochs = config.target.schedule.warmup_epochs = 0.0

    class Interrupted(loop.Progress):
        def step(self, step):
            super().step(step)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    before = loop.Progress
    monkeypatch.setattr(loop, "Progress", Interrupted)
    with pytest.raises(RunStopped, match=r"^SIGTERM received: search is saved at step 2 of 2; "):
        run.run(config, tmp_path)
    assert not (tmp_path / "target").exists()
    monkeypatch.setattr(loop, "Progress", before)
    real = run.train

    def only_the_search(part, workdir):
        if part.name == "target":
            raise RunStopped("the target begins", 0)
        return real(part, workdir)  # reads its last checkpoint

    monkeypatch.setattr(run, "train", only_the_search)
    fake_step += [math.nan] * 9  # so that a step of the search would show
    with pytest.raises(RunStopped, match="the target begins"):
        run.run(config, tmp_path)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_closed_terminal_or_a_warning_of_a_scheduler_saves_first(
    tmp_path, monkeypatch, fake_step, name
):
    class Interrupted(loop.Progress):
        def step(self, step):
            super().step(step)
            if step == 2:
                os.kill(os.getpid(), signal.Signals[name])

    monkeypatch.setattr(loop, "Progress", Interrupted)
    config = small_config(parts=("plain",), checkpoint__every=9.0)
    before = signal.signal(signal.Signals[name], lambda *_: None)  # else it would end the tests
    with pytest.raises(RunStopped, match=f"^{name} received: plain is saved at step 2 of 33"):
        run.run(config, tmp_path)
    signal.signal(signal.Signals[name], before)
    assert (tmp_path / "plain" / "checkpoints" / "2").is_dir()


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_during_an_evaluation_ends_it(tmp_path, monkeypatch, no_step):
    """The step is saved at once, and evaluated when the run goes on; the best is known then."""
    config = small_config(parts=("plain",), target__epochs=2.0, eval_every=0.5)
    config.checkpoint.every = 9.0
    real = evaluation._evaluate_network

    def interrupting(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        found = real(*arguments)
        assert found is None
        return found

    monkeypatch.setattr(evaluation, "_evaluate_network", interrupting)
    with pytest.raises(RunStopped, match="plain is saved at step 6 of 22") as stopped:
        run.run(config, tmp_path)
    assert stopped.value.exit_code == 143
    told = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    assert told[-1]["step"] == 6 and "eval/top1" not in told[-1]
    assert (tmp_path / "plain" / "checkpoints" / "6").is_dir()
    monkeypatch.setattr(evaluation, "_evaluate_network", real)
    run.run(config, tmp_path)
    told = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    evaluated = [r["step"] for r in told if "eval/top1" in r]
    assert evaluated == [6, 12, 18, 22]
    assert all("train/loss" in record for record in told)


def test_a_step_is_saved_before_its_evaluation(tmp_path, monkeypatch, fake_step):
    """A machine that is taken away meanwhile loses no step, nor which checkpoint is the best."""
    config = small_config(parts=("plain",), eval_every=1.0, checkpoint__every=1.0)

    def taken_away(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "evaluate_state", taken_away)
    with pytest.raises(KeyboardInterrupt):
        run.run(config, tmp_path)
    let_evaluations_find(monkeypatch, [80.0, 50.0, 60.0])  # of steps 11, 22, 33
    summary = run.run(config, tmp_path)
    assert summary["parts"]["plain"]["best_top1"] == 80
    checkpoints = Checkpoints(tmp_path / "plain", read_only=True)
    assert checkpoints.best_step() == 11 and checkpoints.steps() == [11, 22, 33]
    checkpoints.close()


def test_a_run_killed_before_an_evaluation_reached_its_checkpoint_adds_it(
    tmp_path, monkeypatch, fake_step
):
    """The metrics of a checkpoint are written by the next save, those of the log at once."""
    config = small_config(parts=("plain",), eval_every=1.0, checkpoint__every=1.0)
    let_evaluations_find(monkeypatch, [80.0, 50.0, 60.0])  # of steps 11, 22, 33
    write = loop.MetricsWriter.write

    def write_and_die(writer, step, record):
        write(writer, step, record)
        if "eval/top1" in record:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "add_metrics", lambda *_: None)
        patch.setattr(loop.MetricsWriter, "write", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            run.run(config, tmp_path)
    assert Checkpoints(tmp_path / "plain", read_only=True).best_step() is None
    run.run(config, tmp_path)
    checkpoints = Checkpoints(tmp_path / "plain", read_only=True)
    assert checkpoints.best_step() == 11 and checkpoints.steps() == [11, 22, 33]
    checkpoints.close()


def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path, monkeypatch, fake_step):
    """Though it came where no checkpoint was due."""
    config = small_config(parts=("plain",), eval_every=0.25, checkpoint__every=9.0)
    let_evaluations_find(monkeypatch, [20.0, 50.0, 80.0, 70.0, *[60.0] * 20])
    summary = run.run(config, tmp_path)
    checkpoints = Checkpoints(tmp_path / "plain", read_only=True)
    assert summary["parts"]["plain"]["best_top1"] == 80
    assert checkpoints.best_step() == 9
    checkpoints.close()


def test_checkpoints_by_time(tmp_path, fake_step):
    config = small_config(parts=("plain",), target__epochs=0.5, eval_every=99.0)
    config.target.schedule.warmup_epochs = 0.0
    config.checkpoint.update({"every": 99.0, "minutes": 1e-9, "keep": 99})
    run.run(config, tmp_path)
    checkpoints = Checkpoints(tmp_path / "plain", read_only=True)
    assert checkpoints.steps() == list(range(1, 7))
    checkpoints.close()
