"""Claims about prepared sets: the same images as the source, resumable, checked."""

import io
import json
import tarfile

import numpy as np
import pytest
import scipy.io
import simplejpeg
from PIL import Image

from repopt_jax.data import eval_batches, load_dataset, prepare, train_batches
from repopt_jax.data.decode import decode
from repopt_jax.data.prepare import main
from repopt_jax.data.sources import ArraySource

NAMES = ("n01", "n02", "n03")


def image(seed, height=40, width=50):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return simplejpeg.encode_jpeg(noise)


@pytest.fixture
def source(tmp_path):
    """Three classes of 4 training and 2 evaluation images, one of which is broken."""
    seed = 0
    for split, count in (("train", 4), ("val", 2)):
        for name in NAMES:
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                seed += 1
                (folder / f"{i}.JPEG").write_bytes(image(seed, height=40 + seed))
    (tmp_path / "source" / "train" / "n02" / "3.JPEG").write_bytes(b"no image")
    return tmp_path / "source"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("repopt_jax.data.prepare._SHARD_IMAGES", 5)


def load(folder, **options):
    return load_dataset("folder", data_dir=str(folder), **options)


def items(source):
    return [source[i] for i in range(len(source))]


def test_a_prepared_set_holds_the_images_of_its_source(source, tmp_path, small_shards):
    """In their order, with labels and names, but for the broken one, which is listed."""
    facts = prepare.prepare(source, tmp_path / "ready", workers=0)
    ready, original = load(tmp_path / "ready"), load(source)
    assert ready.num_classes == 3 and ready.image_shape is None
    for split in ("train", "eval"):
        expected = [i for i in items(getattr(original, split)) if i["image"] != b"no image"]
        found = items(getattr(ready, split))
        assert [(i["image"], i["label"]) for i in found] == [
            (i["image"], i["label"]) for i in expected
        ]
        assert [f"{source}/{i['name']}" for i in found] == [i["name"] for i in expected]
    splits = facts["splits"]
    assert splits["train"]["bad_images"] == ["train/n02/3.JPEG"]
    assert splits["train"]["images_by_class"] == [4, 3, 4]
    assert splits["val"]["images_by_class"] == [2, 2, 2]
    assert [shard["images"] for shard in splits["train"]["shards"]] == [5, 4, 2]
    assert facts == json.loads((tmp_path / "ready" / "dataset.json").read_text())
    assert not [p for p in (tmp_path / "ready").iterdir() if "unfinished" in p.name]


def test_batches_of_a_prepared_set_are_those_of_the_folder(source, tmp_path):
    (source / "train" / "n02" / "3.JPEG").unlink()
    prepare.prepare(source, tmp_path / "ready", workers=0)
    for workers in (0, 2):
        for folder in (source, tmp_path / "ready"):
            arguments = {"batch_size": 4, "seed": 1, "augment": "raug15", "image_size": 24}
            batches = train_batches(load(folder), workers=workers, **arguments)
            first = [next(batches)["image"] for _ in range(3)]
            if folder is source:
                expected = first
        np.testing.assert_array_equal(first, expected)
    (batch,) = eval_batches(load(tmp_path / "ready"), batch_size=6, image_size=24)
    assert batch["label"].tolist() == [0, 0, 1, 1, 2, 2]


def test_an_interrupted_command_goes_on_to_the_same_files(
    source, tmp_path, small_shards, monkeypatch
):
    expected = prepare.prepare(source, tmp_path / "whole", workers=0)
    decoded = []

    def interrupted(data):
        decoded.append(data)
        if len(decoded) == 8:
            raise KeyboardInterrupt
        return decode(data)

    monkeypatch.setattr("repopt_jax.data.prepare.decode", interrupted)
    assert main([str(source), str(tmp_path / "ready"), "--workers=0"]) == 130
    first = tmp_path / "ready" / "train-00000-of-00003.array_record"
    before = first.stat().st_mtime_ns
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "ready")
    assert prepare.prepare(source, tmp_path / "ready", workers=0) == expected
    assert first.stat().st_mtime_ns == before
    assert len(decoded) == 8 + 18 - 5


