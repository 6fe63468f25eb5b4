"""The report of a run: progress on the screen, metrics in files, tables.

A working directory gets ``metrics.jsonl``, one JSON object per line with ``step``, ``epoch`` and
what was measured (``train/loss``, ``train/lr``, ``eval/top1``, ...), the same numbers as events of
TensorBoard under ``tensorboard``, and ``train.log``. Process 0 does all the writing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from repopt_jax.atomic_write import atomic_write

_log = logging.getLogger("repopt_jax")


def _json(content: Any, indent: int | None = None) -> str:
    """JSON has no NaN and no arrays: those become null and lists."""
    text = json.dumps(content, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=indent) + "\n"


def write_json(path: epath.PathLike, content: Any) -> None:
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
    _replace(epath.Path(path), _json(content, indent=2))


def _replace(path: epath.Path, text: str) -> None:
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        unfinished.write_text(text)


def _append(path: epath.Path, text: str) -> None:
    if "://" in str(path):  # objects in a bucket cannot grow: the whole is written anew
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; null becomes NaN, and a line cut off by a kill is left out.

    What was measured at one step is one record, though an evaluation has a line of its own.

    Args:
      path: the file; an absent one gives an empty list.
    """
    path = epath.Path(path)
    records: dict[int, dict[str, Any]] = {}  # by step
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            records.setdefault(record["step"], {}).update(record)
    return list(records.values())


