"""Claims about RandAugment: its operations are the official code's."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from repopt_jax.data.moves import translate
from repopt_jax.data.randaugment import NAMES, OPERATIONS, Draw, draw_rand_augment, posterize

GREY = (128, 128, 128)
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
EXACT = [name for name in OPERATIONS if name not in (*MOVES, "Cutout")]


def random_image(seed=0, height=61, width=80):
    """Smooth colours with some noise, all values from 0 to 255."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(image + rng.integers(-9, 10, image.shape), 0, 255).astype(np.uint8)


def covered(name, image, draw):
    """Where the moved image is, without two pixels along its border."""
    white = np.full_like(image, 255)
    inside = (OPERATIONS[name](white, draw) == 255).all(axis=-1)
    return cv2.erode(inside.astype(np.uint8), np.ones((5, 5))) == 1


@pytest.mark.parametrize("name", EXACT)
def test_looked_up_and_blended_values_equal_the_official_codes(name, golden):
    data = np.load(golden / "randaug.npz")
    keys = [key for key in data if key.startswith(f"{name}_") and not key.endswith("_error")]
    assert len(keys) >= 6
    for key in keys:
        _, magnitude, sign = key.split("_")
        ours = OPERATIONS[name](data["input"], Draw(int(magnitude), sign == "-"))
        np.testing.assert_array_equal(ours, data[key], err_msg=key)


@pytest.mark.parametrize("name", MOVES)
def test_moved_images_are_within_one_of_the_official_codes(name, golden):
    data = np.load(golden / "randaug.npz")
    for magnitude in (0, 3, 9, 14):
        for sign in "+-":
            draw = Draw(magnitude, sign == "-")
            ours = OPERATIONS[name](data["input"], draw).astype(int)
            official = data[f"{name}_{magnitude}_{sign}"].astype(int)
            inside = covered(name, data["input"], draw)
            assert inside.mean() > 0.2
            assert np.abs(ours - official)[inside].mean() <= 1
            # And what is uncovered is grey in both, but for a pixel along the border.
            grey, official_grey = ((x == 128).all(axis=-1) for x in (ours, official))
            assert official_grey.any() == (magnitude > 0)
            assert (grey != official_grey).mean() < 0.03


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("pixels", [-31.7, -2.5, -0.4, 0.0, 0.3, 7.0, 12.6])
def test_translation_equals_pillows(axis, bicubic, pixels):
    """Both interpolations, the border included, but for Pillow's rounding down."""
    image = random_image()
    offsets = (1, 0, pixels, 0, 1, 0) if axis == 1 else (1, 0, 0, 0, 1, pixels)
    pillow = Image.fromarray(image).transform(
        image.shape[1::-1],
        Image.Transform.AFFINE,
        offsets,
        Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR,
        fillcolor=GREY,
    )
    ours = translate(image, pixels, axis, bicubic).astype(int)
    assert np.abs(ours - np.asarray(pillow)).max() <= 1


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY"])
def test_bicubic_moves_stay_near_the_bilinear_ones(name):
    """Same geometry: a wrong sign or centre would be off by tens."""
    for magnitude in (2, 14):
        linear, cubic = (
            OPERATIONS[name](random_image(), Draw(magnitude, True, bicubic)).astype(int)
            for bicubic in (False, True)
        )
        assert (
            np.abs(linear - cubic)[covered(name, random_image(), Draw(magnitude, True))].mean() < 4
        )


@pytest.mark.parametrize("values", [[7], [0, 255], [3, 250], list(range(256))])
def test_images_of_few_values_equalize_and_stretch_as_in_pillow(values):
    image = np.random.default_rng(0).choice(values, (20, 30, 3)).astype(np.uint8)
    for name, pillow in (("Equalize", ImageOps.equalize), ("AutoContrast", ImageOps.autocontrast)):
        expected = np.asarray(pillow(Image.fromarray(image)))
        np.testing.assert_array_equal(OPERATIONS[name](image, Draw(5)), expected)


@pytest.mark.parametrize("brightest", [89, 90, 91, 345, 346, 599])
def test_equalize_steps_as_pillow_does(brightest):
    """The step is the number of pixels below the brightest value over 255, rounded down."""
    values = np.repeat([10, 20, 200], [300, 300, brightest])[-600:].astype(np.uint8)
    image = np.repeat(values.reshape(20, 30, 1), 3, axis=-1)
    expected = np.asarray(ImageOps.equalize(Image.fromarray(image)))
    np.testing.assert_array_equal(OPERATIONS["Equalize"](image, Draw(5)), expected)


def test_zero_bits_make_a_black_image():
    """Pillow refuses to posterize to 0 bits, which magnitudes 0, 1 and 2 ask for."""
    assert posterize(random_image(), 0).max() == 0
    assert OPERATIONS["PosterizeTpu"](random_image(), Draw(2)).max() == 0


@pytest.mark.parametrize(
    ("magnitude", "centre", "painted"),
    [(0, (0.5, 0.5), 4), (5, (0.5, 0.5), 400), (5, (0.0, 0.0), 400), (5, (0.999, 0.999), 100)],
)
def test_cutout_paints_a_square_that_may_leave_the_image(magnitude, centre, painted):
    image = np.zeros((60, 80, 3), np.uint8)
    out = OPERATIONS["Cutout"](image, Draw(magnitude, centre=centre))
    changed = (out == (125, 122, 113)).all(axis=-1)
    assert changed.sum() == pytest.approx(painted, rel=0.25)
    assert not out[~changed].any()
    assert not image.any()


def test_operations_magnitudes_and_signs_are_uniform():
    rng = np.random.default_rng(0)
    drawn = [pair for _ in range(2000) for pair in draw_rand_augment(rng)]
    assert len(drawn) == 4000  # two for an image
    counts = np.bincount([NAMES.index(name) for name, _ in drawn], minlength=16)
    assert counts.min() > 180 and counts.max() < 320
    magnitudes = np.bincount([draw.magnitude for _, draw in drawn])
    assert len(magnitudes) == 15 and magnitudes.min() > 190 and magnitudes.max() < 345
    for attribute in ("negative", "bicubic"):
        share = np.mean([getattr(draw, attribute) for _, draw in drawn])
        assert share == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_leave_their_input_and_its_shape_alone(name):
    image = random_image()
    out = OPERATIONS[name](image, Draw(9, True, True))
    np.testing.assert_array_equal(image, random_image())
    assert out.shape == image.shape and out.dtype == np.uint8
