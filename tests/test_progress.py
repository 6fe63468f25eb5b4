"""The same facts reach a terminal, a plain console and the log file."""

import logging
import re

import jax
import pytest

from repopt_jax.training import progress as module
from repopt_jax.training.progress import Progress


class Clock:
    """Seconds that pass only when told."""

    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def texts(path):
    """Lines of a log without their times."""
    lines = path.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines)
    return [line.split(" ", 2)[2] for line in lines]


def train(progress, clock):
    for step in range(1, 5):
        clock.now += 0.5 if step <= 2 else 0.25
        progress.step(step)
        if step % 2 == 0:
            progress.report(step, loss=1 / step, lr=0.1)
    progress.say("evaluation: top-1 71.20 %")


LINES = [
    "search 2/400 (0 %), loss 0.5000, lr 0.1, 512 images/s, 3 min 19 s left",
    "search 4/400 (1 %), loss 0.2500, lr 0.1, 1,024 images/s, 1 min 39 s left",
    "evaluation: top-1 71.20 %",
]


def test_plain_console_and_log_file_get_the_same_lines(tmp_path, clock, capsys):
    with Progress(tmp_path, 400, batch_size=256, label="search") as progress:
        train(progress, clock)
    assert texts(tmp_path / "train.log") == LINES
    assert capsys.readouterr().err == (tmp_path / "train.log").read_text()


def test_terminal_gets_a_bar_with_the_facts_and_the_log_file_the_lines(tmp_path, clock, capsys):
    with Progress(tmp_path, 400, batch_size=256, label="search", terminal=True) as progress:
        train(progress, clock)
        progress._bar.refresh()
    assert texts(tmp_path / "train.log") == LINES
    shown = capsys.readouterr().err
    assert "4/400, loss 0.2500, lr 0.1, 1,024 images/s, 1 min 39 s left" in shown
    assert "search 2/400 (0 %)" not in shown  # lines of the log do not break the bar
    assert "evaluation: top-1 71.20 %\n" in shown


def test_bar_and_time_left_of_a_resumed_run_count_from_where_it_resumed(tmp_path, clock):
    with Progress(tmp_path, 400, batch_size=256, resumed_at=390, terminal=True) as progress:
        assert progress._bar.n == 390
        clock.now += 10
        progress.report(392, loss=1.0, lr=0.1)
    assert texts(tmp_path / "train.log")[0].endswith("51 images/s, 40 s left")


def test_time_of_an_evaluation_is_kept_out_of_the_speed(tmp_path, clock):
    with Progress(tmp_path, 10, batch_size=100) as progress:
        clock.now += 1
        with progress.paused():
            clock.now += 1000
        progress.report(1, loss=1.0, lr=0.1)
    assert ", 100 images/s, 9 s left" in texts(tmp_path / "train.log")[0]


def test_warnings_of_the_package_reach_the_log_file_and_the_console_while_it_is_open(
    tmp_path, capsys, caplog
):
    logger = logging.getLogger("repopt_jax.training.checkpoints")
    with Progress(tmp_path, 10, batch_size=1):
        logger.warning("a checkpoint is damaged")
    logger.warning("afterwards")
    assert texts(tmp_path / "train.log") == ["a checkpoint is damaged"]
    assert capsys.readouterr().err.count("a checkpoint is damaged") == 1
    assert caplog.messages == ["afterwards"]
    package = logging.getLogger("repopt_jax")
    assert (package.handlers, package.level) == ([], logging.NOTSET)


def test_log_file_of_a_resumed_run_is_continued(tmp_path):
    for text in ("first", "second"):
        with Progress(tmp_path, 10, batch_size=1) as progress:
            progress.say(text)
    assert texts(tmp_path / "train.log") == ["first", "second"]


def test_other_processes_are_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Progress(tmp_path, 10, batch_size=1, terminal=True) as progress:
        progress.step(1)
        progress.report(1, loss=1.0, lr=0.1)
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []
