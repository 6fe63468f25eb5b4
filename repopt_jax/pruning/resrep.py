"""ResRep: compactors, which forget channels while the network remembers (arXiv 2007.03260).

A compactor, a 1x1 convolution, follows the BatchNorm of every target layer. A lasso shrinks its
output channels; for the least of them the gradient is reset, so that nothing resists the lasso.

Deviations from the authors' code: multiply-adds are counted as they are (theirs count a 1x1
projection as 2x2), and the folded layer keeps a BatchNorm, which passes its bias on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax.branches import wide_type
from repopt_jax.pruning.channels import ChannelGroup, channel_widths, check_names, place, unsharded
from repopt_jax.pruning.surgery import copied, prune_filters
from repopt_jax.tree_paths import by_path, layer_at, path_str

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, PyTree

ModelT = TypeVar("ModelT", bound=nnx.Module)


class CompactedNorm(nnx.Module):
    """A BatchNorm and the compactor after it: ``y = norm(x) @ compactor``.

    Attributes:
      layer: the BatchNorm.
      compactor: ``(channels, channels)``, the outputs on the last axis; it starts as the identity.
    """

    def __init__(self, layer: nnx.Module):
        self.layer = layer
        self.compactor = nnx.Param(jnp.diag(jnp.ones_like(layer.mean[...])))

    def __call__(self, x: Float[Array, "batch *window channels"]) -> Array:
        """Run both."""
        y = self.layer(x)
        return y @ self.compactor[...].astype(y.dtype)


def add_compactors(
    model: ModelT, groups: Mapping[str, ChannelGroup], targets: Sequence[str]
) -> ModelT:
    """A copy of a network with a compactor after the BatchNorm of every target.

    It computes what `model` computes. The new parameters are ``<path of the BatchNorm>/compactor``.

    Args:
      model: a trained network; it is not changed.
      groups: name -> group of channels.
      targets: the groups to prune; each needs one layer with a BatchNorm.

    Raises:
      ValueError: a target that is no group, has several layers (those around a shortcut), a
        depthwise one or no complete BatchNorm; groups that do not fit the network.
    """
    channel_widths(model, groups)
    model = copied(model)
    for name, path in _norms(groups, targets).items():
        (layer,), norm = groups[name].layers, layer_at(model, path)
        if getattr(layer_at(model, layer), "feature_group_count", 1) > 1:
            raise ValueError(f"targets: the layer {layer!r} of {name!r} must not be depthwise")
        if norm.scale is None or norm.bias is None:
            raise ValueError(f"targets: {path!r} must have a scale and a bias")
        place(model, path, CompactedNorm(norm))
    return model


def _norms(groups: Mapping[str, ChannelGroup], targets: Sequence[str]) -> dict[str, str]:
    """Target -> the path of its BatchNorm."""
    check_names("targets", targets, groups)
    for name in targets:
        if len(groups[name].layers) != 1 or not groups[name].norms:
            raise ValueError(
                f"targets: group {name!r} must have one layer with a BatchNorm, got "
                f"{dict(groups[name].layers)}"
            )
    return {name: groups[name].norms[0] for name in targets}


def is_compactor(params: PyTree) -> PyTree[bool]:
    """True for compactors, to give them an own momentum by `optax.partition` and no decay.

    >>> import jax.numpy as jnp
    >>> is_compactor({"bn": {"compactor": jnp.eye(2), "layer": {"scale": jnp.ones(2)}}})
    {'bn': {'compactor': True, 'layer': {'scale': False}}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: f"/{path_str(path)}".endswith("/compactor"), params
    )


class ScaleByResRepState(NamedTuple):
    """State of `scale_by_resrep`.

    Attributes:
      count: updates so far.
      masks: target -> for which channels of its compactor the loss's gradient still counts.
    """

    count: Int[Array, ""]
    masks: dict[str, Bool[Array, " channels"]]


