"""Random access to labelled images, in memory or encoded.

A source is anything with `len(source)` and `source[i] -> {"image", "label"}`, where `image` is
a uint8 (height, width, 3) array or the bytes of a image file. Items may have a `name` for
error messages. `source.__getitems__(list)` is used where it exists: of TFDS, many records at
once cost 25 us each, one alone 160.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


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


class TfdsSource:
    """One split of a TFDS set, its images still encoded.

    Raises:
      OSError: when records are read from a damaged file.
    """

    def __init__(self, builder, split: str):
        import tensorflow_datasets as tfds

        self._image_key, self._label_key = tfds_keys(builder)
        self._folder = builder.data_dir
        self._reader = builder.as_data_source(
            split=split, decoders={self._image_key: tfds.decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            records = self._reader.__getitems__(indices)
        except RuntimeError as error:  # ArrayRecord's for all that goes wrong
            raise OSError(f"the data set in {self._folder} cannot be read: {error}") from error
        return [
            {
                "image": record[self._image_key],
                "label": int(record[self._label_key]),
                "name": _text(record.get("file_name", "")),
            }
            for record in records
        ]


class FolderSource:
    """Image files in one folder per class.

    Args:
      folder: holds the class folders; files with other endings than a image's are ignored.
      class_names: the class folders' names in the order of their labels.

    Attributes:
      labels: int32 (n,).
    """

    def __init__(self, folder: pathlib.Path, class_names: Sequence[str]):
        self._folder = folder
        self._class_names = class_names
        # A million paths: names and labels apart take a third of the memory of whole paths.
        self._files: list[str] = []
        counts = []
        for class_name in class_names:
            names = []
            if (folder / class_name).is_dir():
                with os.scandir(folder / class_name) as entries:
                    names = [entry.name for entry in entries]
            names = sorted(n for n in names if os.path.splitext(n)[1].lower() in _EXTENSIONS)
            self._files += names
            counts.append(len(names))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = int(self.labels[index])
        path = self._folder / self._class_names[label] / self._files[index]
        return {"image": path.read_bytes(), "label": label, "name": str(path)}


class SubsetSource:
    """Some images of another source, with new labels."""

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
        return [item | {"label": label} for item, label in zip(items, labels, strict=True)]


def read_items(source, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Reads several items, in one call where the source can."""
    if hasattr(source, "__getitems__"):
        return source.__getitems__(indices)
    return [source[index] for index in indices]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def tfds_keys(builder) -> tuple[str, str]:
    """Names of the image and of the label in the set's records."""
    keys = builder.info.supervised_keys
    return keys if keys and len(keys) == 2 else ("image", "label")
