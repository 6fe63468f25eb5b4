"""Which layers share their channels: what surgery on a network has to know of it, as data.

A network states its groups of channels by path, as it states its blocks::

    {"conv1": ChannelGroup({"conv1": "bn1"}, readers=("conv2",))}

Layers whose outputs are added (the last ones of the blocks around a shortcut, and a projection)
share one group: a channel can go only where it goes from all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repopt_jax.tree_paths import layer_at, parent_and_key

if TYPE_CHECKING:
    from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Channels of a network: who writes them and who reads them.

    Attributes:
      layers: path of every layer whose outputs they are -> path of the BatchNorm that follows it,
        or None. The first one leads: its filters are what `cluster_filters` groups. Depthwise
        layers, which hand channels on, and the last layer of a squeeze-excite belong here.
      readers: paths of the layers that have them as inputs. In a dense layer after ``flatten``
        the channels vary fastest, as in images with the channels last.
    """

    layers: Mapping[str, str | None]
    readers: tuple[str, ...] = ()

    @property
    def norms(self) -> list[str]:
        """The paths of the BatchNorms."""
        return [norm for norm in self.layers.values() if norm is not None]


def repopt_vgg_channels(model: nnx.Module) -> dict[str, ChannelGroup]:
    """The groups of a `RepOptVGG`: one per 3x3 layer, and one inside every squeeze-excite.

    >>> import repopt_jax
    >>> size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3}
    >>> model = repopt_jax.create_model("RepOpt-VGG", **size, rngs=nnx.Rngs(0))
    >>> groups = repopt_vgg_channels(model)
    >>> groups["stage3/0"]
    ChannelGroup(layers={'stage3/0/conv': 'stage3/0/bn'}, readers=('stage4/0/conv',))
    >>> groups["stage4/0"].readers
    ('linear',)
    """
    blocks = dict(model.layers())
    nexts = [*(f"{path}/conv" for path in list(blocks)[1:]), "linear"]
    groups = {}
    for (path, block), reader in zip(blocks.items(), nexts, strict=True):
        layers: dict[str, str | None] = {f"{path}/conv": f"{path}/bn"}
        readers = (reader,)
        for gate in ("pre_se", "post_se"):
            if getattr(block, gate) is not None:
                down, up = f"{path}/{gate}/down", f"{path}/{gate}/up"
                layers[up] = None
                readers = (down, *readers)
                groups[f"{path}/{gate}"] = ChannelGroup({down: None}, (up,))
        groups[path] = ChannelGroup(layers, readers)
    return groups


def check_names(argument: str, names: Iterable[str], groups: Mapping[str, ChannelGroup]) -> None:
    """Refuse names of no group."""
    if unknown := sorted(set(names) - groups.keys()):
        raise ValueError(f"{argument} must be by group among {list(groups)}, got {unknown}")


def channel_widths(model: nnx.Module, groups: Mapping[str, ChannelGroup]) -> dict[str, int]:
    """How many channels each group of a network has.

    Raises:
      ValueError: groups that do not fit the network: no such layer, layers of different widths, a
        reader that does not read the group's width, a layer in two groups, or a grouped
        convolution that is not depthwise.

    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> channel_widths(model, {"outputs": ChannelGroup({"layers/0": None})})
    {'outputs': 3}
    """
    widths = {}
    seen = {"layers": set(), "readers": set()}
    for name, group in groups.items():
        outputs = {path: layer_at(model, path).kernel.shape[-1] for path in group.layers}
        if len(set(outputs.values())) != 1:
            problem = f"layers must have the same number of outputs, got {outputs}"
        else:
            (widths[name],) = set(outputs.values())
            problem = _misfit(model, group, widths[name])
        for role, paths in seen.items():
            if twice := sorted(paths & set(getattr(group, role))):
                problem = f"{role} must be in one group only, got {twice} again"
            paths.update(getattr(group, role))
        if problem:
            raise ValueError(f"groups[{name!r}]: {problem}")
    return widths


def _misfit(model: nnx.Module, group: ChannelGroup, width: int) -> str | None:
    """Why a network's layers are not those of a group; None if they are."""
    for path in group.layers:
        parts = getattr(layer_at(model, path), "feature_group_count", 1)
        if parts not in (1, width):
            return f"layer {path!r} must be depthwise or without groups, got {parts} groups"
    for path in group.norms:
        if not hasattr(layer_at(model, path), "mean"):
            return f"{path!r} must be a BatchNorm, got a {type(layer_at(model, path)).__name__}"
    for path in group.readers:
        layer = layer_at(model, path)
        inputs = layer.kernel.shape[-2]
        flattened = not hasattr(layer, "kernel_size") and inputs % width == 0
        if getattr(layer, "feature_group_count", 1) != 1 or (inputs != width and not flattened):
            return (
                f"reader {path!r} must read {width} channels without groups, got a kernel of "
                f"shape {layer.kernel.shape}"
            )
    return None


def unsharded(x: Array) -> Array:
    """`x`, whole on every device of an explicit mesh; other meshes see to it themselves."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def place(model: nnx.Module, path: str, layer: Any) -> None:
    """Put a layer where another one is, in place."""
    parent, key = parent_and_key(model, path)
    if key.isdigit():
        parent[int(key)] = layer
    else:
        setattr(parent, key, layer)


class _Intercepted(nnx.Module):
    def __init__(self, layer: Any, call: Callable):
        self.layer = layer
        self.call = call

    def __call__(self, x):
        return self.call(self.layer, x)


@contextlib.contextmanager
def intercepted(model: nnx.Module, calls: Mapping[str, Callable]) -> Iterator[None]:
    """Within the context, the layer at each path of `calls` runs as ``call(layer, x)``.

    Under jit, intercept inside the traced function the model that is merged there.
    """
    layers = {path: layer_at(model, path) for path in calls}
    for path, call in calls.items():
        place(model, path, _Intercepted(layers[path], call))
    try:
        yield
    finally:
        for path, layer in layers.items():
            place(model, path, layer)


def multiply_adds(model: nnx.Module, image_shape: tuple[int, ...]) -> dict[str, int]:
    """Multiply-adds of every convolution and dense layer for one image, by path.

    Args:
      model: a network of one argument; it is not run.
      image_shape: such as ``(height, width, channels)``.

    >>> model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), strides=2, rngs=nnx.Rngs(0)))
    >>> multiply_adds(model, (8, 8, 3))  # 3 * 3 taps, 3 * 4 pairs of channels, 4 * 4 positions
    {'layers/0': 1728}
    """
    modules = (("/".join(map(str, path)), module) for path, module in nnx.iter_modules(model))
    counts = {path: 0 for path, module in modules if isinstance(module, nnx.Conv | nnx.Linear)}

    def count(layer, x, path):
        y = layer(x)
        counts[path] += y.size // y.shape[-1] * layer.kernel.size  # positions and weights
        return y

    graphdef, state = nnx.split(model)

    def forward(state, images):
        merged = nnx.merge(graphdef, state, copy=True)
        calls = {path: functools.partial(count, path=path) for path in counts}
        with intercepted(merged, calls):
            return merged(images)

    jax.eval_shape(forward, state, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return {path: number for path, number in counts.items() if number}
