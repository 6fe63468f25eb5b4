"""Data sets by name: scikit-learn's digits, TFDS, a folder of images. Nothing is downloaded."""

import concurrent.futures
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from repopt_jax.data.decode import decode
from repopt_jax.data.sources import (
    ArraySource,
    FolderSource,
    SubsetSource,
    TfdsSource,
    read_items,
    tfds_keys,
)

# Images up to this side are cached by default, as long as a split fits into _CACHE_BYTES.
_CACHE_SIDE = 64
_CACHE_BYTES = 2 * 2**30

_DIGITS_SEED = 0

# TFDS 4.9 declares none of the three, and its command cannot do without them.
TFDS_COMMAND = "the command needs `pip install tensorflow apache-beam mlcroissant`"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification set with its two splits.

    Attributes:
      name: the name it was loaded by.
      num_classes: number of labels, which run from 0.
      train: source of the training images.
      eval: source of the evaluation images.
      image_shape: (height, width, 3) where all images are known to share it, else None.
      bad_images: names of the undecodable images met so far, where they are skipped.
    """

    name: str
    num_classes: int
    train: Any
    eval: Any
    image_shape: tuple[int, int, int] | None = None
    bad_images: set[str] = dataclasses.field(default_factory=set)


def load_dataset(
    name: str,
    *,
    data_dir: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    classes: Sequence[int] | None = None,
    cache: bool | None = None,
) -> Dataset:
    """Opens a data set for training and evaluation.

    Args:
      name: `digits` (scikit-learn's 8x8 digits: 1437 to train, 360 to evaluate, always the same
        ones), `folder` (files such as `train/cat/1.jpg`), or the name of a TFDS image
        classification set prepared as ArrayRecord, e.g. `cifar100` or `imagenet2012`.
      data_dir: for TFDS the folder that holds its sets, None is `$TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`; for `folder` the one that holds the splits. Not used by
        `digits`.
      train_split: a TFDS split with slicing, e.g. `train[:20000]`, or a folder's name; None is
        `train`.
      eval_split: the same for evaluation. None is, of TFDS, `test` or, where there is no
        labelled test split, `validation`; of folders, the first that exists of `val`,
        `validation` and `test`.
      classes: None, or the labels to keep, in the order of their new numbers.
      cache: hold the decoded images in memory. None does so for images of one size up to
        64 pixels, where decoding every epoch anew would cost more than the training step.

    Returns:
      The `Dataset`.

    Raises:
      ValueError: unknown name, split or class, or images of several sizes with `cache=True`.
      FileNotFoundError: a folder is missing, or a TFDS set is not prepared; the message then has
        the command that does it.

    >>> digits = load_dataset("digits")
    >>> len(digits.train), len(digits.eval), digits.num_classes, digits.image_shape
    (1437, 360, 10, (8, 8, 3))
    >>> len(load_dataset("digits", classes=(3, 8)).eval)
    72
    """
    if name == "digits":
        if train_split or eval_split:
            raise ValueError(
                "train_split and eval_split must be None for digits, whose split is fixed, "
                f"got {train_split!r} and {eval_split!r}"
            )
        dataset = _load_digits()
    elif name == "folder":
        dataset = _load_folder(data_dir, train_split, eval_split)
    else:
        dataset = _load_tfds(name, data_dir, train_split, eval_split)
    if classes is not None:
        dataset = _keep_classes(dataset, classes)
    if cache is None:
        cache = _is_small(dataset)
    if cache:
        dataset = dataclasses.replace(
            dataset, train=_cached(dataset.train), eval=_cached(dataset.eval)
        )
        dataset = dataclasses.replace(dataset, image_shape=dataset.train.images.shape[1:])
    return dataset


def dataset_arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load_dataset` among the fields of a configuration's section `data`.

    >>> section = {"name": "digits", "augment": "crop"} | dict.fromkeys(
    ...     ("data_dir", "train_split", "eval_split", "classes")
    ... )
    >>> load_dataset(**dataset_arguments(section)).num_classes
    10
    """
    keys = ("name", "data_dir", "train_split", "eval_split", "classes")
    return {key: section[key] for key in keys}


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    labels = bunch.target
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=_DIGITS_SEED
    )
    return Dataset(
        "digits",
        10,
        ArraySource(images[train], labels[train]),
        ArraySource(images[held_out], labels[held_out]),
        images.shape[1:],
    )


