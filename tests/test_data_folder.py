"""Claims about image files: folders, broken files, batches from encoded images."""

import logging
import os

import numpy as np
import pytest
import simplejpeg

from repopt_jax.data import eval_batches, load_dataset, train_batches
from repopt_jax.data.decode import decode
from repopt_jax.data.resize import resize_and_crop


@pytest.fixture
def folder(tmp_path):
    """Two classes of 6 training and 3 evaluation images, of several sizes, coloured by label."""
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.full((40 + 3 * i, 50 - 2 * i, 3), 60 + 100 * label, np.uint8)
                image[::2] += np.uint8(10 * i)
                data = simplejpeg.encode_jpeg(image)
                (tmp_path / split / name / f"{i}.JPEG").write_bytes(data)
    (tmp_path / "train" / "bee" / "notes.txt").write_text("no image")
    return tmp_path


def load(folder, **arguments):
    return load_dataset("folder", data_dir=str(folder), **arguments)


def test_a_folder_gives_its_files_sorted_with_its_classes_as_labels(folder):
    dataset = load(folder)
    assert (len(dataset.train), len(dataset.eval), dataset.num_classes) == (12, 6, 2)
    items = [dataset.train[i] for i in range(12)]
    assert [item["label"] for item in items] == [0] * 6 + [1] * 6
    assert items[7]["name"] == str(folder / "train" / "bee" / "1.JPEG")
    assert items[7]["image"] == (folder / "train" / "bee" / "1.JPEG").read_bytes()


def test_an_evaluation_class_keeps_its_label_where_others_are_missing(folder):
    for path in (folder / "val" / "ant").iterdir():
        path.unlink()
    (folder / "val" / "ant").rmdir()
    assert [load(folder).eval[i]["label"] for i in range(3)] == [1, 1, 1]


def test_wrong_folders_are_named(folder):
    with pytest.raises(ValueError, match=r"data_dir must be the folder .* got None"):
        load_dataset("folder")
    with pytest.raises(FileNotFoundError, match=r"train_split must name a folder .* got 'trian'"):
        load(folder, train_split="trian")
    (folder / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"no class that train_split lacks, got \['cat'\]"):
        load(folder)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"train_split must hold images .* got none in"):
        load(folder, train_split="empty", eval_split="empty")


def test_stray_folders_do_not_shift_labels(folder):
    """Hidden ones are no classes, and a class without images is refused."""
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    assert load(folder).num_classes == 2 and load(folder).train[0]["label"] == 0
    (folder / "train" / "aardvark").mkdir()
    with pytest.raises(ValueError, match=r"images of every class, got none in .*aardvark'$"):
        load(folder)


def test_images_at_any_depth_belong_to_their_class_and_dot_files_to_none(folder):
    """Files of a folder come before those of its sub-folders: flat sets keep their order."""
    ant = folder / "train" / "ant"
    (ant / "1deep" / "er").mkdir(parents=True)
    (ant / "1deep" / "er" / "x.JPEG").write_bytes((ant / "0.JPEG").read_bytes())
    (ant / "folder.jpg").mkdir()
    for hidden in (ant / "._1.JPEG", ant / ".trash" / "2.JPEG"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"no image")
    train = load(folder).train
    assert train.labels.tolist() == [0] * 7 + [1] * 6
    names = [train[i]["name"].removeprefix(f"{ant}/") for i in range(7)]
    assert names == [*(f"{i}.JPEG" for i in range(6)), "1deep/er/x.JPEG"]


@pytest.fixture
def tiny_imagenet(folder):
    """The same images as Tiny-ImageNet lays them out, the evaluation images mixed."""
    lines = []
    for name in ("ant", "bee"):
        (folder / "train" / name).rename(folder / "images")
        (folder / "train" / name).mkdir()
        (folder / "images").rename(folder / "train" / name / "images")
        (folder / "train" / name / f"{name}_boxes.txt").write_text("0.JPEG\t0\t0\t62\t62\n")
        for path in sorted((folder / "val" / name).iterdir()):
            (folder / "val" / "images").mkdir(exist_ok=True)
            path.rename(folder / "val" / "images" / f"val_{len(lines)}.JPEG")
            lines.append(f"val_{len(lines)}.JPEG\t{name}\t0\t0\t62\t62")
        (folder / "val" / name).rmdir()
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines[::-1]) + "\n")
    return folder


