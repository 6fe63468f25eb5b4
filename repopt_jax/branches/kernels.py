"""Branches of convolution kernels, ``(*window, in / groups, out)`` with a window of any rank."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from repopt_jax.branches.branch import Branch, centre_mask
from repopt_jax.branches.frozen import frozen_uniform

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True)
class Window(Branch):
    """A smaller kernel at the centre, with a size per axis, such as ACNet's 1xk and kx1.

    Attributes:
      sizes: of the smaller window; each side of the kernel is larger by an even number.

    >>> Window((1, 3)).embed(jnp.ones((1, 3, 1, 1)), (3, 3, 1, 1))[..., 0, 0].tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """

    sizes: tuple[int, ...]
    placement: ClassVar[bool] = True
    by_channel: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(self.sizes))  # hashable, also from a list

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """`sizes` as the window."""
        window = kernel_shape[:-2]
        pairs = zip(window, self.sizes, strict=False)
        if len(window) != len(self.sizes) or any(not 0 < s <= k or (k - s) % 2 for k, s in pairs):
            raise self.refuse("a window whose every side is larger by an even number", kernel_shape)
        return (*self.sizes, *kernel_shape[-2:])

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` with zeros around it."""
        margins = [(k - s) // 2 for k, s in zip(kernel_shape[:-2], self.sizes, strict=True)]
        return jnp.pad(weight, [(m, m) for m in margins] + [(0, 0), (0, 0)])

    def mask(self, kernel_shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """The window."""
        return centre_mask(kernel_shape, self.sizes).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Centre(Branch):
    """A smaller kernel at the centre, of the same size on every axis, such as RepVGG's 1x1.

    >>> Centre(1).embed(jnp.full((1, 1, 1, 1), 5.0), (3, 3, 1, 1))[..., 0, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]
    """

    size: int
    placement: ClassVar[bool] = True
    by_channel: ClassVar[bool] = True

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """`size` on every window axis; the difference to the kernel must be even."""
        window = kernel_shape[:-2]
        if not window or any(not 0 < self.size <= k or (k - self.size) % 2 for k in window):
            raise self.refuse("a window whose every side is larger by an even number", kernel_shape)
        return (*(self.size,) * len(window), *kernel_shape[-2:])

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` with zeros around it."""
        return Window((self.size,) * (len(kernel_shape) - 2)).embed(weight, kernel_shape)

    def mask(self, kernel_shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """The window."""
        return Window((self.size,) * (len(kernel_shape) - 2)).mask(kernel_shape, dtype)


@dataclasses.dataclass(frozen=True)
class Dilated(Branch):
    """A small kernel with gaps, at the centre of every axis, such as UniRepLKNet's.

    Attributes:
      size: of the small kernel.
      dilation: distance of its taps.

    >>> Dilated(2, 2).embed(jnp.ones((2, 1, 1)), (5, 1, 1)).ravel().tolist()
    [0.0, 1.0, 0.0, 1.0, 0.0]
    """

    size: int
    dilation: int
    placement: ClassVar[bool] = True
    by_channel: ClassVar[bool] = True

    @property
    def extent(self) -> int:
        """From the first to the last tap."""
        return (self.size - 1) * self.dilation + 1

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """`size` on every window axis; the taps' extent must leave an even margin."""
        window = kernel_shape[:-2]
        fits = all(self.extent <= k and (k - self.extent) % 2 == 0 for k in window)
        if not window or not fits or self.size < 1 or self.dilation < 1:
            raise self.refuse(
                f"a window whose every side is larger than {self.extent} by an even number",
                kernel_shape,
            )
        return (*(self.size,) * len(window), *kernel_shape[-2:])

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` with zeros between its taps and around them."""
        margins = [(k - self.extent) // 2 for k in kernel_shape[:-2]]
        padding = [(m, m, self.dilation - 1) for m in margins] + [(0, 0, 0), (0, 0, 0)]
        return jax.lax.pad(weight, jnp.zeros((), weight.dtype), padding)


@dataclasses.dataclass(frozen=True)
class PooledPointwise(Branch):
    """A 1x1 kernel, then average pooling over the window (Diverse Branch Block).

    Pooling counts the padding and takes the stride of the layer.

    >>> PooledPointwise().embed(jnp.full((1, 1, 1), 6.0), (3, 1, 1)).ravel().tolist()
    [2.0, 2.0, 2.0]
    """

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """A window of 1; the kernel must have one."""
        window = kernel_shape[:-2]
        if not window:
            raise self.refuse("a window", kernel_shape)
        return (*(1,) * len(window), *kernel_shape[-2:])

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` shared out evenly over the window."""
        taps = jnp.asarray(math.prod(kernel_shape[:-2]), weight.dtype)
        return jnp.broadcast_to(weight / taps, kernel_shape)


@dataclasses.dataclass(frozen=True)
class FrozenPointwise(Branch):
    """A trained kernel after a frozen 1x1 (the linear part of a Diverse Branch Block's 1x1-kxk).

    For a matrix it is a low rank product ``F w`` whose first factor is frozen.

    Two layers in a row would be a product of their weights, which is not linear; with the first
    frozen it is. The factor follows from `seed`, see `repopt_jax.branches.frozen`. For a factor of
    your own, subclass and define `factor`.

    Attributes:
      features: channels between the two layers, over all groups.
      groups: ``feature_group_count`` of the layer.
      seed: of the frozen 1x1.

    >>> FrozenPointwise(features=8).weight_shape((3, 3, 4, 16))
    (3, 3, 8, 16)
    """

    features: int
    groups: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.features < 1 or self.groups < 1 or self.features % self.groups:
            raise ValueError(
                f"features must be a positive multiple of groups, got features={self.features} "
                f"and groups={self.groups}"
            )

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The kernel's shape with ``features / groups`` inputs."""
        if kernel_shape[-1] % self.groups:
            raise self.refuse(f"a multiple of {self.groups} output channels", kernel_shape)
        return (*kernel_shape[:-2], self.features // self.groups, kernel_shape[-1])

    def factor(self, inputs: int, dtype: DTypeLike) -> Float[Array, "groups inputs features"]:
        """The frozen 1x1, per group: `inputs` to ``features / groups`` channels."""
        shape = (self.groups, inputs, self.features // self.groups)
        return frozen_uniform(self.seed, shape, inputs, dtype)

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """Every tap of `weight` times the frozen 1x1."""
        grouped = weight.reshape(*weight.shape[:-1], self.groups, kernel_shape[-1] // self.groups)
        factor = self.factor(kernel_shape[-2], weight.dtype)
        return jnp.einsum("gim,...mgo->...igo", factor, grouped, precision="highest").reshape(
            kernel_shape
        )
