"""Surgery: from a trained network and what pruning decided to a smaller plain network.

Channels leave every layer that writes them, with its BatchNorm, and every layer that reads them,
as the network's groups say (`ChannelGroup`). Layers, shortcuts and paths stay, so the result is
trained, saved and exported as the network was. To read a checkpoint of it, do the same surgery on
a fresh network first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.pruning.channels import ChannelGroup, channel_widths, check_names
from repopt_jax.tree_paths import layer_at

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

ModelT = TypeVar("ModelT", bound=nnx.Module)


def prune_filters(
    model: ModelT,
    groups: Mapping[str, ChannelGroup],
    masks: Mapping[str, Bool[np.ndarray, " channels"]],
) -> ModelT:
    """A copy of a network without some of its channels.

    It computes what `model` computes if the channels that go are zero where they are read, as
    those that `Aofp` masks are.

    Args:
      model: a network; it is not changed.
      groups: name -> group of channels.
      masks: name of a group -> which channels to keep, ``(channels,)``. Groups that are not named
        stay whole.

    Raises:
      ValueError: a mask of an unknown group, of another length or without a channel to keep, or
        groups that do not fit the network.

    >>> model = nnx.Sequential(*(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)) for _ in range(2)))
    >>> groups = {"first": ChannelGroup({"layers/0": None}, ("layers/1",))}
    >>> small = prune_filters(model, groups, {"first": np.array([True, False, True, False])})
    >>> small.layers[0].kernel.shape, small.layers[1].kernel.shape
    ((3, 3, 4, 2), (3, 3, 2, 4))
    """
    for name, mask in masks.items():
        if not np.any(mask):
            raise ValueError(f"masks[{name!r}] must keep at least one channel, got none")
    kept = {name: np.asarray(mask, bool) for name, mask in masks.items()}
    places = {name: np.where(mask, np.cumsum(mask) - 1, -1) for name, mask in kept.items()}
    return _shrink(copied(model), groups, places, "masks")


def merge_clusters(
    model: ModelT,
    groups: Mapping[str, ChannelGroup],
    clusters: Mapping[str, Int[np.ndarray, " channels"]],
) -> ModelT:
    """A copy of a network with one channel for each cluster of equal ones: the end of C-SGD.

    Of every cluster the first channel stays, with its BatchNorm; layers that read the cluster add
    up their weights of it. The outputs are those of `model` if the channels of a cluster are
    equal.

    Args:
      model: a network; it is not changed.
      groups: name -> group of channels.
      clusters: name of a group -> the cluster of every channel, ``(channels,)``, numbered from 0,
        as `cluster_filters` returns them. Groups that are not named stay whole.

    Raises:
      ValueError: clusters of an unknown group, of another length or with a number left out, or
        groups that do not fit the network.

    >>> model = nnx.Sequential(*(nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2)))
    >>> groups = {"hidden": ChannelGroup({"layers/0": None}, ("layers/1",))}
    >>> small = merge_clusters(model, groups, {"hidden": np.array([0, 1, 0])})
    >>> wide, narrow = (m.layers[1].kernel for m in (model, small))
    >>> bool(jnp.allclose(narrow[0], wide[0] + wide[2])), narrow.shape
    (True, (2, 3))
    """
    places = {name: np.asarray(labels) for name, labels in clusters.items()}
    for name, labels in places.items():
        if labels.size and set(labels.tolist()) != set(range(labels.max() + 1)):
            raise ValueError(
                f"clusters[{name!r}] must be numbered from 0 without a gap, got {labels.tolist()}"
            )
    return _shrink(copied(model), groups, places, "clusters")


def copied(model: ModelT) -> ModelT:
    """A copy of a network with arrays of its own."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def _shrink(
    model: ModelT, groups: Mapping[str, ChannelGroup], places: Mapping[str, Any], argument: str
) -> ModelT:
    """Put channel ``c`` of a group at ``places[c]`` of the new one, in place; -1 drops it.

    Of channels with one place the first is kept, and their readers' weights are added.
    """
    widths = channel_widths(model, groups)
    check_names(argument, places, groups)
    for name, place in places.items():
        if place.shape != (widths[name],):
            raise ValueError(
                f"{argument}[{name!r}] must have the shape {(widths[name],)}, got {place.shape}"
            )
        width = place.max() + 1
        first = np.array([np.flatnonzero(place == new)[0] for new in range(width)])
        for path, norm in groups[name].layers.items():
            layer = layer_at(model, path)
            _keep(layer, ("kernel", "bias"), first)
            _state_size(layer, out_features=width)
            if getattr(layer, "feature_group_count", 1) > 1:  # depthwise
                _state_size(layer, in_features=width, feature_group_count=width)
            if norm is not None:
                _keep(layer_at(model, norm), ("scale", "bias", "mean", "var"), first)
                _state_size(layer_at(model, norm), num_features=width)
        for path in groups[name].readers:
            layer = layer_at(model, path)
            layer.kernel = layer.kernel.replace(_gather(layer.kernel[...], place, width))
            _state_size(layer, in_features=layer.kernel.shape[-2])
    return model


def _keep(layer: nnx.Module, names: tuple[str, ...], channels: np.ndarray) -> None:
    for name in names:
        if (variable := getattr(layer, name, None)) is not None:
            setattr(layer, name, variable.replace(variable[..., channels]))


def _gather(kernel: jax.Array, place: np.ndarray, width: int) -> jax.Array:
    """A reader's kernel with its inputs at new places; those of one place are added."""
    *window, inputs, outputs = kernel.shape
    positions = inputs // len(place)  # more than 1 in a dense layer after flatten
    by_channel = kernel.reshape(*window, positions, len(place), outputs)
    new = jnp.zeros((*window, positions, width, outputs), kernel.dtype)
    kept = np.flatnonzero(place >= 0)
    new = new.at[..., place[kept], :].add(by_channel[..., kept, :])
    return new.reshape(*window, positions * width, outputs)


def _state_size(layer: nnx.Module, **sizes: int) -> None:
    """Correct what a layer says of its own size."""
    for name, size in sizes.items():
        if hasattr(layer, name):
            setattr(layer, name, size)
    if hasattr(layer, "kernel_shape"):
        layer.kernel_shape = layer.kernel.shape
