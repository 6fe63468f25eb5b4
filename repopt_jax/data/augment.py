"""Training augmentations on uint8 images, chosen by a preset's name.

An augmentation has two halves. `draw(n, rng)` draws what is random for n images as an array
with a row for each; the other half is a pure function of images and rows. The pipeline draws
for the global batch and uses its own rows, so an image looks the same on any number of hosts
and threads.
"""

import dataclasses

import cv2
import numpy as np

from repopt_jax.data.randaugment import Draw, apply_operations, draw_jitter, draw_rand_augment
from repopt_jax.data.resize import random_resized_crop


@dataclasses.dataclass(frozen=True)
class FlipCrop:
    """Zero padding, a random crop of the old size, and a random horizontal flip.

    Works on a batch at once, for small images.

    Attributes:
      padding: pixels added on every side before the crop; 0 crops nothing.
      flip: mirror every second image, on average.

    >>> one = FlipCrop(padding=1, flip=True)
    >>> one.batch(np.array([[[[1], [2]], [[3], [4]]]], np.uint8), np.array([[0, 1, 1]]))[0, ..., 0]
    array([[0, 0],
           [2, 1]], dtype=uint8)
    """

    padding: int = 0
    flip: bool = False

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draws int64 (n, 3): the crop's top and left edge, and 1 where to flip."""
        corners = rng.integers(0, 2 * self.padding + 1, (n, 2))
        flips = rng.integers(0, 2, (n, 1)) if self.flip else np.zeros((n, 1), np.int64)
        return np.concatenate([corners, flips], axis=1)

    def batch(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Augments uint8 (n, height, width, channels) by n rows of `draw`; returns a copy."""
        pad = self.padding
        n, height, width, channels = images.shape
        padded = np.zeros((n, height + 2 * pad, width + 2 * pad, channels), np.uint8)
        padded[:, pad : pad + height, pad : pad + width] = images
        out = np.empty_like(images)
        # Copying crop by crop is four times as fast as one gather by index arrays.
        for target, source, (top, left, _) in zip(out, padded, draws.tolist(), strict=True):
            target[:] = source[top : top + height, left : left + width]
        flips = draws[:, 2] == 1
        out[flips] = out[flips, :, ::-1]
        return out


@dataclasses.dataclass(frozen=True)
class ResizedCrop:
    """Random-resized-crop and flip, then perhaps RandAugment or colour jitter.

    Works image by image, from the encoded file where there is one.

    Attributes:
      rand_augment: two operations of RandAugment, magnitudes 0..14.
      jitter: brightness, contrast and saturation are multiplied by factors from
        1-jitter..1+jitter, in random order.
      random_interpolation: resize every second image bicubically.

    >>> augment = ResizedCrop(rand_augment=True)
    >>> seed = augment.draw(1, np.random.default_rng(0))[0]
    >>> augment.image(np.zeros((40, 60, 3), np.uint8), seed, 32).shape
    (32, 32, 3)
    """

    rand_augment: bool = False
    jitter: float = 0.0
    random_interpolation: bool = False

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draws int64 (n,): a seed for every image."""
        return rng.integers(2**63, size=n)

    def image(
        self, image: np.ndarray | bytes, seed: int, size: int, fast: bool = False
    ) -> np.ndarray:
        """Augments one image to uint8 (size, size, 3); `fast` as in `random_resized_crop`."""
        return apply_operations(*self.crop(image, seed, size, fast))

    def crop(
        self, image: np.ndarray | bytes, seed: int, size: int, fast: bool = False
    ) -> tuple[np.ndarray, list[tuple[str, Draw]]]:
        """The first half of `image`: the crop, mirrored or not, and the operations to apply."""
        rng = np.random.default_rng(seed)
        bicubic = self.random_interpolation and rng.random() < 0.5
        image = random_resized_crop(image, size, rng, bicubic=bicubic, fast=fast)
        if rng.random() < 0.5:
            image = cv2.flip(image, 1)
        drawn = draw_rand_augment(rng) if self.rand_augment else []
        if self.jitter:
            drawn += draw_jitter(rng, self.jitter)
        return image, drawn

    @property
    def operations(self) -> int:
        """How many operations follow the crop."""
        return 2 * self.rand_augment + 3 * (self.jitter > 0)


PRESETS = {
    # Images as evaluation sees them.
    "none": FlipCrop(),
    # Padding 1 of 8 pixels moves a digit as far as padding 4 of 32 moves a CIFAR image.
    "crop": FlipCrop(padding=1),
    "flip_crop": FlipCrop(padding=4, flip=True),
    "weak": ResizedCrop(),
    "raug15": ResizedCrop(rand_augment=True),
    # What RepOpt-GhostNet was trained with.
    "jitter": ResizedCrop(jitter=0.4, random_interpolation=True),
}


def preset(name: str) -> FlipCrop | ResizedCrop:
    """Looks an augmentation up.

    Args:
      name: for small images, `crop` (padding 1) or `flip_crop` (padding 4); for large ones,
        `weak` (random-resized-crop and flip), `raug15` (RandAugment on top) or `jitter` (colour
        jitter and random interpolation on top); for either, `none`.

    Raises:
      ValueError: there is no preset of that name.

    >>> preset("flip_crop")
    FlipCrop(padding=4, flip=True)
    """
    if name not in PRESETS:
        raise ValueError(f"augment must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
