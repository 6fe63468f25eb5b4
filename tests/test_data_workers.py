"""Claims about worker processes: they change neither batches nor messages; none stays behind."""

import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import traceback

import numpy as np
import pytest
import simplejpeg

from repopt_jax.data import eval_batches, load_dataset, train_batches
from repopt_jax.data.randaugment import FIELDS, NAMES, Draw, apply_operations
from repopt_jax.data.workers import _Worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 8 training and 3 evaluation images of noise."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (40 + i, 50, 3)).astype(np.uint8)
                path = folder / split / name / f"{i}.jpg"
                path.write_bytes(simplejpeg.encode_jpeg(image))
    return folder


def batches_of(folder, **options):
    dataset = load_dataset("folder", data_dir=str(folder))
    arguments = {"batch_size": 4, "seed": 3, "augment": "raug15", "image_size": 32} | options
    return train_batches(dataset, **arguments)


def processes():
    """The worker processes of this process."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "serve"], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize(("augment", "workers"), [("none", 1), ("raug15", 3), ("jitter", 1)])
def test_batches_and_positions_do_not_depend_on_workers(folder, augment, workers):
    """Over two epochs, stopped and resumed with another number of them on the way."""
    alone = batches_of(folder, augment=augment, threads=0)
    ours = batches_of(folder, augment=augment, workers=workers)
    for step in range(8):
        if step == 5:
            resumed = batches_of(folder, augment=augment, workers=2)
            resumed.set_state(alone.get_state())
            ours = resumed
        expected, found = next(alone), next(ours)
        assert found["image"].dtype == np.uint8 and found["label"].dtype == np.int32
        for key in expected:
            np.testing.assert_array_equal(expected[key], found[key])
        assert alone.get_state() == ours.get_state()


def test_a_batch_stays_as_it_is_while_the_next_are_made(folder):
    """It does not lie in the memory that a process writes the next one to."""
    ours, alone = batches_of(folder, workers=1), batches_of(folder, threads=0)
    first = next(ours)
    for _ in range(4):
        next(ours)
    np.testing.assert_array_equal(first["image"], next(alone)["image"])


def test_evaluation_by_workers_is_the_same_every_time(folder):
    dataset = load_dataset("folder", data_dir=str(folder))
    arguments = {"batch_size": 4, "image_size": 32, "resize": 36}
    expected = list(eval_batches(dataset, threads=0, **arguments))
    ours = eval_batches(dataset, workers=2, **arguments)
    for _ in range(2):
        for a, b in zip(expected, ours, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])


def test_hosts_with_workers_see_the_batches_of_one(folder):
    whole = next(batches_of(folder, threads=0))
    parts = [next(batches_of(folder, workers=1, process_index=i, process_count=2)) for i in (0, 1)]
    together = np.concatenate([part["image"] for part in parts])
    np.testing.assert_array_equal(whole["image"], together)


@pytest.fixture
def broken(folder):
    """Two training images that cannot be decoded."""
    paths = [folder / "train" / "ant" / "2.jpg", folder / "train" / "bee" / "5.jpg"]
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"no image")
    yield folder
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)


def test_bad_images_of_all_workers_are_named_once(broken, caplog, capfd):
    """By their parent alone; and the images that stand in for them are the same."""
    found = {}
    for workers in (0, 2):
        dataset = load_dataset("folder", data_dir=str(broken))
        caplog.clear()
        batches = train_batches(
            dataset, batch_size=4, seed=0, image_size=32, skip_bad=True, workers=workers,
            num_epochs=2,
        )  # fmt: skip
        images = [batch["image"] for batch in batches]
        messages = {record.message.split(",")[0] for record in caplog.records}
        found[workers] = (images, dataset.bad_images, messages, len(caplog.records))
    np.testing.assert_array_equal(found[0][0], found[2][0])
    assert found[0][1:] == found[2][1:] and len(found[2][1]) == 2 and found[2][3] == 2
    assert "skipping" not in capfd.readouterr().err


def test_operations_for_the_device_are_those_of_the_image_that_stands_in(broken):
    for augment_on in ("host", "device"):
        dataset = load_dataset("folder", data_dir=str(broken))
        options = {"batch_size": 16, "seed": 0, "image_size": 32, "skip_bad": True}
        batch = next(train_batches(dataset, augment="jitter", augment_on=augment_on, **options))
        assert len(dataset.bad_images) == 2
        if augment_on == "host":
            expected = batch
    for image, rows, wanted in zip(
        batch["image"], batch["operations"], expected["image"], strict=True
    ):
        columns = [dict(zip(FIELDS, row, strict=True)) for row in rows]
        drawn = [(NAMES[int(c["operation"])], Draw(factor=c["factor"])) for c in columns]
        np.testing.assert_array_equal(apply_operations(image, drawn), wanted)


def test_an_error_in_a_worker_is_the_same_sentence(broken):
    told = []
    for workers in (0, 2):
        with pytest.raises(ValueError) as error:
            list(batches_of(broken, workers=workers, num_epochs=1, batch_size=16))
        told.append(str(error.value))
    assert told[0] == told[1] and "skip_bad=True" in told[0]


def test_a_killed_worker_ends_the_iteration_with_a_sentence(folder):
    batches = batches_of(folder, workers=2)
    next(batches)
    for pid in processes():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"a worker process .* status -9"):
        for _ in range(50):
            next(batches)


def test_the_error_about_a_lost_worker_can_be_collected():
    """From Python 3.13 on, a BytesIO with a view that goes at the same time says so anywhere."""
    worker = _Worker(1)
    for _ in range(2):  # the process ends in the first call, and the second cannot reach it
        with pytest.raises(OSError, match=r"a worker process .* status 3") as caught:
            worker.run(functools.partial(os._exit, 3), ())
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__context__.__traceback__)]
    values = [value for frame in frames for value in frame.f_locals.values()]
    views = [value for value in values if isinstance(value, memoryview)]
    assert views and all(isinstance(view.obj, bytes) for view in views)
    worker.stop()


def test_signals_to_a_whole_terminal_leave_workers_to_their_parent(folder):
    batches = batches_of(folder, workers=1, num_epochs=3)
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        for pid in processes():
            os.kill(pid, number)
    assert len(list(batches)) == 11


def test_signals_to_a_whole_terminal_do_not_end_workers_that_are_starting(folder, monkeypatch):
    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                self.send_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    assert len(list(batches_of(folder, workers=1, num_epochs=1))) == 4
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_load_no_jax_and_end_with_their_iterator(folder):
    before = processes()  # of an iterator that an error of another test keeps
    batches = batches_of(folder, workers=2)
    next(batches)
    started = [pid for pid in processes() if pid not in before]
    assert len(started) == 2
    for pid in started:
        deadline = time.monotonic() + 60  # one may still be importing
        while "cv2" not in (maps := pathlib.Path(f"/proc/{pid}/maps").read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not re.search("jaxlib|torch|tensorflow/", maps)
        environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes()
        assert b"OMP_NUM_THREADS=1\0" in environment  # not a thread per core in each process
    del batches
    assert wait_until_gone(started)


def test_importing_the_data_room_loads_no_jax():
    """Not even for a moment: a worker starts with this import."""
    code = "import repopt_jax.data, sys; print([n for n in ('jax', 'grain') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("end", ["sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_worker_outlives_its_parent(folder, end):
    code = f"""
import os, signal, subprocess, sys
from repopt_jax.data import load_dataset, train_batches
dataset = load_dataset("folder", data_dir={str(folder)!r})
batches = train_batches(dataset, batch_size=4, seed=0, image_size=32, workers=2)
next(batches)
subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "serve"])
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=120)
    assert done.returncode in (3, -signal.SIGKILL)
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2 and wait_until_gone(workers)


def wait_until_gone(pids):
    """Whether processes end within a while; long, for a machine that is busy."""
    for _ in range(300):
        if not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_a_data_set_that_cannot_be_sent_is_refused(folder):
    dataset = load_dataset("folder", data_dir=str(folder))
    dataset.train.hook = lambda: None
    with pytest.raises(ValueError, match=r"workers must be 0 for this data set: .*lambda"):
        next(train_batches(dataset, batch_size=4, seed=0, image_size=32, workers=1))


def test_negative_workers_are_refused(folder):
    with pytest.raises(ValueError, match="workers must be None or at least 0, got -1"):
        batches_of(folder, workers=-1)
