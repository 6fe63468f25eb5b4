"""Claims about a preparation that ends early, or must not begin: a sentence, and nothing lost."""

import builtins
import concurrent.futures
import fcntl
import functools
import io
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg
import tqdm
from test_data_workers import wait_until_gone

from repopt_jax.data import eval_batches, load_dataset, prepare
from repopt_jax.data.decode import decode
from repopt_jax.data.prepare import main
from repopt_jax.data.sources import ArraySource


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Two classes of 4 training and 1 evaluation images, in files of at most 3."""
    monkeypatch.setattr("repopt_jax.data.prepare._SHARD_IMAGES", 3)
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for name in ("ant", "bee"):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (20 + i, 30, 3)).astype(np.uint8)
                (folder / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(image))
    return tmp_path / "source"


def load(folder):
    return load_dataset("folder", data_dir=str(folder))


@pytest.mark.parametrize("nth", range(1, 7))
def test_a_full_disk_ends_any_note_in_a_sentence_and_the_command_goes_on(
    source, tmp_path, monkeypatch, capsys, nth
):
    """The plan, what each of four files holds, and `dataset.json`."""
    expected = prepare.prepare(source, tmp_path / "whole", workers=0)
    opened = []

    def full(file, mode="r", *arguments, **options):
        result = io_open(file, mode, *arguments, **options)
        if "w" in mode and str(file).endswith(".json"):
            opened.append(file)
            if len(opened) == nth:
                result.write("{")
                result.close()
                raise OSError(28, "No space left on device")
        return result

    io_open = io.open
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", full)
        patch.setattr(builtins, "open", full)
        assert main([str(source), str(tmp_path / "ready"), "--workers=0"]) == 2
    assert capsys.readouterr().err.endswith("No space left on device\n")
    with pytest.raises(FileNotFoundError, match=r"data_dir must hold .* finished, got .*ready'"):
        load(tmp_path / "ready")
    assert prepare.prepare(source, tmp_path / "ready", workers=0) == expected
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "ready")]
    assert names[0] == names[1]


def test_a_full_disk_ends_a_file_of_images_in_a_sentence(source, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        assert main([str(source), str(tmp_path / "ready"), "--workers=0"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "train-00000-of-00003.array_record cannot be written" in error
    assert error.count("\n") == 1
    prepare.prepare(source, tmp_path / "ready", workers=0)
    assert len(load(tmp_path / "ready").train) == 8


def test_an_output_in_use_is_refused(source, tmp_path):
    (tmp_path / "ready").mkdir()
    other = os.open(tmp_path / "ready", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"output must not be in use, got '.*ready'"):
        prepare.prepare(source, tmp_path / "ready", workers=0)
    os.close(other)
    prepare.prepare(source, tmp_path / "ready", workers=0)


def test_what_another_command_has_begun_is_refused(source, tmp_path, monkeypatch):
    """Smaller images, or those of another source with the same names and classes."""
    monkeypatch.setattr(prepare, "_is_undamaged", lambda path: False)
    arguments = {"output": tmp_path / "ready", "workers": 0}
    with pytest.raises(ValueError, match="is not what was written"):
        prepare.prepare(source, max_side=24, **arguments)
    with pytest.raises(ValueError, match=r"output must be new .* got '.*ready'"):
        prepare.prepare(source, max_side=16, **arguments)
    source.rename(tmp_path / "other")
    with pytest.raises(ValueError, match=r"output must be new .* got '.*ready'"):
        prepare.prepare(tmp_path / "other", max_side=24, **arguments)


@pytest.mark.parametrize("place", ["train/ready", "val/bee/ready", "test"])
def test_an_output_among_the_images_is_refused_and_one_beside_them_is_not(source, place):
    with pytest.raises(ValueError, match=f"output must not lie among .* got '.*/{place}'"):
        prepare.prepare(source, source / place, workers=0)
    assert not (source / place).exists()
    prepare.prepare(source, source / "ready", workers=0)
    assert len(load(source).train) == len(load(source / "ready").train) == 8


def test_an_output_whose_name_is_no_text_is_refused(source, tmp_path):
    output = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match=r"output must be a name in UTF-8, got '.*caf\\xe9'"):
        prepare.prepare(source, output, workers=0)
    assert not output.exists()


@pytest.mark.parametrize("reason", ["gone", "not text"])
def test_a_source_that_cannot_be_opened_is_named_by_its_argument(source, tmp_path, reason):
    if reason == "gone":
        (source / "train").rename(source / "training")
    else:
        (source / "val" / "val_annotations.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"source must hold .*, got '.*source': "):
        prepare.prepare(source, tmp_path / "ready", workers=0)
    assert not (tmp_path / "ready").exists()


def test_images_none_of_which_can_be_decoded_are_refused(source, tmp_path):
    for path in (source / "val").glob("*/*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"source must hold images .* got none in 'val'"):
        prepare.prepare(source, tmp_path / "ready", workers=0)


def test_a_file_without_images_can_be_read_beside_others(source, tmp_path):
    for i in range(3):
        (source / "train" / "ant" / f"{i}.jpg").write_bytes(b"no image")
    facts = prepare.prepare(source, tmp_path / "ready", workers=0)
    assert [shard["images"] for shard in facts["splits"]["train"]["shards"]] == [0, 3, 2]
    assert facts["splits"]["train"]["images_by_class"] == [1, 4]
    train = load(tmp_path / "ready").train
    assert [train[i]["label"] for i in range(len(train))] == [0, 1, 1, 1, 1]


def test_a_file_that_breaks_off_is_found_and_written_anew(source, tmp_path, monkeypatch):
    write, path = prepare._write_shard, tmp_path / "ready" / "val-00000-of-00001.array_record"

    def damaging(job):
        facts = write(job)
        if job[2] == path:
            os.truncate(path, 70_000)
        return facts

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_shard", damaging)
        with pytest.raises(ValueError, match=r"val-00000-of-00001\.array_record is not what was"):
            prepare.prepare(source, tmp_path / "ready", workers=0)
    prepare.prepare(source, tmp_path / "ready", workers=0)
    assert len(load(tmp_path / "ready").eval) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 2}'])
def test_facts_of_something_else_are_refused(source, content):
    """Other tools call their files `dataset.json` too."""
    (source / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"data_dir must hold the format version 1, got "):
        load(source)


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda path: path.write_bytes(b"no")])
def test_a_prepared_file_that_is_lost_or_damaged_is_named(source, tmp_path, damage):
    prepare.prepare(source, tmp_path / "ready", workers=0)
    damage(tmp_path / "ready" / "train-00001-of-00003.array_record")
    with pytest.raises(OSError, match=r"the data set in .*ready cannot be read: "):
        load(tmp_path / "ready")


def test_all_images_count_as_progress(source, tmp_path, monkeypatch):
    """Those of files that are there already too, so that the end is all of them."""
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})

        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(prepare, "_is_undamaged", lambda path: False)
    for _ in range(2):
        with pytest.raises(ValueError, match="is not what was written"):
            prepare.prepare(source, tmp_path / "ready", workers=0)
    assert set(bars) == {(10, 10)}


def test_a_worker_per_core_prepares(monkeypatch):
    counts = []

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, count, *_, **__):
            counts.append(count)
            super().__init__(1)

    monkeypatch.setattr(prepare, "usable_cores", lambda: 7)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    for workers in (None, 2):
        with prepare._mapping(workers, ()):
            pass
    assert counts == [7, 2]


def test_ctrl_c_reaches_no_process_of_the_command():
    """Not even one that is starting; what it means is up to their parent."""
    with prepare._mapping(1, ()) as run:
        (blocked,) = run(functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK), [()])
    assert signal.SIGINT in blocked and signal.SIGTERM not in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_processes_end_in_the_middle_of_a_file(tmp_path):
    """An interrupted or failed command does not wait for the 10,000 images of each."""
    begun = tmp_path / "begun"
    job = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(20)"
    with prepare._mapping(1, ()) as run:
        results = run(exec, [job])
        while not begun.exists():
            time.sleep(0.01)
    with pytest.raises(concurrent.futures.BrokenExecutor):
        next(results)


@pytest.mark.parametrize("killed", ["worker", "parent"])
def test_a_kill_leaves_no_process_and_is_told(source, tmp_path, killed):
    ant = source / "train" / "ant"
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3)).astype(np.uint8)
    (ant / "0.jpg").write_bytes(simplejpeg.encode_jpeg(noise))
    for i in range(10, 1000):  # some seconds of work
        os.link(ant / "0.jpg", ant / f"{i}.jpg")
    module = ["-m", "repopt_jax.data.prepare", source, tmp_path / "ready", "--workers=2"]
    process = subprocess.Popen([sys.executable, *module], stderr=subprocess.PIPE, text=True)
    while not (workers := children(process.pid)):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid if killed == "parent" else workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    if killed == "worker":
        assert process.returncode == 1
        assert "a worker process has ended" in error and error.count("\n") == 1
    assert wait_until_gone(workers)


def test_the_narrowest_image_keeps_a_pixel(source, tmp_path):
    image = simplejpeg.encode_jpeg(np.zeros((400, 1, 3), np.uint8))
    (source / "val" / "ant" / "0.jpg").write_bytes(image)
    prepare.prepare(source, tmp_path / "ready", max_side=16, workers=0)
    assert decode(load(tmp_path / "ready").eval[0]["image"]).shape == (16, 1, 3)


def test_one_image_can_be_read_without_its_neighbours(source, tmp_path):
    """Training reads them in random order."""
    from array_record.python.array_record_module import ArrayRecordReader

    prepare.prepare(source, tmp_path / "ready", workers=0)
    reader = ArrayRecordReader(str(tmp_path / "ready" / "train-00000-of-00003.array_record"))
    assert "group_size:1," in reader.writer_options_string()
    reader.close()


def test_a_worker_that_ends_while_others_start_is_told(source, tmp_path, monkeypatch, capsys):
    def submit(*_):
        raise BrokenPipeError

    monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, "submit", submit)
    assert main([str(source), str(tmp_path / "ready")]) == 1
    assert "a worker process has ended" in capsys.readouterr().err


def children(pid):
    """The processes that another one has started to work for it."""
    command = ["pgrep", "-P", str(pid), "-f", "spawn_main"]
    return [int(x) for x in subprocess.run(command, capture_output=True).stdout.split()]


def test_images_of_unusual_files_are_prepared_as_they_are_read(source, tmp_path):
    """A PNG and a JPEG of one name in two classes, grey, CMYK; spaces and letters of any script."""
    from PIL import Image

    ant = (source / "train" / "ant").rename(source / "train" / "ä nt 蟻")
    (source / "val" / "ant").rename(source / "val" / "ä nt 蟻")
    noise = np.random.default_rng(0).integers(0, 256, (33, 31, 4)).astype(np.uint8)
    Image.fromarray(noise[..., :3]).save(ant / "1.png")
    Image.fromarray(noise[..., 0]).save(ant / "grey 2.jpg")
    Image.fromarray(noise, "CMYK").save(source / "train" / "bee" / "x é.jpg")
    prepare.prepare(source, tmp_path / "ready", workers=0)
    ready = load(tmp_path / "ready")
    assert not isinstance(ready.train, ArraySource) and ready.class_names == ("bee", "ä nt 蟻")
    expected, found = (
        next(iter(eval_batches(load(folder), split="train", batch_size=11, image_size=24)))
        for folder in (source, tmp_path / "ready")
    )
    assert found["mask"].all()
    np.testing.assert_array_equal(found["image"], expected["image"])
    np.testing.assert_array_equal(found["label"], expected["label"])
