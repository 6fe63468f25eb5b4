"""A run of the whole method in seconds, for scripts and tests that start or stop runs.

Two parts on scikit-learn's digits: a search and the target that is trained with its scales.
"""

import pathlib
import runpy
import socket
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
      lines: send it once the log has that many steps.
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


def start_joined(workdir, *flags: str, **options) -> list[subprocess.Popen]:
    """Start two processes of this machine that train together; what they write is piped.

    Args:
      workdir: their directory.
      *flags: of the run.
      **options: of `subprocess.Popen`.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    joined = [*command(workdir, *flags), f"--coordinator_address={address}", "--num_processes=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([*joined, f"--process_id={index}"], **pipes, **options)
        for index in range(2)
    ]


def kill_one(both: list[subprocess.Popen], victim: int, workdir, *, lines: int, delay: float):
    """Kill one of two joined processes.

    Args:
      both: from `start_joined`.
      victim: which of them.
      workdir: their directory.
      lines: kill once that many steps are in the metrics.
      delay: seconds to wait after that.

    Returns:
      The victim's exit status; the other's, what that one wrote to standard error, and after how
      many seconds it ended.
    """
    try:
        while all(process.poll() is None for process in both) and lines_written(workdir) < lines:
            time.sleep(0.002)
        time.sleep(delay)
        both[victim].kill()
        begun = time.monotonic()
        _, said = both[1 - victim].communicate(timeout=300)
        seconds = time.monotonic() - begun
        both[victim].communicate()
        return both[victim].returncode, both[1 - victim].returncode, said, seconds
    finally:
        for process in both:
            process.kill()
