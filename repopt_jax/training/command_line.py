"""The command `repopt-train`, which `train.py` runs too: flags, modes and exit codes."""

from __future__ import annotations

import difflib
import pathlib
import re
import sys
import traceback

from repopt_jax.extras import needs_extra

PROGRAM = pathlib.Path(sys.argv[0]).name

with needs_extra("train", command=PROGRAM):
    from absl import app, flags, logging
    from ml_collections import ConfigDict, config_flags

    from repopt_jax.training.config import default_config

DEFAULT_CONFIG = pathlib.Path(__file__).parent / "digits.py"
MODES = {
    "run": "train what is not finished",
    "eval": "evaluate the checkpoints in workdir",
    "throughput": "time the training step, without workdir",
}


def main() -> None:
    """Run the command with the arguments of the process."""
    app.run(_dispatch, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """Define and parse the flags; end with one sentence where they are wrong."""
    _check_fields(argv)
    try:
        config_flags.DEFINE_config_file(
            "config",
            str(DEFAULT_CONFIG),
            "Configuration file, with an argument after a colon where it takes one.",
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


def _check_fields(argv: list[str]) -> None:
    """Refuse a second --config, and names of fields that no configuration has."""
    files = [argument for argument in argv if re.match("--?config(=|$)", argument)]
    if len(files) > 1:
        _stop(f"config must be given once, got {' '.join(files)}", 2)
    for argument in argv[1:]:
        given = re.match(r"--?(?:no)?config\.([^=\[]+)", argument)
        if given is None:
            continue
        section = default_config()
        for key in given[1].split("."):
            if not isinstance(section, ConfigDict) or key not in section:
                flag = argument.split("=")[0]
                hint = _hint(section, key, given[1])
                _stop(f"the configuration has no field {flag}{hint}", 2)
            section = section[key]


def _hint(section: object, key: str, field: str) -> str:
    """A guess at what the unknown `key` of a section, or the whole `field`, should have been."""
    if field in _fields(default_config().target):
        return f"; did you mean --config.search.{field} or --config.target.{field}?"
    names = list(section) if isinstance(section, ConfigDict) else []
    similar = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {similar[0]!r} instead of {key!r}?" if similar else ""


def _fields(section: ConfigDict) -> set[str]:
    """The dotted names of everything in a section."""
    found = set(section)
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            found |= {f"{name}.{inner}" for inner in _fields(value)}
    return found


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
