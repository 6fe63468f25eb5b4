"""Shows a person how training goes: a bar on a terminal, lines elsewhere, and a log file always."""

import contextlib
import logging
import sys
import time

import jax
from etils import epath

from repopt_jax.training.report import append_text

_log = logging.getLogger("repopt_jax")


def format_seconds(seconds: float) -> str:
    """Write a duration in its two largest units.

    >>> [format_seconds(s) for s in (7.4, 200, 3725, 200_000)]
    ['7 s', '3 min 20 s', '1 h 02 min', '2 d 07 h']
    """
    seconds = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // small:02d} {small_unit}"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


class _Lines(logging.Handler):
    """Sends lines to the log file and, above the bar if there is one, to standard error."""

    def __init__(self, path: epath.Path, bar):
        super().__init__(logging.INFO)
        self.path, self.bar = path, bar
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record):
        line = self.format(record) + "\n"
        append_text(self.path, line)
        if self.bar is None:
            sys.stderr.write(line)
        elif not getattr(record, "on_bar", False):
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
        self._bar = self._lines = None
        if jax.process_index() != 0:
            return
        if sys.stderr.isatty() if terminal is None else terminal:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=label,
                total=total,
                initial=resumed_at,
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f} % |{bar}| {n}/{total}{postfix}",
            )
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
        self.close()

    def step(self, step: int):
        """Move the bar to ``step``; cheap enough for every update."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, *, loss: float, lr: float) -> float:
        """Tell the loss, the learning rate, images per second and the time left.

        Returns:
          Images per second since the last report, without the time spent in :meth:`paused`.
        """
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9) / max(step - self._reported, 1)  # per update
        self._reported, self._since = step, now
        speed, left = self._batch_size / seconds, seconds * (self._total - step)
        facts = f"loss {float(loss):.4f}, lr {float(lr):.3g}, {speed:,.0f} images/s, "
        facts += f"{format_seconds(left)} left"
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self.step(step)
        done = f"{self._label} {step}/{self._total} ({100 * step / self._total:.0f} %)"
        _log.info("%s, %s", done, facts, extra={"on_bar": True})
        return speed

    def say(self, text: str):
        """Tell one line, such as the result of an evaluation."""
        _log.info("%s", text)

    @contextlib.contextmanager
    def paused(self):
        """Keep the time spent inside, such as in an evaluation, out of the speed."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def close(self):
        """End the bar and give the logger back."""
        if self._bar is not None:
            self._bar.close()
        if self._lines is not None:
            _log.removeHandler(self._lines)
            level, _log.propagate = self._before
            _log.setLevel(level)
        self._bar = self._lines = None
