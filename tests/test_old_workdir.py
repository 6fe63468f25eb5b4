"""A working directory that an earlier version left behind is gone on with."""

import pathlib
import tarfile

import numpy as np
import pytest
from make_old_workdir import configuration

from repopt_jax.training import run
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.report import read_metrics

ARCHIVE = pathlib.Path(__file__).with_name("old_workdir.tar.xz")
TIMES = {"seconds", "train/images_per_second"}
SINCE = {"train/input_wait", "eval/input_wait"}  # was not measured then


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.slow
def test_the_run_ends_with_the_numbers_that_the_earlier_version_ends_with(old, x64):
    """Up to rounding, which other devices and compilers change: from step 14 to 22, in float64.

    The batches, their mixing, momentum, averages and multipliers all have to go on.
    """
    run.run(configuration(), old / "workdir")
    checkpoints = Checkpoints(old / "workdir" / "target", read_only=True)
    step, found = checkpoints.restore()
    checkpoints.close()
    expected = np.load(old / "final_state.npz")
    assert step == 22
    # Paths of variables ended in "/value" then.
    expected = {path.removesuffix("/value"): array for path, array in expected.items()}
    assert set(found) == set(expected)
    for path, array in expected.items():
        assert found[path].dtype == array.dtype
        np.testing.assert_allclose(found[path], array, rtol=1e-9, atol=1e-12, err_msg=path)
    expected = read_metrics(old / "final_metrics.jsonl")
    metrics = read_metrics(old / "workdir" / "target" / "metrics.jsonl")
    for one, other in zip(metrics, expected, strict=True):
        assert one.keys() - SINCE == other.keys()
        for name in other.keys() - TIMES:
            rtol = 1e-5 if name.startswith("eval") else 1e-9  # clu sums in float32
            np.testing.assert_allclose(one[name], other[name], rtol=rtol, err_msg=name)
