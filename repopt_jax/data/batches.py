"""Batches as pure functions of their number: what the pipeline's threads call."""

import functools

import numpy as np

from repopt_jax.data.augment import FlipCrop, preset
from repopt_jax.data.datasets import Dataset
from repopt_jax.data.decode import decode
from repopt_jax.data.reader import Reader
from repopt_jax.data.resize import resize_and_crop
from repopt_jax.data.sources import ArraySource


class TrainBatch:
    """Makes the training batch of a step; the arguments are those of `train_batches`.

    Args:
      dataset: from `load_dataset`.
      batch_size: images per step over all processes.
      seed: decides the order of every epoch.
      augment: name of a preset.
      image_size: side of the images, None keeps it.
      fast: random-resized-crop with less exact decoding and without antialiasing.
      skip_bad: take the next image for one that cannot be decoded.
      rows: this process's part of the global batch.

    Raises:
      ValueError: unknown preset, or an image size is needed.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        augment: str = "none",
        image_size: int | None = None,
        fast: bool = False,
        skip_bad: bool = False,
        rows: slice = slice(None),
    ):
        self._source = dataset.train
        self._batch_size = batch_size
        self._steps = len(dataset.train) // batch_size
        self._augment = preset(augment)
        self._image_size = image_size
        self._shape = image_shape(dataset, image_size)
        self._fast = fast
        self._rows = rows
        self._reader = Reader(dataset.train, "training", dataset.bad_images if skip_bad else None)

        # Two epochs: near an epoch's end, threads already work on the next.
        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(len(dataset.train))

        self._order = order

    def __call__(self, step: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns `{"image", "label"}`; `rng` must be in the same state for the same step."""
        epoch, position = divmod(step, self._steps)
        start = position * self._batch_size
        indices = self._order(epoch)[start : start + self._batch_size][self._rows]
        draws = self._augment.draw(self._batch_size, rng)[self._rows]
        if not isinstance(self._augment, FlipCrop):
            images, labels = self._read(indices, self._crop, draws)
            return {"image": images, "label": labels}
        if _fits(self._source, self._image_size):
            images, labels = self._source.images[indices], self._source.labels[indices]
        else:
            make = functools.partial(_whole, image_size=self._image_size)
            images, labels = self._read(indices, make)
        return {"image": self._augment.batch(images, draws), "label": labels}

    def _crop(self, image, seed):
        return self._augment.image(image, seed, self._shape[0], self._fast)

    def _read(self, indices, make, draws=None) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(indices), *self._shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        pairs = self._reader.read_all(indices.tolist(), make, draws)
        for row, (image, label) in enumerate(pairs):
            images[row], labels[row] = image, label
        return images, labels


class EvalBatch:
    """Makes an evaluation batch from its number; the arguments are those of `eval_batches`.

    Args:
      dataset: from `load_dataset`.
      batch_size: images per batch over all processes.
      image_size: side of the images, None keeps it.
      resize: length of the shorter side before the centre crop.
      skip_bad: leave out images that cannot be decoded.
      rows: this process's part of the global batch.

    Raises:
      ValueError: an image size is needed.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        image_size: int | None = None,
        resize: int | None = None,
        skip_bad: bool = False,
        rows: slice = slice(None),
    ):
        self._source = dataset.eval
        self._batch_size = batch_size
        self._image_size = image_size
        self._resize = resize
        self._rows = rows
        self._shape = image_shape(dataset, image_size)
        bad_images = dataset.bad_images if skip_bad else None
        self._reader = Reader(dataset.eval, "evaluation", bad_images)

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """Returns `{"image", "label", "mask"}`."""
        indices = (number * self._batch_size + np.arange(self._batch_size))[self._rows]
        batch = {
            "image": np.zeros((len(indices), *self._shape), np.uint8),
            "label": np.zeros(len(indices), np.int32),
            "mask": np.zeros(len(indices), bool),
        }
        indices = indices[indices < len(self._source)]
        if self._resize is None and _fits(self._source, self._image_size):
            batch["image"][: len(indices)] = self._source.images[indices]
            batch["label"][: len(indices)] = self._source.labels[indices]
            batch["mask"][: len(indices)] = True
            return batch
        make = functools.partial(_whole, image_size=self._image_size, resize=self._resize)
        for row, (image, label) in enumerate(self._reader.read(indices.tolist(), make)):
            if image is not None:
                batch["image"][row], batch["label"][row], batch["mask"][row] = image, label, True
        return batch


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


def _fits(source, image_size: int | None) -> bool:
    """Whether a batch can be copied out of memory as it lies there."""
    return isinstance(source, ArraySource) and (
        image_size is None or source.images.shape[1:3] == (image_size, image_size)
    )


def _whole(image, image_size: int | None, resize: int | None = None) -> np.ndarray:
    image = image if isinstance(image, np.ndarray) else decode(image)
    return image if image_size is None else resize_and_crop(image, image_size, resize)
