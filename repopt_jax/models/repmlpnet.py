"""RepMLPNet: dense layers over the pixels of patches, plain or with convolutions beside them.

Paper: RepMLP, arXiv 2112.11081, section 3 and table 1. The plain network states the convolutions
as branches of the dense layers, which are 1x1 convolutions with a pixel per channel. Images are
NHWC, of the one size that the patches are made for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from repopt_jax.branches.presets import repmlp_branches
from repopt_jax.models.checks import MAX_BLOCKS, MAX_WIDTH, check_sizes
from repopt_jax.models.conv_blocks import Parts, PlainBlock, batch_norm, no_branches, pair
from repopt_jax.models.layers import SqueezeExcite, conv, layer_types
from repopt_jax.models.replknet import Residual, Stages

if TYPE_CHECKING:
    from jaxtyping import Array, Float

WINDOWS = (1, 3)  # of the convolutions, in all published networks


def _size(width: int, num_blocks: tuple, sets: tuple, pixels: int) -> dict[str, Any]:
    """Sizes of a network for images of `pixels` by `pixels`."""
    return {
        "num_blocks": num_blocks,
        "widths": tuple(width * 2**i for i in range(4)),
        "patches": tuple(pixels // 4 // 2**i for i in range(4)),
        "sets": sets,
    }


REPMLPNET_SIZES = {
    "RepMLPNet-T224": _size(64, (2, 2, 6, 2), (1, 4, 16, 128), 224),
    "RepMLPNet-T256": _size(64, (2, 2, 6, 2), (1, 4, 16, 128), 256),
    "RepMLPNet-B224": _size(96, (2, 2, 12, 2), (1, 4, 32, 128), 224),
    "RepMLPNet-B256": _size(96, (2, 2, 12, 2), (1, 4, 32, 128), 256),
    "RepMLPNet-D256": _size(80, (2, 2, 18, 2), (1, 4, 16, 128), 256),
    "RepMLPNet-L256": _size(96, (2, 2, 18, 2), (1, 4, 32, 256), 256),
}


class PatchDense(nnx.Module):
    """A dense layer over the pixels of patches, one per set of channels, and its BatchNorm.

    Args:
      sets: of channels that share a layer.
      image: height and width of a patch.
      types: bn_group, dtype, param_dtype and rngs, see `RepOptVGG`.
    """

    def __init__(self, sets: int, image: tuple[int, int], **types: Any):
        features = sets * image[0] * image[1]
        self.conv = conv(features, features, 1, groups=sets, **layer_types(**types))
        self.bn = batch_norm(sets, **types)
        block = repmlp_branches("", self.conv, image=image, windows=WINDOWS)
        self.branches = tuple(block.items())  # those that GR trains the layer with

    def __call__(self, x: Float[Array, "patches height width sets"]) -> Array:
        """Run the block: set after set, the pixels of a patch are the channels of a 1x1."""
        count, height, width, sets = x.shape
        y = self.conv(x.transpose(0, 3, 1, 2).reshape(count, 1, 1, -1))
        return self.bn(y.reshape(count, sets, height, width).transpose(0, 2, 3, 1))

    def parts(self) -> Parts:
        """What `fold` makes one layer of."""
        return pair(self.conv, self.bn)


class BranchedPatchDense(PatchDense):
    """RepMLPNet's training block: beside it depthwise convolutions, with a BatchNorm each."""

    def __init__(self, sets: int, image: tuple[int, int], **types: Any):
        super().__init__(sets, image, **types)
        self.built, self.branches = self.branches, ()
        types |= {"groups": sets, "rule": no_branches, "activation": jax.nn.identity}
        for k in WINDOWS:
            setattr(self, f"repconv{k}", PlainBlock(sets, sets, size=k, **types))

    def __call__(self, x: Float[Array, "patches height width sets"]) -> Array:
        """Run the block."""
        return super().__call__(x) + sum(getattr(self, f"repconv{k}")(x) for k in WINDOWS)

    def parts(self) -> Parts:
        """What `fold` makes one layer of."""
        layers = {f"conv{k}x{k}": getattr(self, f"repconv{k}") for k in WINDOWS} | {"fc": self}
        weights = {name: layer.conv.kernel[...] for name, layer in layers.items()}
        norms = {name: layer.bn for name, layer in layers.items()}
        return self.conv, dict(self.built), weights, norms