def _load_folder(data_dir, train_split, eval_split) -> Dataset:
    if data_dir is None:
        raise ValueError("data_dir must be the folder that holds train/ and val/, got None")
    root = pathlib.Path(data_dir)
    if eval_split is None:
        found = [split for split in ("val", "validation", "test") if (root / split).is_dir()]
        eval_split = found[0] if found else "val"
    folders = {"train_split": root / (train_split or "train"), "eval_split": root / eval_split}
    classes = {}
    for argument, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{argument} must name a folder in data_dir={str(root)!r}, got {folder.name!r}"
            )
        folders_in = [entry.name for entry in folder.iterdir() if entry.is_dir()]
        classes[argument] = sorted(name for name in folders_in if not name.startswith("."))
    class_names = classes["train_split"]
    unknown = sorted(set(classes["eval_split"]) - set(class_names))
    if unknown:
        raise ValueError(
            f"eval_split must hold no class that train_split lacks, got {unknown[:3]} in "
            f"{str(folders['eval_split'])!r}"
        )
    train, evaluation = (FolderSource(folder, class_names) for folder in folders.values())
    for argument, source in (("train_split", train), ("eval_split", evaluation)):
        if len(source) == 0:
            raise ValueError(
                f"{argument} must hold images in one folder per class, got none in "
                f"{str(folders[argument])!r}"
            )
    empty = sorted(set(range(len(class_names))) - set(train.labels.tolist()))
    if empty:  # else a stray folder would shift the labels of all classes after it
        raise ValueError(
            f"train_split must hold images of every class, got none in "
            f"{str(folders['train_split'] / class_names[empty[0]])!r}"
        )
    return Dataset("folder", len(class_names), train, evaluation)


def _load_tfds(name, data_dir, train_split, eval_split) -> Dataset:
    import tensorflow_datasets as tfds
    from etils import epath

    try:
        # Offline by design: TFDS asks its public bucket only with `try_gcs=True`.
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        # TFDS's own message lists a thousand names.
        raise ValueError(
            "name must be 'digits', 'folder', a TFDS set or a TFDS folder in "
            f"data_dir={str(data_dir)!r}, got {name!r}"
        ) from None
    folder = epath.Path(builder.data_dir)  # may lie in a bucket
    # The folder is <root>/name/version or <root>/name/config/version.
    root = folder.parents[builder.info.full_name.count("/")]
    prepare = f"`tfds build {name} --data_dir={root} --file_format=array_record"
    # ImageNet cannot be downloaded without an account.
    prepare += " --manual_dir=DIR_OF_THE_TAR_FILES`" if builder.name == "imagenet2012" else "`"
    if not (folder / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {folder}: run {prepare} once ({TFDS_COMMAND})"
        )
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        # Knows of formats that were added later, which a set's own class does not.
        builder = tfds.builder_from_directory(folder)
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise ValueError(
            f"data set {name!r} in {folder} must be stored as array_record, got "
            f"{builder.info.file_format.value}: run `tfds convert_format "
            f"--dataset_version_dir={folder} --out_file_format=array_record --num_workers=1`, "
            f"which adds such files beside the others ({TFDS_COMMAND})"
        )
    features = builder.info.features
    image_key, label_key = tfds_keys(builder)
    if image_key not in features or not hasattr(
        dict(features.items()).get(label_key), "num_classes"
    ):
        raise ValueError(
            f"name must be an image classification set, got {name!r} with features {list(features)}"
        )
    if eval_split is None:
        # ImageNet's test split in TFDS has no labels.
        labelled_test = "test" in builder.info.splits and builder.name != "imagenet2012"
        eval_split = "test" if labelled_test else "validation"
    _allow_open_files(sum(split.num_shards for split in builder.info.splits.values()))
    shape = features[image_key].shape
    return Dataset(
        name,
        features[label_key].num_classes,
        _open_split(builder, "train_split", train_split or "train"),
        _open_split(builder, "eval_split", eval_split),
        None if None in shape[:2] else (*shape[:2], 3),
    )