def scale_by_resrep(
    groups: Mapping[str, ChannelGroup],
    targets: Sequence[str],
    counts: Mapping[str, int],
    *,
    keep: float,
    lasso: float = 1e-4,
    start: int = 0,
    every: int = 200,
    more: int = 4,
) -> optax.GradientTransformationExtraArgs:
    """Shrink compactors by a lasso and reset the gradient of their least channels.

    For column ``w_j`` of a compactor, which makes channel ``j``, with gradient ``g_j``::

        g_j <- mask_j * g_j + lasso * w_j / |w_j|

    All other parameters are left alone. The masks are chosen anew in every update that `every`
    divides, from update `start` on: all targets' channels are looked at from the smallest
    ``|w_j|`` up and masked until the network without them has `keep` of its multiply-adds. As long
    as it has more, a choice looks at no more channels than were masked before and `more` others.
    Every target keeps a channel, and one of which no channel is chosen keeps its mask.

    In a chain it comes first; the paper gives compactors the momentum 0.99 and no decay, see
    `is_compactor`. Its order with `scale_by_grad_mult` does not matter: no compactor has a
    multiplier.

    Args:
      groups: name -> group of channels. Who writes and reads a target's channels is what they
        cost.
      targets: the groups with compactors, as in `add_compactors`.
      counts: path of a layer -> its multiply-adds, as `multiply_adds` returns them.
      keep: the share of multiply-adds to leave, in (0, 1).
      lasso: strength of the lasso.
      start: the first update that may choose masks; the paper waits for five epochs.
      every: updates from one choice to the next.
      more: how many more channels a choice may look at than were masked before.

    Returns:
      An optax.GradientTransformationExtraArgs; its ``update`` needs the parameters.

    Raises:
      ValueError: here, for a number out of range, a target that can have no compactor, or a
        layer of a target without a count; by ``init``, if a target has no compactor.

    >>> import jax.numpy as jnp, optax
    >>> groups = {"hidden": ChannelGroup({"conv": "bn"})}
    >>> params = {"bn": {"compactor": jnp.diag(jnp.array([1.0, 2.0]))}}
    >>> tx = scale_by_resrep(groups, ["hidden"], {"conv": 20}, keep=0.5, lasso=0.25)
    >>> updates, state = tx.update(optax.tree.ones_like(params), tx.init(params), params)
    >>> state.masks["hidden"].tolist(), updates["bn"]["compactor"].tolist()
    ([False, True], [[0.25, 1.0], [0.0, 1.25]])

    References:
      Ding et al., `ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting
      <https://arxiv.org/abs/2007.03260>`_, ICCV 2021
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep must be in (0, 1), got {keep}")
    least = {"lasso": (lasso, 0), "start": (start, 0), "every": (every, 1), "more": (more, 1)}
    for argument, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"{argument} must be at least {bound}, got {value}")
    compactors = {name: f"{norm}/compactor" for name, norm in _norms(groups, targets).items()}
    touched = {path for name in targets for path in (*groups[name].layers, *groups[name].readers)}
    if missing := sorted(touched - counts.keys()):
        raise ValueError(f"counts must have the layers of all targets, missing: {missing}")
    names = {path: name for name, path in compactors.items()}

    def init_fn(params):
        found = by_path(params)
        if missing := [path for path in names if path not in found]:
            raise ValueError(f"targets must have compactors among the parameters, not: {missing}")
        masks = {name: jnp.ones(found[path].shape[-1], bool) for name, path in compactors.items()}
        return ScaleByResRepState(jnp.zeros((), jnp.int32), masks)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("params must be given to update, got None")
        found = by_path(params)
        norms = {n: unsharded(_column_norms(found[p])[0]) for n, p in compactors.items()}
        share_left = _share_left(groups, counts, {name: norm.size for name, norm in norms.items()})
        masks = jax.lax.cond(
            (state.count >= start) & (state.count % every == 0),
            lambda: _choose(norms, state.masks, share_left, keep, more),
            lambda: state.masks,
        )

        def reset(path, g):
            if (name := names.get(path_str(path))) is None:
                return g
            w = found[path_str(path)]
            pulled = lasso * w / jnp.maximum(_column_norms(w), jnp.finfo(w.dtype).tiny)
            return jnp.where(masks[name][None], g, 0) + pulled.astype(g.dtype)

        updates = jax.tree_util.tree_map_with_path(reset, updates)
        return updates, ScaleByResRepState(optax.safe_increment(state.count), masks)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _column_norms(w: Float[Array, "in out"]) -> Float[Array, "1 out"]:
    return jnp.linalg.norm(w.astype(wide_type(w.dtype)), axis=0, keepdims=True)


def _share_left(
    groups: Mapping[str, ChannelGroup], counts: Mapping[str, int], sizes: Mapping[str, int]
) -> Callable[[Int[Array, " targets"]], Float[Array, ""]]:
    """The share of multiply-adds that is left, as a function of the targets' widths."""
    index = {name: i for i, name in enumerate(sizes)}
    written = {path: i for name, i in index.items() for path in groups[name].layers}
    read = {path: i for name, i in index.items() for path in groups[name].readers}
    # The last place stands for all widths that do not change.
    outputs = np.array([written.get(path, len(index)) for path in counts])
    inputs = np.array([read.get(path, len(index)) for path in counts])
    shares = np.array(list(counts.values())) / sum(counts.values())
    full = np.array(list(sizes.values()))

    def share_left(widths):
        left = jnp.append(widths / full, 1.0)
        return (shares * left[outputs] * left[inputs]).sum()

    return share_left


