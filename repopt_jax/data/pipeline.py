"""Batches of uint8 images for training and evaluation, by Grain.

An element of the Grain data set is a whole batch, made by one thread: with small images a
call per image would cost more than the work inside it. The batch of a step is a function of
(seed, step) alone, hence the same for any number of threads or hosts, and the position to
resume from is one number.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from repopt_jax.data.augment import preset
from repopt_jax.data.batches import EvalBatch, TrainBatch, image_shape
from repopt_jax.data.sources import ArraySource, Dataset
from repopt_jax.data.workers import WorkerPool, usable_cores

if TYPE_CHECKING:
    import grain

# It is imported when it is used, because it brings JAX, of no use to worker processes.
if importlib.util.find_spec("grain") is None:
    raise ModuleNotFoundError("No module named 'grain'", name="grain")


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Number of full batches in the training split; the remainder of an epoch is dropped.

    Raises:
      ValueError: batch_size is not in 1..number of training images.

    >>> from repopt_jax.data import load_dataset
    >>> steps_per_epoch(load_dataset("digits"), 64)
    22
    """
    if not 1 <= batch_size <= len(dataset.train):
        raise ValueError(
            f"batch_size must be in 1..{len(dataset.train)}, the number of training images "
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
    fast: bool = False,
    skip_bad: bool = False,
    augment_on: str = "host",
    threads: int | None = None,
    workers: int | None = 0,
    process_index: int = 0,
    process_count: int = 1,
    images: bool = True,
) -> grain.DatasetIterator:
    """Shuffled, augmented training batches.

    Every epoch has its own order of the whole set. The batches of all processes, put one after
    another, are the batches that a single process would see.

    Args:
      dataset: from `load_dataset`.
      batch_size: images per step over all processes.
      seed: 0..2**32-1, decides order and augmentation.
      num_epochs: passes over the set. None: without end.
      augment: name of a preset, see `repopt_jax.data.augment.preset`.
      image_size: side of the images; None keeps the size that they have, if they share one.
      fast: decode with less exact arithmetic and crop without antialiasing. Not used by `none`,
        `crop` and `flip_crop`.
      skip_bad: take the next image for one that cannot be decoded, whose name is added to
        `dataset.bad_images`; False stops the run.
      augment_on: `host`, or `device` for batches without RandAugment's and jitter's operations,
        which `repopt_jax.training.randaugment.apply_operations` then applies.
      threads: threads that make batches, at most two batches each ahead; None is one per core,
        0 makes them in the caller's. Not used with workers.
      workers: processes that make batches, likewise; None is one per core for images that have to
        be decoded, if there are at least 4 cores, else 0: threads make them.
      process_index: number of this process.
      process_count: number of processes; must divide batch_size.
      images: False leaves making the images to the caller, see below.

    Returns:
      An iterator of `{"image": uint8 (batch_size / process_count, height, width, 3),
      "label": int32 (batch_size / process_count,)}`; for operations on the device also
      `"operations": float32 (batch_size / process_count, operations, values)`. `get_state` and
      `set_state` (and so `grain.checkpoint.CheckpointSave` and `CheckpointRestore`) keep the exact
      position. Without images, of what they would be made of: `{"index": int64 (batch_size /
      process_count,), "draw"}`, places in `dataset.train` and what the augmentation has drawn.
      The position means the same.

    Raises:
      ValueError: an argument is out of its range or, from the iterator, an image is broken.

    >>> from repopt_jax.data import load_dataset
    >>> batches = train_batches(load_dataset("digits"), batch_size=4, seed=0, augment="crop")
    >>> batch = next(batches)
    >>> batch["image"].shape, batch["label"].shape
    ((4, 8, 8, 3), (4,))
    >>> batches.get_state()
    {'next_index': 1}
    """
    import grain

    steps = steps_per_epoch(dataset, batch_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32-1, got {seed}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be None or at least 1, got {num_epochs}")
    if augment_on not in ("host", "device"):
        raise ValueError(f"augment_on must be 'host' or 'device', got {augment_on!r}")
    rows = _rows(batch_size, process_index, process_count)
    image_shape(dataset, image_size)  # refuses some
    augmentation = preset(augment)
    how = {"fast": fast, "skip_bad": skip_bad, "augment_on": augment_on, "rows": rows}
    make = TrainBatch(dataset, batch_size, seed, augmentation, image_size, **how)
    total = sys.maxsize if num_epochs is None else steps * num_epochs
    call, options = _executors(make, threads, workers) if images else (make.draw, _at_once())
    batches = grain.MapDataset.range(total).seed(seed).random_map(call)
    return iter(batches.to_iter_dataset(options))


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    split: str = "eval",
    image_size: int | None = None,
    resize: int | None = None,
    skip_bad: bool = False,
    threads: int | None = None,
    workers: int | None = 0,
    process_index: int = 0,
    process_count: int = 1,
    images: bool = True,
) -> grain.IterDataset:
    """Every evaluation image exactly once, in order; iterate as often as needed.

    The last batch is filled up, so that all batches have one shape and all processes the same
    number of them.

    Args:
      dataset: from `load_dataset`.
      batch_size: images per batch over all processes; may exceed the size of the set.
      split: `eval`, or `train` for the training images as evaluation sees them.
      image_size: side of the images; None keeps the size that they have, if they share one.
      resize: length that the shorter side is brought to before the centre crop of
        `image_size`; None is `image_size` itself.
      skip_bad: leave out images that cannot be decoded and add their names to
        `dataset.bad_images`; False stops the run.
      threads: as for `train_batches`.
      workers: likewise.
      process_index: number of this process.
      process_count: number of processes; must divide batch_size.
      images: False leaves making the images to the caller.

    Returns:
      An iterable of `{"image", "label", "mask"}`; `mask` is bool, False where the row is filler
      (a black image with label 0). Without images, of `{"index", "mask"}`: places in the split.

    Raises:
      ValueError: an argument is out of its range or, from the iterator, an image is broken.

    >>> from repopt_jax.data import load_dataset
    >>> [int(b["mask"].sum()) for b in eval_batches(load_dataset("digits"), batch_size=256)]
    [256, 104]
    """
    import grain

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if resize is not None and (image_size is None or resize < image_size):
        raise ValueError(
            f"resize must be None or at least image_size, got {resize} with "
            f"image_size = {image_size}"
        )
    rows = _rows(batch_size, process_index, process_count)
    image_shape(dataset, image_size)  # refuses some
    make = EvalBatch(dataset, split, batch_size, image_size, resize, skip_bad, rows)
    call, options = _executors(make, threads, workers) if images else (make.indices, _at_once())
    batches = grain.MapDataset.range(-(-len(getattr(dataset, split)) // batch_size)).map(call)
    return batches.to_iter_dataset(options)


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


def _at_once() -> grain.ReadOptions:
    """In the caller's thread: to draw is cheaper than to hand over."""
    import grain

    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def _executors(
    make: TrainBatch | EvalBatch, threads: int | None, workers: int | None
) -> tuple[Callable, grain.ReadOptions]:
    """What makes a batch, by processes or not, and how many threads call it."""
    import grain

    cores = usable_cores()
    for name, value in (("threads", threads), ("workers", workers)):
        if value is not None and value < 0:
            raise ValueError(f"{name} must be None or at least 0, got {value}")
    if workers is None:
        decoded = isinstance(getattr(make.dataset, make.split), ArraySource)
        workers = cores if cores >= 4 and not decoded and sys.platform != "win32" else 0
    if workers:
        count = len(range(make.batch_size)[make.rows])
        shape = image_shape(make.dataset, make.image_size)
        # A process needs no copy of the other split.
        unused = {"eval" if make.split == "train" else "train": None}
        make = dataclasses.replace(make, dataset=dataclasses.replace(make.dataset, **unused))
        make = WorkerPool(make, workers, count * int(np.prod(shape)))
        threads = workers
    threads = cores if threads is None else threads
    # Two batches per thread: enough to hide a slow batch, small enough for big images.
    return make, grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
