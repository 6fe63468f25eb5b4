"""No damaged or unfinished checkpoint gives wrong numbers, stops a run or costs the one before."""

import logging
import resource
import signal
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repopt_jax.training import checkpoints as checkpoints_module
from repopt_jax.training.checkpoints import Checkpoints


def numbers(seed, size=2000):
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=size), jnp.float32)}


def bits(state):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), state)


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def two_saved(workdir):
    """Write steps 1 and 2; return the data set, of which step n has seen n elements."""
    dataset = grain.MapDataset.range(100).shuffle(seed=1).to_iter_dataset()
    checkpoints, iterator = Checkpoints(workdir), iter(dataset)
    for step in (1, 2):
        next(iterator)
        checkpoints.save(step, numbers(step), iterator, metrics={"top1": step / 10})
    checkpoints.close()
    return dataset


def flip(content, rng):
    content = bytearray(content)
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return bytes(content)


DAMAGES = {
    "a flipped bit": flip,
    "cut in half": lambda content, rng: content[: len(content) // 2],
    "garbage": lambda content, rng: rng.bytes(len(content)),
    "empty": lambda content, rng: b"",
    "deleted": lambda content, rng: None,
}


def test_a_checkpoint_that_another_process_cannot_read_is_not_used_here_either(
    tmp_path, monkeypatch
):
    """Else they would go on from different steps, and sum the gradients of different weights."""
    dataset = two_saved(tmp_path)
    answers = [[1.0], [0.0]]
    monkeypatch.setattr(checkpoints_module, "agreed", lambda own: answers.pop(0))
    iterator = iter(dataset)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    step, restored = checkpoints.restore(numbers(0), iterator)
    checkpoints.close()
    assert (step, answers) == (1, [])
    assert bits(restored) == bits(numbers(1))
    fresh = iter(dataset)
    next(fresh)
    assert iterator.get_state() == fresh.get_state()


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_any_file_gives_wrong_numbers_or_stops_the_run(tmp_path, damage, caplog):
    """Either the file did not matter, or the checkpoint before is used and the log says so."""
    dataset, rng = two_saved(tmp_path), np.random.default_rng(0)
    newest = tmp_path / "checkpoints" / "2"
    fallbacks = 0
    for path in files(newest):
        content = path.read_bytes()
        changed = DAMAGES[damage](content, rng)
        path.unlink() if changed is None else path.write_bytes(changed)
        caplog.clear()
        iterator = iter(dataset)
        checkpoints = Checkpoints(tmp_path, read_only=True)
        step, restored = checkpoints.restore(numbers(0), iterator)
        checkpoints.close()
        path.write_bytes(content)
        assert bits(restored) == bits(numbers(step)), path
        assert iterator.get_state() == {"next_index": step}, path
        told = [
            r
            for r in caplog.records
            if r.levelno == logging.WARNING and str(newest) in r.msg % r.args
        ]
        assert len(told) == (step == 1), path
        fallbacks += step == 1
    assert fallbacks >= 4  # the arrays, their index, the manifest and the data's position


def test_flipped_bit_among_the_numbers_is_noticed(tmp_path):
    two_saved(tmp_path)
    largest = max(files(tmp_path / "checkpoints" / "2"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(OSError, match="numbers of w "):
        checkpoints.restore(numbers(0), step=2)
    assert checkpoints.restore(numbers(0))[0] == 1
    checkpoints.close()


def test_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(tmp_path):
    two_saved(tmp_path)
    (tmp_path / "checkpoints" / "2" / "manifest" / "metadata").write_text("{")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(numbers(0))[0] == 1
    checkpoints.save(2, numbers(22))
    step, restored = checkpoints.restore(numbers(0))
    checkpoints.close()
    assert (step, bits(restored)) == (2, bits(numbers(22)))


def test_damaged_checkpoint_does_not_count_among_those_to_keep(tmp_path):
    two_saved(tmp_path)
    (tmp_path / "checkpoints" / "2" / "manifest" / "metadata").unlink()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(numbers(0))
    checkpoints.save(3, numbers(3))
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]


def test_it_is_an_error_rather_than_a_fresh_start_when_every_checkpoint_is_damaged(tmp_path):
    two_saved(tmp_path)
    for path in files(tmp_path):
        path.write_bytes(b"?")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(OSError, match=rf"{tmp_path}/checkpoints .*\[2, 1\]"):
        checkpoints.restore(numbers(0))
    checkpoints.close()


KILLED_WHILE_SAVING = """
import os, pathlib, signal, sys, threading, time
import jax.numpy as jnp, numpy as np
from repopt_jax.training.checkpoints import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep_latest=1)
checkpoints.save(1, {"w": jnp.ones(8)})
checkpoints.wait()
checkpoints.save(2, {"w": jnp.asarray(np.random.default_rng(0).normal(size=1 << 24), jnp.float32)})
print([path.name for path in pathlib.Path(sys.argv[1], "checkpoints").iterdir()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "'1'" in killed.stdout and "'2'" not in killed.stdout  # the second was unfinished
    checkpoints = Checkpoints(tmp_path)
    step, restored = checkpoints.restore({"w": jnp.zeros(8)})
    checkpoints.close()
    assert (step, restored["w"].tolist()) == (1, [1.0] * 8)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_failed_write_is_told_deletes_nothing_and_does_not_end_saving(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    checkpoints.save(1, numbers(1))
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=f"step 2 .*{tmp_path}"):
            checkpoints.save(2, numbers(2, size=1 << 20))
            checkpoints.restore(numbers(0))  # as save and close do, waits for the one before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    step, restored = checkpoints.restore(numbers(0))
    assert (step, bits(restored)) == (1, bits(numbers(1)))
    checkpoints.save(2, numbers(2))
    assert checkpoints.restore(numbers(0))[0] == 2
    checkpoints.close()
    assert checkpoints.steps() == [2]


def test_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=f"{tmp_path}.* 0 MB .* 4 MB"):
        checkpoints.save(1, numbers(1, size=1 << 20))
    checkpoints.close()
    assert files(tmp_path) == []


def test_directory_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"workdir .*{tmp_path}/file/run"):
        Checkpoints(tmp_path / "file" / "run")


def test_other_reads_that_failed_are_not_told_a_second_time(tmp_path, caplog):
    """asyncio tells them when it forgets them, which depends on how fast the machine is."""
    Checkpoints(tmp_path).close()
    told = "Task exception was never retrieved\nfuture: <Task finished exception=ValueError('%s')>"
    for error in ("Error reading a/.zarray in OCDBT database", "of somebody else"):
        logging.getLogger("asyncio").error(told, error)
    assert [record.args for record in caplog.records] == [("of somebody else",)]
