"""Claims about decoding what real data sets contain."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from repopt_jax.data.decode import decode, decoded_size

RNG = np.random.default_rng(0)
COARSE = RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8)
IMAGE = Image.fromarray(COARSE).resize((50, 61), Image.Resampling.BICUBIC)


def encoded(mode="RGB", file_format="JPEG", **options):
    buffer = io.BytesIO()
    IMAGE.convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


KINDS = {
    "jpeg": encoded(),
    "progressive": encoded(progressive=True),
    "no subsampling": encoded(subsampling=0),
    "grey": encoded("L"),
    "CMYK": encoded("CMYK"),
    "png": encoded(file_format="PNG"),
    "grey png": encoded("L", "PNG"),
    "transparent png": encoded("RGBA", "PNG"),
    "palette gif": encoded("P", "GIF"),
    # Two bytes that belong to no segment, before the tables.
    "junk between segments": encoded()[:20] + b"\x00\x00" + encoded()[20:],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_decodes_as_pillow_does(kind):
    data = KINDS[kind]
    image = decode(data)
    assert image.dtype == np.uint8
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    # The two round a product of ink and black differently.
    np.testing.assert_allclose(image, pillow, atol=1 if kind == "CMYK" else 0)
    assert decoded_size(data) == (61, 50)


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_jpegs_can_be_decoded_small(reduction):
    assert decode(KINDS["jpeg"], reduction=reduction).shape[:2] == (
        -(-61 // reduction),
        -(-50 // reduction),
    )
    assert decode(KINDS["png"], reduction=reduction).shape == (61, 50, 3)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 32, 61])
def test_the_top_of_a_jpeg_equals_that_of_the_whole(rows, subsampling):
    data = encoded(subsampling=subsampling)
    top = decode(data, rows=rows)
    assert len(top) >= rows
    assert (len(top) < 61) == (rows <= 32)
    np.testing.assert_array_equal(top[:rows], decode(data)[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_a_separable_top_come_whole(kind):
    if kind in ("jpeg", "no subsampling", "grey", "CMYK"):
        assert len(decode(KINDS[kind], rows=8)) < 61
    else:
        np.testing.assert_array_equal(decode(KINDS[kind], rows=8), decode(KINDS[kind]))


def test_a_truncated_jpeg_is_refused_even_if_its_top_is_there():
    """Or else it would depend on the crop whether a broken file is noticed."""
    with pytest.raises(ValueError, match="the image cannot be decoded"):
        decode(KINDS["jpeg"][:-300], rows=8)


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", KINDS["jpeg"][:-300], KINDS["png"][:-300], KINDS["jpeg"][:30]],
    ids=["empty", "text", "truncated jpeg", "truncated png", "header only"],
)
def test_broken_files_are_refused(data):
    with pytest.raises(ValueError, match="the image cannot be decoded"):
        decode(data)


def grey(values, file_format):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, file_format)
    return buffer.getvalue()


def pgm(largest, values):
    return b"P5\n3 1\n%d\n" % largest + np.array(values, ">u2").tobytes()


SIXTEEN_BITS = np.array([[0, 20000, 65535]], np.uint16)
COLOUR = cv2.imencode(".png", np.repeat(SIXTEEN_BITS[..., None], 3, axis=-1))[1].tobytes()
DEEP = {
    "16-bit png": grey(SIXTEEN_BITS, "PNG"),
    "16-bit tiff": grey(SIXTEEN_BITS, "TIFF"),
    "16-bit pgm": pgm(65535, [0, 20000, 65535]),
    "10-bit pgm": pgm(1023, [0, 312, 1023]),
    "16-bit colour png": cv2.imencode(".png", np.repeat(SIXTEEN_BITS[..., None], 3, -1))[
        1
    ].tobytes(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deeper_values_are_scaled_to_eight_bits(kind):
    """20000 of 65535 and 312 of 1023 are 78 of 255."""
    assert decode(DEEP[kind])[0].tolist() == [[0] * 3, [78] * 3, [255] * 3]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_unknown_range_are_refused(dtype):
    with pytest.raises(ValueError, match=f"TIFF .* mode '{'I' if dtype == np.int32 else 'F'}'"):
        decode(grey(np.array([[0.25, 1.0]]).astype(dtype), "TIFF"))


def claiming(height, width):
    """A JPEG of some hundred bytes whose header says another size."""
    data = bytearray(encoded())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize("read", [decode, decoded_size])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(read, monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)  # would be a TypeError
    with pytest.raises(ValueError, match=r"cannot be decoded: .* limit of 178956970 pixels"):
        read(claiming(65500, 65500))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.raises(ValueError, match=r"cannot be decoded: .* limit of 3000 pixels"):
        read(KINDS["png"])


def test_an_image_for_which_memory_does_not_suffice_cannot_be_decoded(monkeypatch):
    def fail(*_, **__):
        raise MemoryError("cannot allocate 4 GiB")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    np.testing.assert_array_equal(decode(KINDS["jpeg"]), decode(KINDS["jpeg"]))  # by Pillow
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ValueError, match="cannot be decoded: cannot allocate 4 GiB"):
        decode(KINDS["jpeg"])
