"""A trained kernel as a sum of branches, so that it can go on training as these."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from repopt_jax.branches.blocks import Block, check_block, merge, pull_back
from repopt_jax.branches.branch import Full, is_known, wide_type
from repopt_jax.branches.multiplier import BranchMult, branch_mult
from repopt_jax.branches.sharding import in_auto_mode

if TYPE_CHECKING:
    from jaxtyping import Array, Float

ITERATIONS = 100  # enough where scales differ by less than a factor of a hundred; else near it
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
    solution. A `Full` branch with no scale of 0 makes it exact.

    Args:
      block: branch name -> branch ``E_b``.
      kernel: ``W``, ``(*window, in / groups, out)``.
      scales: branch name -> ``s_b``, shape ``(out,)``; entries of unscaled branches are ignored.

    Returns:
      Branch name -> ``w_b``. `search_network` with `keep_kernels` and `reparameterize` without
      `weights` call this, and refuse what is not exact.

    >>> from repopt_jax import Centre, Full
    >>> block = {"conv3x3": Full(), "conv1x1": Centre(1)}
    >>> scales = {"conv3x3": jnp.array([1.0]), "conv1x1": jnp.array([2.0])}
    >>> weights = split_kernel(block, jnp.full((3, 3, 1, 1), 5.0), scales)
    >>> weights["conv1x1"].item(), weights["conv3x3"][1, :, 0, 0].tolist()
    (2.0, [5.0, 1.0, 5.0])
    """
    check_block(block, kernel.shape)
    mult, wide = branch_mult(block, scales), kernel.astype(wide_type(kernel.dtype))
    weights = pull_back(block, scales, _divided(wide, mult))
    if not mult.is_elementwise:
        weights |= _completed(block, weights, mult.scales, wide)
    return {name: w.astype(kernel.dtype) for name, w in weights.items()}


def _divided(kernel: Array, mult: BranchMult) -> Array:
    """The ``y`` that the linear multiplier takes to `kernel`, where there is one."""
    if mult.is_elementwise:
        dense = mult.dense(kernel.shape, kernel.dtype)
        return jnp.where(dense > 0, kernel / jnp.where(dense > 0, dense, 1), 0)
    squares = [jnp.square(scale.astype(kernel.dtype)) for scale in mult.scales.values()]
    unscaled = jnp.asarray(len(mult.block) - len(squares), kernel.dtype)
    size = functools.reduce(jnp.add, squares, unscaled)
    size = jnp.broadcast_to(jnp.where(size > 0, size, 1), kernel.shape)
    # Channels may have scales of any size; divided by these they converge together.
    divided, _ = jax.scipy.sparse.linalg.cg(
        mult,
        kernel,
        tol=float(jnp.finfo(kernel.dtype).eps),
        maxiter=ITERATIONS,
        M=lambda y: y / size,
    )
    return divided


def _completed(block: Block, weights: Mapping, scales: Mapping, kernel: Array) -> dict[str, Array]:
    """The full branches with what iterations have left of `kernel`."""
    completed = {}
    for name, branch in block.items():
        if isinstance(branch, Full):
            rest = kernel - merge(block, {**weights, **completed}, scales, kernel.shape)
            scale = jnp.broadcast_to(scales[name].astype(kernel.dtype), kernel.shape)
            share = jnp.where(scale != 0, rest / jnp.where(scale != 0, scale, 1), 0)
            completed[name] = weights[name] + share
    return completed


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
