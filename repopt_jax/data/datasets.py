"""Data sets by name: scikit-learn's digits, TFDS, a folder of images. Nothing is downloaded."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from repopt_jax.data.decode import decode
from repopt_jax.data.folder import load_folder
from repopt_jax.data.sources import ArraySource, Dataset, SubsetSource, chunks, read_items
from repopt_jax.data.tfds import load_tfds

# Images up to this side are cached by default, as long as a split fits into _CACHE_BYTES.
_CACHE_SIDE = 64
_CACHE_BYTES = 2 * 2**30

_DIGITS_SEED = 0


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
        `~/tensorflow_datasets`; for `folder` the one that holds the splits, see
        `repopt_jax.data.folder.load_folder` for the layouts. Not used by `digits`. A `~` at its
        start is the home folder.
      train_split: a TFDS split with slicing, e.g. `train[:20000]`, or a folder's name; None is
        `train`.
      eval_split: the same for evaluation. For TFDS, None is `test` or, without a labelled test
        split, `validation`; for folders, the first that exists of `val`, `validation` and `test`.
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
    folder = None if data_dir is None else os.path.expanduser(data_dir)
    if name == "digits":
        if train_split or eval_split:
            raise ValueError(
                "train_split and eval_split must be None for digits, whose split is fixed, "
                f"got {train_split!r} and {eval_split!r}"
            )
        dataset = _load_digits()
    elif name == "folder":
        dataset = load_folder(folder, train_split, eval_split)
    else:
        dataset = load_tfds(name, folder, train_split, eval_split)
    if classes is not None:
        dataset = _keep_classes(dataset, np.asarray(classes, int))
    if _is_small(dataset) if cache is None else cache:
        train, evaluation = _cached(dataset.train), _cached(dataset.eval)
        shape = train.images.shape[1:]
        dataset = dataclasses.replace(dataset, train=train, eval=evaluation, image_shape=shape)
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
    parts = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=_DIGITS_SEED
    )
    train, evaluation = (ArraySource(images[part], labels[part]) for part in parts)
    return Dataset("digits", 10, train, evaluation, images.shape[1:])


def _keep_classes(dataset: Dataset, classes: np.ndarray) -> Dataset:
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
        labels = renumber[source.labels]
        indices = np.flatnonzero(labels >= 0)
        return SubsetSource(source, indices, labels[indices])

    names = dataset.class_names
    return dataclasses.replace(
        dataset,
        num_classes=len(classes),
        train=subset(dataset.train),
        eval=subset(dataset.eval),
        class_names=names and tuple(names[label] for label in classes),
    )


def _is_small(dataset: Dataset) -> bool:
    if dataset.image_shape is None:
        return False
    images = max(len(dataset.train), len(dataset.eval))
    fits = images * int(np.prod(dataset.image_shape)) <= _CACHE_BYTES
    return fits and max(dataset.image_shape[:2]) <= _CACHE_SIDE


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
        images, labels = zip(*pool.map(read, chunks(source)), strict=True)
    _require_one_size([chunk[0] for chunk in images])
    return ArraySource(np.concatenate(images), np.concatenate(labels))


def _require_one_size(images) -> None:
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"cache must not be True for images of several sizes, got {sizes[0]} and {sizes[1]}"
        )
