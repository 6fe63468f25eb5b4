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
# The identities of RepOpt-GhostNet: the official code decays vectors that are called
# `identity.weight`, and calls these `fusion_scale.weight`.
GHOST_IDENTITY = "/cheap_conv/branch_weights/identity"


def weight_decay_mask(params: PyTree) -> PyTree:
    """True for what the official recipe decays, to be passed as `mask`.

    Decayed: every parameter of rank 2 or more and, in search networks and under `reparameterize`,
    the vectors of identity branches. The official code goes by the name: it also decays the scale
    of the BatchNorm in RepVGG's identity branch, and it does not decay the identity vectors of
    RepOpt-GhostNet (``cheap_conv/branch_weights/identity``). Not decayed: biases, the other
    BatchNorms and scales, of any rank; they are recognized by their names in Flax, Haiku, Equinox
    and Keras.

    A plain RepOpt-GhostNet has one kernel in place of the branches, all of which is decayed, as in
    the official target training. It therefore follows its branches exactly only where their
    identities are decayed as well.

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
            return not name.endswith(GHOST_IDENTITY)
        undecayed = name.rpartition("/")[2] in NOT_DECAYED or "/branch_scales/" in name
        return jnp.ndim(param) >= 2 and not undecayed

    return jax.tree_util.tree_map_with_path(decayed, params)
