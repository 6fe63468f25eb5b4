"""Blocks: branches by name, and what follows from their sum.

A *block* states its branches as data, for RepOpt-VGG
``{"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from repopt_jax.branches.branch import Branch
from repopt_jax.messages import quote
from repopt_jax.tree_paths import errors_at

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

Block: TypeAlias = Mapping[str, Branch]


_UNTRUE = {
    "constant": "embed must be linear in its weight, got a constant added to it",
    "mask": "mask must be embed of ones, got another one; a subclass that overrides embed must "
    "override mask too",
    "placement": "embed must copy each weight to one place of its own where placement is True",
    "channel": "embed must keep the output channels apart where by_channel is True",
}


def _untrue(branch: Branch, kernel_shape: tuple[int, ...]) -> str | None:
    """Why `embed` returns wrong numbers or a claim of the class is untrue; None if all is right.

    It costs a compilation. The types of this package are tested, and not asked.
    """
    if type(branch).__module__.startswith(f"{__package__}."):
        return None
    shape = branch.weight_shape(kernel_shape)

    def differences():
        size = math.prod(shape)
        weight = jnp.arange(1, size + 1, dtype=jnp.float32).reshape(shape) / size
        found = {"constant": branch.embed(jnp.zeros_like(weight), kernel_shape)}
        if branch.placement:
            ones = branch.embed(jnp.ones_like(weight), kernel_shape)
            found["mask"] = ones - branch.mask(kernel_shape, jnp.float32)
            embed = functools.partial(branch.embed, kernel_shape=kernel_shape)
            (there_and_back,) = jax.linear_transpose(embed, weight)(embed(weight))
            found["placement"] = jnp.maximum(
                jnp.abs(there_and_back - weight).max(), jnp.abs(ones * (ones - 1)).max()
            )
        if branch.by_channel:
            scale = jnp.linspace(1, 2, kernel_shape[-1], dtype=jnp.float32)
            before = branch.embed(weight * jnp.broadcast_to(scale, shape), kernel_shape)
            after = branch.embed(weight, kernel_shape) * jnp.broadcast_to(scale, kernel_shape)
            found["channel"] = before - after
        return {name: jnp.abs(array).max() > 1e-5 for name, array in found.items()}

    # Compiled before it is called, so that it runs even while a caller is being traced.
    found = jax.device_get(jax.jit(differences).lower().compile()())
    return next((message for name, message in _UNTRUE.items() if found.get(name)), None)


@functools.lru_cache(maxsize=1024)
def _why_not_linear(branch: Branch, kernel_shape: tuple[int, ...]) -> str | None:
    """Why a branch's `embed` is no linear map onto `kernel_shape`; None if it is one.

    Kept for every statement of a branch and every shape, since either may make the difference.
    """
    weight = jax.ShapeDtypeStruct(branch.weight_shape(kernel_shape), jnp.float32)
    embed = functools.partial(branch.embed, kernel_shape=kernel_shape)
    made = jax.eval_shape(embed, weight)
    if made.shape != kernel_shape:
        return f"embed must return the kernel's shape {kernel_shape}, got {made.shape}"
    try:  # all of it traced, or the constants of embed would be computed
        jax.eval_shape(lambda kernel: jax.linear_transpose(embed, weight)(kernel), made)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return (
            "embed must be linear in its weight; a product of weights (two trainable layers in a "
            "row) or a division by their statistics (BatchNorm inside the branch) is not"
        )
    return _untrue(branch, kernel_shape)


def _check_branches(block: Any) -> None:
    if not isinstance(block, Mapping):
        raise ValueError(f"block must be branches by name, got {quote(block)}")
    if not block:
        raise ValueError("block must have at least one branch, got none")
    for name, branch in block.items():
        if not isinstance(branch, Branch):
            raise ValueError(
                f"branch {name!r} must be a Branch, got {branch!r}: a layer is described by the "
                "linear map from its weight to the kernel; normalization goes after the block, "
                "and of two layers in a row one must be frozen"
            )


def check_complete(argument: str, given: Any, blocks: Any) -> None:
    """Refuse scales or weights that lack a branch, and what has another form than they have.

    Args:
      argument: "scales" or "weights"; scales may lack unscaled branches.
      given: path of a layer -> branch name -> array.
      blocks: path of a layer -> branch name -> branch.

    >>> from repopt_jax import Full
    >>> check_complete("scales", {"conv": {}}, {"conv": {"conv3x3": Full()}})
    Traceback (most recent call last):
    ValueError: scales must have every branch of every block, missing: ['conv/conv3x3']
    """
    for name, mapping in {"blocks": blocks, argument: given}.items():
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{name} must be given by the paths of layers, got {quote(mapping)}")
    missing = []
    for path, block in blocks.items():
        with errors_at(f"blocks[{path!r}]"):
            _check_branches(block)
        found = given.get(path)
        if found is not None and not isinstance(found, Mapping):
            raise ValueError(
                f"{argument}[{path!r}] must be arrays by the names of branches, got {quote(found)}"
            )
        missing += [path] if found is None else []
        missing += [
            f"{path}/{name}"
            for name, branch in block.items()
            if found is not None and name not in found and (branch.scaled or argument == "weights")
        ]
    if missing:
        raise ValueError(f"{argument} must have every branch of every block, missing: {missing}")


def check_block(block: Block, kernel_shape: tuple[int, ...]) -> None:
    """Refuse branches that do not fit the kernel or are not linear.

    Args:
      block: branch name -> branch.
      kernel_shape: ``(*window, in / groups, out)``.

    Raises:
      ValueError: naming the branch and the reason.

    >>> check_block({"batch_norm": "BatchNorm"}, (3, 3, 2, 2))
    Traceback (most recent call last):
    ValueError: branch 'batch_norm' must be a Branch, got 'BatchNorm': a layer is described by the \