def test_tiny_imagenets_layout_gives_the_same_images_and_labels(tiny_imagenet):
    dataset = load(tiny_imagenet)
    assert dataset.train.labels.tolist() == [0] * 6 + [1] * 6
    assert dataset.eval.labels.tolist() == [0] * 3 + [1] * 3
    means = [decode(dataset.eval[i]["image"]).mean() for i in range(6)]
    assert max(means[:3]) < 110 < min(means[3:])
    assert dataset.eval[4]["name"] == str(tiny_imagenet / "val" / "images" / "val_4.JPEG")


def test_annotations_that_do_not_fit_the_images_are_refused(tiny_imagenet):
    (tiny_imagenet / "val" / "images" / "val_9.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match=r"eval_split .*val_annotations.txt.* got 'images/val_9"):
        load(tiny_imagenet)


def test_a_link_to_nothing_is_refused_before_the_first_batch(folder):
    (folder / "train" / "bee" / "9.JPEG").symlink_to(folder / "gone")
    with pytest.raises(ValueError, match=r"train_split must .* got '.*/train/bee/9\.JPEG'"):
        load(folder)


def test_a_tilde_in_data_dir_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load(f"~/{folder.name}").train) == len(load(folder).train)


def test_images_of_several_sizes_need_an_image_size(folder):
    for make in (train_batches, eval_batches):
        seed = {"seed": 0} if make is train_batches else {}
        with pytest.raises(ValueError, match=r"image_size must be given, because .* got None"):
            make(load(folder), batch_size=4, **seed)


@pytest.mark.parametrize("augment", ["none", "flip_crop", "weak", "raug15", "jitter"])
def test_encoded_batches_depend_on_neither_threads_nor_processes_nor_interruption(folder, augment):
    dataset = load(folder)
    arguments = {"batch_size": 4, "seed": 3, "augment": augment, "image_size": 32}
    alone = train_batches(dataset, threads=0, **arguments)
    threaded = train_batches(dataset, threads=3, **arguments)
    parts = [
        train_batches(dataset, process_index=i, process_count=2, **arguments) for i in range(2)
    ]
    for step in range(5):
        expected = next(alone)
        assert expected["image"].shape == (4, 32, 32, 3)
        ours = next(threaded)
        together = [next(part) for part in parts]
        for key in expected:
            np.testing.assert_array_equal(expected[key], ours[key])
            np.testing.assert_array_equal(expected[key], np.concatenate([b[key] for b in together]))
        if step == 2:
            state = threaded.get_state()
            threaded = train_batches(dataset, threads=2, **arguments)
            threaded.set_state(state)


def test_encoded_evaluation_sees_every_image_once(folder):
    batches = list(eval_batches(load(folder), batch_size=4, image_size=24, resize=28))
    assert [batch["mask"].sum() for batch in batches] == [4, 2]
    assert batches[0]["image"].shape == (4, 24, 24, 3)
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    means = np.concatenate([b["image"][b["mask"]].mean((1, 2, 3)) for b in batches])
    np.testing.assert_array_equal(labels, means > 110)
    assert not batches[1]["image"][2:].any()
    whole = decode(load(folder).eval[2]["image"])
    np.testing.assert_array_equal(batches[0]["image"][2], resize_and_crop(whole, 24, 28))


def test_resize_without_or_below_image_size_is_refused(folder):
    for image_size in (None, 64):
        with pytest.raises(ValueError, match="resize must be None or at least image_size, got 32"):
            eval_batches(load(folder), batch_size=4, image_size=image_size, resize=32)


def test_a_broken_file_stops_the_run_with_its_name(folder):
    (folder / "train" / "ant" / "2.JPEG").write_bytes(b"no image")
    (folder / "val" / "bee" / "1.JPEG").write_bytes(b"")
    batches = train_batches(load(folder), batch_size=12, seed=0, augment="weak", image_size=32)
    with pytest.raises(ValueError, match=r"training image 2 \(.*ant.2\.JPEG\): .*skip_bad=True"):
        next(batches)
    with pytest.raises(ValueError, match=r"evaluation image 4 \(.*bee.1\.JPEG\)"):
        list(eval_batches(load(folder), batch_size=6, image_size=32))


