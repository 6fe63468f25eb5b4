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
from repopt_jax.models.layers import BatchNorm, check_numbers
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


FOLDED = {PlainBlock: FoldedBlock, RepVGGBlock: FoldedBlock}
FOLDED |= {PlainGhost: FoldedGhost, RepGhost: FoldedGhost}
# Layers outside such blocks, and the BatchNorm that follows each.
PAIRS = {"conv_stem": "bn1", "conv": "bn1", "conv_dw": "bn_dw", "conv_pw": "bn_pw"}


def fold(model: RepOptVGG | RepOptGhost) -> RepOptVGG | RepOptGhost:
    """A copy of `model`, of any kind, with its BatchNorms folded into convolutions.

    Raises:
      ValueError: `model` has blocks that cannot be folded, such as folded ones, or numbers that are
        not finite.

    >>> import repopt_jax
    >>> from flax import nnx
    >>> size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3}
    >>> model = repopt_jax.create_model("RepOpt-VGG", "repvgg", **size, rngs=nnx.Rngs(0))
    >>> model.eval()
    >>> x = jnp.ones((1, 32, 32, 3))
    >>> bool(abs(fold(model)(x) - model(x)).max() < 1e-6)
    True
    """
    check_numbers(model)
    folded = nnx.clone(model)
    modules = [module for _, module in nnx.iter_modules(folded)]
    if not any(type(module) in FOLDED for module in modules):
        raise ValueError(
            f"model must have blocks to fold, got a folded {type(model).__name__}: "
            "FoldedBlock and FoldedGhost have no BatchNorm"
        )
    for module in modules:
        for name, child in list(vars(module).items()):
            if type(child) in FOLDED:
                setattr(module, name, FOLDED[type(child)](child))
            elif isinstance(child, nnx.Conv) and hasattr(module, PAIRS.get(name, "")):
                norm = getattr(module, PAIRS[name])
                setattr(module, name, _folded(child, (child.kernel[...], norm)))
                setattr(module, PAIRS[name], nnx.static(jax.nn.identity))
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
