"""The command `repopt-train`, which `train.py` runs too: flags, modes and exit codes."""

from __future__ import annotations

import contextlib
import difflib
import functools
import operator
import os
import pathlib
import re
import sys
import traceback

from repopt_jax.extras import needs_extra

PROGRAM = pathlib.Path(sys.argv[0]).name

with needs_extra("train", command=PROGRAM):
    from absl import app, flags, logging
    from ml_collections import config_dict, config_flags

    from repopt_jax.training.config import default_config, flat

DEFAULT_CONFIG = pathlib.Path(__file__).parent / "digits.py"
MODES = {
    "run": "train what is not finished",
    "eval": "evaluate the checkpoints in workdir",
    "throughput": "time the training step, without workdir",
}


class _Console:
    """A standard stream that a run outlives: writes are lost once nobody reads, as after `head`."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with self._outlived():
            return self._stream.write(text)

    def flush(self):
        with self._outlived():
            self._stream.flush()

    @contextlib.contextmanager
    def _outlived(self):
        try:
            yield
        except OSError:  # what is buffered goes nowhere, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def main() -> None:
    """Run the command with the arguments of the process."""
    sys.stdout, sys.stderr = _Console(sys.stdout), _Console(sys.stderr)
    app.run(_dispatch, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """Define and parse the flags; end with one sentence where they are wrong."""
    argv = [_expanded(argument) for argument in argv]
    _check_fields(argv)
    try:
        config_flags.DEFINE_config_file(
            "config",
            str(DEFAULT_CONFIG),
            "Configuration file, with an argument after a colon where it takes one; "
            "--config.FIELD=VALUE changes a field.",
            lock_config=True,
        )
        flags.DEFINE_string("workdir", None, "Where everything goes. Default: runs/CONFIG.")
        modes = "; ".join(f"{mode}: {what}" for mode, what in MODES.items())
        flags.DEFINE_enum("mode", "run", list(MODES), f"{modes}.")
        flags.DEFINE_string(
            "coordinator_address", None, "HOST:PORT of the first of many processes."
        )
        flags.DEFINE_integer("num_processes", None, "Number of processes.")
        flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
        for flag in flags.FLAGS.get_flags_for_module(__name__):  # else --help would not list them
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
        unknown = flags.FLAGS(argv)[1:]
        _ = flags.FLAGS.config.parts  # a file that is not there shows only at its first use
    except flags.Error as error:
        lines = str(error).splitlines()  # of an error in the file: a traceback, the reason last
        _stop(lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}", 2)
    except OSError as error:
        reason = str(error).splitlines()[-1].strip()
        _stop(f"config must be a file that can be read, got this: {reason}", 2)
    if unknown:
        _stop(f"unknown arguments {unknown}; flags begin with --", 2)
    return argv[:1]


def _expanded(argument: str) -> str:
    """The flag --config with the home folder for a ~, which no shell expands after a =."""
    flag, equals, path = argument.partition("=")
    return flag + equals + os.path.expanduser(path) if flag.lstrip("-") == "config" else argument


def _check_fields(argv: list[str]) -> None:
    """Refuse names of fields that no configuration has, and a second flag where one is expected.

    The values of a tuple's flags would add up; of all other flags, the last counts.
    """
    config = default_config()
    fields = flat(config.to_dict())
    for name in ("config", *(f"config.{field}" for field in fields if _is_tuple(config, field))):
        given = [a for a in argv[1:] if re.match(f"--?{re.escape(name)}(=|$)", a)]
        if len(given) > 1:
            _stop(f"{name} must be given once, got {' '.join(given)}", 2)
    for argument in argv[1:]:
        given = re.match(r"--?(?:no)?config\.([^=\[]+)", argument)
        if given and given[1] not in fields:
            similar = difflib.get_close_matches(given[1], fields, n=2)
            hint = f"; did you mean --config.{' or --config.'.join(similar)}?" if similar else ""
            _stop(f"the configuration has no field {given[1]}{hint}", 2)


def _is_tuple(config: config_dict.ConfigDict, field: str) -> bool:
    *sections, name = field.split(".")
    return functools.reduce(operator.getitem, sections, config).get_type(name) is tuple


def _dispatch(_) -> None:
    """Do what --mode says; end with one sentence where the run cannot go on."""
    logging.set_verbosity(logging.WARNING)  # absl would log which backends jax looks for
    with needs_extra("train", command=PROGRAM):
        from repopt_jax.training import run
        from repopt_jax.training.interruption import RunStopped
        from repopt_jax.training.processes import (
            end_if_another_is_lost,
            join_processes,
            leave_the_others,
        )

    given = flags.FLAGS
    try:
        join_processes(given.coordinator_address, given.num_processes, given.process_id)
    except (ValueError, RuntimeError) as error:
        _stop(f"the processes cannot be joined: {error}", 2)
    name = pathlib.Path(config_flags.get_config_filename(given["config"])).stem
    workdir = given.workdir or f"runs/{name}"
    try:
        if given.mode == "run":
            run.run(given.config, workdir)
        elif given.mode == "eval":
            run.evaluate(given.config, workdir)
        else:
            run.throughput(given.config)
    except RunStopped as stopped:
        _stop(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except Exception:  # not foreseen, so its traceback is wanted
        end_if_another_is_lost()
        traceback.print_exc()
        leave_the_others(1)
        sys.exit(1)


def _stop(sentence: str, exit_code: int) -> None:
    """End the process with a sentence instead of a traceback."""
    joined = "jax" in sys.modules and exit_code < 128
    if joined:
        from repopt_jax.training.processes import end_if_another_is_lost, leave_the_others

        end_if_another_is_lost()
    print(f"{PROGRAM}: {sentence}", file=sys.stderr, flush=True)
    if joined:
        leave_the_others(exit_code)
    sys.exit(exit_code)
