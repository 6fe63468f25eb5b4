"""Folding: a plain network without BatchNorm that computes the same as a trained one.

In inference the BatchNorm after a branch is a scale and a bias. So the kernel of every
re-parameterized block is the merged kernel, with ``gamma / sigma`` as the branches' scales
(RepVGG, arXiv 2101.03697, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import Block, check_block, merge, wide_type
from repopt_jax.models.checks import check_numbers
from repopt_jax.models.conv_blocks import ConvBlock, activate, pair
from repopt_jax.models.create import Network
from repopt_jax.models.repmlpnet import PatchDense
from repopt_jax.models.repopt_ghost import GhostModule
from repopt_jax.models.search import SearchLayer

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def fold_block(
    block: Block,
    weights: Mapping[str, Array],
    norms: Mapping[str, Any],
    kernel_shape: tuple[int, ...],
    *,
    biases: Mapping[str, Array] | None = None,
    norm: Any = None,
) -> tuple[Float[Array, "*kernel_shape"], Float[Array, " out"]]:
    """Kernel and bias of the one layer that computes the same as trained branches in inference.

    Branch ``b`` is followed by a BatchNorm with scale ``gamma_b``, bias ``beta_b`` and running
    ``mean_b`` and ``var_b``. With ``r_b = gamma_b / sqrt(var_b + epsilon)`` and the bias ``a_b`` of
    the layer in the branch::

        kernel = sum_b r_b * E_b(w_b)
        bias   = sum_b beta_b + r_b * (a_b - mean_b)

    Squeeze-excite and activations after the sum stay as they are. In two cases a branch is two
    layers: fold the first on its own. For a mean over its outputs (Diverse Branch Block), give its
    kernel as the weight and its bias as the entry of `biases`; for a kernel after a 1x1, first call
    `fold_pointwise`. Both are exact if the border of the second layer's input is filled with what
    the first gives for zeros, as that paper does.

    Args:
      block: branch name -> branch ``E_b``, such as `repvgg_branches` returns.
      weights: branch name -> ``w_b``. Without an entry, an identity's weight is 1.
      norms: branch name -> `BatchNorm`, or any object with scale, bias, mean, var and epsilon.
        Branches without an entry have none. One with fewer channels than there are outputs stands
        for as many outputs in a row (RepMLP's, which have a channel per set).
      kernel_shape: ``(*window, in / groups, out)``.
      biases: branch name -> ``a_b``, ``(out,)``. None: no layer has a bias.
      norm: BatchNorm after the sum (QARepVGG). None: there is none.

    Returns:
      The kernel, and the bias, ``(out,)``, in float32 or a wider type of the parts.

    Raises:
      ValueError: a branch that does not fit the kernel, or weights, biases or BatchNorms that do
        not fit the branches.

    >>> from repopt_jax import Centre, Full
    >>> from repopt_jax.models.layers import BatchNorm
    >>> block = {"conv3x3": Full(), "conv1x1": Centre(1)}
    >>> weights = {"conv3x3": jnp.ones((3, 3, 1, 1)), "conv1x1": jnp.ones((1, 1, 1, 1))}
    >>> bn = BatchNorm(1, epsilon=0.0)
    >>> bn.scale[...], bn.mean[...] = jnp.array([3.0]), jnp.array([2.0])
    >>> kernel, bias = fold_block(block, weights, {"conv1x1": bn}, (3, 3, 1, 1))
    >>> kernel[1, :, 0, 0].tolist(), bias.tolist()
    ([1.0, 4.0, 1.0], [-6.0])
    """
    biases = biases or {}
    check_block(block, kernel_shape)
    _check_parts(block, weights, norms, biases, norm, kernel_shape)
    used = [bn.scale.dtype for bn in (*norms.values(), norm) if bn is not None]
    dtype = wide_type(jnp.result_type(*weights.values(), *used))
    weights = {name: jnp.asarray(weight, dtype) for name, weight in weights.items()}
    scales, total = {}, jnp.zeros(kernel_shape[-1], dtype)
    for name, branch in block.items():
        scales[name], shift = _affine(norms.get(name), kernel_shape[-1], dtype)
        total += shift + scales[name] * biases.get(name, 0)
        if not branch.scaled:
            weights[name] = weights.get(name, 1) * scales[name]
    factor, shift = _affine(norm, kernel_shape[-1], dtype)
    kernel = merge(block, weights, scales, kernel_shape)
    return kernel * jnp.broadcast_to(factor, kernel_shape), total * factor + shift


def fold_pointwise(
    kernel: Array, pointwise: Array, bias: Array, groups: int = 1
) -> tuple[Array, Array]:
    """Kernel and bias of a 1x1 convolution with a bias, followed by another convolution.

    For Diverse Branch Block's "1x1, then kernel"::

        W[t, i, o] = sum_m pointwise[i, m] * kernel[t, m, o]
        a[o]       = sum_t sum_m bias[m] * kernel[t, m, o]

    over taps ``t``, inputs ``i``, channels ``m`` between the two, and outputs ``o``, each group by
    itself.

    Args:
      kernel: of the second convolution, ``(*window, features / groups, out)``.
      pointwise: kernel of the first one, ``(1, ..., 1, in / groups, features)``.
      bias: of the first one, ``(features,)``.
      groups: of both.

    Returns:
      ``W``, ``(*window, in / groups, out)``, and ``a``, ``(out,)``: a `Full` branch's entries of
      `weights` and `biases` in `fold_block`.

    Raises:
      ValueError: layers that do not have the same channels between them.

    >>> kernel, bias = jnp.full((3, 1, 1), 2.0), jnp.array([10.0])
    >>> [array.tolist() for array in fold_pointwise(kernel, jnp.full((1, 1, 1), 5.0), bias)]
    [[[[10.0]], [[10.0]], [[10.0]]], [60.0]]
    """
    features, outputs = bias.shape[0], kernel.shape[-1]
    if not features == pointwise.shape[-1] == kernel.shape[-2] * groups:
        raise ValueError(
            f"kernel, pointwise and bias must have the same channels between them, got shapes "
            f"{kernel.shape}, {pointwise.shape} and {bias.shape} with groups={groups}"
        )
    # The bias is one more input, which is 1 everywhere.
    rows = jnp.concatenate([pointwise.reshape(-1, features), bias[None]])
    first = rows.reshape(-1, groups, features // groups)
    second = kernel.reshape(*kernel.shape[:-1], groups, outputs // groups)
    joined = jnp.einsum("igm,...mgo->...igo", first, second, precision="highest")
    joined = joined.reshape(*kernel.shape[:-2], -1, outputs)
    return joined[..., :-1, :], joined[..., -1, :].reshape(-1, outputs).sum(0)


def _affine(norm: Any, outputs: int, dtype: Any) -> tuple[Array, Array]:
    """Factor and shift of a BatchNorm in inference, by output."""
    if norm is None:
        return jnp.ones(outputs, dtype), jnp.zeros(outputs, dtype)
    parts = (norm.scale, norm.bias, norm.mean, norm.var)
    scale, bias, mean, var = (jnp.repeat(p[...], outputs // p.size).astype(dtype) for p in parts)
    factor = scale * jax.lax.rsqrt(var + norm.epsilon)
    return factor, bias - mean * factor


def _check_parts(block, weights, norms, biases, norm, kernel_shape) -> None:
    """Refuse parts of branches that `block` does not have, and parts of the wrong shape."""
    for argument, parts in {"weights": weights, "norms": norms, "biases": biases}.items():
        if surplus := sorted(set(parts) - set(block)):
            raise ValueError(f"{argument} must be of branches {list(block)}, got {surplus}")
    arrays = {
        f"weights of {name!r}": (weights.get(name), branch.weight_shape(kernel_shape))
        for name, branch in block.items()
        if branch.scaled or name in weights
    }
    arrays |= {f"biases of {name!r}": (bias, kernel_shape[-1:]) for name, bias in biases.items()}
    for argument, (array, wanted) in arrays.items():
        found = None if array is None else jnp.shape(array)
        if found != wanted:
            raise ValueError(f"{argument} must have the shape {wanted}, got {found}")
    named = {f"norms of {name!r}": bn for name, bn in norms.items()}
    for argument, bn in {**named, "norm": norm}.items():
        if bn is not None and kernel_shape[-1] % bn.scale.size:
            raise ValueError(
                f"{argument} must have channels that divide the {kernel_shape[-1]} outputs, "
                f"got {bn.scale.size}"
            )


class FoldedBlock(nnx.Module):
    """Convolution with bias, and the activation and squeeze-excites that the block had."""

    def __init__(self, block: ConvBlock):
        self.conv = _folded(*block.parts())
        self.activation, self.post_se, self.pre_se = block.activation, block.post_se, block.pre_se

    def __call__(self, x: Float[Array, "batch height width in"]) -> Array:
        """Run the block."""
        return activate(self, self.conv(x))


class FoldedPatchDense(PatchDense):
    """Dense layer over patches, with a bias."""

    def __init__(self, block: PatchDense):
        self.conv = _folded(*block.parts())
        self.bn, self.branches = nnx.static(jax.nn.identity), ()


class FoldedGhost(GhostModule):
    """Pointwise and depthwise convolution with bias, and ReLU after each if the module had it."""

    def __init__(self, module: GhostModule):
        self.primary_conv = _folded(*pair(module.primary_conv, module.primary_bn))
        self.primary_bn = nnx.static(jax.nn.identity)
        self.cheap_conv = _folded(*module.parts())
        self.relu = module.relu

    def depthwise(self, x: Float[Array, "batch height width out"]) -> Array:
        """The second layer."""
        return self.cheap_conv(x)


FOLDED = {ConvBlock: FoldedBlock, PatchDense: FoldedPatchDense, GhostModule: FoldedGhost}
# Layers outside such blocks, and the BatchNorm that follows each.
PAIRS = {"conv_stem": "bn1", "conv": "bn1", "conv_dw": "bn_dw", "conv_pw": "bn_pw"}


def fold(model: Network) -> Network:
    """A copy of `model`, of any kind, with its BatchNorms folded into convolutions.

    Numbers of fewer bits than float32 become float32, so that nothing is rounded on the way.

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
    if not any(_folded_type(module) for _, module in nnx.iter_modules(model)):
        raise ValueError(
            f"model must have blocks to fold, got a folded {type(model).__name__}: "
            "FoldedBlock and FoldedGhost have no BatchNorm"
        )
    return nnx.merge(*_fold_blocks(*nnx.split(model)))


@jax.jit  # one program, where JAX would compile one for every operation on every shape
def _fold_blocks(graphdef: nnx.GraphDef, state: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    folded = nnx.merge(graphdef, jax.tree.map(_widened, state))
    modules = [module for _, module in nnx.iter_modules(folded)]
    for module in reversed(modules):  # a block before the blocks in it
        for name, child in list(vars(module).items()):
            if new := _folded_type(child):
                setattr(module, name, new(child))
            elif isinstance(child, nnx.Conv) and hasattr(module, PAIRS.get(name, "")):
                setattr(module, name, _folded(*pair(child, getattr(module, PAIRS[name]))))
                setattr(module, PAIRS[name], nnx.static(jax.nn.identity))
    return nnx.split(folded)


def _folded_type(module: Any) -> type | None:
    """What a block is folded to; None for other modules and folded blocks."""
    if isinstance(module, tuple(FOLDED.values())):
        return None
    return next((new for old, new in FOLDED.items() if isinstance(module, old)), None)


def _widened(value: Array) -> Array:
    return value.astype(wide_type(value.dtype))


def _folded(layer: nnx.Conv | SearchLayer, block: Block, weights, norms) -> nnx.Conv:
    """`layer` with the kernel and bias of `fold_block`."""
    norms = {name: norms[name] for name in block}
    kernel, bias = fold_block(block, weights, norms, layer.kernel_shape)
    if isinstance(layer, SearchLayer):
        layer = nnx.merge(layer.layer_def, {"kernel": nnx.Param(kernel)})
    layer.kernel, layer.bias, layer.use_bias = nnx.Param(kernel), nnx.Param(bias), True
    return layer
