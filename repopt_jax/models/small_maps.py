"""Convolutions of maps smaller than their window, made fast on CPU.

XLA swaps images and kernel wherever the window has more pixels than the map. The CPU backend has
no fast code for what results: with 3x3 kernels on maps of 2x2 a convolution and its gradients
take 50 to 200 times as long as they should. That hits the last stages of a network
on small images: the input gradient of B1's last convolution took half of a step at 64 px. Here
such a convolution is one matrix product on the CPU, and stays a convolution elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from repopt_jax.branches import wide_type

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def conv_general_dilated(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "rows columns in out"],
    window_strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> Array:
    """`jax.lax.conv_general_dilated` for `flax.nnx.Conv`, fast for small maps on CPU too.

    The result is the same up to rounding, under every transformation (forward and reverse mode of
    any order, `vmap`, `jax.linear_transpose`). Kernels with groups or dilation are left to JAX.

    Args:
      x: images in JAX's layout NHWC.
      kernel: in the layout HWIO.
      window_strides: by axis.
      padding: as ``((above, below), (left, right))``; "SAME" and "VALID" are left to JAX.
      **options: of `jax.lax.conv_general_dilated`.

    >>> options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    >>> x, kernel = jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1))
    >>> conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), **options).ravel().tolist()
    [4.0, 4.0, 4.0, 4.0]
    """
    native = functools.partial(
        jax.lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options
    )
    plain = options.get("feature_group_count", 1) == 1 and not isinstance(padding, str)
    dilations = (options.get(name) or (1,) for name in ("lhs_dilation", "rhs_dilation"))
    if kernel.ndim != 4 or not plain or any(set(d) != {1} for d in dilations):
        return native(x, kernel)
    out = jax.eval_shape(native, x, kernel)
    if math.prod(out.shape[1:3]) >= math.prod(kernel.shape[:2]):
        return native(x, kernel)
    taps = [
        # A tap that meets nothing but padding has no part in the product.
        [t for t in range(size) if any(0 <= o * s + t - low < n for o in range(outs))]
        for size, s, (low, _), n, outs in zip(
            kernel.shape[:2], window_strides, padding, x.shape[1:3], out.shape[1:3], strict=True
        )
    ]
    if not all(t and t == [*range(t[0], t[-1] + 1)] for t in taps):
        return native(x, kernel)  # a stride longer than the map may leave gaps between them
    product = functools.partial(
        _matrix_product, taps=taps, strides=window_strides, padding=padding, sizes=out.shape[1:3]
    )
    # Without the checkpoint, other platforms would keep the product's operands too, as zeros.
    return jax.lax.platform_dependent(x, kernel, cpu=jax.checkpoint(product), default=native)


def _matrix_product(x, kernel, *, taps, strides, padding, sizes):
    """The convolution as one product of the pixels under every tap with the flat kernel."""
    # Backwards, pixels are sums over taps, rounded once as in a convolution.
    dtype = wide_type(x.dtype)
    padded = jnp.pad(x.astype(dtype), ((0, 0), *padding, (0, 0)))
    (rows, columns), (down, right) = taps, strides
    height, width = sizes
    pixels = [
        padded[:, r : r + down * (height - 1) + 1 : down, c : c + right * (width - 1) + 1 : right]
        for r in rows
        for c in columns
    ]
    used = kernel[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(dtype)
    flat = used.reshape(-1, kernel.shape[-1])
    return jnp.einsum("bhwi,io->bhwo", jnp.concatenate(pixels, -1), flat).astype(x.dtype)
