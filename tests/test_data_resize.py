"""Claims about crops and resizing."""

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from repopt_jax.data.decode import decode
from repopt_jax.data.resize import antialiased, random_box, random_resized_crop, resize_and_crop


def photo(height, width, seed=0):
    """Like a photograph: strong coarse structure, weak fine structure."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells, strength in ((4, 90), (16, 30), (64, 12), (256, 5)):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def mean_difference(a, b):
    return np.abs(a.astype(int) - b).mean()


def test_evaluation_equals_the_official_preprocessing(golden):
    data = (golden / "eval_preprocess_input.jpg").read_bytes()
    official = np.load(golden / "eval_preprocess.npz")["output"]
    np.testing.assert_array_equal(resize_and_crop(decode(data), 224), official)


@pytest.mark.parametrize(("size", "resize"), [(224, None), (320, None), (224, 256), (32, 32)])
@pytest.mark.parametrize("shape", [(301, 400), (400, 301), (120, 90), (320, 320), (100, 110)])
def test_evaluation_is_pillows_resize_and_a_centre_crop(size, resize, shape):
    image = photo(*shape)
    short = resize or size
    height, width = (short * n // min(shape) for n in shape)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    expected = np.asarray(resized.crop((left, top, left + size, top + size)))
    np.testing.assert_array_equal(resize_and_crop(image, size, resize), expected)


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(ValueError, match="resize must be at least image_size = 224, got 200"):
        resize_and_crop(photo(300, 300), 224, 200)


def test_random_boxes_have_uniform_area_and_bounded_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(4000, 4000, rng) for _ in range(3000)])
    top, left, height, width = boxes.T
    assert top.min() >= 0 and (top + height).max() <= 4000
    assert left.min() >= 0 and (left + width).max() <= 4000
    area, ratio = height * width / 4000**2, width / height
    assert 0.0799 < area.min() < 0.09 and area.max() > 0.95
    assert 0.7499 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.3334
    assert np.exp(np.log(ratio).mean()) == pytest.approx(1, abs=0.02)
    # Large areas fit less often, so the mean lies a little under the middle.
    assert 0.45 < area.mean() < 0.54


@pytest.mark.parametrize(
    ("shape", "box"),
    [((100, 30), (30, 0, 40, 30)), ((30, 100), (0, 30, 30, 40)), ((50, 50), (0, 0, 50, 50))],
)
def test_without_a_fitting_draw_the_box_is_the_largest_centred_one(shape, box):
    """Boxes of 99 times the image's area never fit."""
    assert random_box(*shape, np.random.default_rng(0), scale=(99, 99)) == box


@pytest.mark.parametrize(
    "shape", [(60, 60), (112, 112), (150, 120), (224, 260), (300, 180), (700, 560)]
)
def test_fast_antialiasing_is_close_to_pillows(shape):
    image = photo(*shape)
    pillow = Image.fromarray(image).resize((112, 112), Image.Resampling.BILINEAR)
    assert mean_difference(antialiased(image, 112), np.asarray(pillow)) < 0.7


def test_huge_images_are_averaged_before_they_are_smoothed(monkeypatch):
    """The smoothing pass sees at most 8 times the result's side; the result is still Pillow's."""
    sizes = []
    smooth = cv2.sepFilter2D
    monkeypatch.setattr(
        cv2,
        "sepFilter2D",
        lambda image, *a, **k: sizes.append(image.shape) or smooth(image, *a, **k),
    )
    image = photo(1500, 900)
    ours = antialiased(image, 32)
    assert sizes == [(256, 256, 3)]
    pillow = Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)
    assert mean_difference(ours, np.asarray(pillow)) < 0.7


@pytest.mark.parametrize("shape", [(3, 60), (500, 7), (40, 900)])
def test_of_a_strip_only_the_crop_is_resized(shape, monkeypatch):
    """A strip of 2 x 20,000 would become 256 x 2,560,000; the pixels are the same within 1."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    monkeypatch.setattr("repopt_jax.data.resize._LONGEST", 10**9)
    whole = resize_and_crop(image, 48, 64)
    monkeypatch.undo()
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *a, **k: made.append(size) or resize(self, size, *a, **k),
    )
    np.testing.assert_allclose(resize_and_crop(image, 48, 64), whole.astype(int), atol=1)
    assert made == [(48, 48)]


def test_only_antialiasing_removes_what_is_too_fine():
    noise = np.random.default_rng(0).integers(0, 256, (448, 448, 3)).astype(np.uint8)
    pillow = np.asarray(Image.fromarray(noise).resize((112, 112), Image.Resampling.BILINEAR))
    assert antialiased(noise, 112).std() == pytest.approx(pillow.std(), rel=0.15)
    assert cv2.resize(noise, (112, 112)).std() > 1.5 * pillow.std()


def test_fast_crops_are_not_antialiased():
    noise = np.random.default_rng(0).integers(0, 256, (448, 448, 3)).astype(np.uint8)
    slow, fast = (
        random_resized_crop(noise, 64, np.random.default_rng(0), fast=fast).std()
        for fast in (False, True)
    )
    assert fast > 1.5 * slow


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("bicubic", [False, True])
def test_crops_of_encoded_and_decoded_images_are_equal(fast, bicubic):
    data = simplejpeg.encode_jpeg(photo(90, 120))
    for seed in range(10):
        ours, expected = (
            random_resized_crop(image, 64, np.random.default_rng(seed), bicubic=bicubic, fast=fast)
            for image in (data, decode(data))
        )
        assert ours.shape == (64, 64, 3)
        assert mean_difference(ours, expected) <= (1 if fast else 0)


def test_crops_from_partly_decoded_images_look_the_same():
    """At 1200 x 1500 pixels most crops of 64 need only a quarter or an eighth."""
    data = simplejpeg.encode_jpeg(cv2.resize(photo(300, 375), (1500, 1200)), quality=95)
    full = decode(data)
    for seed in range(4):
        ours, expected = (
            random_resized_crop(image, 64, np.random.default_rng(seed)) for image in (data, full)
        )
        assert mean_difference(ours, expected) < 2.5
