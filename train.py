"""Train by the RepOptimizer method: python train.py --config=configs/digits.py --workdir=DIR.

Without arguments the whole method runs on scikit-learn's digits. `--help` lists the flags;
`--config.FIELD=VALUE` overrides a field of the configuration.
"""

import pathlib
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags


def parse(argv):
    """Parse the flags; end with one sentence where they are wrong."""
    try:
        config_flags.DEFINE_config_file(
            "config",
            str(pathlib.Path(__file__).parent / "configs" / "digits.py"),
            "Configuration file, with an argument after a colon where it takes one.",
            lock_config=True,
        )
        flags.DEFINE_string("workdir", None, "Where everything goes. Default: runs/CONFIG.")
        flags.DEFINE_enum(
            "mode",
            "run",
            ["run", "eval", "throughput"],
            "run: train what is not finished; eval: evaluate the checkpoints in workdir; "
            "throughput: time the training step, without workdir.",
        )
        flags.DEFINE_string(
            "coordinator_address", None, "HOST:PORT of the first of many processes."
        )
        flags.DEFINE_integer("num_processes", None, "Number of processes.")
        flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
        unknown = flags.FLAGS(argv)[1:]
        _ = flags.FLAGS.config.parts  # that the file is not there shows only at its first use
    except flags.Error as error:
        lines = str(error).splitlines()  # of an error in the file: a traceback, the reason last
        stop(lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}", 2)
    except OSError as error:
        reason = str(error).splitlines()[-1].strip()
        stop(f"config must be a file that can be read, got this: {reason}", 2)
    except (AttributeError, KeyError) as error:  # ml_collections' answers to a misspelt field
        given = [x.split("=")[0] for x in argv if re.match("--?(no)?config[.]", x)]
        frames = traceback.extract_tb(error.__traceback__)
        if not given or any(frame.name == "get_config" for frame in frames):
            raise  # a mistake in the file, whose author wants to see the line
        missing = re.search(r"\w+", str(error)).group()
        wrong = [x for x in given if missing in x.split(".")] or given
        similar = re.search('did you mean "(.*?)"', str(error), re.IGNORECASE)
        hint = f"; did you mean {similar[1]!r} instead of {missing!r}?" if similar else ""
        field = wrong[0].split("config.", 1)[1]
        if field in fields_of_a_section():
            both = [f"--config.{section}.{field}" for section in ("search", "target")]
            hint = f"; did you mean {' or '.join(both)}?"
        stop(f"the configuration has no field {' '.join(wrong)}{hint}", 2)
    if unknown:
        stop(f"unknown arguments {unknown}; flags begin with --", 2)
    return argv[:1]


def fields_of_a_section():
    """The dotted fields that the search and the target have each of their own."""
    from repopt_jax.training.config import default_config

    section = default_config().target
    inner = {f"{k}.{f}" for k, v in section.items() if isinstance(v, ConfigDict) for f in v}
    return {*section, *inner}


def main(_):
    """Dispatch on --mode; end with one sentence where the run cannot go on."""
    logging.set_verbosity(logging.WARNING)  # absl would tell which backends jax looks for
    from repopt_jax.training import run
    from repopt_jax.training.processes import join_processes, leave_the_others
    from repopt_jax.training.stopping import RunStopped
    from repopt_jax.training.throughput import throughput

    given = flags.FLAGS
    try:
        join_processes(given.coordinator_address, given.num_processes, given.process_id)
    except (ValueError, RuntimeError) as error:
        stop(f"the processes cannot be joined: {error}", 2)
    name = pathlib.Path(config_flags.get_config_filename(given["config"])).stem
    workdir = given.workdir or f"runs/{name}"
    try:
        if given.mode == "run":
            run.run(given.config, workdir)
        elif given.mode == "eval":
            run.evaluate(given.config, workdir)
        else:
            throughput(given.config)
    except RunStopped as stopped:
        stop(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except Exception:  # not foreseen, so its traceback is wanted
        traceback.print_exc()
        leave_the_others(1)
        sys.exit(1)


def stop(sentence, exit_code):
    """End the process with a sentence instead of a traceback."""
    print(f"train.py: {sentence}", file=sys.stderr, flush=True)
    if "jax" in sys.modules and exit_code < 128:
        from repopt_jax.training.processes import leave_the_others

        leave_the_others(exit_code)
    sys.exit(exit_code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
