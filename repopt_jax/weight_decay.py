"""What of a network is decayed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from repopt_jax.tree_paths import path_str

if TYPE_CHECKING:
    from jaxtyping import PyTree

# Names of biases, and of what normalization multiplies by.
NOT_DECAYED = ("bias", "b", "beta", "offset", "scale", "gamma")


def weight_decay_mask(params: PyTree) -> PyTree:
    """True for what the official recipe decays, to be passed as `mask`.

    Decayed: every parameter of rank 2 or more and, in search networks, the vectors of identity
    branches (they are kernels in disguise). The official code goes by the name: in RepVGG the
    scale of the identity branch's BatchNorm is decayed, too. Not decayed: biases, the other
    BatchNorms and scales, of any rank; they are told by their names in Flax, Haiku, Equinox and
    Keras.

    Under `optax.inject_hyperparams` list ``"mask"`` in its ``static_args``; it would otherwise call
    this function with a step count, as if it were a schedule.

    Raises:
      ValueError: for a number, such as that count.

    >>> import jax.numpy as jnp
    >>> weight_decay_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
    {'bias': False, 'kernel': True}
    """

    if jax.tree_util.all_leaves([params]) and jnp.ndim(params) == 0:
        raise ValueError(
            f"params must be a tree of parameters, got {params}; optax.inject_hyperparams needs "
            'static_args=("nesterov", "mask")'
        )

    def decayed(path, param):
        name = f"/{path_str(path)}"
        if "/branch_weights/" in name or name.endswith("/bn_identity/scale"):
            return True
        undecayed = name.rpartition("/")[2] in NOT_DECAYED or "/branch_scales/" in name
        return jnp.ndim(param) >= 2 and not undecayed

    return jax.tree_util.tree_map_with_path(decayed, params)