def test_what_is_there_already_is_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output must be new .* got '.*full'"):
        prepare.prepare(source, tmp_path / "full")
    prepare.prepare(source, tmp_path / "ready", workers=0)
    with pytest.raises(ValueError, match=r"output must be new .* got '.*ready'"):
        prepare.prepare(source, tmp_path / "ready", workers=0)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "unfinished.json").write_text('{"max_side": 64}')
    with pytest.raises(ValueError, match=r"output must be new .* got '.*begun'"):
        prepare.prepare(source, tmp_path / "begun")
    with pytest.raises(ValueError, match="max_side must be None or at least 1, got 0"):
        prepare.prepare(source, tmp_path / "new", max_side=0)
    with pytest.raises(ValueError, match="workers must be None or at least 0, got -1"):
        prepare.prepare(source, tmp_path / "new", workers=-1)
    with pytest.raises(FileNotFoundError, match=r"source must be an existing folder, got '.*gone'"):
        prepare.prepare(tmp_path / "gone", tmp_path / "new")


@pytest.mark.parametrize("damage", ["changed", "exchanged"])
def test_a_file_that_is_damaged_on_the_way_is_found_and_written_anew(
    source, tmp_path, small_shards, monkeypatch, damage
):
    """Bytes that ArrayRecord's own checksum finds, or a good file in the place of another."""
    write, path = prepare._write_shard, tmp_path / "ready" / "train-00001-of-00003.array_record"

    def damaging(job):
        facts = write(job)
        if job[2] == path:
            content = path.read_bytes().replace(b"train/n02/1.JPEG", b"train/n02/7.JPEG")
            other = path.with_name("train-00000-of-00003.array_record").read_bytes()
            path.write_bytes(content if damage == "changed" else other)
        return facts

    monkeypatch.setattr(prepare, "_write_shard", damaging)
    with pytest.raises(ValueError, match=r"train-00001-of-00003\.array_record is not what was"):
        prepare.prepare(source, tmp_path / "ready", workers=0)
    monkeypatch.undo()
    monkeypatch.setattr("repopt_jax.data.prepare._SHARD_IMAGES", 5)
    prepare.prepare(source, tmp_path / "ready", workers=0)
    assert len(load(tmp_path / "ready").train) == 11


def test_larger_images_are_stored_smaller(source, tmp_path):
    (source / "val" / "n01" / "0.JPEG").write_bytes(image(0, 200, 100))
    (source / "val" / "n01" / "1.JPEG").write_bytes(image(0, 20, 32))
    prepare.prepare(source, tmp_path / "ready", max_side=32, workers=0)
    dataset = load(tmp_path / "ready")
    large, small = dataset.eval[0], dataset.eval[1]
    assert decode(large["image"]).shape == (32, 16, 3) and large["image"][:2] == b"\xff\xd8"
    assert small["image"] == image(0, 20, 32)
    smaller = Image.fromarray(decode(image(0, 200, 100))).resize((16, 32), Image.Resampling.LANCZOS)
    smaller.save(expected := io.BytesIO(), "JPEG", quality=95)
    assert large["image"] == expected.getvalue()
    assert max(max(decode(i["image"]).shape) for i in items(dataset.train)) == 32


def test_images_of_one_size_are_cached_as_those_of_tfds(source, tmp_path):
    for i, path in enumerate(sorted(source.glob("*/*/*.JPEG"))):
        path.write_bytes(image(i, 16, 16))
    prepare.prepare(source, tmp_path / "ready", workers=0)
    dataset = load(tmp_path / "ready")
    assert dataset.image_shape == (16, 16, 3) and isinstance(dataset.train, ArraySource)
    assert load(tmp_path / "ready", classes=[2]).train.labels.tolist() == [0] * 4
    (source / "train" / "n03" / "2.JPEG").write_bytes(image(0, 16, 17))
    assert prepare.prepare(source, tmp_path / "other", workers=0)["image_shape"] is None


