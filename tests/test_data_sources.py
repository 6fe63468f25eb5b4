"""Claims about opening data sets."""

import json
import os
import pathlib
import resource

import numpy as np
import pytest
from sklearn.datasets import load_digits

from repopt_jax.data import load_dataset
from repopt_jax.data.sources import ArraySource, SubsetSource


def test_digits_split_is_fixed_disjoint_and_stratified():
    first, second = load_dataset("digits"), load_dataset("digits")
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert (len(first.train), len(first.eval)) == (1437, 360)
    assert first.train.images.dtype == np.uint8
    assert first.train.images.max() == 255
    counts = np.bincount(first.eval.labels)
    assert counts.min() >= 35 and counts.max() <= 37
    together = np.concatenate([first.train.images, first.eval.images])[..., 0]
    everything = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(x.tobytes() for x in together) == sorted(x.tobytes() for x in everything)
    # Pins the split across versions of scikit-learn.
    assert first.eval.labels[:8].tolist() == [7, 6, 3, 7, 7, 3, 2, 8]


def test_digits_refuses_other_splits():
    with pytest.raises(ValueError, match=r"train_split and eval_split must be None"):
        load_dataset("digits", train_split="train[:10]")


def test_classes_keep_their_images_and_get_new_numbers():
    whole = load_dataset("digits")
    pair = load_dataset("digits", classes=(8, 3))
    assert pair.num_classes == 2
    np.testing.assert_array_equal(
        np.sort(pair.train.images[pair.train.labels == 0], axis=0),
        np.sort(whole.train.images[whole.train.labels == 8], axis=0),
    )
    assert len(pair.train) == np.isin(whole.train.labels, (3, 8)).sum()


@pytest.mark.parametrize("classes", [(), (1, 1), (3, 10), (-1,)])
def test_impossible_classes_are_refused(classes):
    with pytest.raises(ValueError, match=r"^classes must .* got \["):
        load_dataset("digits", classes=classes)


def test_cached_and_encoded_images_are_equal(tfds_dir):
    arguments = {"data_dir": tfds_dir, "train_split": "train[:300]", "eval_split": "test[-50:]"}
    cached = load_dataset("cifar10_jpeg", **arguments)
    encoded = load_dataset("cifar10_jpeg", cache=False, **arguments)
    assert isinstance(cached.train, ArraySource)
    assert cached.image_shape == (32, 32, 3)
    assert (len(cached.train), len(cached.eval), cached.num_classes) == (300, 50, 10)
    from repopt_jax.data.decode import decode

    for index in (0, 7, 299):
        item = encoded.train[index]
        assert isinstance(item["image"], bytes)
        np.testing.assert_array_equal(decode(item["image"]), cached.train[index]["image"])
        assert item["label"] == cached.train[index]["label"]


def test_imagenet_is_read_encoded_and_evaluated_on_its_validation_split(tfds_dir):
    imagenet = load_dataset("imagenet2012", data_dir=tfds_dir)
    assert (len(imagenet.train), len(imagenet.eval)) == (240, 120)
    assert (imagenet.num_classes, imagenet.image_shape) == (1000, None)
    assert isinstance(imagenet.train[0]["image"], bytes)


def with_split(source, target, old, new, keep_old):
    """Links a TFDS set with one split renamed or, with keep_old, there under two names."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name == "dataset_info.json":
            continue
        if keep_old or f"-{old}." not in path.name:
            (target / path.name).symlink_to(path)
        if f"-{old}." in path.name:
            (target / path.name.replace(f"-{old}.", f"-{new}.")).symlink_to(path)
    info = json.loads((source / "dataset_info.json").read_text())
    splits = info["splits"]
    renamed = [split | {"name": new} for split in splits if split["name"] == old]
    info["splits"] = [s for s in splits if keep_old or s["name"] != old] + renamed
    (target / "dataset_info.json").write_text(json.dumps(info))


def imagenet_to_change(tfds_dir, tmp_path):
    """Links ImageNet's images into `tmp_path`; its folder there and the file of training."""
    folder = tmp_path / "imagenet2012/5.1.0"
    with_split(pathlib.Path(tfds_dir, "imagenet2012/5.1.0"), folder, "train", "train", False)
    (records,) = folder.glob("*-train.array_record-*")
    return folder, records


