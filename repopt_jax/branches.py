"""Linear branches: a re-parameterized kernel stated once, everything else derived.

A re-parameterized kernel is a sum of linear branches (RepOptimizers, arXiv 2205.15242,
section 3)::

    W = sum_b s_b * E_b(w_b)

``w_b`` is the weight of branch ``b``, ``E_b`` the linear map that places it inside the big
kernel and ``s_b`` a constant per output channel. A *block* states its branches as data, for
RepOpt-VGG ``{"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}``. From this
statement alone follow the merged kernel, the Rule of Initialization, the multipliers of the
Rule of Iteration and, through ``jax.linear_transpose``, the exact operator for any branch.

Layout: kernels are ``(*window, in / groups, out)`` (HWIO for images, IO for dense layers);
scales are vectors over the last axis.

Deviation from the authors' code: multipliers stay one vector per branch and become the shape
of the kernel only inside the jitted update; for Adam they are ``sum_b |s_b| E_b(1)``, where the
original sums signed scales.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

RULES = ("linear", "direction")


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


@dataclasses.dataclass(frozen=True)
class Branch(abc.ABC):
    """One linear branch. Subclass it and define `weight_shape` and `embed` to add a type.

    Attributes:
      scale: value at which a search starts the branch's per-channel vector.
      scaled: whether the vector is the scale ``s_b`` (found by the search, then constant). If
        false, ``s_b`` is 1 and the vector is the branch's trainable weight itself.
      placement: whether ``E_b`` only copies each entry of ``w_b`` to a place of its own. Then
        ``E_b E_b^T`` is a 0/1 mask and the multiplier is element-wise.
    """

    scale: float = dataclasses.field(default=1.0, kw_only=True)
    scaled: ClassVar[bool] = True
    placement: ClassVar[bool] = True

    @abc.abstractmethod
    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of ``w_b`` inside a kernel of `kernel_shape`; ValueError if it cannot fit."""

    @abc.abstractmethod
    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """``E_b(w_b)``: a pure function, linear in `weight`, with an array of `kernel_shape`."""

    def init(self, key: PRNGKeyArray, kernel_shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Draw a fresh ``w_b`` by the branch's own initializer."""
        return uniform_fan_in(key, self.weight_shape(kernel_shape), dtype)


Block: TypeAlias = Mapping[str, Branch]


@dataclasses.dataclass(frozen=True)
class Full(Branch):
    """The kernel itself.

    >>> Full().weight_shape((3, 3, 8, 16))
    (3, 3, 8, 16)
    """

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The kernel's own shape."""
        return kernel_shape

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` unchanged."""
        return weight


@dataclasses.dataclass(frozen=True)
class Centre(Branch):
    """A smaller kernel at the centre of every window axis, such as RepVGG's 1x1.

    >>> Centre(1).embed(jnp.full((1, 1, 1, 1), 5.0), (3, 3, 1, 1))[..., 0, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]
    """

    size: int

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """`size` on every window axis; the difference to the kernel must be even."""
        window = kernel_shape[:-2]
        if not window or any(k < self.size or (k - self.size) % 2 for k in window):
            raise ValueError(
                f"Centre(size={self.size}) needs a kernel whose every window side is larger by an "
                f"even number, got a kernel of shape {kernel_shape}"
            )
        return (*(self.size,) * len(window), *kernel_shape[-2:])

    def embed(self, weight: Array, kernel_shape: tuple[int, ...]) -> Array:
        """`weight` with zeros around it."""
        margins = [(k - self.size) // 2 for k in kernel_shape[:-2]]
        return jnp.pad(weight, [(m, m) for m in margins] + [(0, 0), (0, 0)])


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

    def weight_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(out,)``; needs as many input as output channels and odd windows."""
        *window, inputs, outputs = kernel_shape
        if inputs * self.groups != outputs or any(k % 2 == 0 for k in window):
            raise ValueError(
                f"Identity(groups={self.groups}) needs as many input as output channels and odd "
                f"windows, got a kernel of shape {kernel_shape}"
            )
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

    def init(self, key: PRNGKeyArray, kernel_shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """`scale` in every channel."""
        return jnp.full(self.weight_shape(kernel_shape), self.scale, dtype)


def initial_scales(block: Block, kernel_shape: tuple[int, ...], dtype=jnp.float32) -> dict:
    """The per-channel vectors with which a search starts, one of shape ``(out,)`` per branch.

    >>> initial_scales({"conv3x3": Full(scale=2.0)}, (3, 3, 1, 2))["conv3x3"].tolist()
    [2.0, 2.0]
    """
    return {name: jnp.full(kernel_shape[-1:], b.scale, dtype) for name, b in block.items()}


def init_weights(
    block: Block,
    key: PRNGKeyArray,
    kernel_shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
    scales: Mapping[str, Float[Array, " out"]] | None = None,
) -> dict[str, Array]:
    """Draw ``w_b`` of every branch; an unscaled branch starts at its vector in `scales`.

    ``merge(block, init_weights(...), scales, kernel_shape)`` is the Rule of Initialization.

    Args:
      block: branch name -> branch.
      key: a PRNG key.
      kernel_shape: ``(*window, in / groups, out)``.
      dtype: of the weights.
      scales: branch name -> ``(out,)``. None: unscaled branches start at their own `scale`.

    >>> block = {"conv3x3": Full(), "identity": Identity()}
    >>> w = init_weights(block, jax.random.key(0), (3, 3, 2, 2))
    >>> w["conv3x3"].shape, w["identity"].tolist()
    ((3, 3, 2, 2), [1.0, 1.0])
    """
    weights = {}
    for name, subkey in zip(block, jax.random.split(key, len(block)), strict=True):
        weights[name] = block[name].init(subkey, kernel_shape, dtype)
        if scales is not None and not block[name].scaled:
            weights[name] = jnp.asarray(scales[name], dtype)
    return weights


def _scaled(branch: Branch, scale: Array | None, kernel: Array) -> Array:
    """``s_b * kernel`` along the last axis; unscaled branches have ``s_b = 1``."""
    if not branch.scaled:
        return kernel
    return kernel * jnp.broadcast_to(scale.astype(kernel.dtype), kernel.shape)


def merge(
    block: Block,
    weights: Mapping[str, Array],
    scales: Mapping[str, Float[Array, " out"]],
    kernel_shape: tuple[int, ...],
) -> Float[Array, "*kernel_shape"]:
    """The merged kernel ``W = sum_b s_b * E_b(w_b)``.

    Args:
      block: branch name -> branch ``E_b``.
      weights: branch name -> ``w_b``.
      scales: branch name -> ``s_b``, shape ``(out,)``; entries of unscaled branches are ignored.
      kernel_shape: ``(*window, in / groups, out)``.

    >>> block = {"conv3x3": Full(), "conv1x1": Centre(1)}
    >>> ones = {name: jnp.ones(b.weight_shape((3, 3, 1, 1))) for name, b in block.items()}
    >>> scales = {"conv3x3": jnp.array([2.0]), "conv1x1": jnp.array([10.0])}
    >>> merge(block, ones, scales, (3, 3, 1, 1))[..., 0, 0].tolist()
    [[2.0, 2.0, 2.0], [2.0, 12.0, 2.0], [2.0, 2.0, 2.0]]
    """
    terms = [
        _scaled(branch, scales.get(name), branch.embed(weights[name], kernel_shape))
        for name, branch in block.items()
    ]
    return functools.reduce(jnp.add, terms)


def pull_back(
    block: Block,
    scales: Mapping[str, Float[Array, " out"]],
    gradient: Float[Array, "*kernel_shape"],
) -> dict[str, Array]:
    """Gradients of the branches' weights, ``E_b^T(s_b * G)``, from the kernel's gradient ``G``.

    >>> block = {"conv1x1": Centre(1)}
    >>> pull_back(block, {"conv1x1": jnp.array([3.0])}, jnp.ones((3, 3, 1, 1)))["conv1x1"].item()
    3.0
    """
    shape, dtype = gradient.shape, gradient.dtype
    pulled = {}
    for name, branch in block.items():
        weight = jax.ShapeDtypeStruct(branch.weight_shape(shape), dtype)
        embed = functools.partial(branch.embed, kernel_shape=shape)
        scaled = _scaled(branch, scales.get(name), gradient)
        (pulled[name],) = jax.linear_transpose(embed, weight)(scaled)
    return pulled


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["scales"], meta_fields=["block", "rule"]
)
@dataclasses.dataclass(frozen=True)
class BranchMult:
    """The gradient multiplier of one merged kernel, kept as one vector per branch.

    Called with a gradient ``G`` it returns, for placements (all entries element-wise)::

        rule "linear":     G * sum_b s_b^2  * E_b(1)    (SGD, momentum, coupled decay)
        rule "direction":  G * sum_b |s_b|  * E_b(1)    (after Adam's or Lion's preconditioner)

    and for other linear branches under the rule "linear" the exact operator
    ``sum_b s_b * E_b(E_b^T(s_b * G))``. Arrays take the shape of the kernel only here, inside the
    jitted update, where XLA fuses them.

    Attributes:
      scales: branch name -> ``s_b``, shape ``(out,)``; the pytree's leaves. Unscaled branches
        have none.
      block: ``(name, branch)`` pairs.
      rule: "linear" or "direction".

    Raises:
      ValueError: unknown rule, or "direction" with a branch that is not a 0/1 placement.

    >>> mult = BranchMult({"conv1x1": jnp.array([3.0])}, (("conv1x1", Centre(1)),), "linear")
    >>> mult(jnp.ones((3, 3, 1, 1)))[..., 0, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 0.0]]
    """

    scales: dict[str, Float[Array, " out"]]
    block: tuple[tuple[str, Branch], ...]
    rule: Literal["linear", "direction"]

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {self.rule!r}")
        if self.rule == "direction" and not self.is_elementwise:
            names = [name for name, branch in self.block if not branch.placement]
            raise ValueError(
                "rule='direction' has a closed form only for branches that are 0/1 placements, "
                f"got {names}"
            )

    @property
    def is_elementwise(self) -> bool:
        """Whether the multiplier is one factor per entry of the kernel."""
        return all(branch.placement for _, branch in self.block)

    def dense(self, kernel_shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        """The element-wise multiplier as an array of `kernel_shape`."""
        terms = []
        for name, branch in self.block:
            mask = branch.embed(jnp.ones(branch.weight_shape(kernel_shape), dtype), kernel_shape)
            if branch.scaled:
                scale = self.scales[name].astype(dtype)
                factor = jnp.square(scale) if self.rule == "linear" else jnp.abs(scale)
                mask = mask * jnp.broadcast_to(factor, kernel_shape)
            terms.append(mask)
        return functools.reduce(jnp.add, terms)

    def __call__(self, gradient: Float[Array, "*kernel_shape"]) -> Float[Array, "*kernel_shape"]:
        """Multiply `gradient`, in at least float32, and return its own dtype."""
        dtype = wide_type(gradient.dtype)
        wide = gradient.astype(dtype)
        if self.is_elementwise:
            product = wide * self.dense(gradient.shape, dtype)
        else:
            block = dict(self.block)
            pulled = pull_back(block, self.scales, wide)
            product = merge(block, pulled, self.scales, gradient.shape)
        return product.astype(gradient.dtype)


def branch_mult(
    block: Block,
    scales: Mapping[str, Float[Array, " out"]],
    rule: Literal["linear", "direction"] = "linear",
) -> BranchMult:
    """The multiplier of a block's kernel under an update `rule`; see `BranchMult`.

    >>> block = {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}
    >>> scales = {"conv3x3": jnp.array([2.0]), "conv1x1": jnp.array([-3.0])}
    >>> branch_mult(block, scales).dense((3, 3, 1, 1))[1, :, 0, 0].tolist()
    [4.0, 14.0, 4.0]
    >>> branch_mult(block, scales, "direction").dense((3, 3, 1, 1))[1, :, 0, 0].tolist()
    [2.0, 6.0, 2.0]
    """
    vectors = {name: jnp.asarray(scales[name]) for name, b in block.items() if b.scaled}
    return BranchMult(vectors, tuple(block.items()), rule)
