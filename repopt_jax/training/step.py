"""The training and evaluation steps: pure functions of a state and a batch.

Nothing here knows the host loop. Models travel as ``(graphdef, params, stats)``, split once by
`nnx.split`, and come first because they are static where a step is jitted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax import nnx

from repopt_jax.training.augment import mix, partners, random_erasing
from repopt_jax.training.randaugment import apply_operations

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PyTree, UInt8


class TrainState(NamedTuple):
    """Everything that a training step changes and a checkpoint holds.

    Attributes:
      step: number of updates done.
      params: the trained parameters.
      stats: all else in the model, such as BatchNorm's running statistics.
      opt_state: state of the Optax transformation, multipliers included.
      ema: moving averages of (params, stats). None: not wanted.
    """

    step: Int[Array, ""]
    params: PyTree
    stats: PyTree
    opt_state: PyTree
    ema: tuple[PyTree, PyTree] | None


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The options of a step besides the model and the optimizer.

    Attributes:
      mean: per channel, in units of a pixel of range 0 to 1.
      std: likewise.
      dtype: of the normalized images, the type of the computation.
      label_smoothing: share of the target spread over all classes.
      accumulation: number of equal parts of a batch whose gradients are averaged; BatchNorm
        sees them one after the other.
      ema_decay: of the moving averages; used only where the state has them.
      group: images that mixup and cutmix mix with each other.
      mixup: alpha of its Beta distribution; 0 for none.
      cutmix: likewise.
      random_erasing: share of the images that lose a rectangle.
      seed: of these three, together with the number of the step.
      mesh: the devices that a batch is split over. None: one device.
      remat: keep only the results of convolutions and matrix products for the backward pass, and
        compute all else anew: less memory, some more time.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any = jnp.float32
    label_smoothing: float = 0.0
    accumulation: int = 1
    ema_decay: float = 0.0
    group: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    random_erasing: float = 0.0
    seed: int = 0
    mesh: jax.sharding.Mesh | None = None
    remat: bool = False


def init_state(
    model: nnx.Module, tx: optax.GradientTransformation, *, ema: bool
) -> tuple[nnx.GraphDef, TrainState]:
    """Split `model` in training mode and initialize the optimizer.

    Args:
      model: any NNX model from images to logits.
      tx: the optimizer.
      ema: whether to keep moving averages.
    """
    model.train()
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    # Copies, because a donated buffer may not appear twice.
    averages = jax.tree.map(jnp.copy, (params, stats)) if ema else None
    step = jnp.zeros((), jnp.int32)
    return graphdef, TrainState(step, params, stats, tx.init(params), averages)


def normalize(
    images: UInt8[Array, "batch height width channels"], options: StepOptions
) -> Float[Array, "batch height width channels"]:
    """``(images / 255 - mean) / std`` in at least float32, then `options.dtype`.

    >>> options = StepOptions(mean=(0.5,), std=(0.25,))
    >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), options).item()
    2.0
    """
    wide = jnp.promote_types(options.dtype, jnp.float32)
    mean, std = (jnp.asarray(x, wide).reshape(1, 1, 1, -1) for x in (options.mean, options.std))
    return ((images.astype(wide) / 255 - mean) / std).astype(options.dtype)


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], smoothing: float = 0.0
) -> Float[Array, " batch"]:
    """Cross entropy of each sample against ``(1 - smoothing) * onehot + smoothing / classes``.

    >>> round(cross_entropy(jnp.zeros((1, 2)), jnp.array([0])).item(), 4)
    0.6931
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=wide.dtype)
    return optax.softmax_cross_entropy(wide, optax.smooth_labels(targets, smoothing))


def _loss(params, stats, images, labels, key, *, graphdef, options):
    # Without the copy, BatchNorm's update under value_and_grad touches outer variables.
    model = nnx.merge(graphdef, params, stats, copy=True)
    images = normalize(images, options)
    key_mix, key_erase, key_drop = jax.random.split(key, 3)
    is_mixed = options.mixup > 0 or options.cutmix > 0
    if is_mixed:
        alphas = {"mixup": options.mixup, "cutmix": options.cutmix}
        images, share = mix(key_mix, images, options.group, **alphas)
    if options.random_erasing > 0:
        images = random_erasing(key_erase, images, options.random_erasing)
    logits = model(images, key=key_drop) if getattr(model, "dropout", 0) else model(images)
    losses = cross_entropy(logits, labels, options.label_smoothing)
    if is_mixed:
        others = partners(labels, options.group)
        loss_of_others = cross_entropy(logits, others, options.label_smoothing)
        losses = share * losses + (1 - share) * loss_of_others
    loss = losses.mean()
    correct = (logits.argmax(-1) == labels).mean(dtype=loss.dtype)
    return loss, (correct, nnx.state(model, nnx.Not(nnx.Param)))


