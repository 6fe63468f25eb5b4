"""MobileOne: depthwise and pointwise convolutions, plain or with a BatchNorm in each branch.

Paper: MobileOne, arXiv 2206.04040, table 9 (blocks, widths, copies of the kernel).
Stage 0 is a 3x3 convolution; stages 1 to 4 are pairs of a 3x3 depthwise and a 1x1 convolution. The
plain network states the paper's branches as blocks. Images are NHWC.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from flax import nnx

from repopt_jax.branches.presets import mobileone_branches
from repopt_jax.models.checks import MAX_BLOCKS, MAX_WIDTH, check_sizes
from repopt_jax.models.conv_blocks import BranchedBlock, PlainBlock
from repopt_jax.models.layers import layer_types, linear
from repopt_jax.models.repopt_vgg import FiveStages, stage_widths

MAX_COPIES = 10  # for which torch names are known
MOBILEONE_SIZES = {
    f"MobileOne-{name}": {
        "num_blocks": (2, 8, 10, 1),
        "widths": stage_widths(multipliers),
        "copies": copies,
        "se_blocks": se_blocks,
    }
    for name, multipliers, copies, se_blocks in (
        ("S0", (0.75, 1, 1, 2), 4, (0, 0, 0, 0)),
        ("S1", (1.5, 1.5, 2, 2.5), 1, (0, 0, 0, 0)),
        ("S2", (1.5, 2, 2.5, 4), 1, (0, 0, 0, 0)),
        ("S3", (2, 2.5, 3, 4), 1, (0, 0, 0, 0)),
        ("S4", (3, 3.5, 3.5, 4), 1, (0, 0, 5, 1)),
    )
}


class MobileOneBlock(BranchedBlock):
    """MobileOne's training block: every copy of the kernel has a BatchNorm, as has the rest."""

    suffixes: ClassVar = {"conv1x1": "_scale", "identity": "_skip"}


class MobileOne(FiveStages):
    """The network; `PlainBlock` makes it plain, `MobileOneBlock` MobileOne in training form.

    Args:
      num_blocks: pairs of convolutions in stages 1 to 4.
      widths: channels of stages 0 to 4.
      num_classes: outputs of the dense layer.
      copies: of every kernel but that of stage 0, which has one.
      se_blocks: pairs with squeeze-excite, at the ends of stages 1 to 4.
      block_type: class of every block.
      types: bn_group, dtype, param_dtype and rngs, see `RepOptVGG`.

    Raises:
      ValueError: a size is out of its range.

    >>> import jax.numpy as jnp
    >>> net = MobileOne((1, 1, 1, 1), (4, 4, 4, 8, 8), num_classes=10, rngs=nnx.Rngs(0))
    >>> net(jnp.ones((2, 32, 32, 3))).shape
    (2, 10)
    >>> list(net.blocks()["stage1/0/conv"]), list(net.blocks()["stage3/1/conv"])
    (['conv0', 'conv1x1'], ['conv0'])
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int,
        copies: int = 1,
        se_blocks: Sequence[int] = (0, 0, 0, 0),
        block_type: type[PlainBlock] | type[MobileOneBlock] = PlainBlock,
        **types: Any,
    ):
        check_sizes(num_blocks=(num_blocks, 4, MAX_BLOCKS), widths=(widths, 5, MAX_WIDTH))
        check_sizes(copies=(copies, 1, MAX_COPIES), num_classes=(num_classes, 1, MAX_WIDTH))
        check_sizes(least=0, se_blocks=(se_blocks, 4, MAX_BLOCKS))
        first, rest = (functools.partial(mobileone_branches, copies=n) for n in (1, copies))
        self.stage0 = block_type(3, widths[0], 2, rule=first, **types)
        features = widths[0]
        for stage, count in enumerate(num_blocks, 1):
            blocks = []
            for i in range(count):
                gated = i >= count - se_blocks[stage - 1]
                block = functools.partial(block_type, features, rule=rest, pre_se=gated, **types)
                blocks.append(block(features, 1 if i else 2, groups=features))
                blocks.append(block(widths[stage], size=1))
                features = widths[stage]
            setattr(self, f"stage{stage}", nnx.List(blocks))
        self.linear = linear(widths[-1], num_classes, **layer_types(**types))
