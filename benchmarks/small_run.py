"""A run of the whole method in seconds, for scripts and tests that start or stop runs.

Two parts on scikit-learn's digits: a search and the target that is trained with its scales.
"""

import pathlib
import runpy
import subprocess
import sys
import time

from ml_collections import ConfigDict

REPOSITORY = pathlib.Path(__file__).parents[1]

SETTINGS = {
    "parts": ("search", "target"),
    "model.num_blocks": (1, 1, 1, 1),
    "model.widths": (4, 4, 4, 8, 8),
    "model.strides": (1, 2, 2, 1, 1),
    "search.bn_group": 8,
    "target.bn_group": 8,
    "search.batch_size": 128,  # 11 steps an epoch
    "target.batch_size": 128,
    "search.eval_batch_size": 100,  # 360 images: the last batch is a partial one
    "target.eval_batch_size": 100,
    "search.epochs": 2.0,
    "target.epochs": 3.0,
    "target.ema_decay": 0.9,
    "log_every": 1,
    "eval_every": 1.0,
    "checkpoint.every": 0.25,  # every third step
}


def small_config(**changes) -> ConfigDict:
    """The configuration; `changes` are by field, with `__` for the dot."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "digits.py"))["get_config"]()
    given = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(SETTINGS | given)
    return config


def command(workdir, *flags: str) -> list[str]:
    """The command of the run whose configuration `small_config` returns."""
    train = [sys.executable, str(REPOSITORY / "train.py"), f"--workdir={workdir}"]
    return [*train, *(f"--config.{key}={value}" for key, value in SETTINGS.items()), *flags]


def lines_written(workdir) -> int:
    """How many steps the run has told in the metrics of both parts."""
    files = [pathlib.Path(workdir) / part / "metrics.jsonl" for part in SETTINGS["parts"]]
    return sum(file.read_text().count("\n") for file in files if file.exists())


def interrupt(arguments: list[str], workdir, signal, *, lines: int, delay: float, **options):
    """Start a run and send it a signal.

    Args:
      arguments: the command.
      workdir: its directory.
      signal: what to send.
      lines: send it once that many steps are told.
      delay: seconds to wait after that.
      **options: of `subprocess.Popen`.

    Returns:
      Its exit status, and what it wrote to standard error.
    """
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, **pipes, **options) as process:
        while process.poll() is None and lines_written(workdir) < lines:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal)
        _, said = process.communicate(timeout=300)
    return process.returncode, said
