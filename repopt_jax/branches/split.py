"""A trained kernel as a sum of branches, so that it can go on training as these."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from repopt_jax.branches.blocks import Block, check_block, merge, pull_back
from repopt_jax.branches.branch import is_known, wide_type
from repopt_jax.branches.multiplier import branch_mult
from repopt_jax.branches.sharding import in_auto_mode

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Two ways of summing a few branches differ by a few units in the last place of their terms.
ROUNDING = 32


def split_kernel(
    block: Block,
    kernel: Float[Array, "*kernel_shape"],
    scales: Mapping[str, Float[Array, " out"]],
) -> dict[str, Array]:
    """Branch weights whose sum is a trained kernel, so that it can go on training as branches.

    Of all ``w_b`` with ``sum_b s_b * E_b(w_b) = W`` the smallest in the sum of squares: with ``y``
    such that the block's linear multiplier takes it to ``W``, ``w_b = E_b^T(s_b * y)``. Where no
    branch reaches an entry, or all that do have a scale of 0, the sum is 0 there: the least-squares
    solution, which `check_merges` refuses. A `Full` branch with no scale of 0 makes it exact.

    Args:
      block: branch name -> branch ``E_b``.
      kernel: ``W``, ``(*window, in / groups, out)``.
      scales: branch name -> ``s_b``, shape ``(out,)``; entries of unscaled branches are ignored.

    Returns:
      Branch name -> ``w_b``, as `search_network` and `reparameterize` start from, which call this.

    >>> from repopt_jax import Centre, Full
    >>> block = {"conv3x3": Full(), "conv1x1": Centre(1)}
    >>> scales = {"conv3x3": jnp.array([1.0]), "conv1x1": jnp.array([2.0])}
    >>> weights = split_kernel(block, jnp.full((3, 3, 1, 1), 5.0), scales)
    >>> weights["conv1x1"].item(), weights["conv3x3"][1, :, 0, 0].tolist()
    (2.0, [5.0, 1.0, 5.0])
    """
    check_block(block, kernel.shape)
    mult, wide = branch_mult(block, scales), kernel.astype(wide_type(kernel.dtype))
    if mult.is_elementwise:
        dense = mult.dense(wide.shape, wide.dtype)
        solved = jnp.where(dense > 0, wide / jnp.where(dense > 0, dense, 1), 0)
    else:
        solved, _ = jax.scipy.sparse.linalg.cg(mult, wide, tol=float(jnp.finfo(wide.dtype).eps))
    weights = pull_back(block, scales, solved.astype(wide.dtype))
    return {name: w.astype(kernel.dtype) for name, w in weights.items()}


def check_merges(
    block: Block, weights: Mapping[str, Array], scales: Mapping[str, Array], kernel: Array
) -> None:
    """Refuse branch weights whose sum is not the kernel; under `jax.jit` nothing is known.

    Args:
      block: branch name -> branch ``E_b``.
      weights: branch name -> ``w_b``.
      scales: branch name -> ``s_b``, shape ``(out,)``; entries of unscaled branches are ignored.
      kernel: ``W``, ``(*window, in / groups, out)``.

    Raises:
      ValueError: if ``sum_b s_b * E_b(w_b)`` is off by more than rounding, or is not a number.

    >>> from repopt_jax import Centre
    >>> scales, weights = {"c": jnp.ones(1)}, {"c": jnp.ones((1, 1, 1))}
    >>> check_merges({"c": Centre(1)}, weights, scales, jnp.ones((3, 1, 1)))
    Traceback (most recent call last):
    ValueError: the weights of branches ['c'] must merge to the kernel, got a largest difference \
of 1 from a kernel of entries up to 1
    """

    def term(name):
        merged = functools.partial(merge, {name: block[name]}, kernel_shape=kernel.shape)
        return in_auto_mode(merged, kernel, weights, scales)

    terms = [term(name) for name in block]
    merged = functools.reduce(jnp.add, terms)
    off = jnp.abs(merged - kernel.astype(merged.dtype)).max()
    eps = max(float(jnp.finfo(x.dtype).eps) for x in (merged, kernel))
    largest = sum(jnp.abs(term).max() for term in terms)
    if is_known(off) and not off <= ROUNDING * eps * largest:  # true for NaN
        raise ValueError(
            f"the weights of branches {list(block)} must merge to the kernel, got a largest "
            f"difference of {off:.2g} from a kernel of entries up to {jnp.abs(kernel).max():.2g}"
        )
