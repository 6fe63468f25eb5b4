"""metrics.jsonl reads as one undisturbed run; JSON files are whole; the table is aligned.

The same facts reach a terminal, a plain console and the log file.
"""

import contextlib
import errno
import io
import json
import logging
import math
import pathlib
import re
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from repopt_jax.training import report
from repopt_jax.training.report import (
    MetricsWriter,
    Progress,
    format_table,
    read_metrics,
    write_json,
)


@pytest.fixture
def writer(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path)) as writer:
        yield writer


def write_steps(workdir, steps, resumed_at=None):
    writer = MetricsWriter(workdir, resumed_at=resumed_at)
    for step in steps:
        writer.write(step, {"train/loss": 1 / step, "epoch": step / 10})
    writer.close()


def test_interrupted_and_resumed_run_leaves_the_file_of_an_undisturbed_one(tmp_path):
    write_steps(tmp_path / "whole", range(1, 21))
    write_steps(tmp_path / "parts", range(1, 14))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "trai')  # killed while writing
    write_steps(tmp_path / "parts", range(11, 21), resumed_at=10)
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert parts.read_text() == whole.read_text()


def test_run_that_starts_anew_does_not_keep_the_lines_of_another(tmp_path):
    write_steps(tmp_path, range(1, 5))
    write_steps(tmp_path, range(1, 3))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_scalars_of_any_library_become_numbers_and_nan_stays_valid_json(tmp_path, writer):
    writer.write(
        jnp.int32(3), {"a": jnp.float32(0.5), "b": np.int64(2), "c": 7, "d": jnp.float32(jnp.nan)}
    )
    writer.write(4, {"e": jnp.bfloat16(1.5), "f": math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"step": 3, "a": 0.5, "b": 2, "c": 7, "d": null}',
        '{"step": 4, "e": 1.5, "f": null}',
    ]
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["d"])


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path, writer):
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == step


def events(path):
    """Events of a TensorBoard file: records of length, checksum, content, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, place = path.read_bytes(), 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        yield Event.FromString(content[place + 12 : place + 12 + length])
        place += 16 + length


def test_tensorboard_gets_the_same_numbers_and_is_told_what_to_drop(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    write_steps(tmp_path, [3, 4], resumed_at=2)
    values, starts = [], []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        for event in events(path):
            starts += [event.step] * (event.session_log.status == event.session_log.START)
            values += [
                (event.step, round(1 / value.simple_value))
                for value in event.summary.value
                if value.tag == "train/loss"
            ]
    assert sorted(values) == [(1, 1), (2, 2), (3, 3), (3, 3), (4, 4)]
    assert sorted(starts) == [0, 3]


def test_tensorboard_on_a_full_disk_is_told_by_the_write_and_not_again_at_the_end(
    tmp_path, monkeypatch
):
    """In the caller's thread, where it ends the run; a thread of its own would hang it."""
    full = pathlib.Path("/dev/full")
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda _: full.open("wb"))
    writer = MetricsWriter(tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        writer.write(1, {"train/loss": 1.0})
    writer.close()


def test_an_evaluation_joins_the_record_of_its_step(tmp_path, writer):
    for metrics in ({"train/loss": 2.0, "seconds": 1.0}, {"eval/top1": 50.0, "seconds": 3.0}):
        writer.write(1, metrics)
    writer.write(2, {"train/loss": 1.0})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "train/loss": 2.0, "seconds": 3.0, "eval/top1": 50.0}
    assert second == {"step": 2, "train/loss": 1.0}


def test_files_in_a_bucket_grow_though_their_objects_cannot(tmp_path):
    """Of what opens there for appending, nothing but the last line would be left."""

    class Bucket(type(pathlib.Path())):
        def __str__(self):
            return "gs://bucket/metrics.jsonl"

        def __fspath__(self):
            return super().__str__()

        def open(self, mode="r", *args, **kwargs):
            return super().open(mode.replace("a", "w"), *args, **kwargs)

    for path in (Bucket(tmp_path / "there"), tmp_path / "here"):
        for line in ("1\n", "2\n", "3\n"):
            report._append(path, line)
    assert (tmp_path / "here").read_text() == "1\n2\n3\n"
    assert (tmp_path / "there").read_text() == "1\n2\n3\n"


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_steps(tmp_path, [1, 2])
    write_json(tmp_path / "config.json", {})
    assert list(tmp_path.iterdir()) == []


def test_wrong_metrics_are_named(tmp_path, writer):
    with pytest.raises(ValueError, match=r"metrics .*, got .* for 'loss'"):
        writer.write(1, {"loss": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"metrics .*, got 'high' for 'loss'"):
        writer.write(1, {"loss": "high"})
    with pytest.raises(ValueError, match=r"metrics .* 'step'"):
        writer.write(1, {"step": 2})
    assert read_metrics(tmp_path / "metrics.jsonl") == read_metrics(tmp_path / "absent") == []


def test_json_file_stays_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"top1": 1})
    file_class = type(epath.Path(path))
    write_text = file_class.write_text

    def killed_half_way(self, text, *args, **kwargs):
        write_text(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(file_class, "write_text", killed_half_way)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"top1": 2})
    assert json.loads(path.read_text()) == {"top1": 1}
    monkeypatch.undo()
    write_json(path, {"top1": 3})
    assert json.loads(path.read_text()) == {"top1": 3}
    assert list(path.parent.iterdir()) == [path]


def test_json_holds_arrays_paths_and_what_json_lacks(tmp_path):
    content = {
        "a": (np.arange(2), jnp.float32(0.5)),
        3: pathlib.Path("x"),
        "n": [math.nan, None, True],
    }
    write_json(tmp_path / "c.json", content)
    read = json.loads((tmp_path / "c.json").read_text())
    assert read == {"a": [[0, 1], 0.5], "3": "x", "n": [None, None, True]}


def test_table_aligns_words_left_and_numbers_right():
    rows = [("a", 1, "-"), ("long name", "+12.5 %", "3 h"), ("", "", "1")]
    assert format_table(rows, ("part", "gain", "time")).splitlines() == [
        "part          gain  time",
        "---------  -------  ----",
        "a                1     -",
        "long name  +12.5 %   3 h",
        "                       1",
    ]
    assert format_table([], ("a", "b")) == "a  b\n-  -"


def test_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"rows .* 2 .*, got \(1, 2, 3\)"):
        format_table([(1, 2), (1, 2, 3)], ("a", "b"))


class Clock:
    """Seconds that pass only when told."""

    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(report, "time", clock)
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
    "search 2/400 (0 %), loss 0.5000, lr 0.1, 512 images/s with compiling",
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
        clock.now += 10
        progress.report(394, loss=1.0, lr=0.1)
    first, second = texts(tmp_path / "train.log")
    assert first.endswith("51 images/s with compiling")
    assert second.endswith("51 images/s, 30 s left")


def test_time_of_an_evaluation_is_kept_out_of_the_speed(tmp_path, clock):
    with Progress(tmp_path, 10, batch_size=100) as progress:
        clock.now += 1
        with progress.paused():
            clock.now += 1000
        progress.report(1, loss=1.0, lr=0.1)
    assert ", 100 images/s" in texts(tmp_path / "train.log")[0]


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


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_that_has_gone_leaves_the_log_file(tmp_path, monkeypatch, terminal):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    with Progress(tmp_path, 10, batch_size=1, terminal=terminal) as progress:
        for text in ("first", "second"):
            progress.say(text)
    assert texts(tmp_path / "train.log") == ["first", "second"]
