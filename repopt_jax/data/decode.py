"""Encoded pictures to uint8 arrays, tolerant of what real data sets contain."""

import io

import numpy as np
import simplejpeg
from PIL import Image

_JPEG_MAGIC = b"\xff\xd8\xff"


def decode(data: bytes, *, reduction: int = 1, fast: bool = False) -> np.ndarray:
    """Decodes one picture to RGB.

    simplejpeg decodes what it can, in three quarters of Pillow's time and with the same result
    (CMYK: within 1). Pillow takes over for the rest of what ImageNet holds, a PNG named JPEG or
    junk between a JPEG's segments.

    Args:
      data: the file's bytes, in any format that Pillow reads.
      reduction: 2, 4 or 8 have a JPEG decoded at that fraction of its size, which skips most of
        the work; other formats ignore it.
      fast: use libjpeg's faster, less exact arithmetic; values are off by 1 or 2.

    Returns:
      uint8 (height, width, 3); grey pictures get three equal channels.

    Raises:
      ValueError: the bytes are no picture or break off early.

    >>> grey = np.full((8, 6, 1), 200, np.uint8)
    >>> data = simplejpeg.encode_jpeg(grey, colorspace="GRAY")
    >>> decode(data).shape, decode(data, reduction=2).shape
    ((8, 6, 3), (4, 3, 3))
    """
    if data[:3] == _JPEG_MAGIC:
        try:
            if reduction == 1:
                return simplejpeg.decode_jpeg(data, "RGB", fastdct=fast, fastupsample=fast)
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return simplejpeg.decode_jpeg(
                data,
                "RGB",
                fastdct=fast,
                fastupsample=fast,
                min_height=-(-height // reduction),
                min_width=-(-width // reduction),
                min_factor=reduction,
            )
        except ValueError:
            pass  # Pillow decides whether the file is unusual or broken.
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, struct.error and more for broken files.
        raise ValueError(f"the picture cannot be decoded: {error}") from error


def decoded_size(data: bytes) -> tuple[int, int]:
    """Height and width that `decode` will give, from the file's header.

    Raises:
      ValueError: the bytes do not begin like a picture.
    """
    if data[:3] == _JPEG_MAGIC:
        try:
            return simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError:
            pass
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.height, picture.width
    except Exception as error:
        raise ValueError(f"the picture cannot be decoded: {error}") from error
