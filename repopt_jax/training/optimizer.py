"""The optimizer of a training part and its learning rate, from the configuration.

The official RepOptimizers code takes its schedules from timm. These equal them update for update.
What is easily missed:

* Every rate is stated for a batch of 256 images and grows in proportion to the batch.
* The rate is set *after* an update, so update ``i`` runs with the schedule's value at ``i - 1``;
  the first two updates both run with its value at 0.
* The cosine spans the whole run. The warm-up covers its beginning, so the rate steps down a little
  where the warm-up ends. The linear and the step schedule start when the warm-up is over.
* After the last update the rate stays where it is; it does not start over.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from repopt_jax.transforms import repopt_adamw, repopt_sgd
from repopt_jax.weight_decay import weight_decay_mask

if TYPE_CHECKING:
    from jaxtyping import PyTree

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "linear", "step")
REFERENCE_BATCH = 256


def steps_in(epochs: float, steps_per_epoch: int) -> int:
    """A length in epochs as a number of updates, at least one.

    >>> steps_in(2.5, 11), steps_in(0.01, 11)
    (28, 1)
    """
    return max(1, round(epochs * steps_per_epoch))


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
    config: Any, schedule: optax.Schedule, grad_mults: PyTree
) -> optax.GradientTransformation:
    """SGD or AdamW with multipliers, clipping first if wanted.

    Args:
      config: the section `optimizer` of a part, as `check_section` accepts it.
      schedule: the learning rate by update.
      grad_mults: a tree like the parameters; all None for the plain optimizer.

    Raises:
      ValueError: unknown name, a number out of its range, or clipping together with multipliers:
        the norm of the merged kernels' gradient is not that of the branches', so the equivalence
        would be lost.
    """
    if config.clip_norm and jax.tree.leaves(grad_mults):
        raise ValueError(
            "optimizer.clip_norm must be 0 for the part 'target', because clipping the merged "
            "kernels' gradient breaks the equivalence with the branches, "
            f"got {config.clip_norm}"
        )
    if update_rule(config.name) == "linear":
        optimizer, fields = repopt_sgd, ("momentum", "nesterov", "weight_decay")
    else:
        optimizer, fields = repopt_adamw, ("b1", "b2", "eps", "weight_decay")
    options = {field: config[field] for field in fields}
    tx = optimizer(schedule, grad_mults, mask=weight_decay_mask, **options)
    if config.clip_norm:
        return optax.chain(clip_by_global_norm(config.clip_norm), tx)
    return tx


def make_schedule(
    config: Any, *, batch_size: int, steps_per_epoch: int, epochs: float
) -> optax.Schedule:
    """Return a learning rate schedule: a pure function of the number of updates done so far.

    With ``t = max(count - 1, 0)``, ``W`` warm-up updates, ``T`` updates in all and every rate
    multiplied by ``batch_size / 256``::

        t < W    warmup_lr + (base_lr - warmup_lr) * t / W
        cosine   min_lr + (base_lr - min_lr) * (1 + cos(pi * t / T)) / 2
        linear   base_lr * (1 - (1 - linear_end) * (t - W) / (T - W))
        step     base_lr * step_rate ** ((t - W) // step_updates)

    Args:
      config: the section `schedule` of a part: the name of the formula, its rates, and lengths in
        epochs (``warmup_epochs``, at most ``epochs``, and ``step_epochs``), fractions allowed.
      batch_size: images per update, over all devices.
      steps_per_epoch: updates per epoch.
      epochs: length of the run, warm-up included; may be a fraction.

    Returns:
      A function of an integer count (an array gives an array), to be traced or not. It computes in
      float32, or in float64 where x64 is on.

    Raises:
      ValueError: for an unknown name, a negative or non-finite number, a length of no update, a
        warm-up longer than the run, or a ``min_lr`` that the schedule would ignore.

    >>> from repopt_jax.training.config import default_config
    >>> config = default_config().target.schedule
    >>> config.warmup_epochs = 1
    >>> schedule = make_schedule(config, batch_size=512, steps_per_epoch=10, epochs=10)
    >>> [round(float(schedule(count)), 4) for count in (0, 1, 6, 11, 51, 100)]
    [0.0, 0.0, 0.1, 0.1951, 0.1, 0.0]
    """
    name = config.name
    lengths = {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch, "epochs": epochs}
    lengths["step_epochs"] = config.step_epochs
    if name not in SCHEDULES:
        raise ValueError(f"name must be one of {', '.join(SCHEDULES)}; got {name!r}")
    for field in ("base_lr", "warmup_lr", "min_lr", "linear_end", "step_rate", "warmup_epochs"):
        if not 0 <= config[field] < math.inf:
            raise ValueError(f"{field} must be a finite number of at least 0; got {config[field]}")
    for field, value in lengths.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{field} must be a finite number above 0; got {value}")
    if config.warmup_epochs > epochs:
        raise ValueError(
            f"warmup_epochs must be at most epochs ({epochs}); got {config.warmup_epochs}"
        )
    if config.min_lr and name != "cosine":
        raise ValueError(
            f"min_lr is the end of the cosine, not of {name!r}, which needs 0; got {config.min_lr}"
        )

    scale = batch_size / REFERENCE_BATCH
    base, start, end = (scale * config[rate] for rate in ("base_lr", "warmup_lr", "min_lr"))
    linear_end, step_rate = config.linear_end, config.step_rate
    total = steps_in(epochs, steps_per_epoch)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    step_updates = steps_in(config.step_epochs, steps_per_epoch)
    decaying = max(total - warmup, 1)  # a run that is all warm-up never gets to decay

    def schedule(count):
        t = jnp.clip(jnp.asarray(count) - 1, 0, total)
        after = jnp.maximum(t - warmup, 0)
        if name == "cosine":
            # (1 + cos(pi t/T)) / 2 without its loss of digits near the end of the run, in float32.
            rate = (
                end + (base - end) * jnp.sin((total - t).astype(float) * (math.pi / 2 / total)) ** 2
            )
        elif name == "linear":
            rate = base - base * (1 - linear_end) * (after.astype(float) / decaying)
        else:
            rate = base * jnp.power(step_rate, (after // step_updates).astype(float))
        ramp = start + (base - start) * (t.astype(float) / max(warmup, 1))
        return jnp.where(t < warmup, ramp, rate)

    return jax.jit(schedule)  # or each report would run it operation by operation
