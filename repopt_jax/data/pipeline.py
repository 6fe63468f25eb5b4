"""Batches of uint8 pictures for training and evaluation, by Grain.

An element of the Grain data set is a whole batch, made by one thread: with small pictures a
call per picture would cost more than the work inside it. The batch of a step is a function of
(seed, step) alone, hence the same for any number of threads or hosts, and the position to
resume from is one number.
"""

import functools
import os
import sys

import grain
import numpy as np

from repopt_jax.data import augment as augmentations
from repopt_jax.data.decode import decode
from repopt_jax.data.sources import ArraySource, Dataset, read_items


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Number of full batches in the training split; the remainder of an epoch is dropped.

    Raises:
      ValueError: batch_size is not in 1..number of training pictures.

    >>> from repopt_jax.data import load_dataset
    >>> steps_per_epoch(load_dataset("digits"), 64)
    22
    """
    if not 1 <= batch_size <= len(dataset.train):
        raise ValueError(
            f"batch_size must be in 1..{len(dataset.train)}, the number of training pictures "
            f"of {dataset.name!r}, got {batch_size}"
        )
    return len(dataset.train) // batch_size


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    augment: str = "none",
    image_size: int | None = None,
    threads: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Shuffled, augmented training batches.

    Every epoch has its own order of the whole set. The batches of all processes, put one after
    another, are the batches that a single process would see.

    Args:
      dataset: from `load_dataset`.
      batch_size: pictures per step over all processes.
      seed: 0..2**32-1, decides order and augmentation.
      num_epochs: None goes on for ever.
      augment: name of a preset, see `repopt_jax.data.augment`.
      image_size: side of the pictures; None keeps the size that they have, which must be the
        same for all.
      threads: threads that make batches ahead; None is one per core, 0 none.
      process_index: number of this process.
      process_count: number of processes; must divide batch_size.

    Returns:
      An iterator of `{"image": uint8 (batch_size / process_count, height, width, 3),
      "label": int32 (batch_size / process_count,)}`. `get_state` and `set_state` (and so
      `grain.checkpoint.CheckpointSave` and `CheckpointRestore`) keep the exact position.

    Raises:
      ValueError: an argument is out of its range.

    >>> from repopt_jax.data import load_dataset
    >>> batches = train_batches(load_dataset("digits"), batch_size=4, seed=0, augment="crop")
    >>> batch = next(batches)
    >>> batch["image"].shape, batch["label"].shape
    ((4, 8, 8, 3), (4,))
    >>> batches.get_state()
    {'next_index': 1}
    """
    steps = steps_per_epoch(dataset, batch_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32-1, got {seed}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be None or at least 1, got {num_epochs}")
    make = _TrainBatch(
        dataset.train,
        batch_size,
        seed,
        augmentations.preset(augment),
        image_size,
        _rows(batch_size, process_index, process_count),
    )
    total = sys.maxsize if num_epochs is None else steps * num_epochs
    batches = grain.MapDataset.range(total).seed(seed).random_map(make)
    return iter(batches.to_iter_dataset(_read_options(threads)))


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int | None = None,
    resize: int | None = None,
    threads: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Every evaluation picture exactly once, in order; iterate as often as needed.

    The last batch is filled up, so that all batches have one shape and all processes the same
    number of them.

    Args:
      dataset: from `load_dataset`.
      batch_size: pictures per batch over all processes; may exceed the size of the set.
      image_size: side of the pictures; None keeps the size that they have.
      resize: None, or the length that the shorter side is brought to before the centre crop of
        `image_size`; None is `image_size` itself.
      threads: as for `train_batches`.
      process_index: number of this process.
      process_count: number of processes; must divide batch_size.

    Returns:
      An iterable of `{"image", "label", "mask"}`; `mask` is bool, False where the row is filler
      (a black picture with label 0).

    Raises:
      ValueError: an argument is out of its range.

    >>> from repopt_jax.data import load_dataset
    >>> [int(b["mask"].sum()) for b in eval_batches(load_dataset("digits"), batch_size=256)]
    [256, 104]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rows = _rows(batch_size, process_index, process_count)
    make = _EvalBatch(dataset.eval, batch_size, image_size, resize, rows)
    batches = grain.MapDataset.range(-(-len(dataset.eval) // batch_size)).map(make)
    return batches.to_iter_dataset(_read_options(threads))


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """This process's part of a global batch."""
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in 0..process_count-1 = {process_count - 1}, "
            f"got {process_index}"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size must be a multiple of process_count = {process_count}, got {batch_size}"
        )
    local = batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)


def _read_options(threads: int | None) -> grain.ReadOptions:
    if threads is None:
        threads = os.cpu_count() or 1
    if threads < 0:
        raise ValueError(f"threads must be None or at least 0, got {threads}")
    # Two batches per thread: enough to hide a slow batch, small enough for big pictures.
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


class _TrainBatch:
    """Makes the training batch of a step."""

    def __init__(self, source, batch_size, seed, augment, image_size, rows):
        self._source = source
        self._batch_size = batch_size
        self._steps = len(source) // batch_size
        self._augment = augment
        self._image_size = image_size
        self._rows = rows

        # Two epochs: near an epoch's end, threads already work on the next.
        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(len(source))

        self._order = order

    def __call__(self, step: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        epoch, position = divmod(step, self._steps)
        start = position * self._batch_size
        indices = self._order(epoch)[start : start + self._batch_size][self._rows]
        draws = self._augment.draw(self._batch_size, rng)[self._rows]
        images, labels = _read(self._source, indices, self._image_size, None)
        return {"image": self._augment.apply(images, draws), "label": labels}


class _EvalBatch:
    """Makes an evaluation batch from its number."""

    def __init__(self, source, batch_size, image_size, resize, rows):
        self._source = source
        self._batch_size = batch_size
        self._image_size = image_size
        self._resize = resize
        self._rows = rows

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        indices = (number * self._batch_size + np.arange(self._batch_size))[self._rows]
        mask = indices < len(self._source)
        # A process without any picture still has to know the pictures' size.
        real = indices[mask] if mask.any() else np.zeros(1, int)
        images, labels = _read(self._source, real, self._image_size, self._resize)
        batch = {
            "image": np.zeros((len(mask), *images.shape[1:]), np.uint8),
            "label": np.zeros(len(mask), np.int32),
            "mask": mask,
        }
        batch["image"][mask] = images[: mask.sum()]
        batch["label"][mask] = labels[: mask.sum()]
        return batch


def _read(source, indices, image_size, resize) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of one size, uint8 (n, height, width, 3), and labels, int32 (n,)."""
    if isinstance(source, ArraySource) and image_size is None and resize is None:
        return source.images[indices], source.labels[indices]
    images, labels = [], []
    for item in read_items(source, indices.tolist()):
        image = item["image"]
        images.append(image if isinstance(image, np.ndarray) else decode(image))
        labels.append(item["label"])
    return np.stack(images), np.asarray(labels, np.int32)