def add(tar, name, data):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def official(source, tmp_path):
    """The same images in ImageNet's tar files; ILSVRC numbers the classes in another order."""
    folder = tmp_path / "official"
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in NAMES[::-1]:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for path in sorted((source / "train" / name).iterdir())[::-1]:
                    add(inner, f"{name}_{path.name}", path.read_bytes())
            add(outer, f"{name}.tar", buffer.getvalue())
        add(outer, "README", b"no class")
    numbers = {"n01": 2, "n02": 3, "n03": 1}
    truth = []
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        tar.add(source / "val", "val", recursive=False)
        mixed = sorted((source / "val").glob("*/*.JPEG"), key=lambda path: path.name)
        for i, path in enumerate(mixed, 1):
            add(tar, f"ILSVRC2012_val_{i:08d}.JPEG", path.read_bytes())
            truth.append(f"{numbers[path.parent.name]}\n")
    types = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = [(number, name, 0) for name, number in numbers.items()] + [(4, "n99", 3)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(synsets, dtype=types)})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        data = "ILSVRC2012_devkit_t12/data"
        add(tar, f"{data}/ILSVRC2012_validation_ground_truth.txt", "".join(truth).encode())
        add(tar, f"{data}/meta.mat", meta.getvalue())
    return folder


def test_the_official_tar_files_give_what_a_folder_of_them_gives(source, official, tmp_path):
    prepare.prepare(official, tmp_path / "ready", workers=0)
    ready, original = load(tmp_path / "ready"), load(source)
    for split in ("train", "eval"):
        expected = [(i["image"], i["label"]) for i in items(getattr(original, split))]
        found = [(i["image"], i["label"]) for i in items(getattr(ready, split))]
        if split == "train":
            expected.remove((b"no image", 1))
            assert found == expected
        assert sorted(found) == sorted(expected)
    assert ready.eval[1]["name"] == "ILSVRC2012_val_00000002.JPEG"
    (official / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"source must hold ILSVRC2012_devkit_t12\.tar\.gz"):
        prepare.prepare(official, tmp_path / "other")


@pytest.mark.parametrize(
    ("truth", "named"), [("2\n3\n1\n", "got 6 and .*\\[\\]"), ("4\n" * 6, "unknown .*'n99'")]
)
def test_validation_files_that_do_not_fit_are_refused(official, tmp_path, truth, named):
    """Other images than the truth is about, or other classes than those of training."""
    path = official / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(path) as tar:
        meta = tar.extractfile("ILSVRC2012_devkit_t12/data/meta.mat").read()
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
        add(tar, "data/meta.mat", meta)
    with pytest.raises(ValueError, match=rf"source must hold the . validation images .*{named}"):
        prepare.prepare(official, tmp_path / "ready", workers=0)


def test_the_command_prints_what_it_left_out_and_errors_in_a_sentence(source, tmp_path, capsys):
    """By two processes here."""
    assert main([str(source), str(tmp_path / "ready"), "--workers=2"]) == 0
    out = capsys.readouterr().out
    assert "train: 11 images of 3 classes\n  left out, cannot be decoded: train/n02/3.JPEG" in out
    assert main([str(source), str(tmp_path / "ready")]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("python -m repopt_jax.data.prepare: output must")
        and error.count("\n") == 1
    )


def test_a_prepared_set_that_is_not_whole_is_refused(source, tmp_path, small_shards):
    prepare.prepare(source, tmp_path / "ready", workers=0)
    with pytest.raises(ValueError, match=r"eval_split must be one of \['train', 'val'\] .* 'test'"):
        load(tmp_path / "ready", eval_split="test")
    one, other = (tmp_path / "ready" / f"train-0000{i}-of-00003.array_record" for i in (0, 2))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"train_split 'train' must hold 11 images in .*, got 8"):
        load(tmp_path / "ready")
