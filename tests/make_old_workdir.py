"""Builds `old_workdir.tar.xz`: an interrupted run of an earlier version, and how it ends there.

    PYTHONPATH=CHECKOUT JAX_ENABLE_X64=1 python tests/make_old_workdir.py tests/old_workdir.tar.xz

CHECKOUT is the earlier version; the archive in this folder is of commit 72e0e07. The run is a
search and a target, which SIGTERM stops in the middle of its second epoch. Beside its working
directory lies what the same version ends with when it goes on from there: the arrays of the final
state by path, and the metrics. All is computed in float64, so that another machine, another number
of devices or another version of JAX changes the last digits only.
"""

import contextlib
import os
import pathlib
import runpy
import shutil
import signal
import sys
import tarfile
import tempfile

import numpy as np

SETTINGS = {
    "parts": ("search", "target"),
    "model.num_blocks": (1, 1, 1, 1),
    "model.widths": (4, 4, 4, 8, 8),
    "model.strides": (1, 2, 2, 1, 1),
    "dtype": "float64",
    "log_every": 1,
    "eval_every": 1.0,
    "checkpoint.keep": 1,
    "search.bn_group": 8,
    "target.bn_group": 8,
    "search.batch_size": 128,
    "target.batch_size": 128,
    "search.epochs": 1.0,
    "target.epochs": 2.0,  # 22 steps
    "target.ema_decay": 0.9,
    "target.mix.mixup": 0.2,
}
STOPPED_AFTER = 13  # steps of the target


def configuration():
    import repopt_jax

    digits = pathlib.Path(repopt_jax.__file__).parents[1] / "configs" / "digits.py"
    config = runpy.run_path(str(digits))["get_config"]()
    config.update_from_flattened_dict(SETTINGS)
    return config


@contextlib.contextmanager
def sigterm_in_the_target():
    from repopt_jax.training.report import MetricsWriter

    write = MetricsWriter.write

    def write_and_stop(self, step, metrics):
        write(self, step, metrics)
        if step == STOPPED_AFTER and self.path.parent.name == "target":
            os.kill(os.getpid(), signal.SIGTERM)

    MetricsWriter.write = write_and_stop
    yield
    MetricsWriter.write = write


def build(folder):
    from repopt_jax.training import run
    from repopt_jax.training.checkpoints import Checkpoints
    from repopt_jax.training.stopping import RunStopped

    workdir, finished = folder / "workdir", folder / "finished"
    with sigterm_in_the_target(), contextlib.suppress(RunStopped):
        run.run(configuration(), workdir)
    shutil.copytree(workdir, finished)
    run.run(configuration(), finished)
    checkpoints = Checkpoints(finished / "target", read_only=True)
    _, arrays = checkpoints.restore()
    checkpoints.close()
    np.savez_compressed(folder / "final_state.npz", **arrays)
    shutil.move(finished / "target" / "metrics.jsonl", folder / "final_metrics.jsonl")
    shutil.rmtree(finished)
    # What resuming does not read would only make the archive larger.
    *older, _ = sorted((workdir / "target" / "checkpoints").iterdir(), key=lambda p: int(p.name))
    for unread in [workdir / "search" / "checkpoints", *workdir.glob("*/tensorboard"), *older]:
        shutil.rmtree(unread)
    for drawn in workdir.glob("*.png"):
        drawn.unlink()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as name:
        build(pathlib.Path(name))
        with tarfile.open(sys.argv[1], "w:xz") as archive:
            archive.add(name, ".")