def test_skipped_files_are_replaced_and_counted(folder, caplog):
    """Images 5 and 6 are broken: 7 stands in for both, in either kind of augmentation."""
    (folder / "train" / "ant" / "5.JPEG").write_bytes(b"no image")
    (folder / "train" / "bee" / "0.JPEG").write_bytes(b"no image")
    for augment in ("none", "raug15"):
        dataset = load(folder)
        arguments = {"batch_size": 12, "seed": 0, "augment": augment, "image_size": 32}
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            batches = train_batches(dataset, skip_bad=True, threads=0, **arguments)
            batch = next(batches)
            next(batches)
        assert batch["label"].tolist().count(1) == 7
        if augment == "none":
            copies = np.unique(batch["image"], axis=0, return_counts=True)[1]
            assert sorted(copies) == [1] * 9 + [3]
        assert batch["image"].any(axis=(1, 2, 3)).all()
        assert len(dataset.bad_images) == 2
        assert [r.message.endswith(f"number {n}") for n, r in enumerate(caplog.records, 1)] == [
            True,
            True,
        ]


def test_a_name_that_is_no_text_is_told_escaped(folder, caplog):
    path = os.fsencode(folder / "train" / "ant") + b"/caf\xe9.jpg"
    with open(path, "wb") as file:
        file.write(b"no image")
    dataset = load(folder)
    arguments = {"batch_size": 13, "seed": 0, "image_size": 32, "threads": 0}
    next(train_batches(dataset, skip_bad=True, **arguments))
    (name,) = dataset.bad_images
    assert name.endswith("caf\\xe9.jpg)") and name.encode()
    with pytest.raises(ValueError, match=r"caf\\xe9\.jpg"):
        next(train_batches(dataset, **arguments))


def test_skipped_files_are_masked_in_evaluation(folder):
    (folder / "val" / "bee" / "1.JPEG").write_bytes(b"")
    dataset = load(folder)
    (batch,) = eval_batches(dataset, batch_size=6, image_size=32, skip_bad=True)
    assert batch["mask"].tolist() == [True, True, True, True, False, True]
    assert len(dataset.bad_images) == 1


def test_an_image_for_which_memory_does_not_suffice_is_bad(folder, monkeypatch):
    def fail(image, *_):
        if image.shape[0] == 40:
            raise MemoryError("cannot allocate 4 GiB")
        return image[:8, :8]

    monkeypatch.setattr("repopt_jax.data.batches.resize_and_crop", fail)
    dataset = load(folder)
    (batch,) = eval_batches(dataset, batch_size=6, image_size=8, skip_bad=True)
    assert batch["mask"].tolist() == [False, True, True] * 2
    with pytest.raises(ValueError, match=r"evaluation image 0 \(.*ant/0.JPEG\): cannot allocate"):
        list(eval_batches(dataset, batch_size=6, image_size=8))


def test_an_image_of_a_subset_is_told_by_its_index_in_the_whole(folder):
    (folder / "val" / "bee" / "1.JPEG").write_bytes(b"")
    dataset = load(folder, classes=[1])
    with pytest.raises(ValueError, match=r"evaluation image 4 \("):
        list(eval_batches(dataset, batch_size=3, image_size=32))


def test_training_images_can_be_seen_as_for_evaluation(folder):
    (batch,) = eval_batches(load(folder), batch_size=12, split="train", image_size=24, resize=28)
    assert batch["mask"].all() and batch["label"].tolist() == [0] * 6 + [1] * 6
    whole = decode(load(folder).train[8]["image"])
    np.testing.assert_array_equal(batch["image"][8], resize_and_crop(whole, 24, 28))


def test_a_set_of_broken_files_only_is_an_error(folder):
    for path in (folder / "train").glob("*/*.JPEG"):
        path.write_bytes(b"no image")
    batches = train_batches(load(folder), batch_size=4, seed=0, image_size=32, skip_bad=True)
    with pytest.raises(ValueError, match="none of the training images can be decoded"):
        next(batches)
