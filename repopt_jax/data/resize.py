"""Crops and antialiased resizing of uint8 images.

Evaluation resizes with Pillow, as the published accuracies did. Training may be a little off
for speed: OpenCV's bilinear interpolation after a small smoothing filter gives Pillow's result
within about 0.6 of 255 on average, in a fifth of the time.
"""

import math

import cv2
import numpy as np
from PIL import Image

from repopt_jax.data.decode import decode, decoded_size

# Parallel work is the pipeline's business: OpenCV's own threads would only get in the way.
cv2.setNumThreads(0)

# Evaluation resizes an image as a whole, as torchvision does, up to this ratio of its sides.
_LONGEST = 8
# A smoothing filter is not applied to sides longer than this many times the result's, because its
# work grows with the cube of the ratio: an image of 6000 pixels took 47 seconds.
_SMOOTHED = 8


def resize_and_crop(image: np.ndarray, size: int, resize: int | None = None) -> np.ndarray:
    """Brings the shorter side to `resize` (bilinear, antialiased) and cuts out the centre.

    Args:
      image: uint8 (height, width, 3).
      size: side of the result.
      resize: length of the shorter side before the cut; None is `size`.

    Returns:
      uint8 (size, size, 3), equal to what torchvision makes of a Pillow image.

    Raises:
      ValueError: resize is smaller than size.

    >>> resize_and_crop(np.zeros((40, 60, 3), np.uint8), 16, resize=20).shape
    (16, 16, 3)
    """
    resize = resize or size
    if resize < size:
        raise ValueError(f"resize must be at least image_size = {size}, got {resize}")
    height, width = image.shape[:2]
    shorter = min(height, width)
    # The longer side is rounded down.
    new_height, new_width = (resize * n // shorter for n in (height, width))
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    if max(new_height, new_width) > _LONGEST * resize:  # a strip: make no more than the crop
        y, x = height / new_height, width / new_width
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        crop = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(crop)
    if shorter != resize:
        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        image = np.asarray(resized)
    return image[top : top + size, left : left + size]


def random_box(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float] = (0.08, 1.0)
) -> tuple[int, int, int, int]:
    """Draws the crop of Inception training: area and aspect ratio are random.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      rng: source of randomness.
      scale: range of the crop's share of the image's area.

    Returns:
      (top, left, height, width). Where ten draws do not fit into the image, the largest
      centred crop with an aspect ratio in 3/4..4/3.

    >>> random_box(10, 100, np.random.default_rng(0), scale=(1.0, 1.0))
    (0, 43, 10, 13)
    """
    ratio = (3 / 4, 4 / 3)
    for area, log_ratio in zip(
        rng.uniform(*scale, 10).tolist(), rng.uniform(*np.log(ratio), 10).tolist(), strict=True
    ):
        root = math.sqrt(area * height * width)
        stretch = math.exp(log_ratio / 2)
        crop_width, crop_height = round(root * stretch), round(root / stretch)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, round(height * ratio[1]))
    crop_height = min(height, round(width / ratio[0]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def random_resized_crop(
    image: np.ndarray | bytes,
    size: int,
    rng: np.random.Generator,
    *,
    bicubic: bool = False,
    fast: bool = False,
) -> np.ndarray:
    """Cuts a random box out of an image and resizes it to a square.

    Of an encoded JPEG, rows below the box are not decoded, and only a half, quarter or eighth
    of the resolution if that is enough.

    Args:
      image: uint8 (height, width, 3) or the bytes of an image file.
      size: side of the result.
      rng: source of randomness.
      bicubic: interpolate bicubically (with Pillow, thus slowly) instead of bilinearly.
      fast: decode with less exact arithmetic and resize without antialiasing, which saves an
        eighth of the time; what is too fine for the result then shows as noise.

    Returns:
      uint8 (size, size, 3).

    Raises:
      ValueError: the bytes cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
        top, left, crop_height, crop_width = random_box(height, width, rng)
        reduction = 1
    else:
        height, width = decoded_size(image)
        top, left, crop_height, crop_width = random_box(height, width, rng)
        # libjpeg's powers of two have SIMD code, its other fractions have not.
        spare = min(crop_height, crop_width) / size
        reduction = max(f for f in (1, 2, 4, 8) if f <= max(spare, 1))
        image = decode(image, rows=top + crop_height, reduction=reduction, fast=fast)
        # Formats other than JPEG come in full size.
        reduction = round(width / image.shape[1])
    # Moves the crop by half a pixel of the reduced image at most.
    rows = slice(round(top / reduction), round((top + crop_height) / reduction))
    columns = slice(round(left / reduction), round((left + crop_width) / reduction))
    crop = image[rows, columns]
    if fast:
        mode = cv2.INTER_CUBIC if bicubic else cv2.INTER_LINEAR
        return cv2.resize(crop, (size, size), interpolation=mode)
    if bicubic:
        resized = Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(resized)
    return antialiased(crop, size)


def antialiased(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes bilinearly after smoothing away what the smaller grid cannot show.

    Resizing by a factor s should average with a triangle 2s wide, of variance s^2/6. Bilinear
    interpolation contributes 1/6 of it; the rest comes from [a, 1-2a, a] filters of variance 2a.

    Args:
      image: uint8 (height, width, 3).
      size: side of the result.

    Returns:
      uint8 (size, size, 3).

    >>> stripes = np.zeros((9, 9, 3), np.uint8)
    >>> stripes[:, ::3] = 240  # too fine for three pixels
    >>> antialiased(stripes, 3)[0, :, 0]
    array([99, 77, 57], dtype=uint8)
    >>> cv2.resize(stripes, (3, 3))[0, :, 0]
    array([0, 0, 0], dtype=uint8)
    """
    shape = [min(side, _SMOOTHED * size) for side in image.shape[:2]]
    if shape != list(image.shape[:2]):
        image = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
    missing = [((side / size) ** 2 - 1) / 6 for side in image.shape[:2]]
    if max(missing) > 0.02:  # less is not worth the pass
        vertical, horizontal = (_smoothing(variance) for variance in missing)
        image = cv2.sepFilter2D(image, -1, horizontal, vertical, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def _smoothing(variance: float) -> np.ndarray:
    """A filter of that variance: as many [a, 1-2a, a] in a row as keep a at most 1/4."""
    kernel = np.ones(1)
    variance = max(variance, 0.0)
    times = max(1, math.ceil(variance / 0.5))
    a = variance / 2 / times
    for _ in range(times):
        kernel = np.convolve(kernel, [a, 1 - 2 * a, a])
    return kernel.astype(np.float32)
