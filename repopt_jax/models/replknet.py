"""RepLKNet: large depthwise kernels, plain or with a small kernel and a BatchNorm beside them.

Paper: RepLKNet, arXiv 2203.06717, section 4 and table 5. Blocks with a large kernel and
feed-forward blocks take turns, each around a shortcut. The plain network states the small kernel
as a branch of the large one. Images are NHWC. Left out: the stochastic depth of the paper's
training.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
from flax import nnx

from repopt_jax.branches.presets import replknet_branches
from repopt_jax.models.checks import MAX_BLOCKS, MAX_WIDTH, check_sizes
from repopt_jax.models.conv_blocks import (
    BranchedBlock,
    ConvNetwork,
    PlainBlock,
    batch_norm,
    no_branches,
)
from repopt_jax.models.layers import layer_types, linear

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def _size(width: int, kernel_sizes: tuple[int, ...], **options: Any) -> dict[str, Any]:
    widths = tuple(width * 2**i for i in range(4))
    size = {"num_blocks": (2, 2, 18, 2), "widths": widths, "kernel_sizes": kernel_sizes}
    return {**size, "small": 5, "ratio": 1.0, **options}


REPLKNET_SIZES = {
    "RepLKNet-31B": _size(128, (31, 29, 27, 13)),
    "RepLKNet-31L": _size(192, (31, 29, 27, 13)),
    "RepLKNet-XL": _size(256, (27, 27, 27, 13), small=0, ratio=1.5),
}


class LargeKernelBlock(BranchedBlock):
    """RepLKNet's training block: a large and a small depthwise kernel with a BatchNorm each."""

    suffixes: ClassVar = {"large": "", "small": "_small"}


class Residual(nnx.Module):
    """BatchNorm, 1x1, a layer for each channel if wanted, and 1x1 back, around a shortcut.

    Args:
      features: channels of the shortcut.
      inner: channels between the two 1x1.
      large: the layer between them, with ReLU before it. None: GELU, a feed-forward block.
      types: bn_group, dtype, param_dtype and rngs, see `RepOptVGG`.
    """

    def __init__(self, features: int, inner: int, large: nnx.Module | None = None, **types: Any):
        unit = functools.partial(PlainBlock, size=1, rule=no_branches, **types)
        gelu = functools.partial(jax.nn.gelu, approximate=False)
        # The authors have two names, too.
        self.norm_name = "ffn_norm" if large is None else "large_norm"
        setattr(self, self.norm_name, batch_norm(features, **types))
        self.pw1 = unit(features, inner, activation=gelu if large is None else jax.nn.relu)
        self.large = large
        self.pw2 = unit(inner, features, activation=jax.nn.identity)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        """Run the block."""
        y = self.pw1(getattr(self, self.norm_name)(x))
        return x + self.pw2(y if self.large is None else self.large(y))


class Stages(ConvNetwork):
    """Blocks in stages, then BatchNorm, global average pooling and a dense layer.

    A network has `stage1`, `stage2`, ..., and before each the layers that `embeddings` gives.
    """

    def _finish(self, width: int, num_classes: int, **types: Any):
        self.norm = batch_norm(width, **types)
        self.head = linear(width, num_classes, **layer_types(**types))

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch classes"]:
        """Logits of normalized `images`."""
        x = images
        for stage, before in enumerate(self.embeddings(), 1):
            for block in (*before, *getattr(self, f"stage{stage}")):
                x = block(x)
        return self.head(self.norm(x).mean((1, 2)))


class RepLKNet(Stages):
    """The network; `PlainBlock` makes it plain, `LargeKernelBlock` RepLKNet in training form.

    Args:
      num_blocks: of stages 1 to 4, pairs of a large kernel and a feed-forward block.
      widths: channels of stages 1 to 4.
      kernel_sizes: of stages 1 to 4, odd.
      num_classes: outputs of the dense layer.
      small: size of the small kernel, odd; it goes with kernels that are not smaller. 0: there is
        none, and nothing for GR to do.
      ratio: channels of a large kernel by those of its stage.
      block_type: class of the large kernels.
      types: bn_group, dtype, param_dtype and rngs, see `RepOptVGG`.

    Raises:
      ValueError: a size is out of its range or even.

    >>> import jax.numpy as jnp
    >>> size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8), "kernel_sizes": (9, 7, 5, 5)}
    >>> net = nnx.eval_shape(lambda: RepLKNet(**size, num_classes=10, rngs=nnx.Rngs(0)))
    >>> jax.eval_shape(lambda net, x: net(x), net, jnp.ones((2, 32, 32, 3))).shape
    (2, 10)
    >>> list(net.blocks()["stage1/0/large/conv"])
    ['large', 'small']
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        kernel_sizes: Sequence[int],
        *,
        num_classes: int,
        small: int = 5,
        ratio: float = 1.0,
        block_type: type[PlainBlock] | type[LargeKernelBlock] = PlainBlock,
        **types: Any,
    ):
        check_sizes(num_blocks=(num_blocks, 4, MAX_BLOCKS), widths=(widths, 4, MAX_WIDTH))
        check_sizes(kernel_sizes=(kernel_sizes, 4, MAX_BLOCKS))
        check_sizes(num_classes=(num_classes, 1, MAX_WIDTH))
        check_sizes(least=0, small=(small, 1, MAX_BLOCKS))
        if even := [n for n in (*kernel_sizes, small or 1) if n % 2 == 0]:
            raise ValueError(f"kernel_sizes and small must be odd, got {even}")
        if not isinstance(ratio, (int, float)) or not 1 <= ratio <= 16:
            raise ValueError(f"ratio must be a number from 1 to 16, got {ratio!r}")
        rule = functools.partial(replknet_branches, small=small) if small else no_branches
        unit = functools.partial(PlainBlock, rule=no_branches, **types)
        first = widths[0]
        self.stem = nnx.List([unit(3, first, 2), unit(first, first, groups=first)])
        self.stem.extend([unit(first, first, size=1), unit(first, first, 2, groups=first)])
        self.transitions = nnx.List()
        for stage, (count, width, size) in enumerate(
            zip(num_blocks, widths, kernel_sizes, strict=True), 1
        ):
            if stage > 1:
                pair = [unit(widths[stage - 2], width, size=1), unit(width, width, 2, groups=width)]
                self.transitions.append(nnx.List(pair))
            blocks = nnx.List()
            inner = int(width * ratio)
            kind = block_type if 0 < small <= size else PlainBlock
            for _ in range(count):
                large = kind(inner, inner, size=size, groups=inner, rule=rule, **types)
                blocks.append(Residual(width, inner, large, **types))
                blocks.append(Residual(width, 4 * width, **types))
            setattr(self, f"stage{stage}", blocks)
        self._finish(widths[-1], num_classes, **types)

    def embeddings(self) -> tuple[nnx.List, ...]:
        """The layers before each stage."""
        return self.stem, *self.transitions
