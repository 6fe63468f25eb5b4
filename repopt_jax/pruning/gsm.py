"""GSM: global sparse momentum, which prunes single weights (arXiv 1909.12778).

Deviation from the authors' code: the threshold is found bit by bit instead of by sorting all
products. It is the same number in a tenth of the time (8 million weights on two CPU cores),
needs no memory, and sharded parameters stay where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from repopt_jax.branches import wide_type

if TYPE_CHECKING:
    from jaxtyping import Array, PyTree


def scale_by_gsm(keep: float) -> optax.GradientTransformationExtraArgs:
    """Pass on the gradients of the weights that matter most, and no others.

    With weight ``w`` and gradient ``g``, over all parameters of rank 2 or more together::

        T = |w * g|
        g <- g * [T >= t]    t: the int(keep * N)-th largest of the N values T

    ``T`` is the first-order change of the loss that removing ``w`` would make. Parameters of rank
    0 and 1 are left alone. Weight decay and momentum come after it in the chain, so that the
    weights without a gradient decay, ``1 / (1 - momentum)`` times as fast, and the network is
    sparse at the end without fine-tuning.

    Args:
      keep: the share of weights that learn in each step, in (0, 1]; the paper's ``Q / N``.

    Returns:
      An optax.GradientTransformationExtraArgs without state, to be put first into a chain. Its
      ``update`` needs the parameters. Parameters that `optax.masked` hides are not counted.

    Raises:
      ValueError: here, if `keep` is out of range; by ``update``, without parameters or if `keep`
        leaves no weight.

    >>> import jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.array([[4.0, 3.0], [2.0, 1.0]]), "bias": jnp.ones(2)}
    >>> tx = scale_by_gsm(keep=0.5)
    >>> updates, state = tx.update(optax.tree.ones_like(params), tx.init(params), params)
    >>> updates["kernel"].tolist(), updates["bias"].tolist()
    ([[1.0, 1.0], [0.0, 0.0]], [1.0, 1.0])

    References:
      Ding et al., `Global Sparse Momentum SGD for Pruning Very Deep Neural Networks
      <https://arxiv.org/abs/1909.12778>`_, NeurIPS 2019
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("params must be given to update, got None")
        products = jax.tree.map(lambda w, g: _wide(w) * _wide(g), params, updates)
        passing = _at_least(products, int(keep * _count(products)), keep)
        passed = jax.tree.map(lambda g, p: jnp.where(p, g, jnp.zeros_like(g)), updates, passing)
        return passed, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def magnitude_masks(params: PyTree, keep: float) -> PyTree:
    """Which weights to keep at the end: the largest of all parameters of rank 2 or more.

    Multiplying the parameters by it prunes them. To train a winning ticket, multiply the initial
    parameters by it and their gradients with ``scale_by_grad_mult(masks)``.

    Args:
      params: any pytree; parameters of rank 0 and 1 are kept.
      keep: the share of weights to keep, in (0, 1].

    Raises:
      ValueError: if `keep` is out of range.

    >>> import jax.numpy as jnp
    >>> magnitude_masks({"kernel": jnp.array([[-4.0, 3.0], [2.0, 1.0]])}, 0.5)["kernel"].tolist()
    [[True, True], [False, False]]
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    wide = jax.tree.map(_wide, params)
    total = _count(wide)
    return _at_least(wide, total - int(total * (1 - keep)), keep)


def _wide(array: Array) -> Array:
    return array.astype(wide_type(array.dtype))


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim >= 2)


def _at_least(tree: PyTree, rank: int, keep: float) -> PyTree:
    """Where a leaf of rank 2 or more reaches the `rank`-th largest size; True elsewhere."""
    if rank < 1:
        raise ValueError(f"keep must leave at least one of {_count(tree)} weights, got {keep}")
    dtype = jnp.result_type(*jax.tree.leaves(tree))
    bits = jnp.finfo(dtype).bits
    integer = jnp.dtype(f"uint{bits}")

    def as_integer(leaf):  # floats that are not negative are ordered as the integers of their bits
        return jax.lax.bitcast_convert_type(jnp.abs(leaf.astype(dtype)), integer)

    sizes = jax.tree.map(as_integer, tree)
    kernels = [leaf for leaf in jax.tree.leaves(sizes) if leaf.ndim >= 2]

    def set_bit(i, threshold):
        # From the highest bit on: a bit is set if enough sizes reach what is set until then.
        tried = threshold | (jnp.ones((), integer) << (bits - 2 - i).astype(integer))
        enough = sum(jnp.sum(leaf >= tried) for leaf in kernels) >= rank
        return jnp.where(enough, tried, threshold)

    threshold = jax.lax.fori_loop(0, bits - 1, set_bit, jnp.zeros((), integer))
    return jax.tree.map(lambda leaf: (leaf >= threshold) | (leaf.ndim < 2), sizes)
