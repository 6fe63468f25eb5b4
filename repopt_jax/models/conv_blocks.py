"""Convolution, BatchNorm and activation: plain, or with a BatchNorm in each branch of a paper."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import Block, Identity
from repopt_jax.branches.presets import repvgg_branches
from repopt_jax.models.layers import BatchNorm, SqueezeExcite, conv, materialize

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float

Rule = Callable[[str, Any], Block | None]


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
    """`BatchNorm` by the options of a network, of which it takes no others.

    Args:
      features: size of the last axis.
      bn_group: samples per group. None: the whole batch.
      param_dtype: of the parameters.
      norm: further options of `BatchNorm`. None: its defaults.
      types: further options of the network.
    """
    del types
    return BatchNorm(features, group=bn_group, param_dtype=param_dtype, **(norm or {}))


def no_branches(path: str, layer: Any) -> None:
    """The rule of a layer that stays as it is."""


class ConvBlock(nnx.Module):
    """What plain and branched blocks share: branches or their sum, then an activation.

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
      norm: further options of every `BatchNorm`. None: its defaults.
      bn_group: see `RepOptVGG`, as for the rest.
    """

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
        norm: Mapping[str, float] | None = None,
        bn_group: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        layer = functools.partial(
            conv, in_features, out_features, stride=stride, groups=groups, **types
        )
        bn = functools.partial(batch_norm, out_features, bn_group=bn_group, norm=norm, **types)
        self._build(layer(size), rule, layer, bn)
        self.activation = activation
        self.post_se = SqueezeExcite(out_features, out_features // 4, **types) if se else None
        self.pre_se = SqueezeExcite(out_features, out_features // 16, **types) if pre_se else None


class PlainBlock(ConvBlock):
    """One convolution and one BatchNorm; it states the branches that GR trains it with.

    Its arguments are those of `ConvBlock`.
    """

    def _build(self, whole, rule, layer, bn):
        del layer
        self.conv, self.bn = whole, bn()
        # A tuple, as the parts of a network that are no arrays must have a hash.
        self.branches = tuple((rule("", whole) or {}).items())

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the block."""
        x = self.conv(x)
        if self.activation is jax.nn.relu and self.pre_se is None:
            x = self.bn(x, relu=True)
            return x if self.post_se is None else self.post_se(x)
        return activate(self, self.bn(x))


class BranchedBlock(ConvBlock):
    """A paper's training block, the structural baseline: every branch has a BatchNorm.

    Its arguments are those of `ConvBlock`. Its layers are called ``conv`` and ``bn`` with the name
    of the branch after it, for which a subclass may have another one in `suffixes`.
    """

    suffixes: Mapping[str, str] = {}

    def _build(self, whole, rule, layer, bn):
        self.branches = tuple((rule("", whole) or {}).items())
        for i, (name, branch) in enumerate(self.branches):
            if not isinstance(branch, Identity):
                side = getattr(branch, "size", whole.kernel_size[0])
                setattr(self, f"conv{self._suffix(name)}", layer(side) if i else whole)
            setattr(self, f"bn{self._suffix(name)}", bn())

    def _suffix(self, name: str) -> str:
        return self.suffixes.get(name, name.removeprefix("conv"))

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the block."""
        _, _, _, norms = self.parts()
        parts = [
            bn(getattr(self, f"conv{self._suffix(name)}", materialize)(x))
            for name, bn in norms.items()
        ]
        return activate(self, functools.reduce(jnp.add, parts))

    def parts(self) -> tuple[nnx.Conv, Block, dict[str, Array], dict[str, BatchNorm]]:
        """The layer with the whole kernel, and its branches with their weights and BatchNorms."""
        norms = {name: getattr(self, f"bn{self._suffix(name)}") for name, _ in self.branches}
        layers = {
            name: getattr(self, f"conv{self._suffix(name)}")
            for name, branch in self.branches
            if not isinstance(branch, Identity)
        }
        weights = {name: layer.kernel[...] for name, layer in layers.items()}
        return next(iter(layers.values())), dict(self.branches), weights, norms


def blocks_in(model: nnx.Module, block_type: type = PlainBlock) -> dict[str, Block]:
    """Path of the layer of every plain block of `model` that has branches -> its branches."""
    return {
        "/".join(map(str, (*path, "conv"))): dict(module.branches)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, block_type) and module.branches
    }
