"""Encoded pictures to uint8 arrays, tolerant of what real data sets contain."""

import io

import numpy as np
import simplejpeg
from PIL import Image

_JPEG_MAGIC = b"\xff\xd8\xff"


def decode(data: bytes, *, min_size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes one picture to RGB.

    simplejpeg decodes what it can, about a quarter faster than Pillow and with the same
    result. Pillow takes over for the rest of what ImageNet holds: CMYK files, a PNG named
    JPEG, harmless junk between the segments.

    Args:
      data: the file's bytes, in any format that Pillow reads.
      min_size: None, or the least (height, width) that is wanted: a JPEG may then come out
        of its decoder at a half, a quarter or an eighth of its size, but not below this.

    Returns:
      uint8 (height, width, 3); grey pictures get three equal channels.

    Raises:
      ValueError: the bytes are no picture or break off early.

    >>> import numpy as np
    >>> import simplejpeg
    >>> grey = np.full((8, 6, 1), 200, np.uint8)
    >>> decode(simplejpeg.encode_jpeg(grey, colorspace="GRAY")).shape
    (8, 6, 3)
    """
    if data[:3] == _JPEG_MAGIC:
        height, width = min_size or (0, 0)
        try:
            return simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_height=height,
                min_width=width,
                # Halvings only: their inverse transforms have SIMD code, 5/8 has not.
                min_factor=1 if min_size is None else 2,
            )
        except ValueError:
            pass  # Pillow decides whether the file is unusual or broken.
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, struct.error and more for broken files.
        raise ValueError(f"the picture cannot be decoded: {error}") from error
