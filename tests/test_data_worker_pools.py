"""Claims about pools of worker processes: how many there are, what they are sent and send back."""

import contextlib
import functools
import gc
import os
import subprocess

import grain
import numpy as np
import pytest

from repopt_jax.data import Dataset, eval_batches, load_dataset, pipeline, train_batches
from repopt_jax.data.sources import ArraySource
from repopt_jax.data.workers import _Worker, usable_cores


class Encoded:
    """Eight images that would have to be decoded."""

    def __init__(self, read=None):
        self.read = read

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.read()


def dataset_of(source):
    return Dataset("own", 1, source, source, (8, 8, 3))


def first_batch(source):
    return next(train_batches(dataset_of(source), batch_size=4, seed=0, workers=1))


@pytest.fixture
def pools(monkeypatch):
    """The arguments of every pool, none of which starts a process, and of its threads."""
    found = []

    def pool(make, count, image_bytes):
        found.append({"make": make, "count": count, "image_bytes": image_bytes})
        return make

    def options(**given):
        found.append(given)
        return real(**given)

    real = grain.ReadOptions
    monkeypatch.setattr(pipeline, "WorkerPool", pool)
    monkeypatch.setattr(grain, "ReadOptions", options)
    return found


@pytest.mark.parametrize(
    ("cores", "encoded", "expected"), [(4, True, 4), (3, True, 0), (16, False, 0)]
)
def test_images_to_decode_get_a_worker_per_core_of_at_least_four(
    pools, monkeypatch, cores, encoded, expected
):
    monkeypatch.setattr(pipeline, "usable_cores", lambda: cores)
    source = Encoded() if encoded else load_dataset("digits").train
    train_batches(dataset_of(source), batch_size=4, seed=0, workers=None)
    *pool, options = pools
    assert sum(p["count"] for p in pool) == expected
    assert options == {"num_threads": cores, "prefetch_buffer_size": 2 * cores}


def test_every_worker_has_a_thread_that_waits_for_it(pools):
    """However many threads there would be without workers; two batches ahead."""
    train_batches(dataset_of(Encoded()), batch_size=4, seed=0, workers=5, threads=1)
    assert pools[1] == {"num_threads": 5, "prefetch_buffer_size": 10}


def test_a_worker_gets_one_split_and_room_for_its_own_images(pools):
    data, host = dataset_of(Encoded()), {"process_index": 1, "process_count": 2}
    train_batches(data, batch_size=8, seed=0, workers=1, **host)
    eval_batches(data, batch_size=6, split="train", workers=1)
    eval_batches(data, batch_size=6, image_size=4, workers=1)
    first, second, third = (pool["make"].dataset for pool in pools[::2])
    assert first.train is second.train is third.eval is data.train
    assert first.eval is second.eval is third.train is None
    sizes = [pool["image_bytes"] for pool in pools[::2]]
    assert sizes == [4 * 8 * 8 * 3, 6 * 8 * 8 * 3, 6 * 4 * 4 * 3]


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 7}, raising=False)
    assert usable_cores() == 3


def test_a_worker_leaves_no_file_open():
    gc.collect()  # what earlier tests left must not close meanwhile
    open_files = len(os.listdir("/proc/self/fd"))
    worker = _Worker(1)
    with contextlib.suppress(OSError):
        worker.run(functools.partial(os._exit, 3), ())
    worker.stop()
    del worker
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= open_files


def test_a_worker_that_ends_before_it_has_its_data_set_is_told(monkeypatch):
    """A set of a million files is more than a connection holds."""

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.kill()
            self.wait()

    monkeypatch.setattr(subprocess, "Popen", Popen)
    worker = _Worker(1)
    with pytest.raises(OSError, match=r"a worker process .* status -9"):
        worker.run(functools.partial(len, bytes(10**7)), ())
    worker.stop()


class Unsendable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def fail():
    raise Unsendable("seven", "eight")


def test_an_error_that_cannot_be_sent_is_told_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"in fail\n(.*\n)*.*Unsendable: seven eight"):
        first_batch(Encoded(fail))


class LoadedOnlyHere(Encoded):
    """As a class of the main program, whose module a worker does not know."""

    def __reduce__(self):
        return _load_only_in, (os.getpid(),)


def _load_only_in(process):
    if os.getpid() != process:
        raise AttributeError("the class is not in this process")
    return LoadedOnlyHere()


def test_a_data_set_that_a_worker_cannot_load_is_refused():
    with pytest.raises(ValueError, match=r"workers must be 0 for this data set: .*not in this"):
        first_batch(LoadedOnlyHere())


def test_workers_find_modules_where_their_parent_does(tmp_path, monkeypatch):
    (tmp_path / "own_images.py").write_text(
        "import numpy\n"
        "def read():\n"
        "    return {'image': numpy.full((8, 8, 3), 7, numpy.uint8), 'label': 0}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_images

    assert (first_batch(Encoded(own_images.read))["image"] == 7).all()


def test_the_seed_decides_what_is_drawn():
    """And not only the order."""
    one = ArraySource(np.zeros((64, 8, 8, 3), np.uint8), np.zeros(64))
    arguments = {"batch_size": 64, "augment": "flip_crop", "images": False}
    draws = [
        next(train_batches(dataset_of(one), seed=seed, **arguments))["draw"] for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
