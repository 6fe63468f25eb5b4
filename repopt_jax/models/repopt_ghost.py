"""RepOpt-GhostNet: RepGhostNet that states the branches of its depthwise kernels as blocks.

Papers: RepGhost, arXiv 2211.06088 (bottlenecks of table 2, widths of table 3); RepOptimizers,
arXiv 2205.15242.
A ghost module is a pointwise convolution, then a depthwise one plus the identity. Two modules make
a bottleneck, sixteen bottlenecks in nine stages the network. Images are NHWC.

Deviation from the authors' code: it names layers by their place in a list, this by what they do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import Block, Full, Identity
from repopt_jax.branches.presets import repghost_branches
from repopt_jax.messages import quote
from repopt_jax.models.checks import MAX_WIDTH, check_sizes
from repopt_jax.models.conv_blocks import Parts, batch_norm, pair
from repopt_jax.models.layers import SqueezeExcite, conv, layer_types, linear

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray


class Bottleneck(NamedTuple):
    """One bottleneck: side of the big depthwise kernel, channels, squeeze-excite and stride."""

    kernel: int
    hidden: int
    out: int
    se: bool
    stride: int


# Stages of bottlenecks at width 1.
STAGES = (
    (Bottleneck(3, 8, 16, False, 1),),
    (Bottleneck(3, 24, 24, False, 2),),
    (Bottleneck(3, 36, 24, False, 1),),
    (Bottleneck(5, 36, 40, True, 2),),
    (Bottleneck(5, 60, 40, True, 1),),
    (Bottleneck(3, 120, 80, False, 2),),
    (
        Bottleneck(3, 100, 80, False, 1),
        Bottleneck(3, 120, 80, False, 1),
        Bottleneck(3, 120, 80, False, 1),
        Bottleneck(3, 240, 112, True, 1),
        Bottleneck(3, 336, 112, True, 1),
    ),
    (Bottleneck(5, 336, 160, True, 2),),
    (
        Bottleneck(5, 480, 160, False, 1),
        Bottleneck(5, 480, 160, True, 1),
        Bottleneck(5, 480, 160, False, 1),
        Bottleneck(5, 480, 160, True, 1),
    ),
)
MAX_FACTOR = 100  # of all channels
STEM, LAST, HEAD = 16, 960, 1280  # the head has the same channels at every width

GHOST_WIDTHS = (0.5, 0.58, 0.8, 1.0, 1.11, 1.3, 1.5, 2.0)
GHOST_SIZES = {f"RepOpt-GhostNet-{width}x": {"width": width} for width in GHOST_WIDTHS}


def ghost_channels(channels: float) -> int:
    """Round a number of channels to a multiple of 4, and down by a tenth at most.

    >>> [ghost_channels(c) for c in (1.6, 18, 5, 50)]
    [4, 20, 8, 52]
    """
    rounded = max(4, int(channels + 2) // 4 * 4)
    return rounded if rounded >= 0.9 * channels else rounded + 4


def ghost_modules(width: float) -> dict[str, int]:
    """The paths of all depthwise kernels that get branches, and their channels.

    >>> len(ghost_modules(0.5)), ghost_modules(0.5)["stages/1/0/ghost1/cheap_conv"]
    (32, 12)
    """
    return {
        f"stages/{s}/{b}/ghost{i}/cheap_conv": ghost_channels(channels * width)
        for s, stage in enumerate(STAGES)
        for b, spec in enumerate(stage)
        for i, channels in enumerate((spec.hidden, spec.out), 1)
    }


def ghost_width(found: Mapping[str, int], last: int | None = None) -> float | None:
    """The width of a network from the channels of its modules; None if no width has them.

    Neighbouring widths share their channels. A published width is preferred, then the one with the
    fewest decimals, up to three.

    Args:
      found: path -> channels, as of `ghost_modules`.
      last: channels before the average pooling. None: not known.

    >>> ghost_width(ghost_modules(0.5)), ghost_width(ghost_modules(0.1)), ghost_width({"conv": 4})
    (0.5, 0.1, None)
    """
    widest = max(found.values(), default=0) / max(spec.hidden for s in STAGES for spec in s)
    near = [k / d for d in (1, 10, 100, 1000) for k in range(1, 8 * d) if abs(k / d - widest) < 0.1]
    for width in (*GHOST_WIDTHS, *near):
        if last in (None, ghost_channels(LAST * width)) and ghost_modules(width) == dict(found):
            return width
    return None


class _Makers:
    """Makes layers that share their types, their generator and their BatchNorm group."""

    def __init__(self, **types: Any):
        self.norm = functools.partial(batch_norm, **types)
        self.types = layer_types(**types)

    def pointwise(self, in_features: int, out_features: int, *, use_bias: bool = False) -> nnx.Conv:
        return conv(in_features, out_features, 1, use_bias=use_bias, **self.types)

    def depthwise(self, features: int, size: int, stride: int = 1) -> nnx.Conv:
        return conv(features, features, size, stride, groups=features, **self.types)

    def squeeze_excite(self, features: int) -> SqueezeExcite:
        hidden = ghost_channels(features / 4)
        return SqueezeExcite(features, hidden, gate=jax.nn.hard_sigmoid, **self.types)


class GhostModule(nnx.Module):
    """Pointwise convolution with BatchNorm, then `depthwise`; ReLU after both or after none."""

    norms: ClassVar[tuple[str, ...]]  # after the depthwise convolution

    def __init__(self, in_features: int, out_features: int, *, relu: bool, make: _Makers):
        self.primary_conv = make.pointwise(in_features, out_features)
        self.primary_bn = make.norm(out_features)
        self.cheap_conv = make.depthwise(out_features, 3)
        for name in self.norms:
            setattr(self, name, make.norm(out_features))
        self.relu = relu

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the module."""
        activation = jax.nn.relu if self.relu else jax.nn.identity
        x = activation(self.primary_bn(self.primary_conv(x)))
        return activation(self.depthwise(x))


