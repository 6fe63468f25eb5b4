"""RandAugment and colour jitter on the device, for uint8 batches.

The host draws and sends the operations of every image (`repopt_jax.data.randaugment.packed`), so an
image looks the same wherever it is augmented. The sixteen operations are four families, each a
function of the whole batch that leaves the images of the others as they are:

    look_up   AutoContrast, Equalize, Invert, PosterizeTpu, Solarize, SolarizeAdd: a table of 256
              values for every image and channel
    blend     Brightness, Contrast, Color, Sharpness: start + factor * (image - start)
    cut_out   Cutout: a square of one colour
    move      Rotate, ShearX, ShearY, TranslateXRel, TranslateYRel: 4x4 weighted pixels around the
              place where a matrix leads

The first three give the bits of `repopt_jax.data.randaugment`. Moved values differ from the host's
by at most 1 where OpenCV interpolates in floating point, as its version 5 does; older ones round
places to 1/32 of a pixel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from repopt_jax.data.moves import GREY, rotation, shearing, shift
from repopt_jax.data.randaugment import (
    CUTOUT_COLOUR,
    FIELDS,
    MAGNITUDES,
    NAMES,
    OPERATIONS,
    Draw,
    stretched,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

_TABLES = ("Invert", "PosterizeTpu", "Solarize", "SolarizeAdd")  # the same for every image
_MOVES = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_MARGIN = 6  # pixels around an image that its interpolation may read
# Weights of the pixels at -1, 0, 1 and 2 for a place t in 0..1: polynomials of t, constant first.
_LINEAR = ((0, 0, 0, 0), (1, -1, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0))
_CUBIC = ((0, -0.75, 1.5, -0.75), (1, 0, -2.25, 1.25), (0, 0.75, 1.5, -1.25), (0, 0, -0.75, 0.75))


class Operation(NamedTuple):
    """One operation for each image: the columns of `FIELDS`, int32 but for the factor."""

    operation: Int[Array, " batch"]
    magnitude: Int[Array, " batch"]
    negative: Int[Array, " batch"]
    bicubic: Int[Array, " batch"]
    factor: Float[Array, " batch"]
    top: Int[Array, " batch"]
    bottom: Int[Array, " batch"]
    left: Int[Array, " batch"]
    right: Int[Array, " batch"]

    @classmethod
    def of(cls, rows: Float[Array, "batch fields"]) -> Operation:
        """One row of `packed` for each image."""
        columns = dict(zip(FIELDS, rows.T, strict=True))
        return cls(**{k: v if k == "factor" else v.astype(int) for k, v in columns.items()})

    def is_one_of(self, *names: str) -> Bool[Array, " batch"]:
        """Which images have one of these operations."""
        return jnp.isin(self.operation, jnp.array([NAMES.index(name) for name in names]))


def apply_operations(
    images: UInt8[Array, "batch height width 3"],
    operations: Float[Array, "batch count fields"],
    mesh: Mesh | None = None,
) -> UInt8[Array, "batch height width 3"]:
    """Apply to every image its own operations, one after the other.

    Args:
      images: of any size; `packed` knows square ones only.
      operations: of `repopt_jax.data.randaugment.packed`, one row for each operation. The values of
        a row are those of `FIELDS`.
      mesh: the devices. The batch is split over all of its axes, and each device augments its own
        images. None: there is one device.

    Returns:
      The augmented images, split as they were.

    >>> from repopt_jax.data.randaugment import packed
    >>> invert = packed([("Invert", Draw())], 2)[None]
    >>> apply_operations(jnp.full((1, 2, 2, 3), 200, jnp.uint8), invert)[0, 0, 0].tolist()
    [55, 55, 55]
    """
    if mesh is None or mesh.size == 1:
        return _apply(images, operations)
    split = PartitionSpec(mesh.axis_names)
    specs = {"in_specs": (split, split), "out_specs": split}
    return jax.shard_map(_apply, mesh=mesh, **specs)(images, operations)


def _apply(images, operations):
    def layer(images, rows):
        each = Operation.of(rows)
        for family in (look_up, blend, cut_out, move):
            images = family(images, each)
        return images, None

    return jax.lax.scan(layer, images, operations.swapaxes(0, 1))[0]


def look_up(images: UInt8[Array, "batch height width 3"], each: Operation) -> Array:
    """Replace the values of an image by those in its tables."""
    batch = len(images)
    values = jnp.broadcast_to(jnp.arange(256, dtype=jnp.uint8)[:, None], (batch, 256, 3))
    kind = sum(i * each.is_one_of(name) for i, name in enumerate(_TABLES))
    fixed = jnp.asarray(_fixed_tables())[kind, each.magnitude][:, :, None]
    tables = jnp.where(_over(each.is_one_of(*_TABLES), 3), fixed, values)
    stretch = _stretch_tables(images.min((1, 2)), images.max((1, 2)))
    tables = jnp.where(_over(each.is_one_of("AutoContrast"), 3), stretch, tables)
    tables = _for_chosen(each.is_one_of("Equalize"), _equalize_tables, tables, images)
    flat = images.reshape(batch, -1, 3)
    found = jnp.take_along_axis(tables, flat.astype(jnp.int32), axis=1, mode="clip")
    return found.reshape(images.shape)


@functools.cache
def _fixed_tables() -> np.ndarray:
    """uint8 (operations, magnitudes, 256): what the host's operations make of a ramp."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 256, 1), 3, axis=2)
    draws = [Draw(magnitude) for magnitude in range(MAGNITUDES)]
    return np.array([[OPERATIONS[name](ramp, d)[0, :, 0] for d in draws] for name in _TABLES])


