"""RandAugment's sixteen operations on uint8 images (Cubuk et al., arXiv 1909.13719).

The results are Pillow's, in which the published models were trained: bit for bit where an
operation looks values up or blends, within rounding where it moves pixels.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from repopt_jax.data.moves import rotate, shear, translate

MAGNITUDES = 15  # they are drawn from 0..14
CUTOUT_COLOUR = (125, 122, 113)  # ImageNet's mean
_VALUES = np.arange(256)
# Pillow's weights of red, green and blue, in units of 1/65536 and thus exact in float32.
_LUMA = np.array([[19595, 38470, 7471]], np.float32) / 65536
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


@dataclasses.dataclass(frozen=True)
class Draw:
    """The random values of one operation.

    Attributes:
      magnitude: 0..14; the operations' levels are stated for 10.
      negative: turn, shear or translate the other way.
      bicubic: move pixels with bicubic instead of bilinear interpolation.
      centre: (vertical, horizontal) place of a cut-out, as fractions of the sides.
      factor: of a blend. None: what RandAugment makes of the magnitude.
    """

    magnitude: int = 0
    negative: bool = False
    bicubic: bool = False
    centre: tuple[float, float] = (0.5, 0.5)
    factor: float | None = None

    @property
    def level(self) -> float:
        """Magnitude in units of 10."""
        return self.magnitude / 10

    @property
    def signed_level(self) -> float:
        """The level with its random sign."""
        return -self.level if self.negative else self.level

    @property
    def degrees(self) -> float:
        """How far a turn goes, counter-clockwise."""
        return 30 * self.signed_level

    @property
    def shear(self) -> float:
        """By how many pixels a sheared line is shifted against its neighbour."""
        return 0.3 * self.signed_level

    @property
    def translation(self) -> float:
        """How far the image is moved, as a share of its side."""
        return 0.45 * self.signed_level

    @property
    def blend(self) -> float:
        """The factor of a blend."""
        return 1.8 * self.level + 0.1 if self.factor is None else self.factor

    @property
    def cutout_side(self) -> float:
        """Side of the square that a cut-out paints, in pixels."""
        return max(2, 40 * self.level)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with black: 0 is black, 1 the image, beyond 1 is brighter."""
    return _look_up(image, _blend(np.zeros(256, np.uint8), _VALUES, factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the image's mean grey: 0 is flat, 1 the image."""
    mean = int(_luma(image).mean() + 0.5)
    return _look_up(image, _blend(np.full(256, mean), _VALUES, factor))


def colour(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the grey image: 0 is grey, 1 the image."""
    return _blend(cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the smoothed image: 0 is smooth, 1 the image."""
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretches every channel to 0..255."""

    def table(histogram):
        used = np.flatnonzero(histogram)
        low, high = used[0], used[-1]
        return _VALUES if high == low else stretched(low, high)

    return _look_up_channels(image, table)


def stretched(low: int, high: int | np.ndarray) -> np.ndarray:
    """What becomes of the values 0..255 where `low` becomes 0 and `high` becomes 255."""
    scale = 255.0 / (high - low)
    return np.clip((_VALUES * scale - low * scale).astype(int), 0, 255)


def equalize(image: np.ndarray) -> np.ndarray:
    """Flattens every channel's histogram."""

    def table(histogram):
        step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
        if step == 0:
            return _VALUES
        below = np.cumsum(histogram) - histogram
        return np.minimum((step // 2 + below) // step, 255)

    return _look_up_channels(image, table)


def invert(image: np.ndarray) -> np.ndarray:
    """255 minus the image."""
    return _look_up(image, 255 - _VALUES)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest bits of every value; 0 bits make a black image."""
    return _look_up(image, _VALUES & ~(2 ** (8 - bits) - 1))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the values from the threshold on."""
    return _look_up(image, np.where(threshold > _VALUES, _VALUES, 255 - _VALUES))


def solarize_add(image: np.ndarray, amount: int) -> np.ndarray:
    """Adds to the values below 128."""
    return _look_up(image, np.where(_VALUES < 128, np.minimum(_VALUES + amount, 255), _VALUES))


def cutout(image: np.ndarray, side: float, centre: tuple[float, float]) -> np.ndarray:
    """Paints a square of `side` pixels around a place given in fractions of the sides."""
    out = image.copy()
    top, bottom, left, right = square(side, centre, *image.shape[:2])
    out[top:bottom, left:right] = CUTOUT_COLOUR
    return out


def square(
    side: float, centre: tuple[float, float], height: int, width: int
) -> tuple[int, int, int, int]:
    """The first row, the row after the last one, and likewise the columns of a cut-out."""
    edges = []
    for length, fraction in zip((height, width), centre, strict=True):
        start = int(max(0, fraction * length - side / 2))
        edges += [start, int(min(length, start + side))]
    return tuple(edges)


# The argument that a magnitude becomes. Magnitudes beyond 10 are intended.
OPERATIONS = {
    "AutoContrast": lambda image, draw: auto_contrast(image),
    "Equalize": lambda image, draw: equalize(image),
    "Invert": lambda image, draw: invert(image),
    "Rotate": lambda image, draw: rotate(image, draw.degrees, draw.bicubic),
    "PosterizeTpu": lambda image, draw: posterize(image, int(4 * draw.level)),
    "Solarize": lambda image, draw: solarize(image, int(256 * draw.level)),
    "SolarizeAdd": lambda image, draw: solarize_add(image, int(110 * draw.level)),
    "Color": lambda image, draw: colour(image, draw.blend),
    "Contrast": lambda image, draw: contrast(image, draw.blend),
    "Brightness": lambda image, draw: brightness(image, draw.blend),
    "Sharpness": lambda image, draw: sharpness(image, draw.blend),
    "ShearX": lambda image, draw: shear(image, draw.shear, 1, draw.bicubic),
    "ShearY": lambda image, draw: shear(image, draw.shear, 0, draw.bicubic),
    "TranslateXRel": lambda image, draw: translate(
        image, draw.translation * image.shape[1], 1, draw.bicubic
    ),
    "TranslateYRel": lambda image, draw: translate(
        image, draw.translation * image.shape[0], 0, draw.bicubic
    ),
    "Cutout": lambda image, draw: cutout(image, draw.cutout_side, draw.centre),
}
NAMES = tuple(OPERATIONS)


def draw_rand_augment(rng: np.random.Generator) -> list[tuple[str, Draw]]:
    """Draws RandAugment's two operations uniformly, each with its own random strength.

    >>> [name for name, _ in draw_rand_augment(np.random.default_rng(1))]
    ['Color', 'Rotate']
    """
    drawn = []
    for _ in range(2):
        name = NAMES[rng.integers(len(NAMES))]
        magnitude, negative, bicubic = rng.integers((MAGNITUDES, 2, 2)).tolist()
        drawn.append((name, Draw(magnitude, bool(negative), bool(bicubic), tuple(rng.random(2)))))
    return drawn


def draw_jitter(rng: np.random.Generator, strength: float) -> list[tuple[str, Draw]]:
    """Draws factors from 1-strength..1+strength for three blends, and their order.

    >>> [name for name, _ in draw_jitter(np.random.default_rng(1), 0.4)]
    ['Contrast', 'Brightness', 'Color']
    """
    names = ("Brightness", "Contrast", "Color")
    factors = rng.uniform(1 - strength, 1 + strength, 3)
    return [(names[i], Draw(factor=factors[i])) for i in rng.permutation(3).tolist()]


def apply_operations(image: np.ndarray, drawn: Sequence[tuple[str, Draw]]) -> np.ndarray:
    """Applies operations one after the other to uint8 (height, width, 3)."""
    for name, draw in drawn:
        image = OPERATIONS[name](image, draw)
    return image


# The values by which the device applies an operation.
FIELDS = (
    *("operation", "magnitude", "negative", "bicubic", "factor"),
    *("top", "bottom", "left", "right"),
)


def packed(drawn: Sequence[tuple[str, Draw]], size: int) -> np.ndarray:
    """Operations on an image of `size` pixels as float32 (operations, FIELDS).

    >>> packed([("Invert", Draw(3, factor=0.5))], 224)[0, :5].tolist()
    [2.0, 3.0, 0.0, 0.0, 0.5]
    """
    rows = [
        (
            NAMES.index(name),
            draw.magnitude,
            draw.negative,
            draw.bicubic,
            draw.blend,
            *square(draw.cutout_side, draw.centre, size, size),
        )
        for name, draw in drawn
    ]
    return np.array(rows, np.float32)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    return cv2.LUT(image, table.astype(np.uint8))


def _look_up_channels(image: np.ndarray, table_of) -> np.ndarray:
    tables = np.empty((1, 256, 3), np.uint8)
    for channel in range(3):
        histogram = cv2.calcHist([image], [channel], None, [256], [0, 256])
        tables[0, :, channel] = table_of(histogram.ravel().astype(int))
    return cv2.LUT(image, tables)


def _luma(image: np.ndarray) -> np.ndarray:
    """Pillow's grey value; OpenCV's rounds one in a thousand the other way."""
    return (cv2.transform(image.astype(np.float32), _LUMA) + np.float32(0.5)).astype(np.uint8)


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
    """start + factor * (end - start), clipped to 0..255 and truncated, as in Pillow."""
    start = start.astype(np.float32)
    # In place: fresh memory for every step would take most of the time.
    mixed = end.astype(np.float32)
    mixed -= start
    mixed *= np.float32(factor)
    mixed += start
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)
