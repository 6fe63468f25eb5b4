"""Train by the RepOptimizer method: python train.py --config=configs/digits.py --workdir=DIR.

Without arguments the whole method runs on scikit-learn's digits. `--help` lists the flags;
`--config.FIELD=VALUE` overrides a field of the configuration.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(pathlib.Path(__file__).parent / "configs" / "digits.py"),
    "Configuration file, with an argument after a colon where it takes one.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes. Default: runs/CONFIG.")
_MODE = flags.DEFINE_enum(
    "mode",
    "run",
    ["run", "eval", "throughput"],
    "run: train what is not finished; eval: evaluate the checkpoints in workdir; "
    "throughput: time the training step, without workdir.",
)


def main(argv):
    """Dispatch on --mode; end with one sentence where the run cannot go on."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # absl would tell which backends jax looks for
    from repopt_jax.training import run
    from repopt_jax.training.loop import RunStopped
    from repopt_jax.training.throughput import throughput

    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or f"runs/{name}"
    try:
        if _MODE.value == "run":
            run.run(_CONFIG.value, workdir)
        elif _MODE.value == "eval":
            run.evaluate(_CONFIG.value, workdir)
        else:
            throughput(_CONFIG.value)
    except RunStopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    app.run(main)
