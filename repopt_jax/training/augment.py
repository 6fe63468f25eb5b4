"""Augmentation on the device, inside the training step: mixup, cutmix and random erasing.

All are functions of a random key and a whole batch, so that the numbers are the same on any
number of devices. An image is mixed with one of its own BatchNorm group, which never spans
devices: no image moves.

Sources: mixup, arXiv 1710.09412; cutmix, arXiv 1905.04899; random erasing, arXiv 1708.04896.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

ERASED_AREA = (0.02, 1 / 3)  # share of the image
ERASED_ASPECT = (0.3, 1 / 0.3)  # height by width


def partners(x: Array, group: int) -> Array:
    """For each sample the one at the mirror place of its group of `group` consecutive ones.

    >>> partners(jnp.arange(6), 3).tolist()
    [2, 1, 0, 5, 4, 3]
    """
    return x.reshape(-1, group, *x.shape[1:])[:, ::-1].reshape(x.shape)


def mix(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channels"],
    group: int,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, " batch"]]:
    """Mix every image ``a`` with its partner ``b``.

    With ``λ ~ Beta(α, α)`` drawn once per group::

        mixup:   λ a + (1 - λ) b
        cutmix:  a, with b in a rectangle of the area 1 - λ, cut off at the border

    Where both are wanted, each group takes one of them by a fair draw.

    Args:
      key: a random key.
      images: normalized images.
      group: images that mix with each other, consecutive ones; must divide the batch.
      mixup: ``α`` of mixup; 0 for none.
      cutmix: ``α`` of cutmix; 0 for none.

    Returns:
      The mixed images, and the share of each that is its own: ``λ``, or the area that the cut
      has left. The loss is to be shared between the labels of both in that proportion.

    >>> images = jnp.arange(2.0).reshape(2, 1, 1, 1)
    >>> mixed, share = mix(jax.random.key(0), images, 2, mixup=1.0)
    >>> bool(jnp.allclose(mixed[:, 0, 0, 0], jnp.array([1 - share[0], share[1]])))
    True
    """
    batch, height, width, _ = images.shape
    groups = batch // group
    wide = jnp.promote_types(images.dtype, jnp.float32)
    key_mixup, key_cutmix, key_choice, key_top, key_left = jax.random.split(key, 5)
    kept = jnp.ones((groups, height, width), wide)  # share of `a` in every pixel
    if mixup:
        share = jax.random.beta(key_mixup, mixup, mixup, (groups, 1, 1), wide)
        kept = jnp.broadcast_to(share, kept.shape)
    if cutmix:
        side = jnp.sqrt(1 - jax.random.beta(key_cutmix, cutmix, cutmix, (groups,), wide))
        rows, columns = _inside(key_top, side, height), _inside(key_left, side, width)
        left = 1 - (rows[:, :, None] & columns[:, None, :]).astype(wide)
        use_cut = jax.random.bernoulli(key_choice, 0.5, (groups, 1, 1)) if mixup else True
        kept = jnp.where(use_cut, left, kept)
    kept = jnp.repeat(kept, group, axis=0)
    weight = kept[..., None].astype(images.dtype)
    return weight * images + (1 - weight) * partners(images, group), kept.mean((1, 2))


def _inside(key: PRNGKeyArray, side: Array, length: int) -> Array:
    """Mark the places of an axis in a window of relative length `side` around a drawn centre."""
    centre = jax.random.randint(key, side.shape, 0, length)
    half = (side * length / 2).astype(jnp.int32)
    place = jnp.arange(length)[None, :]
    return (place >= (centre - half)[:, None]) & (place < (centre + half)[:, None])


def random_erasing(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channels"],
    probability: float,
) -> Float[Array, "batch height width channels"]:
    """Fill a random rectangle with Gaussian noise (mean 0, deviation 1), image by image.

    Its area is uniform in `ERASED_AREA` of the image, the logarithm of its height by width
    uniform in `ERASED_ASPECT`; a side longer than the image's is cut to it.

    Args:
      key: a random key.
      images: normalized images.
      probability: share of images that lose a rectangle.

    >>> images = jnp.full((4, 8, 8, 3), 9.0)
    >>> erased = random_erasing(jax.random.key(0), images, 1.0)
    >>> bool((erased != images).any((1, 2, 3)).all())
    True
    """
    batch, height, width, _ = images.shape
    key_which, key_area, key_aspect, key_top, key_left, key_noise = jax.random.split(key, 6)
    low, high = ERASED_AREA
    area = height * width * jax.random.uniform(key_area, (batch,), minval=low, maxval=high)
    low, high = map(math.log, ERASED_ASPECT)
    aspect = jnp.exp(jax.random.uniform(key_aspect, (batch,), minval=low, maxval=high))
    rows = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, height)
    columns = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, width)

    def window(key, size, length):
        start = jnp.floor(jax.random.uniform(key, (batch,)) * (length - size + 1))
        place = jnp.arange(length, dtype=start.dtype)[None, :]
        return (place >= start[:, None]) & (place < (start + size)[:, None])

    inside = window(key_top, rows, height)[:, :, None] & window(key_left, columns, width)[:, None]
    erased = inside & jax.random.bernoulli(key_which, probability, (batch, 1, 1))
    noise = jax.random.normal(key_noise, images.shape, images.dtype)
    return jnp.where(erased[..., None], noise, images)
