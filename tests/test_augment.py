"""Mixup, cutmix and random erasing are what their docstrings state, and know no devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repopt_jax.training.augment import ERASED_AREA, ERASED_ASPECT, mix, partners, random_erasing

KEY = jax.random.key(3)
GROUP = 4
BOTH = functools.partial(mix, mixup=0.8, cutmix=1.0)


@pytest.fixture(scope="module")
def images():
    """Each image is filled with its own number, from 1 on."""
    return jnp.broadcast_to(jnp.arange(1.0, 65)[:, None, None, None], (64, 16, 16, 3))


def test_mixup_blends_each_image_with_its_partner_by_its_group_s_share(images):
    mixed, share = mix(KEY, images, GROUP, mixup=0.8)
    own, other = images[:, 0, 0, 0], partners(images, GROUP)[:, 0, 0, 0]
    np.testing.assert_allclose(mixed[:, 0, 0, 0], share * own + (1 - share) * other, rtol=1e-5)
    assert (mixed == mixed[:, :1, :1, :1]).all()
    assert len(np.unique(share)) == 64 // GROUP
    assert (share.reshape(-1, GROUP) == share[::GROUP, None]).all()


def test_cutmix_replaces_one_rectangle_and_tells_the_area_left(images):
    mixed, share = mix(KEY, images, GROUP, cutmix=1.0)
    is_own = np.asarray(mixed == images)[..., 0]
    is_other = np.asarray(mixed == partners(images, GROUP))[..., 0]
    assert (is_own ^ is_other).all()
    np.testing.assert_allclose(is_own.mean((1, 2)), share, rtol=1e-6)
    for other in is_other:
        rows, columns = other.any(1), other.any(0)
        np.testing.assert_array_equal(other, np.outer(rows, columns))
        for line in (rows, columns):
            assert abs(np.diff(line.astype(int))).sum() <= 2  # one piece
    assert 0 < is_other.mean() < 1


def test_a_group_takes_either_mixup_or_cutmix_where_both_are_wanted(images):
    mixed, _ = mix(KEY, images, GROUP, mixup=0.8, cutmix=1.0)
    is_flat = np.asarray((mixed == mixed[:, :1, :1, :1]).all((1, 2, 3)))
    assert 0 < is_flat.mean() < 1


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha):
    images = jnp.zeros((4000, 1, 1, 1))
    _, share = mix(KEY, images, 1, mixup=alpha)
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_random_erasing_fills_one_rectangle_of_the_stated_size_with_noise():
    images = jnp.full((400, 60, 60, 3), 9.0)
    erased = random_erasing(KEY, images, 0.25)
    hit = np.asarray((erased != images).any(-1))
    assert hit.any((1, 2)).mean() == pytest.approx(0.25, abs=0.06)
    low, high = ERASED_AREA
    for one in hit[hit.any((1, 2))]:
        rows, columns = one.any(1), one.any(0)
        np.testing.assert_array_equal(one, np.outer(rows, columns))
        assert low - 0.01 <= one.mean() <= high + 0.02
        if not (rows.all() or columns.all()):
            aspect = rows.sum() / columns.sum()
            assert ERASED_ASPECT[0] * 0.8 <= aspect <= ERASED_ASPECT[1] * 1.25
    noise = np.asarray(erased)[hit]
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)


@pytest.fixture
def spread(images):
    """The images on eight devices."""
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    return jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))


@pytest.mark.parametrize(
    "function",
    [lambda x: BOTH(KEY, x, GROUP)[0], lambda x: random_erasing(KEY, x, 0.5)],
    ids=["mix", "random_erasing"],
)
def test_eight_devices_draw_what_one_draws(function, images, spread):
    np.testing.assert_array_equal(jax.jit(function)(spread), function(images))


@pytest.mark.usefixtures("optimized")
def test_devices_that_hold_whole_groups_exchange_no_images(spread):
    text = jax.jit(lambda x: BOTH(KEY, x, GROUP)[0]).lower(spread).compile().as_text()
    assert "all-gather" not in text and "permute" not in text and "all-to-all" not in text
