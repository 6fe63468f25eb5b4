"""The blocks of sibling papers: from a layer of a network to its branches.

Every function here is a rule for `find_blocks`. It takes the path of a Flax NNX layer and the
layer, and returns the branches that its paper gives to such a layer, or None where the paper leaves
it as it is. It refuses a layer that the paper cannot treat. Options are bound with
`functools.partial`. To leave out more layers, wrap a rule in a function that returns None for them.

The papers put a BatchNorm behind each branch, gradient re-parameterization a constant scale
(RepOptimizers, arXiv 2205.15242); the statement of the branches is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flax import nnx

from repopt_jax.branches.blocks import Block
from repopt_jax.branches.branch import Full, Identity
from repopt_jax.branches.kernels import Centre, FrozenPointwise, PooledPointwise, Window
from repopt_jax.branches.matrices import FoldedConv, FoldedDepthwise


def repvgg_branches(path: str, layer: Any) -> Block | None:
    """RepVGG (arXiv 2101.03697) and YOLOv7's RepConv: 3x3, 1x1 and, if shapes allow it, identity.

    For every 3x3 convolution, grouped, depthwise, strided and dilated ones included. The identity
    needs stride 1 and as many input as output channels.

    >>> list(repvgg_branches("conv", nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))))
    ['conv3x3', 'conv1x1', 'identity']
    >>> list(repvgg_branches("conv", nnx.Conv(4, 4, (3, 3), strides=2, rngs=nnx.Rngs(0))))
    ['conv3x3', 'conv1x1']
    """
    del path
    if not isinstance(layer, nnx.Conv) or layer.kernel_size != (3, 3):
        return None
    return {"conv3x3": Full(), "conv1x1": Centre(1), **_identity(layer)}


def acnet_branches(path: str, layer: Any) -> Block | None:
    """ACNet (arXiv 1908.03930): the kernel, one of its columns and one of its rows.

    For every convolution of images with a window of 3 or 5 on either axis, grouped, depthwise and
    strided ones included. Those with a 1 in their window are left as they are.

    Raises:
      ValueError: a window with another size than 3 or 5, or dilation, which the paper's block does
        not have.

    >>> block = acnet_branches("conv", nnx.Conv(4, 4, (3, 5), rngs=nnx.Rngs(0)))
    >>> [block[name].sizes for name in ("vertical", "horizontal")]
    [(3, 1), (1, 5)]
    """
    if not _has_window(layer) or len(layer.kernel_size) != 2 or 1 in layer.kernel_size:
        return None
    rows, columns = layer.kernel_size
    if not {rows, columns} <= {3, 5} or _steps(layer.kernel_dilation):
        raise _refusal("acnet_branches", "1 < K < 7, odd, without dilation", path, layer)
    return {"square": Full(), "vertical": Window((rows, 1)), "horizontal": Window((1, columns))}


def dbb_branches(path: str, layer: Any, *, features: int | None = None) -> Block | None:
    """Diverse Branch Block (arXiv 2103.13425): kernel, 1x1, 1x1 then mean, 1x1 then kernel.

    For every convolution with an odd window, grouped and strided ones included; depthwise ones have
    no 1x1 branch.

    The paper trains both layers of "1x1 then kernel", whose product is not linear in them. With a
    constant scale only one of the two can be trained: here the first is frozen, see
    `FrozenPointwise`.

    Args:
      path: of the layer.
      layer: any layer.
      features: channels between the 1x1 and the kernel after it. None: those of the input, twice
        as many for depthwise layers, as in the paper.

    Raises:
      ValueError: an even window, dilation, which average pooling does not have, or `features` that
        the layer's groups do not divide.

    >>> list(dbb_branches("conv", nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0))))
    ['conv', 'conv1x1', 'pooled', 'frozen']
    """
    if not _has_window(layer):
        return None
    if any(size % 2 == 0 for size in layer.kernel_size) or _steps(layer.kernel_dilation):
        raise _refusal("dbb_branches", "an odd window without dilation", path, layer)
    groups = layer.feature_group_count
    depthwise = groups == layer.out_features
    if features is None:
        features = layer.in_features * (2 if depthwise else 1)
    if features < 1 or features % groups:
        rule = f"features that are a multiple of the layer's groups={groups}, not {features},"
        raise _refusal("dbb_branches", rule, path, layer)
    return {
        "conv": Full(),
        **({} if depthwise else {"conv1x1": Centre(1)}),
        "pooled": PooledPointwise(),
        "frozen": FrozenPointwise(features, groups),
    }


def mobileone_branches(path: str, layer: Any, *, copies: int = 4) -> Block | None:
    """MobileOne (arXiv 2206.04040): copies of the kernel, 1x1 and, if shapes allow it, identity.

    For every convolution with an odd window, of any groups, stride and dilation. A layer whose own
    window is 1x1 has no other 1x1.

    Args:
      path: of the layer.
      layer: any layer.
      copies: of the kernel, each with its own weight; 4 in MobileOne-S0, 1 in the larger ones.

    Raises:
      ValueError: an even window, or fewer than one copy.

    >>> conv = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
    >>> list(mobileone_branches("conv", conv, copies=2))
    ['conv0', 'conv1', 'conv1x1', 'identity']
    """
    if not isinstance(layer, nnx.Conv):
        return None
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    if any(size % 2 == 0 for size in layer.kernel_size):
        raise _refusal("mobileone_branches", "an odd window", path, layer)
    smaller = {"conv1x1": Centre(1)} if _has_window(layer) else {}
    return {**{f"conv{i}": Full() for i in range(copies)}, **smaller, **_identity(layer)}


def replknet_branches(path: str, layer: Any, *, small: int = 5) -> Block | None:
    """RepLKNet (arXiv 2203.06717): a large kernel and a small one at its centre.

    For every convolution whose window is at least `small` on every axis; the paper's are depthwise.

    Args:
      path: of the layer.
      layer: any layer.
      small: size of the small kernel.

    Raises:
      ValueError: a window that is larger than `small` by an odd number, or `small` below 1.

    >>> conv = nnx.Conv(4, 4, (13, 13), feature_group_count=4, rngs=nnx.Rngs(0))
    >>> replknet_branches("conv", conv)["small"]
    Centre(scale=1.0, size=5)
    """
    if small < 1:
        raise ValueError(f"small must be at least 1, got {small}")
    if not _has_window(layer) or min(layer.kernel_size) < small:
        return None
    if any((size - small) % 2 for size in layer.kernel_size):
        rule = f"a window that is larger than small={small} by an even number"
        raise _refusal("replknet_branches", rule, path, layer)
    return {"large": Full(), "small": Centre(small)}


def repghost_branches(path: str, layer: Any) -> Block | None:
    """RepGhost (arXiv 2211.06088): the depthwise kernel and the identity.

    For every depthwise convolution with stride 1, an odd window and as many input as output
    channels.

    >>> conv = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
    >>> list(repghost_branches("conv", conv))
    ['conv', 'identity']
    """
    del path
    odd = isinstance(layer, nnx.Conv) and all(size % 2 for size in layer.kernel_size)
    if not odd or layer.feature_group_count != layer.out_features or not _identity(layer):
        return None
    return {"conv": Full(), **_identity(layer)}


def repmlp_branches(
    path: str, layer: Any, *, image: Sequence[int], windows: Sequence[int] = (1, 3)
) -> Block | None:
    """RepMLP (arXiv 2105.01883, 2112.11081): a dense layer over pixels, and convolutions in it.

    For two kinds of layers, and no others:

    * 1x1 convolutions over pixels as RepMLPNet has them, with ``feature_group_count`` sets of
      channels and a pixel per channel of a set: depthwise convolutions, one kernel per set.
    * dense layers on flattened images whose inputs and outputs are multiples of the pixels:
      ordinary convolutions.

    Args:
      path: of the layer.
      layer: any layer.
      image: size of the images, such as ``(7, 7)``.
      windows: sizes of the square convolutions, odd.

    Raises:
      ValueError: an even window, or an image without pixels.

    >>> fc = nnx.Conv(2 * 49, 2 * 49, (1, 1), feature_group_count=2, rngs=nnx.Rngs(0))
    >>> list(repmlp_branches("fc3", fc, image=(7, 7)))
    ['fc', 'conv1x1', 'conv3x3']
    """
    del path
    if not image or min(image) < 1:
        raise ValueError(f"image must have sizes of at least 1, got {tuple(image)}")
    pixels = math.prod(image)
    if isinstance(layer, nnx.Conv) and not _has_window(layer):
        sizes = {layer.in_features, layer.out_features}
        branch = FoldedDepthwise if sizes == {layer.feature_group_count * pixels} else None
    elif isinstance(layer, nnx.Linear):
        multiples = layer.in_features % pixels == layer.out_features % pixels == 0
        branch = FoldedConv if multiples else None
    else:
        branch = None
    if branch is None:
        return None
    square = {f"conv{'x'.join([str(k)] * len(image))}": (k,) * len(image) for k in windows}
    return {"fc": Full(), **{name: branch(image, window) for name, window in square.items()}}


def _has_window(layer: Any) -> bool:
    """Whether `layer` is a convolution of more than one tap."""
    return isinstance(layer, nnx.Conv) and math.prod(layer.kernel_size) > 1


def _steps(option: int | Sequence[int] | None) -> bool:
    """Whether strides or a dilation are other than 1 on some axis."""
    return any(s != 1 for s in ((option,) if isinstance(option, int) else option or ()))


def _identity(layer: nnx.Conv) -> Block:
    """The identity branch where input and output have the same shape, else none."""
    if layer.in_features != layer.out_features or _steps(layer.strides):
        return {}
    return {"identity": Identity(groups=layer.feature_group_count)}


def _refusal(function: str, rule: str, path: str, layer: nnx.Conv) -> ValueError:
    return ValueError(
        f"{function} needs {rule}, got layer {path!r} with kernel_size={layer.kernel_size}, "
        f"kernel_dilation={layer.kernel_dilation}; a rule that returns None leaves a layer out"
    )
