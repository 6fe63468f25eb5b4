"""Convolution, BatchNorm and activation: plain, or with a BatchNorm in each branch of a paper."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import Block, Full, Identity
from repopt_jax.branches.presets import repvgg_branches
from repopt_jax.models.layers import BatchNorm, SqueezeExcite, conv, layer_types, materialize

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float

Rule = Callable[[str, Any], Block | None]
# A layer with the whole kernel, and its branches with their weights and BatchNorms.
Parts = tuple[nnx.Conv, Block, dict[str, "Array"], dict[str, BatchNorm]]


def activate(block: nnx.Module, x: Array) -> Array:
    """The activation of `block`, with the squeeze-excite that it has before or after it."""
    x = block.activation(x if block.pre_se is None else block.pre_se(x))
    return x if block.post_se is None else block.post_se(x)


def batch_norm(
    features: int,
    *,
    bn_group: int | None = None,
    param_dtype: DTypeLike = jnp.float32,
    norm: Mapping[str, float] | None = None,
    **types: Any,
) -> BatchNorm:
    """`BatchNorm` by the options of a network; `norm` are further ones, such as epsilon."""
    del types
    return BatchNorm(features, group=bn_group, param_dtype=param_dtype, **(norm or {}))


def pair(layer: Any, norm: BatchNorm) -> Parts:
    """The parts of a layer without branches and of the BatchNorm after it."""
    return layer, {"conv": Full()}, {"conv": jnp.asarray(layer.kernel[...])}, {"conv": norm}


def no_branches(path: str, layer: Any) -> None:
    """The rule of a layer that stays as it is."""


class ConvBlock(nnx.Module):
    """One convolution and BatchNorm, or one of each for every branch; then an activation.

    The layers of a branch are called ``conv`` and ``bn``, followed by the branch's name or what
    `suffixes` has for it.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      stride: of the convolution.
      size: of its window.
      groups: of its channels.
      rule: from a layer to its branches, see `find_blocks`.
      activation: after the sum of the branches.
      se: squeeze-excite after the activation, of a quarter of the channels.
      pre_se: squeeze-excite before the activation, of a sixteenth of the channels.
      types: bn_group, dtype, param_dtype and rngs, see `RepOptVGG`; and norm, see `batch_norm`.
    """

    plain: ClassVar[bool]
    suffixes: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int = 1,
        *,
        size: int = 3,
        groups: int = 1,
        rule: Rule = repvgg_branches,
        activation: Callable[[Array], Array] = jax.nn.relu,
        se: bool = False,
        pre_se: bool = False,
        **types: Any,
    ):
        bn = functools.partial(batch_norm, out_features, **types)
        types = layer_types(**types)
        shape = {"stride": stride, "groups": groups, **types}
        whole = conv(in_features, out_features, size, **shape)
        # Tuples, as the parts of a network that are no arrays must have a hash.
        stated = tuple((rule("", whole) or {}).items())
        self.branches = stated if self.plain else ()  # those that GR trains the layer with
        self.built = (("conv", Full()),) if self.plain else stated
        for i, (name, branch) in enumerate(self.built):
            if not isinstance(branch, Identity):
                side = getattr(branch, "size", size)
                layer = conv(in_features, out_features, side, **shape) if i else whole
                setattr(self, f"conv{self._suffix(name)}", layer)
            setattr(self, f"bn{self._suffix(name)}", bn())
        self.activation = activation
        self.post_se = SqueezeExcite(out_features, out_features // 4, **types) if se else None
        self.pre_se = SqueezeExcite(out_features, out_features // 16, **types) if pre_se else None

    def _suffix(self, name: str) -> str:
        return self.suffixes.get(name, name.removeprefix("conv"))

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the block."""
        parts = []
        for suffix in (self._suffix(name) for name, _ in self.built):
            layer = getattr(self, f"conv{suffix}", materialize)
            parts.append(getattr(self, f"bn{suffix}")(layer(x)))
        return activate(self, functools.reduce(jnp.add, parts))

    def parts(self) -> Parts:
        """What `fold` makes one layer of."""
        norms = {name: getattr(self, f"bn{self._suffix(name)}") for name, _ in self.built}
        layers = {
            name: getattr(self, f"conv{self._suffix(name)}")
            for name, branch in self.built
            if not isinstance(branch, Identity)
        }
        weights = {name: layer.kernel[...] for name, layer in layers.items()}
        return next(iter(layers.values())), dict(self.built), weights, norms


class PlainBlock(ConvBlock):
    """One convolution and one BatchNorm; it states the branches that GR trains it with."""

    plain: ClassVar = True

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the block."""
        x = self.conv(x)
        # Only our BatchNorm takes ReLU in; pruning may put something else in its place.
        fused = isinstance(self.bn, BatchNorm) and self.activation is jax.nn.relu
        if not fused or self.pre_se is not None:
            return activate(self, self.bn(x))
        x = self.bn(x, relu=True)
        return x if self.post_se is None else self.post_se(x)


class BranchedBlock(ConvBlock):
    """A paper's training block, the structural baseline: every branch has a BatchNorm."""

    plain: ClassVar = False


class ConvNetwork(nnx.Module):
    """A network of such blocks."""

    def blocks(self) -> dict[str, Block]:
        """Path of a layer -> its branches; empty if there are none, or the blocks are not plain."""
        return {
            "/".join(map(str, (*path, "conv"))): dict(module.branches)
            for path, module in nnx.iter_modules(self)
            if getattr(module, "branches", ())
        }
