"""C-SGD: centripetal SGD, which trains clustered filters into equal ones (arXiv 1904.03837).

Deviation from the authors' code: weight decay, which is the same for all filters, is left to
``optax.add_decayed_weights``; of their two versions this is the later one, which decays no bias
and pulls vectors by a tenth of the strength.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax.pruning.channels import ChannelGroup, channel_widths, check_names, unsharded
from repopt_jax.tree_paths import by_path, layer_at, path_str

if TYPE_CHECKING:
    from jaxtyping import Array, Int

VECTOR_SHARE = 0.1  # of the strength, for BatchNorm and biases


class ScaleByCsgdState(NamedTuple):
    """State of `scale_by_csgd`: the clusters, by path of the parameters that they are for."""

    clusters: dict[str, Int[Array, " channels"]]


def scale_by_csgd(
    groups: Mapping[str, ChannelGroup],
    clusters: Mapping[str, Int[np.ndarray, " channels"]],
    strength: float,
) -> optax.GradientTransformationExtraArgs:
    """Give the filters of a cluster one gradient, and pull them to their centre.

    They end equal, so that `merge_clusters` makes one of them without a loss.

    For filter ``w_i`` in cluster ``H``, with gradient ``g_i`` and ``e`` the `strength`::

        g_i <- mean over H of g  +  e * (w_i - mean over H of w)

    A filter is what a kernel has at one place of its last axis. The scale and bias of the
    BatchNorm after it, and its own bias, go the same way with ``0.1 * e``. All other parameters
    are left alone.

    In a chain it comes after `scale_by_grad_mult`, whose multipliers differ within a cluster, and
    before weight decay and momentum.

    Args:
      groups: name -> group of channels; see `ChannelGroup`.
      clusters: name of a group -> the cluster of every channel, such as `cluster_filters` returns.
      strength: ``e``, not negative. The paper takes 0.05 for ResNet-50 and 0.003 for ResNet-56.

    Returns:
      An optax.GradientTransformationExtraArgs; its ``update`` needs the parameters.

    Raises:
      ValueError: here, for a negative strength or clusters of an unknown group; by ``init``, if
        clusters do not fit their parameter; by ``update``, without parameters.

    >>> import jax.numpy as jnp, numpy as np, optax
    >>> groups = {"hidden": ChannelGroup({"dense": None})}
    >>> tx = scale_by_csgd(groups, {"hidden": np.array([0, 0, 1])}, strength=0.5)
    >>> params = {"dense": {"kernel": jnp.array([[1.0, 3.0, 5.0]])}}
    >>> grads = {"dense": {"kernel": jnp.array([[2.0, 4.0, 6.0]])}}
    >>> tx.update(grads, tx.init(params), params)[0]["dense"]["kernel"].tolist()
    [[2.5, 3.5, 6.0]]

    References:
      Ding et al., `Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated
      Structure <https://arxiv.org/abs/1904.03837>`_, CVPR 2019
    """
    if strength < 0:
        raise ValueError(f"strength must not be negative, got {strength}")
    check_names("clusters", clusters, groups)
    labels: dict[str, np.ndarray] = {}
    for name, label in clusters.items():
        for layer in groups[name].layers:
            labels |= {f"{layer}/{key}": np.asarray(label) for key in ("kernel", "bias")}
        for norm in groups[name].norms:
            labels |= {f"{norm}/{key}": np.asarray(label) for key in ("scale", "bias")}
    counts = {path: int(label.max()) + 1 for path, label in labels.items()}

    def init_fn(params):
        for path, param in by_path(params).items():
            if path in labels and labels[path].shape != jnp.shape(param)[-1:]:
                raise ValueError(
                    f"clusters of {path!r} must have the shape {jnp.shape(param)[-1:]}, got "
                    f"{labels[path].shape}"
                )
        return ScaleByCsgdState({path: jnp.asarray(label) for path, label in labels.items()})

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("params must be given to update, got None")

        def pull(key_path, g, w):
            path = path_str(key_path)
            if path not in state.clusters:
                return g
            label, count = state.clusters[path], counts[path]
            share = 1.0 if path.endswith("/kernel") else VECTOR_SHARE
            centre = _centres(w, label, count)
            return _centres(g, label, count) + strength * share * (w - centre)

        return jax.tree_util.tree_map_with_path(pull, updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _centres(array: Array, label: Int[Array, " channels"], count: int) -> Array:
    """Every entry replaced by the mean over its cluster along the last axis."""
    by_channel = jnp.moveaxis(unsharded(array), -1, 0)
    sums = jax.ops.segment_sum(by_channel, label, count)
    sizes = jax.ops.segment_sum(jnp.ones(label.shape, array.dtype), label, count)
    means = sums / jnp.expand_dims(sizes, tuple(range(1, sums.ndim)))
    return jnp.moveaxis(means[label], 0, -1)


def cluster_filters(
    model: nnx.Module,
    groups: Mapping[str, ChannelGroup],
    widths: Mapping[str, int],
) -> dict[str, Int[np.ndarray, " channels"]]:
    """Group similar filters by k-means, as many clusters as channels are to be left.

    A group's channels are clustered by the filters of its first layer.

    Args:
      model: a trained network.
      groups: name -> group of channels.
      widths: name of a group -> how many channels to leave. Groups that are not named have none
        clustered.

    Returns:
      Name of a group -> the cluster of every channel, from 0 in the order of their first member.

    Raises:
      ValueError: a width of an unknown group, or not between 1 and the group's channels.

    >>> kernel = jnp.array([[1.0, 9.0, 1.1, 9.1], [0.0, 5.0, 0.1, 5.1]])
    >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)))
    >>> model.layers[0].kernel[...] = kernel
    >>> groups = {"hidden": ChannelGroup({"layers/0": None})}
    >>> cluster_filters(model, groups, {"hidden": 2})["hidden"].tolist()
    [0, 1, 0, 1]
    """
    channels, clusters = channel_widths(model, groups), {}
    check_names("widths", widths, groups)
    for name, width in widths.items():
        if not 1 <= width <= channels[name]:
            raise ValueError(
                f"widths[{name!r}] must be between 1 and {channels[name]}, got {width}"
            )
        kernel = np.asarray(layer_at(model, next(iter(groups[name].layers))).kernel[...])
        filters = kernel.reshape(-1, channels[name]).T.astype(np.float64)
        clusters[name] = _k_means(filters, width)
    return clusters


def _k_means(points: np.ndarray, count: int) -> np.ndarray:
    """Clusters of the rows of `points`, none of them empty; centres start far from each other."""
    first = [int(_distances(points, points.mean(0, keepdims=True)).argmax())]
    while len(first) < count:
        first.append(int(_distances(points, points[first]).min(1).argmax()))
    centres, label = points[first], None
    for _ in range(300):
        distances = _distances(points, centres)
        new = distances.argmin(1)
        for cluster in range(count):  # an empty one takes the point farthest from its own centre
            if not (new == cluster).any():
                own = distances[np.arange(len(points)), new]
                own[np.bincount(new, minlength=count)[new] == 1] = -1.0
                new[own.argmax()] = cluster
        if label is not None and (new == label).all():
            break
        label = new
        centres = np.stack([points[label == cluster].mean(0) for cluster in range(count)])
    _, order = np.unique(label, return_index=True)
    return np.argsort(np.argsort(order))[label]


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    squares = np.square(points).sum(1)[:, None] + np.square(centres).sum(1)
    return np.maximum(squares - 2 * points @ centres.T, 0.0)
