"""Frozen factors: constants that follow from a seed alone.

A branch such as "3x3 after a frozen 1x1" needs a matrix that nobody trains. It is not stored
anywhere: integer arithmetic computes it from the seed in the branch's statement, inside the jitted
function that needs it. It has the same values on every device, in every precision and with every
version of JAX, and neither checkpoints nor scales files have to carry it.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from repopt_jax.branches.branch import wide_type

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike


def mixed_bits(
    x: Array, shift: int = 15, factors: tuple[int, int] = (0x7FEB352D, 0x846CA68B)
) -> Array:
    """A bijection of 32-bit integers that flips every output bit with probability near 1/2.

    Args:
      x: uint32.
      shift: of the second of three rounds.
      factors: odd numbers of 32 bits.
    """
    for by, factor in zip((16, shift), factors, strict=True):
        x = (x ^ (x >> jnp.uint32(by))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def frozen_uniform(seed: int, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    """``U(-a, a)`` with ``a = 1 / sqrt(fan_in)``, a function of `seed` and `shape`.

    Args:
      seed: from 0 to 2^32 - 1.
      shape: of the factor, at most 2^32 entries.
      fan_in: number of products that one output of the factor sums.
      dtype: of the factor; 24 random bits, so that float32 and float64 agree up to rounding.

    >>> [round(float(x), 4) for x in frozen_uniform(0, (3,), 4, jnp.float32)]
    [0.1814, 0.3891, -0.0658]
    """
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    # Mixing twice: neighbouring seeds must not share shifted sequences.
    bits = mixed_bits(mixed_bits(index) ^ mixed_bits(jnp.uint32(seed) ^ jnp.uint32(0x9E3779B9)))
    wide = wide_type(dtype)
    unit = (bits >> jnp.uint32(8)).astype(wide) / jnp.asarray(2**23, wide) - jnp.asarray(1, wide)
    return (unit / jnp.asarray(math.sqrt(fan_in), wide)).astype(dtype)
