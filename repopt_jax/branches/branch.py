"""The base class of branches, and how their weights start."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, PRNGKeyArray


def uniform_fan_in(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Draw ``U(-a, a)`` with ``a = 1 / sqrt(fan_in)``, torch's default for conv and linear.

    ``fan_in`` is the product of all axes of `shape` but the last.

    >>> bool(abs(uniform_fan_in(jax.random.key(0), (3, 3, 4, 8), jnp.float32)).max() <= 1 / 6)
    True
    """
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def wide_type(dtype: DTypeLike) -> DTypeLike:
    """`dtype`, or float32 where that is wider: the type in which to multiply and to average.

    >>> wide_type(jnp.bfloat16).__name__, wide_type(jnp.float64).__name__
    ('float32', 'float64')
    """
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def is_known(x: Any) -> bool:
    """Whether `x` has a value yet; under `jax.jit` it has none, and cannot be checked.

    >>> is_known(1.0)
    True
    """
    return not isinstance(x, jax.core.Tracer)


def centre_mask(kernel_shape: tuple[int, ...], sizes: tuple[int, ...]) -> Array:
    """Which entries of a kernel lie in the window of `sizes` at its centre.

    >>> centre_mask((3, 3, 1, 1), (1, 3))[..., 0, 0].astype(int).tolist()
    [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    """
    inside = jnp.ones(kernel_shape, bool)
    for axis, size in enumerate(sizes):
        margin = (kernel_shape[axis] - size) // 2
        if margin:
            index = jax.lax.broadcasted_iota(jnp.int32, kernel_shape, axis)
            # One comparison where one is enough: these run in every kernel's update.
            inside &= index == margin if size == 1 else (index >= margin) & (index < margin + size)
    return inside


@dataclasses.dataclass(frozen=True)
class Branch(abc.ABC):
    """One linear branch. Subclass it and define `weight_shape` and `embed` to add a type.

    A subclass is a frozen dataclass, so that the statement of a block can be hashed, compared and
    printed. Only its weight is trained: whatever else `embed` needs, such as a frozen factor, must
    follow from the dataclass' fields.

    Attributes:
      scale: value at which a search starts the branch's per-channel vector.
      scaled: whether the vector is the scale ``s_b`` (found by the search, then constant). If
        false, ``s_b`` is 1 and the vector is the branch's trainable weight itself.
      placement: whether ``E_b`` only copies each entry of ``w_b`` to a place of its own. Then
        ``E_b E_b^T`` is a 0/1 mask and the multiplier is element-wise. False is always right: the
        multiplier is the linear operator then.
      by_channel: whether the last axis of ``w_b`` is the kernel's, so that ``E_b(s_b * w_b)`` is
        ``s_b * E_b(w_b)``. False is always right, and costs a product of the kernel's size.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Constant(Branch):
    ...     def weight_shape(self, kernel_shape):
    ...         return kernel_shape[-1:]
    ...
    ...     def embed(self, weight, kernel_shape):
    ...         return jnp.broadcast_to(weight, kernel_shape)
    >>> Constant().embed(jnp.array([1.0, 2.0]), (2, 2)).tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """

    scale: float = dataclasses.field(default=1.0, kw_only=True)
    scaled: ClassVar[bool] = True
    placement: ClassVar[bool] = False
    by_channel: ClassVar[bool] = False

    @abc.abstractmethod
    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of ``w_b`` inside a kernel of `kernel_shape`; ValueError if it cannot fit."""

    @abc.abstractmethod
    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """``E_b(w_b)``: a pure function, linear in `weight`, with an array of `kernel_shape`."""

    def init(self, key: PRNGKeyArray, kernel_shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Draw a fresh ``w_b`` by the branch's own initializer."""
        return uniform_fan_in(key, self.weight_shape(kernel_shape), dtype)

    def mask(self, kernel_shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """``E_b(1)``: 1 where a placement reaches the kernel, 0 elsewhere.

        XLA's CPU backend stores what `embed` pads, as an array of the kernel's size that every
        update reads. The common types compare indices instead, which it fuses. A subclass of
        theirs that overrides `embed` must override this too.
        """
        return self.embed(jnp.ones(self.weight_shape(kernel_shape), dtype), kernel_shape)

    def refuse(self, rule: str, kernel_shape: tuple[int, ...]) -> ValueError:
        """The error that says which `rule` a kernel breaks; to be raised by `weight_shape`.

        >>> raise Full().refuse("an odd window", (2, 2, 3, 4))
        Traceback (most recent call last):
        ValueError: Full() needs an odd window, got a kernel of shape (2, 2, 3, 4)
        """
        fields = [f.name for f in dataclasses.fields(self) if f.name != "scale"]
        stated = ", ".join(f"{name}={getattr(self, name)!r}" for name in fields)
        return ValueError(
            f"{type(self).__name__}({stated}) needs {rule}, got a kernel of shape {kernel_shape}"
        )


@dataclasses.dataclass(frozen=True)
class Full(Branch):
    """A branch of the kernel's own shape; several of them, each with a name, are MobileOne's.

    >>> Full().weight_shape((3, 3, 8, 16))
    (3, 3, 8, 16)
    """

    placement: ClassVar[bool] = True
    by_channel: ClassVar[bool] = True

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The kernel's own shape."""
        return kernel_shape

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` unchanged."""
        return weight


@dataclasses.dataclass(frozen=True)
class Identity(Branch):
    """A per-channel factor on the input: a vector on the centre's diagonal.

    The vector is trained with constant scale 1. It starts at 1 (the paper) or where the search
    ended (the authors' default).

    Attributes:
      groups: ``feature_group_count`` of the convolution; the number of channels if depthwise.

    >>> Identity().embed(jnp.array([5.0, 7.0]), (2, 2)).tolist()
    [[5.0, 0.0], [0.0, 7.0]]
    >>> Identity(groups=2).embed(jnp.array([5.0, 7.0]), (3, 1, 2))[:, 0].tolist()
    [[0.0, 0.0], [5.0, 7.0], [0.0, 0.0]]
    """

    groups: int = 1
    scaled: ClassVar[bool] = False
    placement: ClassVar[bool] = True

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(out,)``; needs as many input as output channels and odd windows."""
        *window, inputs, outputs = kernel_shape
        if inputs * self.groups != outputs or any(k % 2 == 0 for k in window):
            raise self.refuse("as many input as output channels and odd windows", kernel_shape)
        return (outputs,)

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` on the diagonal of the centre tap, of every group."""
        inputs, outputs = kernel_shape[-2:]
        row = jax.lax.broadcasted_iota(jnp.int32, (inputs, outputs), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (inputs, outputs), 1)
        spread = jnp.broadcast_to(weight[None, :], (inputs, outputs))
        centre = jnp.where(row == column % inputs, spread, jnp.zeros((), weight.dtype))
        margins = [(k // 2, k // 2) for k in kernel_shape[:-2]]
        return jnp.pad(centre[(None,) * len(margins)], [*margins, (0, 0), (0, 0)])

    def mask(self, kernel_shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """The diagonal of the centre tap, of every group."""
        *window, inputs, _ = kernel_shape
        row, column = (
            jax.lax.broadcasted_iota(jnp.int32, kernel_shape, len(window) + i) for i in (0, 1)
        )
        diagonal = row == (column if self.groups == 1 else column % inputs)
        return (diagonal & centre_mask(kernel_shape, (1,) * len(window))).astype(dtype)

    def init(self, key: PRNGKeyArray, kernel_shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """`scale` in every channel."""
        return jnp.full(self.weight_shape(kernel_shape), self.scale, dtype)
