"""The images of a data set as deployment needs them: to calibrate with and to evaluate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from repopt_jax.data import Dataset, dataset_arguments, eval_batches, load_dataset
from repopt_jax.data.batches import image_shape
from repopt_jax.data.sources import SubsetSource

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Small, because calibration keeps every activation of a batch: 40 MB per 224-pixel image in B1.
CALIBRATION_BATCH = 8


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A data set, and how its images are brought to the network's size.

    Attributes:
      dataset: from `load_dataset`.
      image_size: side of the images. None: as they are, if they share one size.
      resize: length of the shorter side before the centre crop. None: `image_size`.
      skip_bad: leave out images that cannot be decoded. False: they are errors.

    >>> from repopt_jax.data import load_dataset
    >>> images = ImageSet(load_dataset("digits"))
    >>> images.size, [len(batch) for batch in images.calibration(20)]
    ((8, 8), [8, 8, 4])
    """

    dataset: Dataset
    image_size: int | None = None
    resize: int | None = None
    skip_bad: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width; ValueError for images of several sizes without `image_size`."""
        return image_shape(self.dataset, self.image_size)[:2]

    def evaluation(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All evaluation images, uint8 NHWC, and their labels, in batches of at most that size."""
        return self._batches(self.dataset, "eval", batch_size)

    def calibration(self, count: int, seed: int = 0) -> list[np.ndarray]:
        """Training images drawn by `seed`, prepared as for evaluation, in batches of uint8.

        Raises:
          ValueError: there are fewer than `count`.
        """
        available = len(self.dataset.train)
        if not 1 <= count <= available:
            raise ValueError(
                f"count of calibration images (--images) must be in 1..{available}, got {count}"
            )
        drawn = np.sort(np.random.default_rng(seed).permutation(available)[:count])
        chosen = SubsetSource(self.dataset.train, drawn, np.zeros(count, np.int32))
        dataset = dataclasses.replace(self.dataset, train=chosen)
        return [images for images, _ in self._batches(dataset, "train", CALIBRATION_BATCH)]

    def _batches(
        self, dataset: Dataset, split: str, batch_size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        sizes = {"image_size": self.image_size, "resize": self.resize, "skip_bad": self.skip_bad}
        for batch in eval_batches(dataset, batch_size=batch_size, split=split, **sizes):
            there = batch["mask"]
            if there.any():
                yield batch["image"][there], batch["label"][there]


def configured_images(data: ConfigDict) -> ImageSet:
    """The images that the section `data` of a configuration names."""
    dataset = load_dataset(**dataset_arguments(data))
    return ImageSet(dataset, data.image_size, data.eval_resize, data.skip_bad)
