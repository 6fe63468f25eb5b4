"""RepOpt-VGG and RepVGG: a stack of 3x3 convolutions, plain or with a BatchNorm in each branch.

Papers: RepOptimizers, arXiv 2205.15242, section 4 and table 1; RepVGG, arXiv 2101.03697, tables 2
to 4. The plain stack states RepVGG's branches as blocks.
Stage 0 is one block, then four stages, global average pooling and a dense layer. Images are NHWC.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import Block
from repopt_jax.models.checks import MAX_BLOCKS, MAX_WIDTH, check_sizes
from repopt_jax.models.conv_blocks import BranchedBlock, ConvNetwork, PlainBlock
from repopt_jax.models.layers import linear

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float

LAST_GROUPED = 26  # of the layers, counted from stage 0; deeper ones are never grouped


def stage_widths(multipliers: Sequence[float]) -> tuple[int, ...]:
    """Channels of stages 0 to 4 from the four width multipliers.

    >>> stage_widths((2, 2, 2, 4))
    (64, 128, 256, 512, 2048)
    """
    stages = [int(base * m) for base, m in zip((64, 128, 256, 512), multipliers, strict=True)]
    return (min(64, stages[0]), *stages)


def _size(num_blocks: tuple, multipliers: Sequence[float], **options: Any) -> dict[str, Any]:
    size = {"num_blocks": num_blocks, "widths": stage_widths(multipliers)}
    return {**size, "groups": 1, "pre_se": False, **options}


# name -> options of `RepOptVGG`
_A, _B, _L = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
SIZES = {
    "RepOpt-VGG-A0": _size(_A, (0.75, 0.75, 0.75, 2.5)),
    "RepOpt-VGG-A1": _size(_A, (1, 1, 1, 2.5)),
    "RepOpt-VGG-A2": _size(_A, (1.5, 1.5, 1.5, 2.75)),
    "RepOpt-VGG-B0": _size(_B, (1, 1, 1, 2.5)),
    "RepOpt-VGG-B1": _size(_B, (2, 2, 2, 4)),
    "RepOpt-VGG-B2": _size(_B, (2.5, 2.5, 2.5, 5)),
    "RepOpt-VGG-L1": _size(_L, (2, 2, 2, 4)),
    "RepOpt-VGG-L2": _size(_L, (2.5, 2.5, 2.5, 5)),
}
REPVGG_SIZES = {
    **{f"RepVGG-{n}": SIZES[f"RepOpt-VGG-{n}"] for n in ("A0", "A1", "A2", "B0", "B1", "B2")},
    "RepVGG-B3": _size(_B, (3, 3, 3, 5)),
    "RepVGG-D2se": _size(_L, (2.5, 2.5, 2.5, 5), pre_se=True),
    "RepVGGplus-L2pse": _size(_L, (2.5, 2.5, 2.5, 5), se=True),
}
REPVGG_SIZES |= {
    f"RepVGG-{n}g{groups}": REPVGG_SIZES[f"RepVGG-{n}"] | {"groups": groups}
    for n in ("B1", "B2", "B3")
    for groups in (2, 4)
}


class RepVGGBlock(BranchedBlock):
    """RepVGG's training block: three branches with a BatchNorm each."""

    suffixes: ClassVar = {"identity": "_identity"}


class FiveStages(ConvNetwork):
    """A block, four lists of blocks, global average pooling and a dense layer.

    Attributes:
      stage0: the block.
      stage1: the first list; `stage2`, `stage3` and `stage4` follow.
      linear: the dense layer.
    """

    def layers(self) -> Iterator[tuple[str, nnx.Module]]:
        """Path and block, in the order in which they run."""
        yield "stage0", self.stage0
        for stage in range(1, 5):
            for i, block in enumerate(getattr(self, f"stage{stage}")):
                yield f"stage{stage}/{i}", block

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch classes"]:
        """Logits of normalized `images`."""
        x = images
        for _, block in self.layers():
            x = block(x)
        return self.linear(x.mean((1, 2)))


class RepOptVGG(FiveStages):
    """The network; `PlainBlock` makes it RepOpt-VGG, `RepVGGBlock` RepVGG in training form.

    Args:
      num_blocks: blocks of stages 1 to 4.
      widths: channels of stages 0 to 4.
      num_classes: outputs of the dense layer.
      strides: of the first block of stages 0 to 4.
      groups: of every second layer, from layer 2 to layer 26; stage 0 is layer 0.
      se: squeeze-excite of a quarter of the channels at the end of every block.
      pre_se: squeeze-excite of a sixteenth of the channels before the ReLU of every block.
      bn_group: samples per BatchNorm group. None: the whole batch.
      dtype: of the computation. None: that of inputs and parameters.
      param_dtype: of the parameters.
      block_type: class of every block.
      rngs: draws the parameters.

    Raises:
      ValueError: a size is out of its range, or `groups` do not divide the widths.

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
        groups: int = 1,
        se: bool = False,
        pre_se: bool = False,
        bn_group: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        block_type: type[PlainBlock] | type[RepVGGBlock] = PlainBlock,
        rngs: nnx.Rngs,
    ):
        check_sizes(num_blocks=(num_blocks, 4, MAX_BLOCKS), widths=(widths, 5, MAX_WIDTH))
        check_sizes(strides=(strides, 5, MAX_WIDTH), groups=(groups, 1, MAX_WIDTH))
        check_sizes(num_classes=(num_classes, 1, MAX_WIDTH))
        if any(width % groups for width in widths[1:]):
            raise ValueError(f"groups must divide the widths {tuple(widths[1:])}, got {groups}")
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options = {"se": se, "pre_se": pre_se, "bn_group": bn_group, **types}
        self.stage0 = block_type(3, widths[0], strides[0], **options)
        layer = 0
        for stage, count in enumerate(num_blocks, 1):
            features = [widths[stage - 1], *[widths[stage]] * count]
            blocks = []
            for i in range(count):
                layer += 1
                grouped = layer % 2 == 0 and layer <= LAST_GROUPED
                stride = 1 if i else strides[stage]
                kinds = {"groups": groups if grouped else 1, **options}
                blocks.append(block_type(*features[i : i + 2], stride, **kinds))
            setattr(self, f"stage{stage}", nnx.List(blocks))
        self.linear = linear(widths[-1], num_classes, **types)

    def blocks(self) -> dict[str, Block]:
        """Path of a layer -> its branches; empty if the blocks are not plain ones.

        A search starts the convolutions' scales at 1 in the first block of a stage and at
        ``sqrt(2 / i)`` in block ``i``.
        """
        found = super().blocks()
        for path, block in found.items():
            if i := int(path.split("/")[1]) if path.count("/") > 1 else 0:
                for name, branch in block.items():
                    if branch.scaled:
                        block[name] = dataclasses.replace(branch, scale=math.sqrt(2 / i))
        return found