def _allow_open_files(shards: int):
    """Let this process open all files of a set: their readers stay open, and shuffling needs all.

    ImageNet has 1024 for training alone, as many as many systems allow a process by default.
    """
    if sys.platform == "win32":
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if x == resource.RLIM_INFINITY else x for x in limits)
    if hard < shards + 256:
        raise ValueError(
            f"a process must be allowed to open more than the {shards} files of the set, got "
            f"{hard}: raise the limit, which `ulimit -Hn` shows"
        )
    wanted = min(2 * shards + 512, hard)  # two parts of a run may have theirs open at a time
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))


def _open_split(builder, argument: str, split: str) -> TfdsSource:
    try:
        return TfdsSource(builder, split)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{argument} must select from the splits {list(builder.info.splits)} "
            f"of {builder.name!r}, got {split!r}"
        ) from error


def _keep_classes(dataset: Dataset, classes: Sequence[int]) -> Dataset:
    classes = np.asarray(classes, int)
    if len(classes) == 0 or len(np.unique(classes)) != len(classes):
        raise ValueError(f"classes must be distinct labels, at least one, got {classes.tolist()}")
    if classes.min() < 0 or classes.max() >= dataset.num_classes:
        raise ValueError(
            f"classes must lie in 0..{dataset.num_classes - 1} for {dataset.name!r}, "
            f"got {classes.tolist()}"
        )
    renumber = np.full(dataset.num_classes, -1)
    renumber[classes] = np.arange(len(classes))

    def subset(source):
        if hasattr(source, "labels"):
            labels = source.labels
        else:  # the records of a TFDS set have to be read
            chunks = _chunks(source)
            labels = [item["label"] for chunk in chunks for item in read_items(source, chunk)]
        labels = renumber[labels]
        indices = np.flatnonzero(labels >= 0)
        return SubsetSource(source, indices, labels[indices])

    return dataclasses.replace(
        dataset,
        num_classes=len(classes),
        train=subset(dataset.train),
        eval=subset(dataset.eval),
    )


def _is_small(dataset: Dataset) -> bool:
    if dataset.image_shape is None:
        return False
    largest = max(len(dataset.train), len(dataset.eval))
    return (
        max(dataset.image_shape[:2]) <= _CACHE_SIDE
        and largest * int(np.prod(dataset.image_shape)) <= _CACHE_BYTES
    )


def _chunks(source) -> list[list[int]]:
    """All indices of a source in lists of at most 1000."""
    return [list(range(i, min(i + 1000, len(source)))) for i in range(0, len(source), 1000)]


def _cached(source) -> ArraySource:
    if isinstance(source, ArraySource):
        return source

    def read(indices):
        items = read_items(source, indices)
        images = [item["image"] for item in items]
        images = [image if isinstance(image, np.ndarray) else decode(image) for image in images]
        _require_one_size(images)
        return np.stack(images), np.asarray([item["label"] for item in items], np.int32)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        images, labels = zip(*pool.map(read, _chunks(source)), strict=True)
    _require_one_size([chunk[0] for chunk in images])
    return ArraySource(np.concatenate(images), np.concatenate(labels))


def _require_one_size(images) -> None:
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"cache must not be True for images of several sizes, got {sizes[0]} and {sizes[1]}"
        )
