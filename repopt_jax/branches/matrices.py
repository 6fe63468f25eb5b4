"""Branches of matrices, ``(in, out)``: of dense layers, and of 1x1 convolutions."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from repopt_jax.branches.branch import Branch
from repopt_jax.branches.frozen import frozen_uniform

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True)
class Diagonal(Branch):
    """A diagonal matrix; `Identity` with a scale and a random start.

    >>> Diagonal().embed(jnp.array([5.0, 7.0]), (2, 2)).tolist()
    [[5.0, 0.0], [0.0, 7.0]]
    """

    placement: ClassVar[bool] = True

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(out,)``; needs a square matrix."""
        if len(kernel_shape) != 2 or kernel_shape[0] != kernel_shape[1]:
            raise self.refuse("a square matrix", kernel_shape)
        return kernel_shape[-1:]

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` on the diagonal."""
        return BlockDiagonal(groups=kernel_shape[-1]).embed(weight[None], kernel_shape)


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Branch):
    """A grouped layer inside an ordinary one: a block of the matrix for each group.

    It works at every tap of a convolution kernel too.

    Attributes:
      groups: number of blocks; divides inputs and outputs.

    >>> BlockDiagonal(groups=2).embed(jnp.array([[5.0, 7.0]]), (2, 2)).tolist()
    [[5.0, 0.0], [0.0, 7.0]]
    """

    groups: int
    placement: ClassVar[bool] = True

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The kernel's shape with ``in / groups`` inputs."""
        *window, inputs, outputs = kernel_shape
        if self.groups < 1 or inputs % self.groups or outputs % self.groups:
            raise self.refuse(
                f"inputs and outputs that are multiples of {self.groups}", kernel_shape
            )
        return (*window, inputs // self.groups, outputs)

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight`'s blocks along the diagonal, zero elsewhere."""
        *window, inputs, outputs = kernel_shape
        row = jnp.arange(inputs)[:, None] // (inputs // self.groups)
        column = jnp.arange(outputs)[None] // (outputs // self.groups)
        stacked = jnp.tile(weight, (*(1,) * len(window), self.groups, 1))
        inside = jnp.broadcast_to(row == column, kernel_shape)
        return jnp.where(inside, stacked, jnp.zeros((), weight.dtype))


