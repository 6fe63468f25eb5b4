"""Claims about augmentations of small images."""

import numpy as np
import pytest

from repopt_jax.data.augment import FlipCrop, ResizedCrop, preset


def test_crops_are_windows_of_the_zero_padded_image_and_all_of_them_occur():
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (1, 5, 6, 3)).astype(np.uint8)
    augment = FlipCrop(padding=1, flip=True)
    out = augment.batch(np.repeat(image, 400, axis=0), augment.draw(400, rng))
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    windows = {
        padded[top : top + 5, left : left + 6][:, ::step].tobytes()
        for top in range(3)
        for left in range(3)
        for step in (1, -1)
    }
    assert {image.tobytes() for image in out} == windows


def test_the_preset_none_returns_equal_images_in_new_memory():
    images = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    augment = preset("none")
    out = augment.batch(images, augment.draw(1, np.random.default_rng(0)))
    np.testing.assert_array_equal(out, images)
    assert not np.shares_memory(out, images)


def test_flips_are_fair():
    draws = preset("flip_crop").draw(4000, np.random.default_rng(0))
    assert draws[:, 2].mean() == pytest.approx(0.5, abs=0.03)
    assert (draws[:, :2].min(), draws[:, :2].max()) == (0, 8)


def test_half_of_the_resized_crops_are_mirrored():
    """Left is dark and right is bright, in every crop of this ramp."""
    ramp = np.repeat(np.tile(np.arange(0, 240, 2, dtype=np.uint8), (90, 1))[..., None], 3, axis=-1)
    augment = preset("weak")
    seeds = augment.draw(400, np.random.default_rng(0))
    crops = [augment.image(ramp, seed, 16) for seed in seeds]
    mirrored = np.mean([crop[8, 0, 0] > crop[8, -1, 0] for crop in crops])
    assert mirrored == pytest.approx(0.5, abs=0.07)


def test_a_seed_decides_everything():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 60, 3)).astype(np.uint8)
    for name in ("weak", "raug15", "jitter"):
        augment = preset(name)
        first, second = augment.draw(2, rng)
        crop = augment.image(image, first, 32)
        np.testing.assert_array_equal(crop, augment.image(image, first, 32))
        assert (crop != augment.image(image, second, 32)).any()


def test_jitter_changes_brightness_by_at_most_its_strength_and_keeps_grey_grey():
    """Contrast and saturation cannot change a flat grey image, so brightness shows alone."""
    image = np.full((20, 20, 3), 100, np.uint8)
    augment = ResizedCrop(jitter=0.4)
    seeds = augment.draw(300, np.random.default_rng(0))
    values = np.array([augment.image(image, seed, 8)[0, 0] for seed in seeds])
    assert (values == values[:, :1]).all()
    assert 59 <= values.min() <= 64 and 136 <= values.max() <= 140


def test_random_interpolation_takes_pillows_bicubic_for_half_of_the_images():
    """Bicubic interpolation overshoots at an edge, bilinear never does."""
    image = np.full((40, 40, 3), 100, np.uint8)
    image[:, 20:] = 150
    augment = ResizedCrop(random_interpolation=True)
    seeds = augment.draw(300, np.random.default_rng(0))
    crops = [augment.image(image, seed, 64) for seed in seeds]
    overshoot = [crop.max() > 151 for crop in crops if crop.min() < 101 and crop.max() >= 150]
    assert np.mean(overshoot) == pytest.approx(0.5, abs=0.1)


def test_presets_are_the_recipes():
    assert preset("weak") == ResizedCrop()
    assert preset("raug15") == ResizedCrop(rand_augment=True)
    assert preset("jitter") == ResizedCrop(jitter=0.4, random_interpolation=True)
    assert preset("none") == FlipCrop()
    assert preset("crop") == FlipCrop(padding=1)
    assert preset("flip_crop") == FlipCrop(padding=4, flip=True)


def test_randaugment_works_on_what_the_weak_preset_makes():
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3)).astype(np.uint8)
    weak, strong = preset("weak"), preset("raug15")
    seeds = weak.draw(200, np.random.default_rng(0))
    pairs = [(weak.image(image, s, 16), strong.image(image, s, 16)) for s in seeds]
    equal = np.mean([(a == b).all() for a, b in pairs])
    # Both operations leave an image alone now and then, e.g. a turn by 0 degrees.
    assert 0 < equal < 0.2
