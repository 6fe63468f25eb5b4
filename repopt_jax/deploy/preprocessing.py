"""The preprocessing of a network's images, which every exported file carries."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from repopt_jax.imagenet import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """``(pixel / 255 - mean) / std`` for images of one size.

    Attributes:
      height: of the images, in pixels.
      width: likewise.
      mean: per channel, of pixels of range 0 to 1.
      std: likewise.
      inside: whether the exported graph does it, and so takes uint8 NHWC images.

    >>> Preprocessing(1, 1, mean=(0.5,) * 3, std=(0.25,) * 3)(np.full((1, 1, 1, 3), 255, np.uint8))
    array([[[[2., 2., 2.]]]], dtype=float32)
    """

    height: int
    width: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    inside: bool = True

    def __post_init__(self):
        if min(self.height, self.width) < 1:
            raise ValueError(
                f"height and width must be at least 1, got {self.height} and {self.width}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                "mean and std must be 3 numbers each, those of std above 0, "
                f"got {self.mean} and {self.std}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def shift(self) -> np.ndarray:
        """What is subtracted from pixels of range 0 to 255, float32 ``(1, 1, 1, 3)``."""
        return (255 * np.asarray([[[self.mean]]])).astype(np.float32)

    @property
    def factor(self) -> np.ndarray:
        """What multiplies the difference, float32 ``(1, 1, 1, 3)``."""
        return (1 / (255 * np.asarray([[[self.std]]]))).astype(np.float32)

    def __call__(self, images: np.ndarray | Array) -> np.ndarray | Array:
        """Normalize uint8 NHWC images, of NumPy or of JAX."""
        return (images.astype(np.float32) - self.shift) * self.factor

    def metadata(self) -> dict[str, str]:
        """The values as text by name, for the metadata of a file."""
        return {k: json.dumps(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Preprocessing:
        """The preprocessing that `metadata` states.

        Raises:
          ValueError: an entry is missing or has no such value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            height, width, mean, std, inside = (json.loads(metadata[name]) for name in names)
            return cls(height, width, tuple(mean), tuple(std), inside)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"file must be one that repopt_jax exported, with the metadata {names}, "
                f"got {sorted(metadata)}"
            ) from None