linear map from its weight to the kernel; normalization goes after the block, and of two layers \
in a row one must be frozen
    """
    _check_branches(block)
    for name, branch in block.items():
        try:
            problem = _why_not_linear(branch, tuple(kernel_shape))
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ValueError(f"branch {name!r}: {problem}")


def initial_scales(block: Block, kernel_shape: tuple[int, ...], dtype=jnp.float32) -> dict:
    """The per-channel vectors with which a search starts, one of shape ``(out,)`` per branch.

    Args:
      block: branch name -> branch, whose `scale` is every entry of its vector.
      kernel_shape: ``(*window, in / groups, out)``.
      dtype: of the vectors.

    >>> from repopt_jax import Full
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

    >>> from repopt_jax import Full, Identity
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

    >>> from repopt_jax import Centre, Full
    >>> block = {"conv3x3": Full(), "conv1x1": Centre(1)}
    >>> ones = {name: jnp.ones(b.weight_shape((3, 3, 1, 1))) for name, b in block.items()}
    >>> scales = {"conv3x3": jnp.array([2.0]), "conv1x1": jnp.array([10.0])}
    >>> merge(block, ones, scales, (3, 3, 1, 1))[..., 0, 0].tolist()
    [[2.0, 2.0, 2.0], [2.0, 12.0, 2.0], [2.0, 2.0, 2.0]]
    """
    terms = []
    for name, branch in block.items():
        weight, scale = weights[name], scales.get(name)
        if branch.by_channel:  # multiply the small kernel, not the large one around it
            terms.append(branch.embed(_scaled(branch, scale, weight), kernel_shape))
        else:
            terms.append(_scaled(branch, scale, branch.embed(weight, kernel_shape)))
    return functools.reduce(jnp.add, terms)


def pull_back(
    block: Block,
    scales: Mapping[str, Float[Array, " out"]],
    gradient: Float[Array, "*kernel_shape"],
) -> dict[str, Array]:
    """Gradients of the branches' weights, ``E_b^T(s_b * G)``, from the kernel's gradient ``G``.

    Args:
      block: branch name -> branch ``E_b``.
      scales: branch name -> ``s_b``, shape ``(out,)``; entries of unscaled branches are ignored.
      gradient: ``G``, ``(*window, in / groups, out)``.

    >>> from repopt_jax import Centre
    >>> block = {"conv1x1": Centre(1)}
    >>> pull_back(block, {"conv1x1": jnp.array([3.0])}, jnp.ones((3, 3, 1, 1)))["conv1x1"].item()
    3.0
    """
    shape, dtype = gradient.shape, gradient.dtype
    pulled = {}
    for name, branch in block.items():
        weight = jax.ShapeDtypeStruct(branch.weight_shape(shape), dtype)
        embed = functools.partial(branch.embed, kernel_shape=shape)
        scale = scales.get(name)
        scaled = gradient if branch.by_channel else _scaled(branch, scale, gradient)
        (pulled[name],) = jax.linear_transpose(embed, weight)(scaled)
        if branch.by_channel:
            pulled[name] = _scaled(branch, scale, pulled[name])
    return pulled