def test_a_set_in_more_files_than_a_process_may_open_is_read_whole(tfds_dir, tmp_path, monkeypatch):
    """As ImageNet's 1024 under many systems' default limit; here 60, and a limit of 40 more."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    target, one = imagenet_to_change(tfds_dir, tmp_path)
    records = ArrayRecordReader(str(one)).read_all()
    one.unlink()
    for shard in range(60):
        path = target / one.name.replace("00000-of-00001", f"{shard:05d}-of-00060")
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records[4 * shard : 4 * shard + 4]:
            writer.write(record)
        writer.close()
    info = json.loads((target / "dataset_info.json").read_text())
    for split in info["splits"]:
        if split["name"] == "train":
            split["shardLengths"] = ["4"] * 60
    (target / "dataset_info.json").write_text(json.dumps(info))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        low = len(os.listdir("/proc/self/fd")) + 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, before[1]))
        split = load_dataset("imagenet2012", data_dir=str(tmp_path)).train
        assert len(split.__getitems__(list(range(240)))) == 240
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 300))
    with pytest.raises(ValueError, match="open more than the 61 files of the set, got 300: raise"):
        load_dataset("imagenet2012", data_dir=str(tmp_path))


def test_evaluation_uses_the_test_split_only_where_it_has_labels(tfds_dir, tmp_path):
    """TFDS's whole imagenet2012 has a test split with label -1; the one here is made up."""
    cifar = load_dataset("cifar10_jpeg", data_dir=tfds_dir, cache=False, train_split="train[:9]")
    assert (len(cifar.train), len(cifar.eval)) == (9, 10000)
    source = pathlib.Path(tfds_dir)
    for name, old, new, keep_old in (
        ("imagenet2012/5.1.0", "train", "test", True),
        ("cifar10_jpeg/1.0.0", "test", "validation", False),
    ):
        with_split(source / name, tmp_path / name, old, new, keep_old)
    tmp = str(tmp_path)
    assert len(load_dataset("imagenet2012", data_dir=tmp, eval_split="test").eval) == 240
    assert len(load_dataset("imagenet2012", data_dir=tmp).eval) == 120
    assert len(load_dataset("cifar10_jpeg", data_dir=tmp, cache=False).eval) == 10000


def test_classes_of_an_encoded_set(tfds_dir):
    whole = load_dataset("imagenet2012", data_dir=tfds_dir)
    label = whole.train[5]["label"]
    one = load_dataset("imagenet2012", data_dir=tfds_dir, classes=[label], eval_split="train")
    assert isinstance(one.train, SubsetSource)
    assert one.train[0]["label"] == 0
    assert whole.train[5]["image"] in [one.train[i]["image"] for i in range(len(one.train))]


def test_cache_refuses_images_of_several_sizes(tfds_dir):
    with pytest.raises(ValueError, match="cache must not be True for images of several sizes"):
        load_dataset("imagenet2012", data_dir=tfds_dir, cache=True)


def test_a_damaged_record_file_is_told_with_its_folder(tfds_dir, tmp_path):
    target, path = imagenet_to_change(tfds_dir, tmp_path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50_000] = bytes(50_000)
    path.unlink()
    path.write_bytes(content)
    split = load_dataset("imagenet2012", data_dir=str(tmp_path)).train
    with pytest.raises(OSError, match=rf"^the data set in {target} cannot be read: Corrupted"):
        split.__getitems__(list(range(240)))


def test_missing_sets_and_splits_name_the_way_out(tfds_dir, tmp_path):
    with pytest.raises(ValueError, match=r"name must be .* got 'no_such_set'"):
        load_dataset("no_such_set", data_dir=str(tmp_path))
    command = f"tfds build mnist --data_dir={tmp_path} --file_format=array_record"
    with pytest.raises(FileNotFoundError, match=command):
        load_dataset("mnist", data_dir=str(tmp_path))
    command = f"tfds build imagenet_resized/8x8 --data_dir={tmp_path} --file_format=array_record"
    with pytest.raises(FileNotFoundError, match=command):
        load_dataset("imagenet_resized/8x8", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"tfds build imagenet2012 .* --manual_dir=DIR_OF_"):
        load_dataset("imagenet2012", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"eval_split must select from .* got 'tset'"):
        load_dataset("cifar10_jpeg", data_dir=tfds_dir, eval_split="tset")


def test_a_set_stored_as_tfrecord_names_the_command(tfds_dir, tmp_path):
    source = pathlib.Path(tfds_dir) / "cifar10_jpeg" / "1.0.0"
    folder = tmp_path / "cifar10_jpeg" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ("features.json", "label.labels.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    info = (source / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    command = f"`tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record "
    command += "--num_workers=1`"
    with pytest.raises(
        ValueError, match=f"must be stored as array_record, got tfrecord: run {command}"
    ):
        load_dataset("cifar10_jpeg", data_dir=str(tmp_path))
    # What the command makes of it: ArrayRecord files beside the others, and another line here.
    added = '"alternativeFileFormats": ["array_record"],'
    info = info.replace("array_record", "tfrecord").replace("{", "{" + added, 1)
    (folder / "dataset_info.json").write_text(info)
    for path in source.glob("*.array_record*"):
        (folder / path.name).symlink_to(path)
    found = load_dataset("cifar10_jpeg", data_dir=str(tmp_path), cache=False)
    whole = load_dataset("cifar10_jpeg", data_dir=tfds_dir, cache=False)
    assert len(found.train) == len(whole.train)
    assert found.train[7]["image"] == whole.train[7]["image"]