class MetricsWriter:
    """Appends numbers to ``metrics.jsonl`` and to TensorBoard's events.

    A resumed run continues the file of the interrupted one. Lines of later steps than the one it
    resumes from are dropped, so that the file reads like that of an undisturbed run.

    Args:
      workdir: the run's directory, local or ``gs://``.
      resumed_at: step of the restored checkpoint; None starts a new file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     writer = MetricsWriter(workdir)
    ...     writer.write(100, {"train/loss": 2.5, "train/lr": 0.1})
    ...     writer.close()
    ...     print(epath.Path(workdir, "metrics.jsonl").read_text(), end="")
    {"step": 100, "train/loss": 2.5, "train/lr": 0.1}
    """

    def __init__(self, workdir: epath.PathLike, *, resumed_at: int | None = None):
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self._events = None
        if jax.process_index() != 0:
            return
        # Not tensorboardX's SummaryWriter, which writes in a thread: the first failure ends the
        # thread, and soon blocks the caller for ever.
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        kept = [] if resumed_at is None else read_metrics(self.path)
        kept = [record for record in kept if record["step"] <= resumed_at]
        _replace(self.path, "".join(map(_json, kept)))
        folder = self.path.parent / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard leaves out what an interrupted run wrote from this step on. It also keeps two
        # runs apart that start within one second.
        purge = 0 if resumed_at is None else resumed_at + 1
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{purge}"
        self._events = RecordWriter(str(folder / name))
        self._write_event(file_version="brain.Event:2")
        self._write_event(step=purge, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
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
                raise ValueError(f"metrics must be scalar numbers, got {value!r} for {name!r}")
            scalars[name] = number.item()
        if jax.process_index() != 0:
            return
        from tensorboardX.summary import scalar

        _append(self.path, _json({"step": int(step)} | scalars))
        for name, value in scalars.items():
            self._write_event(step=int(step), summary=scalar(name, value))
        self._events.flush()

    def _write_event(self, **fields):
        from tensorboardX.proto.event_pb2 import Event

        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        """Close TensorBoard's file; every `write` has already written its part."""
        if self._events is not None:
            with contextlib.suppress(OSError):  # a `write` that failed has raised already
                self._events.close()


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
            raise ValueError(f"rows must have {len(header)} cells, as the header, got {row!r}")
    cells = [[str(cell) for cell in row] for row in rows]
    columns = []
    for place, title in enumerate(header):
        column = [row[place] for row in cells]
        width = max(map(len, [title, *column]))
        align = str.rjust if column and all(map(_starts_as_number, column)) else str.ljust
        columns.append([align(cell, width) for cell in (title, "-" * width, *column)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _starts_as_number(cell: str) -> bool:
    return cell == "" or cell.lstrip("+-~<>")[:1].isdigit() or cell in ("-", "nan")


def format_seconds(seconds: float) -> str:
    """Write a duration in its two largest units.

    >>> [format_seconds(s) for s in (7.4, 200, 3725, 200_000)]
    ['7 s', '3 min 20 s', '1 h 02 min', '2 d 07 h']
    """
    seconds = round(seconds)
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    for size, unit, small, small_unit in units:
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // small:02d} {small_unit}"
    return f"{seconds} s"


class _Lines(logging.Handler):
    """Sends lines to the log file and, above the bar if there is one, to standard error."""

    def __init__(self, path: epath.Path, bar):
        super().__init__(logging.INFO)
        self.path, self.bar = path, bar
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record):
        line = self.format(record) + "\n"
        _append(self.path, line)
        if self.bar.disable or not getattr(record, "on_bar", False):
            with contextlib.suppress(OSError, ValueError):  # a closed terminal or pipe
                self.bar.write(line, file=sys.stderr, end="")


class Progress:
    """A bar where standard error is a terminal, lines elsewhere; the same lines in ``train.log``.

    While it is open, every line of the ``repopt_jax`` logger (warnings about damaged checkpoints
    among them) goes to the console and to the log file. Only process 0 shows and writes anything.

    Args:
      workdir: the run's directory, local or ``gs://``; a ``train.log`` in it is continued.
      total: number of updates of the whole run.
      batch_size: images per update, over all devices.
      resumed_at: number of updates that were done before.
      label: what is being done, such as ``search``.
      terminal: whether to draw a bar; None means where standard error is a terminal.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     with Progress(workdir, 10, batch_size=32, label="search", terminal=False) as progress:
    ...         for step in range(1, 11):
    ...             progress.step(step)
    ...             if step % 5 == 0:
    ...                 speed = progress.report(step, loss=2 / step, lr=0.1)
    ...     lines = epath.Path(workdir, "train.log").read_text().splitlines()
    >>> lines[1].split(" ", 2)[2].split(", ")[:3]
    ['search 10/10 (100 %)', 'loss 0.2000', 'lr 0.1']
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        total: int,
        *,
        batch_size: int,
        resumed_at: int = 0,
        label: str = "training",
        terminal: bool | None = None,
    ):
        self._total, self._batch_size, self._label = total, batch_size, label
        self._reported, self._since = resumed_at, time.perf_counter()
        self._compiled = False  # what the first report's time contains
        self._lines = None
        silent = jax.process_index() != 0
        self._bar = tqdm(
            desc=label,
            total=total,
            initial=resumed_at,
            file=sys.stderr,
            # None lets tqdm see whether that is a terminal.
            disable=True if silent else None if terminal is None else not terminal,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f} % |{bar}| {n}/{total}{postfix}",
        )
        if silent:
            return
        path = epath.Path(workdir) / "train.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = _Lines(path, self._bar)
        self._before = _log.level, _log.propagate
        _log.addHandler(self._lines)
        _log.setLevel(logging.INFO)
        _log.propagate = False  # absl's handler would print every line a second time

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
        if self._lines is not None:
            _log.removeHandler(self._lines)
            level, _log.propagate = self._before
            _log.setLevel(level)

    def step(self, step: int) -> None:
        """Move the bar to ``step``; cheap enough for every update."""
        self._bar.update(step - self._bar.n)

    def report(self, step: int, *, loss: float, lr: float) -> float:
        """Show the loss, the learning rate, images per second and the time left.

        The first report's time contains the compilation, so nothing can be said of the time left.

        Returns:
          Images per second since the last report, without the time spent in :meth:`paused`.
        """
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9) / max(step - self._reported, 1)  # per update
        self._reported, self._since = step, now
        speed, left = self._batch_size / seconds, seconds * (self._total - step)
        facts = f"loss {float(loss):.4f}, lr {float(lr):.3g}, {speed:,.0f} images/s"
        facts += f", {format_seconds(left)} left" if self._compiled else " with compiling"
        self._compiled = True
        self._bar.set_postfix_str(facts, refresh=False)
        self.step(step)
        done = f"{self._label} {step}/{self._total} ({100 * step / self._total:.0f} %)"
        _log.info("%s, %s", done, facts, extra={"on_bar": True})
        return speed

    def say(self, text: str) -> None:
        """Show one line, such as the result of an evaluation."""
        _log.info("%s", text)

    @contextlib.contextmanager
    def paused(self):
        """Keep the time spent inside, such as in an evaluation, out of the speed."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start
