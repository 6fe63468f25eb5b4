"""YOLOv6's backbone and neck, EfficientRep and Rep-PAN or BiFPAN, plain or as RepVGG blocks.

Papers: YOLOv6, arXiv 2209.02976, section 2.1; YOLOv6 v3.0, arXiv 2301.05586, sections 2.1 and 2.2
(sizes N and S). The network gives feature maps: a detector's head, and its training, are left out.
Blocks are named as in the released files, whose scales and weights go in by name. Images are NHWC.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import uniform_fan_in
from repopt_jax.branches.presets import repvgg_branches
from repopt_jax.models.checks import MAX_BLOCKS, MAX_WIDTH, check_sizes
from repopt_jax.models.conv_blocks import ConvNetwork, PlainBlock, no_branches
from repopt_jax.models.layers import draw_bias, layer_types
from repopt_jax.models.repopt_vgg import RepVGGBlock

if TYPE_CHECKING:
    from jaxtyping import Array, Float

NORM = {"epsilon": 1e-3, "momentum": 0.03}


def _size(width: int, *, bifpan: bool = False) -> dict[str, Any]:
    backbone = [width * 2**i for i in range(5)]
    widths = (*backbone, *(width * n for n in (4, 2, 2, 4, 4, 8)))
    return {"num_blocks": (1, 2, 4, 6, 2, 4, 4, 4, 4), "widths": widths, "bifpan": bifpan}


YOLOV6_SIZES = {
    "YOLOv6-N": _size(16),
    "YOLOv6-S": _size(32),
    "YOLOv6-v3-N": _size(16, bifpan=True),
    "YOLOv6-v3-S": _size(32, bifpan=True),
}


def _joined(*maps: Array) -> Array:
    return jnp.concatenate(maps, -1)


class ConvReLU(nnx.Module):
    """A convolution with BatchNorm and ReLU that has no branches."""

    def __init__(self, in_features: int, out_features: int, size: int, stride: int = 1, **types):
        options = {"size": size, "rule": no_branches, **types}
        self.block = PlainBlock(in_features, out_features, stride, **options)

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the layer."""
        return self.block(x)


class RepBlock(nnx.Module):
    """Several blocks in a row, of which the first may change the number of channels."""

    def __init__(self, in_features: int, out_features: int, count: int, unit: Any):
        self.conv1 = unit(in_features, out_features)
        self.block = nnx.List([unit(out_features, out_features) for _ in range(count - 1)])

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run them."""
        for block in (self.conv1, *self.block):
            x = block(x)
        return x


class Pooling(nnx.Module):
    """Spatial pyramid pooling: an image, and the largest of 5, 9 and 13 pixels around each.

    Args:
      features: channels.
      csp: whether it is the version of YOLOv6 v3.0, with more layers and a path around them.
      types: bn_group, norm, dtype, param_dtype and rngs.
    """

    def __init__(self, features: int, *, csp: bool, **types: Any):
        half = features // 2
        sizes = {1: (features, half, 1), 2: (4 * half, features, 1)}
        if csp:
            sizes = {1: (features, half, 1), 2: (features, half, 1), 3: (half, half, 3)}
            sizes |= {4: (half, half, 1), 5: (4 * half, half, 1), 6: (half, half, 3)}
            sizes |= {7: (2 * half, features, 1)}
        layers = {f"cv{i}": ConvReLU(*size, **types) for i, size in sizes.items()}
        self.name = "cspsppf" if csp else "sppf"
        setattr(self, self.name, nnx.Dict(layers))

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        """Run the module."""
        cv = getattr(self, self.name)
        csp = self.name == "cspsppf"
        maps = [cv["cv4"](cv["cv3"](cv["cv1"](x))) if csp else cv["cv1"](x)]
        for _ in range(3):
            maps.append(nnx.max_pool(maps[-1], (5, 5), padding="SAME"))
        y = _joined(*maps)
        if not csp:
            return cv["cv2"](y)
        y = cv["cv6"](cv["cv5"](y))
        return cv["cv7"](_joined(cv["cv2"](x), y))


class EfficientRep(nnx.Module):
    """The backbone: maps of a quarter, eighth, sixteenth and thirty-second of the image's size."""

    def __init__(self, num_blocks: Sequence[int], widths: Sequence[int], unit, *, csp, **types):
        self.stem = unit(3, widths[0], 2)
        for i in range(1, 5):
            blocks = [unit(*widths[i - 1 : i + 1], 2)]
            blocks.append(RepBlock(widths[i], widths[i], num_blocks[i], unit))
            if i == 4:
                blocks.append(Pooling(widths[i], csp=csp, **types))
            setattr(self, f"ERBlock_{i + 1}", nnx.List(blocks))

    def __call__(self, images: Float[Array, "batch height width 3"]) -> list[Array]:
        """The four maps of normalized `images`, the largest first."""
        x, maps = self.stem(images), []
        for i in range(2, 6):
            for block in getattr(self, f"ERBlock_{i}"):
                x = block(x)
            maps.append(x)
        return maps


class Upsample(nnx.Module):
    """A transposed 2x2 convolution with stride 2, its kernel laid out as torch's."""

    def __init__(self, features: int, **types: Any):
        layout = {"strides": (2, 2), "padding": "VALID", "transpose_kernel": True}
        layout |= {"kernel_init": uniform_fan_in, **layer_types(**types)}
        self.upsample_transpose = nnx.ConvTranspose(features, features, (2, 2), **layout)
        draw_bias(self.upsample_transpose, types["rngs"])

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        """Run the layer."""
        return self.upsample_transpose(x)


