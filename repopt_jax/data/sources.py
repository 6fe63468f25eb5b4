"""A data set, and random access to its labelled images, decoded or encoded.

A source is anything with `len(source)` and `source[i] -> {"image", "label"}`. The `image` is a
uint8 (height, width, 3) array or the bytes of an image file. For messages, items may have a `name`
and, where it is not `i`, their `index` in the data set.
`source.__getitems__(list)` is used where it exists: TFDS reads many records at once in 25 us each,
and one alone in 160. A source of which some classes are kept needs `labels`.
"""

import abc
import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification set with its two splits.

    Attributes:
      name: the name it was loaded by.
      num_classes: number of labels, which run from 0.
      train: source of the training images.
      eval: source of the evaluation images.
      image_shape: (height, width, 3) if all images are known to share it, else None.
      bad_images: names of the undecodable images met so far, if they are skipped.
      class_names: of the labels, in their order. None: not known.
    """

    name: str
    num_classes: int
    train: Any
    eval: Any
    image_shape: tuple[int, int, int] | None = None
    bad_images: set[str] = dataclasses.field(default_factory=set)
    class_names: tuple[str, ...] | None = None


class ArraySource:
    """Decoded images of one size in memory.

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


class ArrayRecordSource(abc.ABC):
    """The images of ArrayRecord files, still encoded.

    Args:
      reader: random access to the records.
      folder: of the files, for messages.

    Raises:
      OSError: when records are read from a damaged file.
    """

    def __init__(self, reader: Any, folder: os.PathLike):
        self._reader, self._folder = reader, folder

    @abc.abstractmethod
    def item(self, record: Any) -> dict[str, Any]:
        """The image of a record, its label and its name."""

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        with readable(self._folder):
            records = self._reader.__getitems__(indices)
        return [self.item(record) for record in records]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The label of every image, int32 (n,), for which all records are read."""
        return read_labels(self)


@contextlib.contextmanager
def readable(folder: os.PathLike) -> Iterator[None]:
    """Turn the errors of ArrayRecord, which raises RuntimeError for all, into OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"the data set in {folder} cannot be read: {error}") from error


class SubsetSource:
    """Some images of another source, with new labels.

    Attributes:
      labels: int32 (n,).
    """

    def __init__(self, source, indices: np.ndarray, labels: np.ndarray):
        self._source = source
        self._indices = indices
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        items = read_items(self._source, self._indices[indices].tolist())
        places = zip(self._indices[indices].tolist(), self.labels[indices].tolist(), strict=True)
        return [
            {"index": index} | item | {"label": label}
            for item, (index, label) in zip(items, places, strict=True)
        ]


def read_items(source, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Reads several items, in one call if the source can."""
    if hasattr(source, "__getitems__"):
        return source.__getitems__(indices)
    return [source[index] for index in indices]


def chunks(source) -> list[list[int]]:
    """All indices of a source in lists of at most 1000."""
    return [list(range(i, min(i + 1000, len(source)))) for i in range(0, len(source), 1000)]


def read_labels(source) -> np.ndarray:
    """The label of every image of a source, int32 (n,), by reading all of it."""
    items = (item for chunk in chunks(source) for item in read_items(source, chunk))
    return np.fromiter((item["label"] for item in items), np.int32, len(source))


def printable(name: str | bytes) -> str:
    r"""The name of a file as text; bytes that are no UTF-8 are escaped.

    >>> print(printable(b"caf\xe9.jpg"))
    caf\xe9.jpg
    """
    return os.fsencode(name).decode(errors="backslashreplace")