def _stretch_tables(low: UInt8[Array, "batch 3"], high: UInt8[Array, "batch 3"]) -> Array:
    """The tables of AutoContrast, of the channels' least and greatest values."""
    low, high = (x.astype(jnp.int32)[:, None] for x in (low, high))
    values = jnp.arange(256)[None, :, None]
    rounded_down = jnp.clip(255 * (values - low) // jnp.maximum(high - low, 1), 0, 255)
    words = jnp.asarray(_stretch_errors())[low[:, 0], high[:, 0]]  # (batch, 3, 32)
    bits = jnp.unpackbits(words, axis=-1).swapaxes(1, 2)
    return jnp.where(high > low, rounded_down - bits, values).astype(jnp.uint8)


@functools.cache
def _stretch_errors() -> np.ndarray:
    """Where float64, in which Pillow computes, ends 1 below the exact value; in bits."""
    errors = np.zeros((256, 256, 32), np.uint8)
    for low in range(255):
        high = np.arange(low + 1, 256)[:, None]
        exact = np.clip(255 * (np.arange(256) - low) // (high - low), 0, 255)
        errors[low, low + 1 :] = np.packbits(exact - stretched(low, high) == 1, axis=-1)
    return errors


def _equalize_tables(images: UInt8[Array, "batch height width 3"]) -> UInt8[Array, "batch 256 3"]:
    flat = images.reshape(len(images), -1, 3)
    # Counted by a product of matrices: which half of 4 bits each value has, above and below.
    halves = (flat >> 4, flat & 15)
    high, low = (jax.nn.one_hot(half, 16, dtype=jnp.bfloat16) for half in halves)
    counts = jnp.einsum("npch,npcl->nhlc", high, low, preferred_element_type=jnp.float32)
    histogram = counts.reshape(-1, 256, 3).astype(jnp.int32)
    last = jnp.take_along_axis(histogram, flat.max(1).astype(jnp.int32)[:, None], axis=1)
    step = (flat.shape[1] - last) // 255
    below = jnp.cumsum(histogram, axis=1) - histogram
    tables = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step == 0, jnp.arange(256)[None, :, None], tables).astype(jnp.uint8)


def blend(images: UInt8[Array, "batch height width 3"], each: Operation) -> Array:
    """``start + factor * (image - start)``, clipped to 0..255 and truncated.

    The start is black, the mean grey, the grey image or the smoothed image.
    """
    wide = images.astype(jnp.int32)
    # Pillow's grey value.
    red, green, blue = (wide[..., c : c + 1] for c in range(3))
    luma = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16
    total, pixels = luma.sum((1, 2, 3), keepdims=True), luma[0].size
    mean = total // pixels + (2 * (total % pixels) >= pixels)
    start = jnp.where(_over(each.is_one_of("Contrast"), 4), mean, 0)
    start = jnp.where(_over(each.is_one_of("Color"), 4), luma, start)
    start = jnp.where(_over(each.is_one_of("Sharpness"), 4), _smooth(wide), start)
    mixed = jnp.clip(_mix(start, wide, _over(each.factor, 4)), 0, 255).astype(jnp.uint8)
    chosen = each.is_one_of("Brightness", "Contrast", "Color", "Sharpness")
    return jnp.where(_over(chosen, 4), mixed, images)


def _smooth(wide: Int[Array, "batch height width 3"]) -> Array:
    """The mean of 3x3 pixels, the middle one counted five times; the border stays."""
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    margin = ((0, 0), (1, 1), (1, 1), (0, 0))
    border = np.pad(np.zeros((1, *total.shape[1:3], 1), bool), margin, constant_values=True)
    return jnp.where(border, wide, jnp.pad((2 * total + 13) // 26, margin))


def _mix(start: Array, end: Array, factor: Array) -> Array:
    """``start + factor * (end - start)`` with each result rounded to float32, as on the host.

    A compiler may turn a product and a sum into one operation, which rounds once. So the factor is
    a sum of two whose products need no rounding.
    """
    difference = (end - start).astype(jnp.float32)
    coarse = _coarse(factor)
    return (difference * coarse + difference * (factor - coarse)) + start.astype(jnp.float32)


def _coarse(factor: Float[Array, "*any"]) -> Array:
    """The factor cut to 12 of its 24 bits, so that a product with 8 bits is exact."""
    bits = jax.lax.bitcast_convert_type(factor, jnp.uint32) & np.uint32(0xFFFFF000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def cut_out(images: UInt8[Array, "batch height width 3"], each: Operation) -> Array:
    """Paint a square of ImageNet's mean colour."""

    def span(first, end, axis):
        place = jnp.arange(images.shape[axis])[None]
        return (place >= first[:, None]) & (place < end[:, None])

    colour = np.array(CUTOUT_COLOUR, np.uint8).reshape(1, 1, 1, 3)
    rows, columns = span(each.top, each.bottom, 1), span(each.left, each.right, 2)
    inside = rows[:, :, None] & columns[:, None] & _over(each.is_one_of("Cutout"), 3)
    return jnp.where(inside[..., None], colour, images)


class _Motion(NamedTuple):
    """Where an image's pixels come from: the cases of `_motions`, or one for each image."""

    matrix: Any  # (2, 3), of `repopt_jax.data.moves.sampling`
    weights: Any  # (2, 4, 4): of 4 pixels along x and y, by powers of the place between two
    whole: Any  # (2,): translation by whole pixels, which decides what is uncovered
    repeats: Any  # whether the image goes on beyond its border with its last pixels, or grey


def move(images: UInt8[Array, "batch height width 3"], each: Operation) -> Array:
    """Turn, shear or translate."""
    cases = jax.tree.map(jnp.asarray, _motions(*images.shape[1:3]))
    kind = sum(i * each.is_one_of(name) for i, name in enumerate(_MOVES))
    case = (kind, each.magnitude, each.negative, each.bicubic)
    motions = jax.tree.map(lambda x: x[case], cases)
    return _for_chosen(each.is_one_of(*_MOVES), _moved, images, images, motions)


@functools.cache
def _motions(height: int, width: int) -> _Motion:
    """Arrays by operation, magnitude, sign and interpolation."""
    found = []
    options = (range(MAGNITUDES), (False, True), (False, True))
    for name, *drawn in itertools.product(_MOVES, *options):
        draw = Draw(*drawn)
        weights = np.array([_CUBIC if draw.bicubic else _LINEAR] * 2, np.float32)
        whole, repeats = np.zeros(2, np.int32), name.startswith("Translate")
        if name == "Rotate":
            matrix = rotation(draw.degrees, height, width)
        elif not repeats:
            matrix = shearing(draw.shear, 1 if name == "ShearX" else 0)
        else:
            axis, side = (0, width) if name == "TranslateXRel" else (1, height)  # of (x, y)
            whole[axis], first, taps = shift(draw.translation * side, draw.bicubic)
            matrix = np.eye(2, 3)
            matrix[axis, 2] = whole[axis] + 1 - first
            weights = np.zeros((2, 4, 4), np.float32)
            weights[axis, :, 0], weights[1 - axis, 1, 0] = taps, 1
        found.append(_Motion(matrix.astype(np.float32), weights, whole, np.bool(repeats)))
    sizes = (len(_MOVES), *map(len, options))
    return jax.tree.map(lambda *x: np.stack(x).reshape(*sizes, *x[0].shape), *found)


def _moved(images: UInt8[Array, "batch height width 3"], motions: _Motion) -> Array:
    batch, height, width, _ = images.shape
    x, y = jnp.arange(width)[None, None, :], jnp.arange(height)[None, :, None]
    matrix = motions.matrix[..., None, None]
    places = [matrix[:, i, 0] * x + matrix[:, i, 1] * y + matrix[:, i, 2] for i in (0, 1)]
    floors = [jnp.floor(place) for place in places]
    weights = []
    for i in (0, 1):
        t = (places[i] - floors[i])[:, None]
        c = motions.weights[:, i, :, :, None, None]  # (batch, 4 pixels, 4 powers, 1, 1)
        weights.append(c[:, :, 0] + t * (c[:, :, 1] + t * (c[:, :, 2] + t * c[:, :, 3])))
    padded, stride = _padded(images, motions.repeats), width + 2 * _MARGIN
    column, row = (
        jnp.clip(floor, 2 - _MARGIN, side + _MARGIN - 3).astype(jnp.int32) + _MARGIN
        for floor, side in zip(floors, (width, height), strict=True)
    )
    first = (row * stride + column).reshape(batch, -1)
    colours = [jnp.zeros((batch, height, width), jnp.float32)] * 3
    for i, j in itertools.product(range(4), range(4)):
        index = first + ((i - 1) * stride + j - 1)
        pixels = jnp.take_along_axis(padded, index, axis=1, mode="clip")
        weight = weights[1][:, i] * weights[0][:, j]
        for c in range(3):
            value = (pixels >> 8 * c & 255).astype(jnp.float32).reshape(weight.shape)
            colours[c] += weight * value
    moved = jnp.clip(jnp.round(jnp.stack(colours, axis=-1)), 0, 255).astype(jnp.uint8)
    x, y = (p + motions.whole[:, i, None, None] for i, p in enumerate((x, y)))
    covered = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return jnp.where(covered[..., None], moved, np.uint8(GREY))


def _padded(images: Array, repeats: Bool[Array, " batch"]) -> Int[Array, "batch pixels"]:
    """Images with a margin, a pixel's three values in one number, because reading takes long."""
    margin = ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))
    red, green, blue = (images[..., c].astype(jnp.int32) for c in range(3))
    pixels = red | green << 8 | blue << 16
    grey = jnp.pad(pixels, margin, constant_values=GREY * 0x010101)
    padded = jnp.where(_over(repeats, 3), jnp.pad(pixels, margin, "edge"), grey)
    return padded.reshape(len(images), -1)


def _for_chosen(
    chosen: Bool[Array, " batch"], function: Callable[..., Array], others: Array, *arguments: PyTree
) -> Array:
    """`function` of the chosen rows of `arguments`, and `others` elsewhere.

    An eighth of the batch at a time, so that the work is that for the chosen ones, whose number is
    known only on the device.
    """
    batch = len(others)
    size = -(-batch // 8)
    order = jnp.pad(jnp.argsort(~chosen), (0, -batch % size))  # the chosen ones first
    place = jnp.arange(len(order))
    order = jnp.where(place < chosen.sum(), order, batch + place)  # out of range, left out

    def some(number, done):
        rows = jax.lax.dynamic_slice(order, (number * size,), (size,))
        own = jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), arguments)
        # Unique, because GPUs would else lock every byte that they write.
        return done.at[rows].set(function(*own), mode="drop", unique_indices=True)

    return jax.lax.fori_loop(0, -(-chosen.sum() // size), some, others)


def _over(vector: Array, rank: int) -> Array:
    """A value for each image, beside arrays of the images."""
    return vector.reshape(-1, *(1,) * (rank - 1))
