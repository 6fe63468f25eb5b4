"""Batches as pure functions of their number, which is what the pipeline calls."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from repopt_jax.data.augment import FlipCrop, ResizedCrop
from repopt_jax.data.decode import decode
from repopt_jax.data.randaugment import FIELDS, packed
from repopt_jax.data.resize import resize_and_crop
from repopt_jax.data.sources import ArraySource, Dataset, read_items

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Makes the training batch of a step.

    Attributes:
      augment: the augmentation.
      augment_on: `host`, or `device`, which gets the operations beside the images.
      rows: this process's part of the global batch.

    The other attributes are arguments of `train_batches`.
    """

    dataset: Dataset
    batch_size: int
    seed: int
    augment: FlipCrop | ResizedCrop
    image_size: int | None
    fast: bool
    skip_bad: bool
    augment_on: str
    rows: slice
    split: ClassVar[str] = "train"

    def draw(self, step: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What is random in a batch: which images, `index`, and what is done to them, `draw`.

        `rng` must be in the same state for the same step.
        """
        count = len(self.dataset.train)
        epoch, position = divmod(step, count // self.batch_size)
        start = position * self.batch_size
        indices = _order(self.seed, epoch, count)[start : start + self.batch_size][self.rows]
        return {"index": indices, "draw": self.augment.draw(self.batch_size, rng)[self.rows]}

    def __call__(self, step: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns a batch, of what `draw` draws."""
        indices, draws = self.draw(step, rng).values()
        if isinstance(self.augment, ResizedCrop):
            return self._resized_crops(indices, draws)
        if in_memory(self.dataset.train, self.image_size):
            source = self.dataset.train
            batch = {"image": source.images[indices], "label": source.labels[indices]}
        else:
            batch = self._read(indices, lambda data, row: _whole(data, self.image_size))
        return batch | {"image": self.augment.batch(batch["image"], draws)}

    def _resized_crops(self, indices: np.ndarray, seeds: np.ndarray) -> dict[str, np.ndarray]:
        size = image_shape(self.dataset, self.image_size)[0]
        if self.augment_on == "host" or not self.augment.operations:
            return self._read(
                indices, lambda data, row: self.augment.image(data, seeds[row], size, self.fast)
            )
        operations = np.empty((len(seeds), self.augment.operations, len(FIELDS)), np.float32)

        def crop(data, row):
            image, drawn = self.augment.crop(data, seeds[row], size, self.fast)
            operations[row] = packed(drawn, size)
            return image

        return self._read(indices, crop) | {"operations": operations}

    def _read(self, indices: np.ndarray, make: Callable) -> dict[str, np.ndarray]:
        batch = _zeros(len(indices), image_shape(self.dataset, self.image_size))
        reader = ImageReader(self.dataset, self.split, self.skip_bad)
        for row, (image, label) in enumerate(reader.read_all(indices.tolist(), make)):
            batch["image"][row], batch["label"][row] = image, label
        return batch


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """Makes an evaluation batch from its number; the attributes are as in `TrainBatch`."""

    dataset: Dataset
    split: str
    batch_size: int
    image_size: int | None
    resize: int | None
    skip_bad: bool
    rows: slice

    def indices(self, number: int) -> dict[str, np.ndarray]:
        """Which images are in a batch: `index`, and `mask`, which is False where there is none."""
        count = len(getattr(self.dataset, self.split))
        indices = (number * self.batch_size + np.arange(self.batch_size))[self.rows]
        return {"index": np.minimum(indices, count - 1), "mask": indices < count}

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """Returns `{"image", "label", "mask"}`."""
        source = getattr(self.dataset, self.split)
        indices = (number * self.batch_size + np.arange(self.batch_size))[self.rows]
        batch = _zeros(len(indices), image_shape(self.dataset, self.image_size))
        batch["mask"] = np.zeros(len(indices), bool)
        indices = indices[indices < len(source)]
        if self.resize is None and in_memory(source, self.image_size):
            batch["image"][: len(indices)] = source.images[indices]
            batch["label"][: len(indices)] = source.labels[indices]
            batch["mask"][: len(indices)] = True
            return batch
        reader = ImageReader(self.dataset, self.split, self.skip_bad)
        pairs = reader.read(
            indices.tolist(), lambda data, row: _whole(data, self.image_size, self.resize)
        )
        for row, (image, label) in enumerate(pairs):
            if image is not None:
                batch["image"][row], batch["label"][row], batch["mask"][row] = image, label, True
        return batch


class ImageReader:
    """Reads images of one split and turns each into an array.

    Args:
      dataset: whose images, and where the names of bad ones are collected.
      split: `train` or `eval`.
      skip_bad: pass over images that cannot be decoded. False stops at the first.
    """

    def __init__(self, dataset: Dataset, split: str, skip_bad: bool):
        self._source = getattr(dataset, split)
        self._split = {"train": "training", "eval": "evaluation"}[split]
        self._bad_images = dataset.bad_images if skip_bad else None

    def read(
        self, indices: Sequence[int], make: Callable
    ) -> Iterator[tuple[np.ndarray | None, int]]:
        """Reads images.

        Args:
          indices: into the source.
          make: `make(image, row)` returns the finished array for the array or encoded bytes at
            `indices[row]`. It raises ValueError or MemoryError if it cannot.

        Yields:
          The array, None for a bad image, and the label. One at a time, so that arrays can be
          copied into a batch while they are in the processor's cache.

        Raises:
          ValueError: an image cannot be decoded and bad ones are not skipped.
        """
        items = read_items(self._source, list(indices))
        for row, (index, item) in enumerate(zip(indices, items, strict=True)):
            try:
                image = make(item["image"], row)
            except (ValueError, MemoryError) as error:
                self._note(index, item, error)
                image = None
            yield image, item["label"]

    def read_all(self, indices: Sequence[int], make: Callable) -> Iterator[tuple[np.ndarray, int]]:
        """Like `read`, but the next good image of the source stands in for a bad one."""
        for row, (image, label) in enumerate(self.read(indices, make)):
            tries = 0
            while image is None:
                tries += 1
                if tries == len(self._source):
                    raise ValueError(f"none of the {self._split} images can be decoded")
                other = (indices[row] + tries) % len(self._source)
                ((image, label),) = self.read([other], lambda data, _, row=row: make(data, row))
            yield image, label

    def _note(self, index: int, item: dict, error: Exception) -> None:
        name = f"{self._split} image {item.get('index', index)}"
        if item.get("name"):
            name += f" ({item['name']})"
        if self._bad_images is None:
            raise ValueError(f"{name}: {error} (skip_bad=True goes on without it)") from error
        note_bad_image(self._bad_images, name)


def note_bad_image(bad_images: set[str], name: str) -> None:
    """Add an image to those that were passed over, with a warning the first time."""
    if name not in bad_images:
        bad_images.add(name)
        _log.warning("skipping %s, bad image number %d", name, len(bad_images))


def image_shape(dataset: Dataset, image_size: int | None) -> tuple[int, int, int]:
    """Shape of the images in a batch.

    Raises:
      ValueError: image_size is None but the images may be of several sizes, or below 1.
    """
    if image_size is None:
        if dataset.image_shape is None:
            raise ValueError(
                f"image_size must be given, because the images of {dataset.name!r} may differ "
                "in size, got None"
            )
        return dataset.image_shape
    if image_size < 1:
        raise ValueError(f"image_size must be None or at least 1, got {image_size}")
    return (image_size, image_size, 3)


# Two epochs: near an epoch's end, threads already work on the next.
@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _zeros(count: int, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return {"image": np.zeros((count, *shape), np.uint8), "label": np.zeros(count, np.int32)}


def in_memory(source, image_size: int | None) -> bool:
    """Whether the images of a source lie in memory as arrays of the wanted size."""
    return isinstance(source, ArraySource) and (
        image_size is None or source.images.shape[1:3] == (image_size, image_size)
    )


def _whole(image, image_size: int | None, resize: int | None = None) -> np.ndarray:
    image = image if isinstance(image, np.ndarray) else decode(image)
    return image if image_size is None else resize_and_crop(image, image_size, resize)