class PlainGhost(GhostModule):
    """One BatchNorm after the depthwise convolution, whose branches are stated for GR."""

    norms: ClassVar = ("final_bn",)

    def depthwise(self, x: Float[Array, "batch height width out"]) -> Array:
        """The second layer."""
        return self.final_bn(self.cheap_conv(x))

    def parts(self) -> Parts:
        """What `fold` makes one layer of."""
        return pair(self.cheap_conv, self.final_bn)


class RepGhost(GhostModule):
    """RepGhost's training module, the structural baseline: each branch has its own BN."""

    norms: ClassVar = ("cheap_bn", "fusion_bn")

    def depthwise(self, x: Float[Array, "batch height width out"]) -> Array:
        """The second layer."""
        return self.cheap_bn(self.cheap_conv(x)) + self.fusion_bn(x)

    def parts(self) -> Parts:
        """What `fold` makes one layer of."""
        layer, norms = self.cheap_conv, {"conv": self.cheap_bn, "identity": self.fusion_bn}
        return layer, repghost_branches("", layer), {"conv": layer.kernel[...]}, norms


class Shortcut(nnx.Module):
    """The shortcut of a bottleneck that changes the shape."""

    def __init__(self, in_features: int, out_features: int, spec: Bottleneck, *, make: _Makers):
        self.conv_dw = make.depthwise(in_features, spec.kernel, spec.stride)
        self.bn_dw = make.norm(in_features)
        self.conv_pw = make.pointwise(in_features, out_features)
        self.bn_pw = make.norm(out_features)

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the layers."""
        return self.bn_pw(self.conv_pw(self.bn_dw(self.conv_dw(x))))


class GhostBottleneck(nnx.Module):
    """Ghost module, strided depthwise convolution, squeeze-excite, ghost module; plus the input.

    The table of sizes says whether a bottleneck has the two in the middle.
    """

    def __init__(
        self,
        in_features: int,
        spec: Bottleneck,
        width: float,
        *,
        module_type: type[PlainGhost] | type[RepGhost],
        make: _Makers,
    ):
        hidden, out = ghost_channels(spec.hidden * width), ghost_channels(spec.out * width)
        self.ghost1 = module_type(in_features, hidden, relu=True, make=make)
        strided = spec.stride > 1
        self.conv_dw = make.depthwise(hidden, spec.kernel, spec.stride) if strided else None
        self.bn_dw = make.norm(hidden) if strided else None
        self.se = make.squeeze_excite(hidden) if spec.se else None
        self.ghost2 = module_type(hidden, out, relu=False, make=make)
        same_shape = not strided and in_features == out
        self.shortcut = None if same_shape else Shortcut(in_features, out, spec, make=make)

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the bottleneck."""
        y = self.ghost1(x)
        if self.conv_dw is not None:
            y = self.bn_dw(self.conv_dw(y))
        if self.se is not None:
            y = self.se(y)
        return self.ghost2(y) + (x if self.shortcut is None else self.shortcut(x))