class PatchMix(nnx.Module):
    """The dense layer over patches, gated by the averages of all channels."""

    def __init__(self, features: int, fc3: PatchDense, sets: int, patch: int, **types: Any):
        self.gp = SqueezeExcite(features, features // 4, **layer_types(**types))
        self.fc3, self.sets, self.patch = fc3, sets, patch

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        """Run the block; channel ``c`` belongs to set ``c mod sets``."""
        n, height, width, channels = x.shape
        side, sets = self.patch, self.sets
        if height % side or width % side:
            raise ValueError(
                f"images must have maps that patches of {side} by {side} divide, "
                f"got one of {height} by {width}"
            )
        rows, columns, shared = height // side, width // side, channels // sets
        y = x.reshape(n, rows, side, columns, side, shared, sets).transpose(0, 1, 3, 5, 2, 4, 6)
        y = self.fc3(y.reshape(-1, side, side, sets))
        # The authors read what comes out with the shared channels before the patches.
        y = y.reshape(n, shared, rows, columns, side, side, sets).transpose(0, 2, 4, 3, 5, 1, 6)
        return self.gp(y.reshape(x.shape), x)


class RepMLPUnit(nnx.Module):
    """BatchNorm and a `PatchMix`, then a feed-forward block, each around a shortcut."""

    def __init__(self, features: int, mix: PatchMix, **types: Any):
        self.prebn1 = batch_norm(features, **types)
        self.repmlp_block = mix
        self.ffn = Residual(features, 4 * features, **types)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        """Run the unit."""
        return self.ffn(x + self.repmlp_block(self.prebn1(x)))


class RepMLPNet(Stages):
    """The network; `PatchDense` makes it plain, `BranchedPatchDense` RepMLPNet in training form.

    Args:
      num_blocks: of stages 1 to 4, or of fewer stages.
      widths: channels of the stages, multiples of `sets`.
      patches: height and width of the patches of each stage.
      sets: of channels that share a dense layer, of each stage.
      num_classes: outputs of the dense layer at the end.
      block_type: class of the dense layers over patches.
      types: bn_group, dtype, param_dtype and rngs, see `RepOptVGG`.

    Raises:
      ValueError: a size is out of its range, or `sets` do not divide `widths`.

    >>> import jax.numpy as jnp
    >>> size = {"num_blocks": (1, 1), "widths": (8, 16), "patches": (4, 2), "sets": (2, 4)}
    >>> net = nnx.eval_shape(lambda: RepMLPNet(**size, num_classes=10, rngs=nnx.Rngs(0)))
    >>> jax.eval_shape(lambda net, x: net(x), net, jnp.ones((2, 32, 32, 3))).shape
    (2, 10)
    >>> list(net.blocks()["stage1/0/repmlp_block/fc3/conv"])
    ['fc', 'conv1x1', 'conv3x3']
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        patches: Sequence[int],
        sets: Sequence[int],
        *,
        num_classes: int,
        block_type: type[PatchDense] = PatchDense,
        **types: Any,
    ):
        stages = len(num_blocks) if isinstance(num_blocks, Sequence) else 4
        check_sizes(num_blocks=(num_blocks, max(1, min(stages, 4)), MAX_BLOCKS))
        check_sizes(widths=(widths, stages, MAX_WIDTH), patches=(patches, stages, MAX_BLOCKS))
        check_sizes(sets=(sets, stages, MAX_WIDTH), num_classes=(num_classes, 1, MAX_WIDTH))
        if any(width % n for width, n in zip(widths, sets, strict=True)):
            raise ValueError(f"sets must divide the widths {tuple(widths)}, got {tuple(sets)}")
        embed = functools.partial(PlainBlock, rule=no_branches, **types)
        self.conv_embedding = embed(3, widths[0], 4, size=4)
        self.embeds = nnx.List([embed(*widths[i : i + 2], 2, size=2) for i in range(stages - 1)])
        for stage, width, side, n in zip(range(1, 5), widths, patches, sets, strict=False):
            units = nnx.List()
            for _ in range(num_blocks[stage - 1]):
                fc3 = block_type(n, (side, side), **types)
                units.append(RepMLPUnit(width, PatchMix(width, fc3, n, side, **types), **types))
            setattr(self, f"stage{stage}", units)
        self._finish(widths[-1], num_classes, **types)

    def embeddings(self) -> list[tuple[PlainBlock]]:
        """The layers before each stage."""
        return [(layer,) for layer in (self.conv_embedding, *self.embeds)]
