"""metrics.jsonl reads as one undisturbed run; JSON files are whole; the table is aligned."""

import json
import math
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from repopt_jax.training import report
from repopt_jax.training.report import MetricsWriter, format_table, read_metrics, write_json


def write_steps(workdir, steps, resumed_at=None, tensorboard=False):
    writer = MetricsWriter(workdir, resumed_at=resumed_at, tensorboard=tensorboard)
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


def test_scalars_of_any_library_become_numbers_and_nan_stays_valid_json(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
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


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
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
    write_steps(tmp_path, [1, 2, 3], tensorboard=True)
    write_steps(tmp_path, [3, 4], resumed_at=2, tensorboard=True)
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


def test_an_evaluation_joins_the_record_of_its_step(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
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
            report.append_text(path, line)
    assert (tmp_path / "here").read_text() == "1\n2\n3\n"
    assert (tmp_path / "there").read_text() == "1\n2\n3\n"


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_steps(tmp_path, [1, 2], tensorboard=True)
    write_json(tmp_path / "config.json", {})
    assert list(tmp_path.iterdir()) == []


def test_wrong_metrics_are_named(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"must be scalar numbers; got .* for 'loss'"):
        writer.write(1, {"loss": jnp.ones(3)})
    with pytest.raises(ValueError, match="must be scalar numbers; got 'high' for 'loss'"):
        writer.write(1, {"loss": "high"})
    with pytest.raises(ValueError, match="must not have the name 'step'"):
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
    with pytest.raises(ValueError, match=r"rows must have 2 cells, as the header; got \(1, 2, 3\)"):
        format_table([(1, 2), (1, 2, 3)], ("a", "b"))
