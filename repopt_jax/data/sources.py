"""Data sets as random access sources: scikit-learn's digits, TFDS.

A source is anything with `len(source)` and `source[i] -> {"image", "label"}`, where `image` is
a uint8 (height, width, 3) array or the bytes of a picture file, and with `__getitems__(list)`
where reading many at once is cheaper (25 instead of 160 us a record of TFDS). Whole sets of
small pictures are decoded once and held in memory; large pictures stay encoded until a batch
needs them.
"""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from repopt_jax.data.decode import decode

# Pictures up to this side are cached by default, as long as a split fits into _CACHE_BYTES.
_CACHE_SIDE = 64
_CACHE_BYTES = 2 * 2**30

_DIGITS_SEED = 0


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification set with its two splits.

    Attributes:
      name: the name it was loaded by.
      num_classes: number of labels, which run from 0.
      train: source of the training pictures.
      eval: source of the evaluation pictures.
      image_shape: (height, width, 3) where all pictures share it, else None.
    """

    name: str
    num_classes: int
    train: Any
    eval: Any
    image_shape: tuple[int, int, int] | None = None


class ArraySource:
    """Decoded pictures of one size in memory.

    Attributes:
      images: uint8 (n, height, width, 3).
      labels: int32 (n,).
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = images
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}


class TfdsSource:
    """One split of a TFDS set, its pictures still encoded."""

    def __init__(self, builder, split: str):
        import tensorflow_datasets as tfds

        self._image_key, self._label_key = _keys(builder)
        self._reader = builder.as_data_source(
            split=split, decoders={self._image_key: tfds.decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"image": record[self._image_key], "label": int(record[self._label_key])}
            for record in self._reader.__getitems__(indices)
        ]


class SubsetSource:
    """Some pictures of another source, with new labels."""

    def __init__(self, source, indices: np.ndarray, labels: np.ndarray):
        self._source = source
        self._indices = indices
        self._labels = labels

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        items = read_items(self._source, self._indices[indices].tolist())
        labels = self._labels[indices].tolist()
        return [
            {"image": item["image"], "label": label}
            for item, label in zip(items, labels, strict=True)
        ]


def read_items(source, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Reads several items, in one call where the source can."""
    if hasattr(source, "__getitems__"):
        return source.__getitems__(indices)
    return [source[index] for index in indices]


def load_dataset(
    name: str,
    *,
    data_dir: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    classes: Sequence[int] | None = None,
    cache: bool | None = None,
) -> Dataset:
    """Opens a data set for training and evaluation; nothing is downloaded.

    Args:
      name: `digits` (scikit-learn's 8x8 digits: 1437 to train, 360 to evaluate, always the same
        ones) or the name of a TFDS image classification set prepared as ArrayRecord, e.g.
        `cifar100` or `imagenet2012`.
      data_dir: folder that holds TFDS sets; None is TFDS's default
        (`$TFDS_DATA_DIR`, else `~/tensorflow_datasets`). Not used by `digits`.
      train_split: TFDS split with slicing, e.g. `train[:20000]`; None is `train`.
      eval_split: the same for evaluation; None is `test`, or `validation` where there is no
        labelled test split.
      classes: None, or the labels to keep, in the order of their new numbers.
      cache: hold the decoded pictures in memory. None does so for pictures of one size up to
        64 pixels, where decoding every epoch anew would cost more than the training step.

    Returns:
      The `Dataset`.

    Raises:
      ValueError: unknown name, split or class, or pictures of several sizes with `cache=True`.
      FileNotFoundError: the set is not prepared; the message has the command that does it.

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


def _load_tfds(name, data_dir, train_split, eval_split) -> Dataset:
    import tensorflow_datasets as tfds

    try:
        # Offline by design: TFDS asks its public bucket only with `try_gcs=True`.
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        # TFDS's own message lists a thousand names.
        raise ValueError(
            "name must be 'digits', a TFDS set or a TFDS folder in "
            f"data_dir={str(data_dir)!r}, got {name!r}"
        ) from None
    folder = pathlib.Path(builder.data_dir)
    prepare = (
        f"`tfds build {name} --data_dir={data_dir or folder.parents[1]} --file_format=array_record`"
    )
    if not (folder / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {folder}: run {prepare} once "
            "(only this command needs tensorflow installed)"
        )
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"data set {name!r} in {folder} must be stored as array_record, got "
            f"{builder.info.file_format.value}: run `tfds convert_format "
            f"--dataset_version_dir={folder} --out_file_format=array_record "
            "--out_path=DIR/NAME/VERSION` or prepare it in another data_dir (only these "
            "commands need tensorflow installed)"
        )
    features = builder.info.features
    image_key, label_key = _keys(builder)
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
    shape = features[image_key].shape
    return Dataset(
        name,
        features[label_key].num_classes,
        _open_split(builder, "train_split", train_split or "train"),
        _open_split(builder, "eval_split", eval_split),
        None if None in shape[:2] else (*shape[:2], 3),
    )


def _keys(builder) -> tuple[str, str]:
    """Names of the picture and of the label in the set's records."""
    keys = builder.info.supervised_keys
    return keys if keys and len(keys) == 2 else ("image", "label")


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
        labels = [item["label"] for chunk in _chunks(source) for item in read_items(source, chunk)]
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
        if len({image.shape for image in images}) > 1:
            raise ValueError("cache must not be True for pictures of several sizes")
        return np.stack(images), np.asarray([item["label"] for item in items], np.int32)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        images, labels = zip(*pool.map(read, _chunks(source)), strict=True)
    if len({chunk.shape[1:] for chunk in images}) > 1:
        raise ValueError("cache must not be True for pictures of several sizes")
    return ArraySource(np.concatenate(images), np.concatenate(labels))
