"""The multipliers of merged kernels' gradients: the Rule of Iteration, compact."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from repopt_jax.branches.blocks import Block, check_block, check_complete, merge, pull_back
from repopt_jax.branches.branch import Branch, is_known, wide_type
from repopt_jax.branches.sharding import in_auto_mode
from repopt_jax.tree_paths import path_str

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float, PyTree

Rule = Literal["linear", "direction", "mean"]
RULES = get_args(Rule)


def check_layout(layout: str) -> None:
    """Refuse a layout that has not its outputs last, as in "HWIO", or first, as in "OIHW"."""
    if not (isinstance(layout, str) and (layout.startswith("OI") or layout.endswith("IO"))):
        raise ValueError(f"layout must end in 'IO' or begin with 'OI', got {layout!r}")


def outputs_last(kernel: Array, layout: str) -> Array:
    """A kernel of `layout` as ``(*window, in / groups, out)``.

    >>> outputs_last(jnp.ones((8, 4, 3, 3)), "OIHW").shape
    (3, 3, 4, 8)
    """
    return jnp.moveaxis(kernel, (0, 1), (-1, -2)) if layout.startswith("OI") else kernel


def as_layout(kernel: Array, layout: str) -> Array:
    """The inverse of `outputs_last`.

    >>> as_layout(jnp.ones((4, 8)), "OI").shape
    (8, 4)
    """
    return jnp.moveaxis(kernel, (-1, -2), (0, 1)) if layout.startswith("OI") else kernel


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales"],
    meta_fields=["block", "rule", "layout", "window_rank"],
)
@dataclasses.dataclass(frozen=True)
class BranchMult:
    """The gradient multiplier of one merged kernel, kept as one vector per branch.

    Called with a gradient ``G`` it returns, for placements (all entries element-wise)::

        rule "linear":     G * sum_b s_b^2  * E_b(1)    (SGD, momentum, coupled decay)
        rule "direction":  G * sum_b |s_b|  * E_b(1)    (after Adam's or Lion's preconditioner)
        rule "mean":       the last divided by the number of branches with ``s_b != 0`` that reach
                           an entry             (before Adam: its epsilon then acts as in a branch)

    and for other linear branches under the rule "linear" the exact operator
    ``sum_b s_b * E_b(E_b^T(s_b * G))``. Arrays take the shape of the kernel only here, inside the
    jitted update, where XLA fuses them.

    Attributes:
      scales: branch name -> ``s_b``, shape ``(out,)`` or, of a stacked kernel, ``(*stack, out)``;
        the pytree's leaves. Unscaled branches have none.
      block: ``(name, branch)`` pairs.
      rule: "linear", "direction" or "mean".
      layout: of the gradient: "IO" with outputs on the last axis, as Flax, Haiku and Keras have
        it, or "OI" with outputs and inputs before the window, as Equinox and torch.
      window_rank: axes of a kernel's window; all axes before those of a kernel are a stack of
        kernels. None: a single kernel, whose window has all axes but two.

    Raises:
      ValueError: unknown rule or layout, or not "linear" for a branch that is not a 0/1 placement.

    >>> from repopt_jax import Centre
    >>> mult = BranchMult({"conv1x1": jnp.array([3.0])}, (("conv1x1", Centre(1)),), "linear")
    >>> mult(jnp.ones((3, 3, 1, 1)))[..., 0, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 0.0]]
    """

    scales: dict[str, Float[Array, " out"]]
    block: tuple[tuple[str, Branch], ...]
    rule: Rule
    layout: str = "IO"
    window_rank: int | None = None

    def __post_init__(self):
        check_layout(self.layout)
        if self.window_rank is not None and self.window_rank < 0:
            raise ValueError(f"window_rank must be at least 0 or None, got {self.window_rank}")
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {self.rule!r}")
        if self.rule != "linear" and (names := self._other_than_placements()):
            raise ValueError(
                f"rule={self.rule!r} has a closed form only for branches that are 0/1 placements, "
                f"got {names}; `reparameterize` is exact for any branch"
            )

    def _other_than_placements(self) -> list[str]:
        return [name for name, branch in self.block if not branch.placement]

    @property
    def is_elementwise(self) -> bool:
        """Whether the multiplier is one factor per entry of the kernel."""
        return not self._other_than_placements()

    def check(self, rule: str) -> None:
        """Refuse a multiplier of another rule, or with scales that are not finite."""
        if self.rule != rule:
            raise ValueError(f"the rule must be {rule!r} here, got {self.rule!r}")
        for name, scale in self.scales.items():
            if is_known(scale) and not np.isfinite(scale).all():
                raise ValueError(f"the scale of {name!r} must be finite, got {scale}")

    def check_fits(self, kernel_shape: tuple[int, ...]) -> None:
        """Refuse a kernel that this multiplier does not fit."""
        depth = self._stack_depth(len(kernel_shape))
        stack, kernel_shape = kernel_shape[:depth], kernel_shape[depth:]
        if self.layout.startswith("OI"):
            kernel_shape = (*kernel_shape[2:], kernel_shape[1], kernel_shape[0])
        check_block(dict(self.block), kernel_shape)
        fitting = {kernel_shape[-1:], (*stack, *kernel_shape[-1:])}
        if wrong := {n: s.shape for n, s in self.scales.items() if s.shape not in fitting}:
            raise ValueError(
                f"scales must have the shape {' or '.join(map(str, sorted(fitting)))} of the "
                f"kernel's outputs, got {wrong}"
            )

    def _stack_depth(self, rank: int) -> int:
        """How many of the first axes of a parameter of `rank` are a stack of kernels."""
        return 0 if self.window_rank is None else max(rank - 2 - self.window_rank, 0)

    def dense(self, kernel_shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        """The element-wise multiplier as an array of `kernel_shape`, which has its outputs last.

        Raises:
          ValueError: for a block with branches that are no placements, which has none, or for the
            shape of a stack of kernels.
        """
        if self._stack_depth(len(kernel_shape)):
            raise ValueError(
                f"kernel_shape must be that of one kernel, with a window of {self.window_rank} "
                f"axes, got {kernel_shape}"
            )
        if names := self._other_than_placements():
            raise ValueError(f"dense needs branches that are 0/1 placements, got {names}")
        terms, counts = [], []
        for name, branch in self.block:
            term = count = branch.mask(kernel_shape, dtype)
            if branch.scaled:
                scale = self.scales[name].astype(dtype)
                factor = jnp.square(scale) if self.rule == "linear" else jnp.abs(scale)
                term = term * jnp.broadcast_to(factor, kernel_shape)
                count = count * jnp.broadcast_to((scale != 0).astype(dtype), kernel_shape)
            terms.append(term)
            counts.append(count)
        total = functools.reduce(jnp.add, terms)
        if self.rule == "mean":
            return total / jnp.maximum(functools.reduce(jnp.add, counts), 1)
        return total

    def __call__(self, gradient: Float[Array, "*kernel_shape"]) -> Float[Array, "*kernel_shape"]:
        """Multiply `gradient`, in at least float32, and return its own dtype."""
        if gradient.ndim == 0:
            raise ValueError(
                f"gradient must have the shape of a kernel, got a number of type {gradient.dtype}; "
                "optax.inject_hyperparams takes a BranchMult for a schedule unless its static_args "
                'have "grad_mults"'
            )
        if self._stack_depth(gradient.ndim):
            axes = {name: 0 if scale.ndim > 1 else None for name, scale in self.scales.items()}
            each = jax.vmap(lambda s, g: dataclasses.replace(self, scales=s)(g), in_axes=(axes, 0))
            return each(self.scales, gradient)
        dtype = wide_type(gradient.dtype)
        wide = outputs_last(gradient.astype(dtype), self.layout)
        if self.is_elementwise:
            product = wide * self.dense(wide.shape, dtype)
        else:
            block = dict(self.block)

            def operator(scales, wide):
                return merge(block, pull_back(block, scales, wide), scales, wide.shape)

            product = in_auto_mode(operator, wide, self.scales, wide)
        return as_layout(product, self.layout).astype(gradient.dtype)


def branch_mult(
    block: Block,
    scales: Mapping[str, Float[Array, " out"]],
    rule: Rule = "linear",
) -> BranchMult:
    """The multiplier of a block's kernel under an update `rule`; see `BranchMult`.

    Args:
      block: branch name -> branch.
      scales: branch name -> ``s_b``, shape ``(out,)``; entries of unscaled branches are ignored.
      rule: "linear", "direction" or "mean".

    Raises:
      ValueError: as `BranchMult` does.

    >>> from repopt_jax import Centre, Full, Identity
    >>> block = {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}
    >>> scales = {"conv3x3": jnp.array([2.0]), "conv1x1": jnp.array([-3.0])}
    >>> branch_mult(block, scales).dense((3, 3, 1, 1))[1, :, 0, 0].tolist()
    [4.0, 14.0, 4.0]
    >>> branch_mult(block, scales, "direction").dense((3, 3, 1, 1))[1, :, 0, 0].tolist()
    [2.0, 6.0, 2.0]
    >>> branch_mult(block, scales, "mean").dense((3, 3, 1, 1))[1, :, 0, 0].tolist()
    [2.0, 2.0, 2.0]
    """
    vectors = {name: jnp.asarray(scales[name]) for name, b in block.items() if b.scaled}
    return BranchMult(vectors, tuple(block.items()), rule)


def grad_mults(
    params: PyTree,
    blocks: Mapping[str, Block],
    scales: Mapping[str, Mapping[str, Array]],
    rule: Rule = "linear",
    *,
    kernel: str = "kernel",
    layout: str = "IO",
    window_rank: int | None = None,
) -> PyTree:
    """The multipliers of a network: a tree like `params` with a `BranchMult` per block.

    For a kernel whose `blocks` state the branches ``E_b``, with ``s_b`` from `scales`:
    ``sum_b s_b^2 E_b(1)`` under the rule "linear", ``sum_b |s_b| E_b(1)`` under "direction". For
    every other parameter None, which leaves it alone.

    Args:
      params: the parameters of the plain network, any pytree.
      blocks: path of a layer -> its branches; the multiplier belongs to its parameter `kernel`.
      scales: path of a layer -> branch name -> ``(out,)``, such as a `Scales`.
      rule: "linear" for `repopt_sgd`, "direction" for `repopt_adamw`.
      kernel: name of the kernels: "kernel" in Flax and Keras, "w" in Haiku, "weight" in Equinox.
      layout: of the kernels: outputs last, such as "HWIO" or "IO" (Flax, Haiku, Keras), or first,
        such as "OIHW" or "OI" (Equinox). It holds for kernels of any rank.
      window_rank: 2 where convolutions of images are stacked along axes before those of a kernel,
        as `jax.vmap` and `jax.lax.scan` over layers stack them; each kernel of the stack then has
        its own multiplier. Scales are those of all, ``(out,)``, or stacked, ``(*stack, out)``.
        None: no kernel is stacked.

    Raises:
      ValueError: if a block has no kernel in `params`, or a branch no scales; for "direction", if a
        branch is no 0/1 placement.

    >>> import jax.numpy as jnp, repopt_jax
    >>> params = {"conv": {"kernel": jnp.ones((1, 1, 2, 2)), "bias": jnp.ones(2)}}
    >>> blocks = {"conv": {"full": repopt_jax.Full()}}
    >>> mults = repopt_jax.grad_mults(params, blocks, {"conv": {"full": jnp.array([1.0, 2.0])}})
    >>> mults["conv"]["kernel"].dense((1, 1, 2, 2))[0, 0].tolist(), mults["conv"]["bias"]
    ([[1.0, 4.0], [1.0, 4.0]], None)
    """
    check_complete("scales", scales, blocks)
    names = {path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if missing := [path for path in blocks if f"{path}/{kernel}" not in names]:
        raise ValueError(f"every block needs a parameter {kernel!r} in params, missing: {missing}")
    axes = {"layout": layout, "window_rank": window_rank}
    mults = {
        f"{path}/{kernel}": dataclasses.replace(branch_mult(b, scales[path], rule), **axes)
        for path, b in blocks.items()
    }
    return jax.tree_util.tree_map_with_path(lambda path, _: mults.get(path_str(path)), params)