class PointwiseBlock(nnx.Module):
    """1x1 convolution, BatchNorm and ReLU."""

    def __init__(self, in_features: int, out_features: int, *, make: _Makers):
        self.conv = make.pointwise(in_features, out_features)
        self.bn1 = make.norm(out_features)

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the layers."""
        return jax.nn.relu(self.bn1(self.conv(x)))


class RepOptGhost(nnx.Module):
    """The network; `PlainGhost` makes it RepOpt-GhostNet, `RepGhost` RepGhostNet in training form.

    Args:
      width: factor of all channels but the head's.
      num_classes: outputs of the dense layer.
      dropout: share of the head's channels that training drops; ``__call__`` then needs a `key`.
      module_type: class of every ghost module.
      types: bn_group, dtype, param_dtype and rngs, see `RepOptVGG`.

    Raises:
      ValueError: `width` or `num_classes` is out of its range, or `dropout` not in [0, 1).

    >>> net = nnx.eval_shape(lambda: RepOptGhost(0.1, num_classes=10, rngs=nnx.Rngs(0)))
    >>> jax.eval_shape(lambda net, x: net(x), net, jnp.ones((2, 32, 32, 3))).shape
    (2, 10)
    >>> len(net.blocks()), list(net.blocks()["stages/0/0/ghost1/cheap_conv"])
    (32, ['conv', 'identity'])
    """

    def __init__(
        self,
        width: float,
        *,
        num_classes: int,
        dropout: float = 0.0,
        module_type: type[PlainGhost] | type[RepGhost] = PlainGhost,
        **types: Any,
    ):
        is_number = isinstance(width, (int, float)) and not isinstance(width, bool)
        if not (is_number and 0 < width <= MAX_FACTOR):
            raise ValueError(f"width must be above 0 and at most {MAX_FACTOR}, got {quote(width)}")
        check_sizes(num_classes=(num_classes, 1, MAX_WIDTH))
        if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
            raise ValueError(f"dropout must be in [0, 1), got {quote(dropout)}")
        make = _Makers(**types)
        features = ghost_channels(STEM * width)
        self.conv_stem = conv(3, features, 3, 2, **make.types)
        self.bn1 = make.norm(features)
        stages = []
        for specs in STAGES:
            stage = []
            for spec in specs:
                block = GhostBottleneck(features, spec, width, module_type=module_type, make=make)
                features = ghost_channels(spec.out * width)
                stage.append(block)
            stages.append(nnx.List(stage))
        last = ghost_channels(LAST * width)
        self.stages = nnx.List([*stages, nnx.List([PointwiseBlock(features, last, make=make)])])
        self.conv_head = make.pointwise(last, HEAD, use_bias=True)
        self.classifier = linear(HEAD, num_classes, **make.types)
        self.dropout = dropout
        self.deterministic = False  # `train` and `eval` set it

    def __call__(
        self, images: Float[Array, "batch height width 3"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits of normalized `images`; `key` draws what a training pass drops.

        Raises:
          ValueError: no `key` in training with dropout.
        """
        x = jax.nn.relu(self.bn1(self.conv_stem(images)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        x = jax.nn.relu(self.conv_head(x.mean((1, 2), keepdims=True)))[:, 0, 0]
        if self.dropout and not self.deterministic:
            if key is None:
                raise ValueError(
                    f"key must be given in training with dropout={self.dropout}, got None"
                )
            kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), jnp.zeros((), x.dtype))
        return self.classifier(x)

    def blocks(self) -> dict[str, Block]:
        """Path of a layer -> its branches; empty if the modules are not plain ones.

        A search starts the scale of the ``n``-th module in a run of bottlenecks with as many
        output channels at ``sqrt(2 / (n + 1))``.
        """
        if not isinstance(self.stages[0][0].ghost1, PlainGhost):
            return {}
        found, out, n = {}, None, 0
        for s, stage in enumerate(STAGES):
            for b, spec in enumerate(stage):
                # A run is all bottlenecks in a row with the same channels, across stages.
                n = n if spec.out == out else 0
                out = spec.out
                for name in ("ghost1", "ghost2"):
                    n += 1
                    groups = getattr(self.stages[s][b], name).primary_conv.kernel.shape[-1]
                    found[f"stages/{s}/{b}/{name}/cheap_conv"] = {
                        "conv": Full(scale=math.sqrt(2 / (n + 1))),
                        "identity": Identity(groups=groups),
                    }
        return found
