"""The optimizer of a training part, from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from repopt_jax.transforms import repopt_adamw, repopt_sgd, weight_decay_mask

if TYPE_CHECKING:
    from jaxtyping import PyTree

OPTIMIZERS = ("sgd", "adamw")


def update_rule(name: str) -> str:
    """The rule that the multipliers of an optimizer follow.

    >>> update_rule("adamw")
    'direction'
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name must be one of {OPTIMIZERS}, got {name!r}")
    return "linear" if name == "sgd" else "direction"


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Clip as torch does: ``g * min(1, max_norm / (norm + 1e-6))``; optax adds no constant.

    >>> import jax.numpy as jnp
    >>> clip_by_global_norm(5.0).update(jnp.array([30.0, 40.0]), optax.EmptyState())[0].tolist()
    [3.0, 4.0]
    """

    def clip(updates, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)


def make_optimizer(
    config: Any, schedule: optax.Schedule, grad_mults: PyTree, *, reparameterized: bool
) -> optax.GradientTransformation:
    """SGD or AdamW with multipliers, clipping first if wanted.

    Args:
      config: the section `optimizer` of a part.
      schedule: the learning rate by update.
      grad_mults: a tree like the parameters; all None for the plain optimizer.
      reparameterized: whether any multiplier is not None.

    Raises:
      ValueError: unknown name, a number out of its range, or clipping together with multipliers:
        the norm of the merged kernels' gradient is not that of the branches', so the equivalence
        would be lost.
    """
    if not config.clip_norm >= 0:
        raise ValueError(f"optimizer.clip_norm must be at least 0, got {config.clip_norm}")
    for key in ("b1", "b2"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"optimizer.{key} must be in [0, 1), got {config[key]}")
    if reparameterized and config.clip_norm:
        raise ValueError(
            "optimizer.clip_norm must be 0 for the part 'target', because clipping the merged "
            "kernels' gradient breaks the equivalence with the branches, "
            f"got {config.clip_norm}"
        )
    update_rule(config.name)
    shared = {"weight_decay": config.weight_decay, "mask": weight_decay_mask}
    if config.name == "sgd":
        tx = repopt_sgd(
            schedule,
            grad_mults,
            momentum=config.momentum,
            nesterov=config.nesterov,
            **shared,
        )
    else:
        tx = repopt_adamw(
            schedule, grad_mults, b1=config.b1, b2=config.b2, eps=config.eps, **shared
        )
    if config.clip_norm:
        return optax.chain(clip_by_global_norm(config.clip_norm), tx)
    return tx
