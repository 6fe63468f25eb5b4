"""Claims about augmentations of small pictures."""

import numpy as np
import pytest

from repopt_jax.data.augment import FlipCrop, preset


def test_crops_are_windows_of_the_zero_padded_picture_and_all_of_them_occur():
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
    assert {picture.tobytes() for picture in out} == windows


def test_the_preset_none_returns_equal_pictures_in_new_memory():
    images = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    augment = preset("none")
    out = augment.batch(images, augment.draw(1, np.random.default_rng(0)))
    np.testing.assert_array_equal(out, images)
    assert not np.shares_memory(out, images)


def test_flips_are_fair():
    draws = preset("flip_crop").draw(4000, np.random.default_rng(0))
    assert draws[:, 2].mean() == pytest.approx(0.5, abs=0.03)
    assert (draws[:, :2].min(), draws[:, :2].max()) == (0, 8)
