"""Encoded images to uint8 arrays, tolerant of what real data sets contain."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
# A file of 700 bytes can claim 4 billion pixels. Pillow refuses more than this by itself.
MAX_PIXELS = 178_956_970
# Second bytes of JPEG markers.
_BASELINE_FRAMES = (0xC0, 0xC1)
_SCAN = 0xDA


def decode(
    data: bytes, *, rows: int | None = None, reduction: int = 1, fast: bool = False
) -> np.ndarray:
    """Decodes one image to RGB.

    simplejpeg decodes what it can, in three quarters of Pillow's time and with the same result
    (CMYK: within 1). Pillow takes over for the rest of what ImageNet holds, a PNG named JPEG or
    junk between a JPEG's segments.

    Args:
      data: the file's bytes, in any format that Pillow reads.
      rows: None, or how many rows are wanted, from the top; the result may have more. A crop
        ends at 85 % of the height on average, and the rest of most JPEGs can be left alone.
      reduction: 2, 4 or 8 decode a JPEG at a half, a quarter or an eighth of its size, which skips
        most of the work; other formats ignore it.
      fast: use libjpeg's faster, less exact arithmetic; values are off by 1 or 2.

    Returns:
      uint8 (height, width, 3); grey images get three equal channels, and values of 16 bits are
      divided by 257.

    Raises:
      ValueError: the bytes are no image or break off early; the image has more than `MAX_PIXELS`
        or values of unknown range (32 bits or floating point); or memory does not suffice.

    >>> grey = np.full((80, 60, 1), 200, np.uint8)
    >>> data = simplejpeg.encode_jpeg(grey, colorspace="GRAY")
    >>> decode(data).shape, decode(data, reduction=2).shape, decode(data, rows=20).shape
    ((80, 60, 3), (40, 30, 3), (32, 60, 3))
    """
    if data[:3] == _JPEG_MAGIC:
        try:
            top = None if rows is None else _top_of_jpeg(data, rows)
            jpeg = top or data
            height, width = _jpeg_size(jpeg)
            return simplejpeg.decode_jpeg(
                jpeg,
                "RGB",
                fastdct=fast,
                fastupsample=fast,
                min_height=-(-height // reduction),
                min_width=-(-width // reduction),
                strict=top is None,  # the rows that are left over count as an error
            )
        except (ValueError, MemoryError):
            pass  # Pillow decides whether the file is unusual or broken.
    with _opened(data) as image:
        return np.asarray(_eight_bits(image).convert("RGB"))


def decoded_size(data: bytes) -> tuple[int, int]:
    """Height and width of the whole image, from the file's header.

    Raises:
      ValueError: the bytes do not begin like those of an image.
    """
    if data[:3] == _JPEG_MAGIC:
        with contextlib.suppress(ValueError):
            return _jpeg_size(data)
    with _opened(data) as image:
        return image.height, image.width


def _jpeg_size(data: bytes) -> tuple[int, int]:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    if height * width > MAX_PIXELS:
        raise ValueError  # Pillow, asked next, will refuse it with a sentence.
    return height, width


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A Pillow image; every failure becomes a ValueError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ValueError("the image cannot be decoded: its format is unknown") from error
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, struct.error and more for broken files.
        raise ValueError(f"the image cannot be decoded: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Brings grey values of 16 bits to 0..255, which Pillow's conversion to RGB cuts off there."""
    if image.mode[0] not in "IF":
        return image
    # Pillow scales PGM files of any depth to 16 bits; other files with 32 do not say their range.
    if not image.mode.startswith("I;16") and image.format not in ("PNG", "PPM"):
        raise ValueError(
            f"the range of its values is unknown ({image.format} of Pillow's mode {image.mode!r}); "
            "it must have 8 or 16 bits"
        )
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _top_of_jpeg(data: bytes, rows: int) -> bytearray | None:
    """The same file with a smaller height in its header, so that decoders stop early.

    Baseline files with a single scan store the image's blocks from top to bottom. None for
    other files, for those that may break off early, and where there is nothing to save.
    """
    if not data.endswith(_JPEG_END):
        return None
    at, frame = 2, None
    while at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _BASELINE_FRAMES:
            frame = at
        elif marker == _SCAN:
            break
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    else:
        return None
    # Progressive files have another kind of frame, files with several scans fewer components in
    # the first. A frame is: marker, length, precision, height, width, components, 3 bytes for each.
    if frame is None or data[at + 4] != data[frame + 9]:
        return None
    components = data[frame + 9]
    sampling = max(data[frame + 11 + 3 * i] & 15 for i in range(components))
    # One more row of blocks than needed: upsampled colours look at the row below.
    block = 8 * sampling
    height = (-(-rows // block) + 1) * block
    if height >= int.from_bytes(data[frame + 5 : frame + 7], "big"):
        return None
    top = bytearray(data)
    top[frame + 5 : frame + 7] = height.to_bytes(2, "big")
    return top