@dataclasses.dataclass(frozen=True)
class FoldedConv(Branch):
    """A convolution folded into the matrix of a dense layer on flattened images (RepMLP).

    The layer maps ``(*image, in)`` to ``(*image, out)``, both flattened in this order; the
    convolution has stride 1 and pads with zeros ("SAME"). Every weight has many places.

    Attributes:
      image: size of the image, such as ``(7, 7)``.
      window: size of the convolution's kernel, odd, of the same rank.
      groups: of the convolution.

    >>> FoldedConv((3,), (3,)).embed(jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1), (3, 3)).tolist()
    [[2.0, 1.0, 0.0], [3.0, 2.0, 1.0], [0.0, 3.0, 2.0]]
    """

    image: tuple[int, ...]
    window: tuple[int, ...]
    groups: int = 1

    def __post_init__(self):
        object.__setattr__(self, "image", tuple(self.image))
        object.__setattr__(self, "window", tuple(self.window))
        if len(self.image) != len(self.window) or any(k < 1 or k % 2 == 0 for k in self.window):
            raise ValueError(
                f"window must be odd and of the rank of image, got window={self.window} and "
                f"image={self.image}"
            )

    def _channels(self, kernel_shape: tuple[int, ...]) -> tuple[int, int]:
        """Input and output channels of the convolution."""
        pixels = math.prod(self.image)
        multiple = pixels * self.groups
        if len(kernel_shape) != 2 or any(size % multiple for size in kernel_shape):
            raise self.refuse(
                f"a matrix with multiples of {multiple} inputs, outputs", kernel_shape
            )
        return kernel_shape[0] // pixels, kernel_shape[1] // pixels

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(*window, in / groups, out)`` of the convolution."""
        inputs, outputs = self._channels(kernel_shape)
        return (*self.window, inputs // self.groups, outputs)

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """``W[(p, i), (q, o)] = w[p - q + centre, i, o]`` for positions ``p`` and ``q``."""
        inputs, outputs = self._channels(kernel_shape)
        rank = len(self.image)
        if self.groups > 1:
            ordinary = (*self.window, inputs, outputs)
            weight = BlockDiagonal(self.groups).embed(weight, ordinary)
        for size, taps in zip(self.image, self.window, strict=True):
            # Replace the leading tap axis by a pair of positions at the end, axis by axis.
            p, q, tap = (jnp.arange(n) for n in (size, size, taps))
            hits = p[:, None, None] - q[None, :, None] + taps // 2 == tap[None, None]
            hits = hits.astype(weight.dtype)
            weight = jnp.einsum("t...,pqt->...pq", weight, hits, precision="highest")
        # Now (in, out, p0, q0, p1, q1, ...).
        rows = (*range(2, 2 + 2 * rank, 2), 0)
        columns = (*range(3, 3 + 2 * rank, 2), 1)
        return weight.transpose(*rows, *columns).reshape(kernel_shape)


@dataclasses.dataclass(frozen=True)
class FoldedDepthwise(Branch):
    """A depthwise convolution folded into a 1x1 convolution over pixels (RepMLPNet).

    The layer has a pixel in each channel: set after set of channels, each with the pixels of an
    image in order. Its ``feature_group_count`` is the number of sets, so its kernel is
    ``(1, ..., 1, pixels, sets * pixels)``. The convolution has a kernel per set, stride 1, and pads
    with zeros ("SAME").

    Attributes:
      image: size of the image, such as ``(7, 7)``.
      window: size of the convolution's kernel, odd, of the same rank.

    >>> weight = jnp.array([[[1.0, 10.0]], [[2.0, 20.0]], [[3.0, 30.0]]])
    >>> FoldedDepthwise((2,), (3,)).embed(weight, (1, 2, 4))[0].tolist()
    [[2.0, 1.0, 20.0, 10.0], [3.0, 2.0, 30.0, 20.0]]
    """

    image: tuple[int, ...]
    window: tuple[int, ...]

    def __post_init__(self):
        one_set = FoldedConv(self.image, self.window)  # which checks both
        object.__setattr__(self, "image", one_set.image)
        object.__setattr__(self, "window", one_set.window)

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(*window, 1, sets)``."""
        *window, inputs, outputs = kernel_shape
        pixels = math.prod(self.image)
        if math.prod(window) != 1 or inputs != pixels or outputs % pixels:
            raise self.refuse(
                f"a 1x1 with {pixels} inputs per group and as many outputs", kernel_shape
            )
        return (*self.window, 1, outputs // pixels)

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """``W[p, (s, q)] = w[p - q + centre, s]`` for positions ``p`` and ``q`` and sets ``s``."""
        pixels = math.prod(self.image)
        one_set = FoldedConv(self.image, self.window)
        fold = functools.partial(one_set.embed, kernel_shape=(pixels, pixels))
        return jax.vmap(fold, -2, 1)(weight[..., None]).reshape(kernel_shape)


@dataclasses.dataclass(frozen=True)
class LowRank(Branch):
    """A product ``w F`` of low rank with the second factor frozen.

    `FrozenPointwise` freezes the first factor instead. The factor follows from `seed`, see
    `repopt_jax.branches.frozen`. For a factor of your own, subclass and define `factor`.

    Attributes:
      rank: columns of the trained factor.
      seed: of the frozen factor.

    >>> LowRank(rank=2).weight_shape((4, 8))
    (4, 2)
    """

    rank: int
    seed: int = 0

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(in, rank)``."""
        if len(kernel_shape) != 2 or not 0 < self.rank <= min(kernel_shape):
            raise self.refuse("a matrix of at least its rank", kernel_shape)
        return (kernel_shape[0], self.rank)

    def factor(self, outputs: int, dtype: DTypeLike) -> Float[Array, "rank outputs"]:
        """The frozen factor."""
        return frozen_uniform(self.seed, (self.rank, outputs), self.rank, dtype)

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` times the frozen factor."""
        factor = self.factor(kernel_shape[-1], weight.dtype)
        return jnp.matmul(weight, factor, precision="highest")