class BiFusion(nnx.Module):
    """BiFPAN's way to join a small map and those of twice and four times its size."""

    def __init__(self, features: int, middle: int, large: int, **types: Any):
        self.upsample = Upsample(features, **types)
        self.cv1 = ConvReLU(middle, features, 1, **types)
        self.cv2 = ConvReLU(large, features, 1, **types)
        self.downsample = ConvReLU(features, features, 3, 2, **types)
        self.cv3 = ConvReLU(3 * features, features, 1, **types)

    def __call__(self, small: Array, middle: Array, large: Array) -> Array:
        """Join the maps."""
        maps = [self.upsample(small), self.cv1(middle), self.downsample(self.cv2(large))]
        return self.cv3(_joined(*maps))


class Neck(nnx.Module):
    """Rep-PAN or BiFPAN: from the small maps to the large ones, and back."""

    def __init__(self, num_blocks: Sequence[int], widths: Sequence[int], unit, *, bifpan, **types):
        _, c2, c3, c4, c5, p4, p3, d3, n3, d4, n4 = widths
        self.reduce_layer0 = ConvReLU(c5, p4, 1, **types)
        if bifpan:
            self.Bifusion0 = BiFusion(p4, c4, c3, **types)
            self.Bifusion1 = BiFusion(p3, c3, c2, **types)
        else:
            self.upsample0, self.upsample1 = Upsample(p4, **types), Upsample(p3, **types)
        self.bifpan = bifpan
        self.Rep_p4 = RepBlock(p4 if bifpan else p4 + c4, p4, num_blocks[5], unit)
        self.reduce_layer1 = ConvReLU(p4, p3, 1, **types)
        self.Rep_p3 = RepBlock(p3 if bifpan else p3 + c3, p3, num_blocks[6], unit)
        self.downsample2 = ConvReLU(p3, d3, 3, 2, **types)
        self.Rep_n3 = RepBlock(p3 + d3, n3, num_blocks[7], unit)
        self.downsample1 = ConvReLU(n3, d4, 3, 2, **types)
        self.Rep_n4 = RepBlock(p4 + d4, n4, num_blocks[8], unit)

    def __call__(self, maps: Sequence[Array]) -> list[Array]:
        """Maps of an eighth, a sixteenth and a thirty-second of the image's size."""
        c2, c3, c4, c5 = maps
        top = self.reduce_layer0(c5)
        joined = self.Bifusion0(top, c4, c3) if self.bifpan else _joined(self.upsample0(top), c4)
        middle = self.reduce_layer1(self.Rep_p4(joined))
        joined = (
            self.Bifusion1(middle, c3, c2) if self.bifpan else _joined(self.upsample1(middle), c3)
        )
        p3 = self.Rep_p3(joined)
        n3 = self.Rep_n3(_joined(self.downsample2(p3), middle))
        n4 = self.Rep_n4(_joined(self.downsample1(n3), top))
        return [p3, n3, n4]


class YOLOv6(ConvNetwork):
    """Backbone and neck; `PlainBlock` makes them plain, `RepVGGBlock` as in training.

    Args:
      num_blocks: of the backbone's stem and four stages, and of the neck's four stages. The stem
        is one block.
      widths: channels of the same, with those of the neck's layers between: of the backbone 5, of
        the neck 6.
      bifpan: whether the neck is BiFPAN, and the backbone's pooling that of version 3.0, instead
        of Rep-PAN and the first version's.
      block_type: class of every block.
      types: bn_group, dtype, param_dtype and rngs, see `RepOptVGG`.

    Raises:
      ValueError: a size is out of its range, or `bifpan` is no truth value.

    >>> import jax
    >>> widths = (4, 4, 8, 8, 8, 4, 4, 4, 4, 4, 8)
    >>> net = nnx.eval_shape(lambda: YOLOv6((1,) * 9, widths, rngs=nnx.Rngs(0)))  # shapes alone
    >>> maps = jax.eval_shape(lambda net, x: net(x), net, jnp.ones((1, 64, 64, 3)))
    >>> [x.shape for x in maps]
    [(1, 8, 8, 4), (1, 4, 4, 4), (1, 2, 2, 8)]
    >>> list(net.blocks()["backbone/ERBlock_2/1/conv1/conv"])
    ['conv3x3', 'conv1x1', 'identity']
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        *,
        bifpan: bool = False,
        block_type: type[PlainBlock] | type[RepVGGBlock] = PlainBlock,
        **types: Any,
    ):
        check_sizes(num_blocks=(num_blocks, 9, MAX_BLOCKS), widths=(widths, 11, MAX_WIDTH))
        if not isinstance(bifpan, bool):
            raise ValueError(f"bifpan must be True or False, got {bifpan!r}")
        types["norm"] = NORM
        unit = functools.partial(block_type, rule=repvgg_branches, **types)
        self.backbone = EfficientRep(num_blocks, widths, unit, csp=bifpan, **types)
        self.neck = Neck(num_blocks, widths, unit, bifpan=bifpan, **types)

    def __call__(self, images: Float[Array, "batch height width 3"]) -> list[Array]:
        """Three maps of normalized `images`, the largest first."""
        return self.neck(self.backbone(images))
