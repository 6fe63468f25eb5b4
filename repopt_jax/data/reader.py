"""Labelled images of a split by index, with a policy for broken files."""

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from repopt_jax.data.sources import read_items

_log = logging.getLogger(__name__)


class Reader:
    """Reads images and turns each into an array.

    Args:
      source: see `repopt_jax.data.sources`.
      name: what the source is called in messages, e.g. `training`.
      bad_images: None stops at the first image that cannot be decoded; a set collects the
        names of those that were passed over.
    """

    def __init__(self, source, name: str, bad_images: set[str] | None = None):
        self._source = source
        self._name = name
        self._bad_images = bad_images

    def read(
        self, indices: Sequence[int], make: Callable, rows: Sequence | None = None
    ) -> Iterator[tuple[np.ndarray | None, int]]:
        """Reads images.

        Args:
          indices: into the source.
          make: `make(image)` or, with rows, `make(image, row)` gives the finished array of an
            array or of encoded bytes, and raises ValueError where it cannot.
          rows: None or one object per image.

        Yields:
          The array, None for a bad image, and the label. One at a time, so that arrays can be
          copied into a batch while they are in the processor's cache.

        Raises:
          ValueError: a image cannot be decoded and bad ones are not collected.
        """
        items = read_items(self._source, list(indices))
        arguments = [()] * len(items) if rows is None else [(row,) for row in rows]
        for index, item, extra in zip(indices, items, arguments, strict=True):
            try:
                image = make(item["image"], *extra)
            except ValueError as error:
                self._note(index, item, error)
                image = None
            yield image, item["label"]

    def read_all(
        self, indices: Sequence[int], make: Callable, rows: Sequence | None = None
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Like `read`, but the next good image of the source stands in for a bad one."""
        for position, (image, label) in enumerate(self.read(indices, make, rows)):
            tries = 0
            while image is None:
                tries += 1
                if tries == len(self._source):
                    raise ValueError(f"none of the {self._name} images can be decoded")
                row = None if rows is None else [rows[position]]
                other = (indices[position] + tries) % len(self._source)
                ((image, label),) = self.read([other], make, row)
            yield image, label

    def _note(self, index: int, item: dict, error: ValueError) -> None:
        name = f"{self._name} image {index}"
        if item.get("name"):
            name += f" ({item['name']})"
        if self._bad_images is None:
            raise ValueError(f"{name}: {error} (skip_bad=True goes on without it)") from error
        if name not in self._bad_images:
            self._bad_images.add(name)
            _log.warning("skipping %s, bad image number %d", name, len(self._bad_images))
