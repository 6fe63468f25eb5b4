"""RandAugment's sixteen operations on uint8 images (Cubuk et al., arXiv 1909.13719).

The results are Pillow's, in which the published models were trained: bit for bit where an
operation looks values up or blends, within rounding where it moves pixels. Pillow itself takes
1 to 2 ms to move an image of 224 pixels, OpenCV 0.1 to 0.9 ms. One difference: where rotating
and shearing use OpenCV's cubic filter, it is a little softer (a = -0.75) than Pillow's (a = -1).
"""

import dataclasses
import math

import cv2
import numpy as np

_GREY = (128, 128, 128)  # fills what a moved image uncovers
_CUTOUT_COLOUR = (125, 122, 113)  # ImageNet's mean
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
    """

    magnitude: int
    negative: bool = False
    bicubic: bool = False
    centre: tuple[float, float] = (0.5, 0.5)

    @property
    def level(self) -> float:
        """Magnitude in units of 10."""
        return self.magnitude / 10

    @property
    def signed_level(self) -> float:
        """The level with its random sign."""
        return -self.level if self.negative else self.level


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
        if high == low:
            return _VALUES
        scale = 255.0 / (high - low)
        return np.clip((_VALUES * scale - low * scale).astype(int), 0, 255)

    return _look_up_channels(image, table)


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


def rotate(image: np.ndarray, degrees: float, bicubic: bool = False) -> np.ndarray:
    """Turns counter-clockwise about the centre."""
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    matrix = [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]
    return _affine(image, matrix, bicubic)


def shear(image: np.ndarray, factor: float, axis: int, bicubic: bool = False) -> np.ndarray:
    """Shifts rows (axis 1) or columns (axis 0) in proportion to their position."""
    matrix = [[1, factor, 0], [0, 1, 0]] if axis == 1 else [[1, 0, 0], [factor, 1, 0]]
    return _affine(image, matrix, bicubic)


def translate(image: np.ndarray, pixels: float, axis: int, bicubic: bool = False) -> np.ndarray:
    """Moves the image by a fraction of pixels, towards 0 where positive, along axis 0 or 1."""
    whole = math.floor(pixels + 0.5)
    fraction = pixels - whole  # -0.5..0.5
    # The taps start two pixels before the value if it lies left of the pixel, else one before.
    first = 2 if fraction < 0 else 1
    taps, one = _taps(fraction % 1, bicubic), np.ones(1, np.float32)
    kernels, anchor = ((taps, one), (first, 0)) if axis == 1 else ((one, taps), (0, first))
    moved = cv2.sepFilter2D(image, -1, *kernels, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    out = np.full_like(image, _GREY[0])
    side = image.shape[axis]
    target = slice(max(0, -whole), min(side, side - whole))
    source = slice(target.start + whole, target.stop + whole)
    if axis == 1:
        out[:, target] = moved[:, source]
    else:
        out[target] = moved[source]
    return out


def cutout(image: np.ndarray, side: float, centre: tuple[float, float]) -> np.ndarray:
    """Paints a square of `side` pixels around a place given in fractions of the sides."""
    out = image.copy()
    spans = []
    for length, fraction in zip(image.shape[:2], centre, strict=True):
        start = int(max(0, fraction * length - side / 2))
        spans.append(slice(start, int(min(length, start + side))))
    out[tuple(spans)] = _CUTOUT_COLOUR
    return out


# The argument that a magnitude becomes. Magnitudes beyond 10 are intended.
OPERATIONS = {
    "AutoContrast": lambda image, draw: auto_contrast(image),
    "Equalize": lambda image, draw: equalize(image),
    "Invert": lambda image, draw: invert(image),
    "Rotate": lambda image, draw: rotate(image, 30 * draw.signed_level, draw.bicubic),
    "PosterizeTpu": lambda image, draw: posterize(image, int(4 * draw.level)),
    "Solarize": lambda image, draw: solarize(image, int(256 * draw.level)),
    "SolarizeAdd": lambda image, draw: solarize_add(image, int(110 * draw.level)),
    "Color": lambda image, draw: colour(image, 1.8 * draw.level + 0.1),
    "Contrast": lambda image, draw: contrast(image, 1.8 * draw.level + 0.1),
    "Brightness": lambda image, draw: brightness(image, 1.8 * draw.level + 0.1),
    "Sharpness": lambda image, draw: sharpness(image, 1.8 * draw.level + 0.1),
    "ShearX": lambda image, draw: shear(image, 0.3 * draw.signed_level, 1, draw.bicubic),
    "ShearY": lambda image, draw: shear(image, 0.3 * draw.signed_level, 0, draw.bicubic),
    "TranslateXRel": lambda image, draw: translate(
        image, 0.45 * draw.signed_level * image.shape[1], 1, draw.bicubic
    ),
    "TranslateYRel": lambda image, draw: translate(
        image, 0.45 * draw.signed_level * image.shape[0], 0, draw.bicubic
    ),
    "Cutout": lambda image, draw: cutout(image, max(2, 40 * draw.level), draw.centre),
}
_FUNCTIONS = tuple(OPERATIONS.values())


def rand_augment(
    image: np.ndarray, rng: np.random.Generator, *, layers: int = 2, magnitudes: int = 15
) -> np.ndarray:
    """Applies operations drawn uniformly, each with its own random strength.

    Args:
      image: uint8 (height, width, 3).
      rng: source of everything random.
      layers: number of operations in a row.
      magnitudes: magnitudes are drawn from 0..magnitudes-1.

    Returns:
      uint8 of the same shape.

    >>> image = np.full((4, 4, 3), 200, np.uint8)
    >>> rand_augment(image, np.random.default_rng(1)).shape
    (4, 4, 3)
    """
    for _ in range(layers):
        function = _FUNCTIONS[rng.integers(len(_FUNCTIONS))]
        magnitude, negative, bicubic = rng.integers((magnitudes, 2, 2)).tolist()
        draw = Draw(magnitude, bool(negative), bool(bicubic), tuple(rng.random(2)))
        image = function(image, draw)
    return image


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


def _taps(fraction: float, bicubic: bool) -> np.ndarray:
    """Weights of the pixels at -1, 0, 1 and 2 for a value between 0 and 1."""
    if not bicubic:
        return np.array([0, 1 - fraction, fraction, 0], np.float32)
    x = np.array([1 + fraction, fraction, 1 - fraction, 2 - fraction])
    near = x**3 - 2 * x**2 + 1
    far = -(x**3) + 5 * x**2 - 8 * x + 4
    return np.where(x < 1, near, far).astype(np.float32)


def _affine(image: np.ndarray, matrix, bicubic: bool) -> np.ndarray:
    """Samples at matrix @ (x, y, 1), where pixel (0, 0) has its middle at (0.5, 0.5)."""
    matrix = np.array(matrix, np.float64)
    # OpenCV counts from the middle of the first pixel.
    matrix[:, 2] += matrix[:, :2].sum(axis=1) * 0.5 - 0.5
    size = image.shape[1::-1]
    if bicubic:
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(image, matrix, size, flags=flags, borderValue=_GREY)
    # Four channels take less than half the time of three.
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    image = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    image = cv2.warpAffine(image, matrix, size, flags=flags, borderValue=(*_GREY, 0))
    return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)
