"""What a run leaves behind: numbers by step, JSON files, and a table at its end.

A working directory gets ``metrics.jsonl``, one JSON object per line with ``step``, ``epoch`` and
what was measured (``train/loss``, ``train/lr``, ``eval/top1``, ...), and TensorBoard events under
``tensorboard``. Process 0 does all the writing.
"""

import contextlib
import json
import math
import socket
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from repopt_jax.atomic_write import atomic_write


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no arrays: those become null and lists."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _jsonable(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def write_json(path: epath.PathLike, content: Any):
    """Write a JSON file that is either the old or the new one, never half of it.

    Args:
      path: file to write, local or ``gs://``; its directory is created where it is absent.
      content: dicts, lists, strings, numbers and arrays; NaN and infinities become null, and
        anything else its ``str``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     write_json(f"{workdir}/summary.json", {"top1": np.float32(78.5), "loss": math.nan})
    ...     print(epath.Path(workdir, "summary.json").read_text())
    {
      "top1": 78.5,
      "loss": null
    }
    <BLANKLINE>
    """
    _replace(epath.Path(path), json.dumps(_jsonable(content), indent=2) + "\n")


def _replace(path: epath.Path, text: str):
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        unfinished.write_text(text)


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; null becomes NaN, and a line cut off by a kill is left out.

    What was measured at one step is one record, though an evaluation has a line of its own.

    Args:
      path: the file; an absent one gives an empty list.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        record = {k: math.nan if v is None else v for k, v in record.items()}
        if records and records[-1]["step"] == record["step"]:
            records[-1] |= record
        else:
            records.append(record)
    return records


def append_text(path: epath.Path, text: str):
    """Write at the end of a file.

    Args:
      path: local or ``gs://``. Objects in a bucket cannot grow; there the whole is written anew.
      text: what to add.
    """
    if "://" in str(path):
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


class MetricsWriter:
    """Appends numbers to ``metrics.jsonl`` and to TensorBoard's events.

    A resumed run continues the file of the interrupted one. Lines of later steps than the one it
    resumes from are dropped, so that the file reads like that of an undisturbed run.

    Args:
      workdir: the run's directory, local or ``gs://``.
      resumed_at: step of the restored checkpoint; None starts a new file.
      tensorboard: also write TensorBoard events.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     writer = MetricsWriter(workdir, tensorboard=False)
    ...     writer.write(100, {"train/loss": 2.5, "train/lr": 0.1})
    ...     print(epath.Path(workdir, "metrics.jsonl").read_text(), end="")
    {"step": 100, "train/loss": 2.5, "train/lr": 0.1}
    """

    def __init__(
        self, workdir: epath.PathLike, *, resumed_at: int | None = None, tensorboard: bool = True
    ):
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self._events = None
        if jax.process_index() != 0:
            return
        kept = [] if resumed_at is None else read_metrics(self.path)
        kept = [record for record in kept if record["step"] <= resumed_at]
        _replace(self.path, "".join(_line(record) for record in kept))
        if tensorboard:
            # Not its SummaryWriter, which writes in a thread: the first failure ends the thread,
            # and soon blocks the caller for ever.
            from tensorboardX.proto.event_pb2 import SessionLog
            from tensorboardX.record_writer import RecordWriter

            folder = self.path.parent / "tensorboard"
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard leaves out what an interrupted run wrote from this step on. It also keeps
            # two runs apart that start within one second.
            purge = 0 if resumed_at is None else resumed_at + 1
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{purge}"
            self._events = RecordWriter(str(folder / name))
            self._write_event(file_version="brain.Event:2")
            self._write_event(step=purge, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: dict[str, Any]):
        """Append one line.

        Args:
          step: number of updates done.
          metrics: scalars by name: Python's, NumPy's or JAX's (which are waited for).

        Raises:
          ValueError: for a value that is no scalar, or the name ``step``.
          OSError: where a file cannot be written.
        """
        if "step" in metrics:
            raise ValueError("metrics must not have the name 'step', which is the first argument")
        scalars = {}
        for name, value in metrics.items():
            number = np.asarray(value)
            if number.ndim or not jnp.issubdtype(number.dtype, jnp.number):
                raise ValueError(f"metrics must be scalar numbers; got {value!r} for {name!r}")
            scalars[name] = number.item()
        if jax.process_index() != 0:
            return
        append_text(self.path, _line({"step": int(step)} | scalars))
        if self._events is not None:
            from tensorboardX.summary import scalar

            for name, value in scalars.items():
                self._write_event(step=int(step), summary=scalar(name, value))
            self._events.flush()

    def _write_event(self, **fields):
        from tensorboardX.proto.event_pb2 import Event

        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self):
        """Close TensorBoard's file; every `write` has already written its part."""
        if self._events is not None:
            with contextlib.suppress(OSError):  # a `write` that failed has raised already
                self._events.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_jsonable(record)) + "\n"


def format_table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Align a table as plain text: words to the left, numbers to the right.

    Args:
      rows: cells by row; anything that is not a string is printed by ``str``.
      header: one word or more per column.

    Raises:
      ValueError: for a row with another number of cells than the header.

    >>> rows = [("search", 240, "71.20 %"), ("RepOptimizer", 1200, "78.62 %")]
    >>> print(format_table(rows, ["part", "epochs", "top-1"]))
    part          epochs    top-1
    ------------  ------  -------
    search           240  71.20 %
    RepOptimizer    1200  78.62 %
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows must have {len(header)} cells, as the header; got {row!r}")
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True)) or [()] * len(header)
    widths = [
        max(map(len, (title, *column))) for title, column in zip(header, columns, strict=True)
    ]
    right = [bool(column) and all(map(_starts_as_number, column)) for column in columns]

    def line(row):
        parts = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def _starts_as_number(cell: str) -> bool:
    return cell == "" or cell.lstrip("+-~<>")[:1].isdigit() or cell in ("-", "nan")