def loss_function(graphdef: nnx.GraphDef, options: StepOptions) -> Callable[..., tuple]:
    """The function that a step differentiates, of params, stats, images, labels and a random key.

    It returns the loss, and (share of hits, new stats).
    """
    loss = functools.partial(_loss, graphdef=graphdef, options=options)
    return jax.checkpoint(loss, policy=_is_product) if options.remat else loss


def _is_product(primitive, *_, **__) -> bool:
    return primitive.name in ("conv_general_dilated", "dot_general")


def train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    options: StepOptions,
    state: TrainState,
    batch: dict[str, Array],
) -> tuple[TrainState, dict[str, Array]]:
    """One update on a batch of uint8 ``image`` and int32 ``label``.

    Where there are ``operations``, those of `repopt_jax.data.train_batches`, they come first.

    Returns:
      The new state, and float32 scalars ``loss`` and ``top1`` (percent) of this batch.
    """
    gradient = jax.value_and_grad(loss_function(graphdef, options), has_aux=True)
    key = jax.random.fold_in(jax.random.key(options.seed), state.step)

    def part(stats, batch, number):
        images, labels = batch["image"], batch["label"]
        if "operations" in batch:
            images = apply_operations(images, batch["operations"], options.mesh)
        (loss, (correct, stats)), grads = gradient(
            state.params, stats, images, labels, jax.random.fold_in(key, number)
        )
        return stats, (loss, correct, grads)

    if options.accumulation == 1:
        stats, (loss, correct, grads) = part(state.stats, batch, 0)
    else:
        # Every part takes samples from every device, so that no image changes its device.
        parts = {
            name: x.reshape(-1, options.accumulation, *x.shape[1:]).swapaxes(0, 1)
            for name, x in batch.items()
        }
        numbers = jnp.arange(options.accumulation)

        def add_part(carry, numbered):
            stats, total = carry
            stats, (loss, correct, grads) = part(stats, *numbered)
            return (stats, jax.tree.map(jnp.add, total, grads)), (loss, correct)

        none = jax.tree.map(jnp.zeros_like, state.params)
        (stats, total), means = jax.lax.scan(add_part, (state.stats, none), (parts, numbers))
        grads = jax.tree.map(lambda x: x / options.accumulation, total)
        loss, correct = (x.mean() for x in means)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        average = functools.partial(_average, decay=options.ema_decay)
        ema = jax.tree.map(average, ema, (params, stats))
    new_state = TrainState(state.step + 1, params, stats, opt_state, ema)
    return new_state, {
        "loss": loss.astype(jnp.float32),
        "top1": 100 * correct.astype(jnp.float32),
    }


def _average(average: Array, value: Array, decay: float) -> Array:
    """The moving average of floats; other values, such as keys of Dropout, are the new ones."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return value
    return optax.incremental_update(value, average, 1 - decay)


# Masked means over an evaluation set: loss, top-1 and top-5 in percent, and the share of images
# whose logits are not finite.
MEASURED = ("loss", "top1", "top5", "not_finite")
EvalMetrics = clu_metrics.Collection.create(
    **{name: clu_metrics.Average.from_output(name) for name in MEASURED}
)


def eval_step(
    graphdef: nnx.GraphDef, options: StepOptions, params: PyTree, stats: PyTree, batch: dict
) -> EvalMetrics:
    """Sums over the samples of `batch` whose ``mask`` is true; merge them and compute once.

    Args:
      graphdef: of the model, which is evaluated in evaluation mode.
      options: normalization and type.
      params: the parameters.
      stats: all else in the model.
      batch: ``image``, ``label`` and ``mask``.
    """
    model = nnx.merge(graphdef, params, stats)
    model.eval()
    logits = model(normalize(batch["image"], options)).astype(jnp.float32)
    labels = batch["label"]
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    finite = jnp.isfinite(logits).all(-1, keepdims=True)
    hits = (best == labels[:, None]) & finite  # else NaN would be a hit of some class
    return EvalMetrics.single_from_model_output(
        loss=cross_entropy(logits, labels),
        top1=100 * hits[:, 0].astype(jnp.float32),
        top5=100 * hits.any(-1).astype(jnp.float32),
        not_finite=1 - finite[:, 0].astype(jnp.float32),
        mask=batch["mask"],
    )


jitted_train_step = jax.jit(train_step, static_argnums=(0, 1, 2), donate_argnums=3)
jitted_eval_step = jax.jit(eval_step, static_argnums=(0, 1))
