"""Folding: a plain network without BatchNorm that computes the same as a trained one.

A convolution with kernel ``k`` and the BatchNorm after it become one convolution::

    k' = k * scale / sqrt(var + epsilon)        b' = bias - mean * scale / sqrt(var + epsilon)

The branches of RepVGG and RepGhost are folded each by its own BatchNorm and added; an identity
branch is a kernel with ones on the centre's diagonal (arXiv 2101.03697, section 3.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import Centre, Identity
from repopt_jax.models.layers import BatchNorm
from repopt_jax.models.repopt_ghost import PlainGhost, RepGhost, RepOptGhost
from repopt_jax.models.repopt_vgg import PlainBlock, RepOptVGG, RepVGGBlock
from repopt_jax.models.search import SearchLayer

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class FoldedBlock(nnx.Module):
    """3x3 convolution with bias, ReLU and, if the block had it, squeeze-excite."""

    def __init__(self, block: PlainBlock | RepVGGBlock):
        if isinstance(block, PlainBlock):
            self.conv = _folded(block.conv, (block.conv.kernel[...], block.bn))
        else:
            kernel = block.conv3x3.kernel[...]
            centre = Centre(1).embed(block.conv1x1.kernel[...], kernel.shape)
            branches = [(kernel, block.bn3x3), (centre, block.bn1x1)]
            if block.bn_identity is not None:
                unit = Identity().embed(jnp.ones(kernel.shape[-1], kernel.dtype), kernel.shape)
                branches.append((unit, block.bn_identity))
            self.conv = _folded(block.conv3x3, *branches)
        self.post_se = block.post_se

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the block."""
        x = jax.nn.relu(self.conv(x))
        return x if self.post_se is None else self.post_se(x)


class FoldedGhost(nnx.Module):
    """Pointwise and depthwise convolution with bias, and ReLU after each if the module had it."""

    def __init__(self, module: PlainGhost | RepGhost):
        primary, cheap = module.primary_conv, module.cheap_conv
        self.primary_conv = _folded(primary, (primary.kernel[...], module.primary_bn))
        kernel = cheap.kernel[...]
        if isinstance(module, PlainGhost):
            branches = [(kernel, module.final_bn)]
        else:
            ones = jnp.ones(kernel.shape[-1], kernel.dtype)
            unit = Identity(groups=kernel.shape[-1]).embed(ones, kernel.shape)
            branches = [(kernel, module.cheap_bn), (unit, module.fusion_bn)]
        self.cheap_conv = _folded(cheap, *branches)
        self.relu = module.relu

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the module."""
        for layer in (self.primary_conv, self.cheap_conv):
            x = jax.nn.relu(layer(x)) if self.relu else layer(x)
        return x


class Unchanged(nnx.Module):
    """Takes the place of a folded BatchNorm."""

    def __call__(self, x: Array) -> Array:
        """`x`."""
        return x


def fold(model: RepOptVGG | RepOptGhost) -> RepOptVGG | RepOptGhost:
    """A copy of `model`, of any kind, with its BatchNorms folded into convolutions.

    Raises:
      ValueError: `model` has blocks that cannot be folded, such as folded ones.

    >>> import repopt_jax
    >>> from flax import nnx
    >>> size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3}
    >>> model = repopt_jax.create_model("RepOpt-VGG", "repvgg", **size, rngs=nnx.Rngs(0))
    >>> model.eval()
    >>> x = jnp.ones((1, 32, 32, 3))
    >>> bool(abs(fold(model)(x) - model(x)).max() < 1e-6)
    True
    """
    if isinstance(model, RepOptGhost):
        return _fold_ghost(model)
    if not isinstance(model.stage0, PlainBlock | RepVGGBlock):
        raise ValueError(f"model must have blocks to fold, got {type(model.stage0).__name__}")
    folded = nnx.clone(model)
    folded.stage0 = FoldedBlock(folded.stage0)
    for stage in range(1, 5):
        blocks = getattr(folded, f"stage{stage}")
        setattr(folded, f"stage{stage}", nnx.List([FoldedBlock(block) for block in blocks]))
    return folded


# Layers of a GhostNet outside its modules, and the BatchNorm that follows each.
GHOST_PAIRS = {"conv_stem": "bn1", "conv": "bn1", "conv_dw": "bn_dw", "conv_pw": "bn_pw"}


def _fold_ghost(model: RepOptGhost) -> RepOptGhost:
    if isinstance(model.bn1, Unchanged):
        raise ValueError("model must have blocks to fold, got a folded RepOptGhost")
    folded = nnx.clone(model)
    for _, module in list(nnx.iter_modules(folded)):
        for name in ("ghost1", "ghost2"):
            if hasattr(module, name):
                setattr(module, name, FoldedGhost(getattr(module, name)))
        for name, norm in GHOST_PAIRS.items():
            layer = getattr(module, name, None)
            if isinstance(layer, nnx.Conv):
                branch = layer.kernel[...], getattr(module, norm)
                setattr(module, name, _folded(layer, branch))
                setattr(module, norm, Unchanged())
    return folded


def _folded(layer: nnx.Conv | SearchLayer, *branches: tuple[Array, BatchNorm]) -> nnx.Conv:
    """`layer` with the sum of the branches, each a kernel and the BatchNorm after it."""
    kernel = bias = 0
    for branch, bn in branches:
        factor = bn.scale[...] * jax.lax.rsqrt(bn.var[...] + bn.epsilon)
        kernel += branch * jnp.broadcast_to(factor, branch.shape)
        bias += bn.bias[...] - bn.mean[...] * factor
    if isinstance(layer, SearchLayer):
        layer = nnx.merge(layer.layer_def, {"kernel": nnx.Param(kernel)})
    layer.kernel, layer.bias, layer.use_bias = nnx.Param(kernel), nnx.Param(bias), True
    return layer
