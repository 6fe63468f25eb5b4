"""RepOpt-VGG: a plain stack of 3x3 convolutions that states RepVGG's branches as blocks.

Papers: RepOptimizers, arXiv 2205.15242, section 4 and table 1; sizes A0 to B0 from RepVGG,
arXiv 2101.03697.
Stage 0 is one block, then four stages, global average pooling and a dense layer. Images are NHWC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import Block, Centre, Full, Identity
from repopt_jax.models.layers import (
    MAX_WIDTH,
    BatchNorm,
    SqueezeExcite,
    check_sizes,
    conv,
    linear,
    materialize,
)

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float

MAX_BLOCKS = 128  # of a stage
# name -> blocks of stages 1 to 4, width multipliers of stages 1 to 4
SIZES = {
    "RepOpt-VGG-A0": ((2, 4, 14, 1), (0.75, 0.75, 0.75, 2.5)),
    "RepOpt-VGG-A1": ((2, 4, 14, 1), (1, 1, 1, 2.5)),
    "RepOpt-VGG-A2": ((2, 4, 14, 1), (1.5, 1.5, 1.5, 2.75)),
    "RepOpt-VGG-B0": ((4, 6, 16, 1), (1, 1, 1, 2.5)),
    "RepOpt-VGG-B1": ((4, 6, 16, 1), (2, 2, 2, 4)),
    "RepOpt-VGG-B2": ((4, 6, 16, 1), (2.5, 2.5, 2.5, 5)),
    "RepOpt-VGG-L1": ((8, 14, 24, 1), (2, 2, 2, 4)),
    "RepOpt-VGG-L2": ((8, 14, 24, 1), (2.5, 2.5, 2.5, 5)),
}


def stage_widths(multipliers: Sequence[float]) -> tuple[int, ...]:
    """Channels of stages 0 to 4 from the four width multipliers.

    >>> stage_widths((2, 2, 2, 4))
    (64, 128, 256, 512, 2048)
    """
    stages = [int(base * m) for base, m in zip((64, 128, 256, 512), multipliers, strict=True)]
    return (min(64, stages[0]), *stages)


def size_name(num_blocks: Sequence[int], widths: Sequence[int]) -> str | None:
    """The published name of a size; None if it has none.

    >>> size_name((4, 6, 16, 1), (64, 128, 256, 512, 2048))
    'RepOpt-VGG-B1'
    """
    for name, (blocks, multipliers) in SIZES.items():
        if (tuple(num_blocks), tuple(widths)) == (blocks, stage_widths(multipliers)):
            return name
    return None


class PlainBlock(nnx.Module):
    """3x3 convolution, BatchNorm, ReLU and, if wanted, squeeze-excite."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        se: bool,
        bn_group: int | None,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.has_identity = in_features == out_features and stride == 1
        self.conv = conv(in_features, out_features, 3, stride, **types)
        self.bn = BatchNorm(out_features, group=bn_group, param_dtype=param_dtype)
        self.post_se = SqueezeExcite(out_features, out_features // 4, **types) if se else None

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the block."""
        x = jax.nn.relu(self.bn(self.conv(x)))
        return x if self.post_se is None else self.post_se(x)


class RepVGGBlock(nnx.Module):
    """RepVGG's training block, the structural baseline: three branches with a BN each."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        se: bool,
        bn_group: int | None,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = {"group": bn_group, "param_dtype": param_dtype}
        self.conv3x3 = conv(in_features, out_features, 3, stride, **types)
        self.bn3x3 = BatchNorm(out_features, **norm)
        self.conv1x1 = conv(in_features, out_features, 1, stride, **types)
        self.bn1x1 = BatchNorm(out_features, **norm)
        has_identity = in_features == out_features and stride == 1
        self.bn_identity = BatchNorm(out_features, **norm) if has_identity else None
        self.post_se = SqueezeExcite(out_features, out_features // 4, **types) if se else None

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the block."""
        y = self.bn3x3(self.conv3x3(x)) + self.bn1x1(self.conv1x1(x))
        if self.bn_identity is not None:
            y = y + self.bn_identity(materialize(x))
        y = jax.nn.relu(y)
        return y if self.post_se is None else self.post_se(y)


class RepOptVGG(nnx.Module):
    """The network; `PlainBlock` makes it RepOpt-VGG, `RepVGGBlock` RepVGG in training form.

    Args:
      num_blocks: blocks of stages 1 to 4.
      widths: channels of stages 0 to 4.
      num_classes: outputs of the dense layer.
      strides: of the first block of stages 0 to 4.
      se: squeeze-excite at the end of every block.
      bn_group: samples per BatchNorm group. None: the whole batch.
      dtype: of the computation. None: that of inputs and parameters.
      param_dtype: of the parameters.
      block_type: class of every block.
      rngs: draws the parameters.

    Raises:
      ValueError: a size is out of its range.

    >>> from flax import nnx
    >>> net = RepOptVGG((1, 2, 1, 1), (4, 4, 4, 8, 8), num_classes=10, rngs=nnx.Rngs(0))
    >>> net(jnp.ones((2, 32, 32, 3))).shape
    (2, 10)
    >>> list(net.blocks()), list(net.blocks()["stage2/1/conv"])
    (['stage0/conv', 'stage1/0/conv', 'stage2/0/conv', 'stage2/1/conv', 'stage3/0/conv', \
'stage4/0/conv'], ['conv3x3', 'conv1x1', 'identity'])
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        se: bool = False,
        bn_group: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        block_type: type[PlainBlock] | type[RepVGGBlock] = PlainBlock,
        rngs: nnx.Rngs,
    ):
        check_sizes(
            num_blocks=(num_blocks, 4, MAX_BLOCKS),
            widths=(widths, 5, MAX_WIDTH),
            strides=(strides, 5, MAX_WIDTH),
            num_classes=(num_classes, 1, MAX_WIDTH),
        )
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options = {"se": se, "bn_group": bn_group, **types}
        self.stage0 = block_type(3, widths[0], strides[0], **options)
        for stage, count in enumerate(num_blocks, 1):
            features = [widths[stage - 1], *[widths[stage]] * count]
            steps = [strides[stage], *[1] * (count - 1)]
            blocks = [block_type(*features[i : i + 2], steps[i], **options) for i in range(count)]
            setattr(self, f"stage{stage}", nnx.List(blocks))
        self.linear = linear(widths[-1], num_classes, **types)

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch classes"]:
        """Logits of normalized `images`."""
        x = self.stage0(images)
        for block in (*self.stage1, *self.stage2, *self.stage3, *self.stage4):
            x = block(x)
        return self.linear(x.mean((1, 2)))

    def blocks(self) -> dict[str, Block]:
        """Path of a layer -> its branches; empty if the blocks are not plain ones.

        A search starts the convolutions' scales at 1 in the first block of a stage and at
        ``sqrt(2 / i)`` in block ``i``.
        """
        if not isinstance(self.stage0, PlainBlock):
            return {}
        found = {"stage0/conv": _branches(self.stage0, 1.0)}
        for stage in range(1, 5):
            for i, block in enumerate(getattr(self, f"stage{stage}")):
                scale = math.sqrt(2 / i) if i else 1.0
                found[f"stage{stage}/{i}/conv"] = _branches(block, scale)
        return found


def _branches(block: PlainBlock, scale: float) -> Block:
    branches = {"conv3x3": Full(scale=scale), "conv1x1": Centre(1, scale=scale)}
    return {**branches, "identity": Identity()} if block.has_identity else branches
