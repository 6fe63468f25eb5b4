"""train.py as its user meets it: flags, modes, and one sentence for what is wrong."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]


def train_py(*flags, folder, devices=1):
    """Run train.py in `folder`."""
    xla_flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *flags],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": xla_flags},
        capture_output=True,
        text=True,
        timeout=300,
    )


WRONG_FLAGS = [
    (["--config.nope=1"], "the configuration has no field nope"),
    (
        ["--config.seed=1", "--config.search.epoch=3"],
        "no field search.epoch; did you mean --config.search.epochs",
    ),
    (
        ["--config.data.data_dir=/data"],
        "did you mean --config.target.data.data_dir or --config.search.data.data_dir?",
    ),
    (["--config.serch.epochs=3"], "did you mean --config.search.epochs"),
    (["--config.seed=first"], "flag --config.seed=first: invalid literal for int()"),
    (["--config.search.epochs=many"], "flag --config.search.epochs=many: could not convert"),
    (["--config=nowhere.py"], "config must be a file that can be read, got this: [Errno 2]"),
    (["--config=nowhere.py", "--config.search.epochs=3"], "config must be a file that can be read"),
    ([f"--config={REPOSITORY}/configs/digits.py:x"], "get_config() takes 0 positional arguments"),
    (["--config=a.py", "--config=b.py"], "config must be given once, got --config=a.py --config=b"),
    (
        ["--config.parts=search", "--config.parts=('target',)"],
        "config.parts must be given once, got --config.parts=search --config.parts=('target',)",
    ),
    (
        ["--config.model.widths=(8, 8)", "--config.model.widths", "(8, 8, 8)"],  # None by default
        "config.model.widths must be given once",
    ),
    (["--config.target.data.name.x=1"], "the configuration has no field target.data.name.x"),
    (["--mode=sleep"], "flag --mode=sleep: value should be one of <run|eval|throughput>"),
    (["--colour=red"], "Unknown command line flag 'colour'"),
    (["configs/digits.py"], "unknown arguments ['configs/digits.py']"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG_FLAGS, ids=lambda x: str(x)[:40])
def test_wrong_flags_end_with_one_sentence(flags, message, tmp_path):
    done = train_py("--workdir=new", *flags, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("train.py: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_configuration_file_shows_its_line(tmp_path):
    """Its author needs more than a sentence."""
    lines = ["from repopt_jax.training.config import default_config", "def get_config():"]
    lines += ["    config = default_config()", "    config.serch.epochs = 3", "    return config"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    done = train_py("--config=mine.py", "--config.seed=1", folder=tmp_path)
    assert done.returncode != 0
    assert "config.serch.epochs = 3" in done.stderr


def test_a_batch_that_eight_devices_cannot_share_ends_with_one_sentence(tmp_path):
    """As all that `run` refuses; nothing is written."""
    done = train_py("--config.target.batch_size=100", folder=tmp_path, devices=8)
    assert done.returncode == 2
    assert re.fullmatch("train.py: target: batch_size must be .*8 devices.*got 100\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_eval_mode_without_a_run_ends_with_one_sentence(tmp_path):
    """The default working directory is named after the configuration."""
    done = train_py("--mode=eval", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "train.py: workdir must hold a run with checkpoints, got runs/digits\n"
    assert list(tmp_path.iterdir()) == []


def test_help_tells_the_flags(tmp_path):
    done = train_py("--help", folder=tmp_path)
    names = ("config", "workdir", "mode", "coordinator_address", "num_processes", "process_id")
    assert all(f"--{name}" in done.stdout for name in names)


UNFORESEEN = f"""
import runpy, sys
from repopt_jax.training import processes, run
def fail(*_):
    raise RuntimeError("unforeseen")
run.run = fail
processes.leave_the_others = lambda status: print("left with status", status)
sys.argv = ["train.py"]
runpy.run_path({str(REPOSITORY / "train.py")!r}, run_name="__main__")
"""


def test_an_unforeseen_error_shows_its_traceback_and_does_not_wait_for_other_processes(tmp_path):
    """They wait for this one in their next sum of gradients, and would for minutes."""
    done = subprocess.run(
        [sys.executable, "-c", UNFORESEEN], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == "left with status 1\n"
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.count("RuntimeError: unforeseen") == 1


def test_a_console_that_nobody_reads_is_outlived():
    """As after `train.py 2>&1 | head -3`, and with a terminal that was closed."""
    code = """
import os, sys
from repopt_jax.training.command_line import _Console
read, write = os.pipe()
os.close(read)
console = _Console(open(write, "w"))
for _ in range(3):
    print("a line", file=console, flush=True)
assert not console.isatty()
sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_tilde_is_the_home_folder(tmp_path):
    """No shell expands one after an equals sign."""
    (tmp_path / "mine.py").write_text("from repopt_jax.training.digits import get_config\n")
    environment = os.environ | {"HOME": str(tmp_path)}
    flags = ["--mode=eval", "--config=~/mine.py", "--workdir=~/x"]
    arguments = [sys.executable, str(REPOSITORY / "train.py"), *flags]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.endswith(f"got {tmp_path}/x\n")