def _choose(
    norms: Mapping[str, Float[Array, " channels"]],
    masks: Mapping[str, Bool[Array, " channels"]],
    share_left: Callable,
    keep: float,
    more: int,
) -> dict[str, Bool[Array, " channels"]]:
    """The masks that follow from the norms of all targets' channels; see `scale_by_resrep`."""
    sizes = np.array([norm.size for norm in norms.values()])
    total = int(sizes.sum())
    target = np.repeat(np.arange(len(sizes)), sizes)
    order = jnp.argsort(jnp.concatenate(list(norms.values())))
    left = jnp.stack([masks[name].sum() for name in norms])
    limit = jnp.where(share_left(left) <= keep, total, total - left.sum() + more)

    def look(widths, item):
        rank, own = item
        take = (rank < limit) & (share_left(widths) > keep) & (widths[own] > 1)
        return widths.at[own].add(-take.astype(widths.dtype)), take

    items = (jnp.arange(total), jnp.asarray(target)[order])
    _, taken = jax.lax.scan(look, jnp.asarray(sizes), items)
    chosen = jnp.split(jnp.zeros(total, bool).at[order].set(taken), np.cumsum(sizes)[:-1])
    return {
        name: jnp.where(part.any(), ~part, masks[name])
        for name, part in zip(norms, chosen, strict=True)
    }


def fold_compactors(
    model: ModelT,
    groups: Mapping[str, ChannelGroup],
    *,
    threshold: float = 1e-5,
    multiple: int = 1,
) -> ModelT:
    """A plain network without compactors and without the channels that they have forgotten.

    With compactor ``Q``, and the running statistics and parameters of the BatchNorm before it::

        kernel' = (kernel * scale / s) @ Q    bias' = (bias - mean * scale / s) @ Q
        s = sqrt(var + epsilon)

    without the columns of ``Q`` whose norm is below `threshold`. ``bias'`` stays in the
    BatchNorm, which changes nothing else. The outputs are those of `model` in evaluation, but for
    what the columns that go still gave.

    Args:
      model: a network of `add_compactors`; it is not changed.
      groups: name -> group of channels.
      threshold: the least norm of a column that stays. A layer keeps its largest in any case.
      multiple: layers keep as many of the largest columns more as make their number a multiple of
        this, such as 8, for which runtimes on CPUs have their fast convolutions.

    Raises:
      ValueError: the network has no compactors, the groups do not fit it, or `multiple` is less
        than 1.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    model, masks = copied(model), {}
    for name, group in groups.items():
        for path, norm_path in group.layers.items():
            if norm_path is None or not isinstance(layer_at(model, norm_path), CompactedNorm):
                continue
            compacted = layer_at(model, norm_path)
            q = compacted.compactor[...]
            norms = np.asarray(_column_norms(q)[0])
            left = max(1, int((norms >= threshold).sum()))
            left = -(-left // multiple) * multiple
            masks[name] = np.argsort(np.argsort(-norms, stable=True)) < left
            place(model, norm_path, compacted.layer)
            _fold(layer_at(model, path), compacted.layer, q)
    if not masks:
        raise ValueError("model must have compactors, got none in the groups' BatchNorms")
    return prune_filters(model, groups, masks)


def _fold(layer: nnx.Module, norm: nnx.Module, q: Float[Array, "in out"]) -> None:
    """Take a compactor, and the BatchNorm before it, into a layer, in place."""
    factor = norm.scale[...] / jnp.sqrt(norm.var[...] + norm.epsilon)
    shift = norm.bias[...] - norm.mean[...] * factor
    if layer.bias is not None:
        shift = shift + layer.bias[...] * factor
        layer.bias[...] = jnp.zeros_like(layer.bias[...])
    kernel = layer.kernel[...]
    highest = jax.lax.Precision.HIGHEST
    layer.kernel[...] = jnp.matmul(kernel, jnp.expand_dims(factor, 1) * q, precision=highest)
    norm.bias[...] = jnp.matmul(shift, q, precision=highest)
    norm.mean[...] = jnp.zeros_like(shift)
    norm.var[...] = jnp.ones_like(shift)
    norm.scale[...] = jnp.full_like(shift, np.sqrt(1 + norm.epsilon))
