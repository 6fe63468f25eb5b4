"""Which layers of a network get which branches."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import Block, FrozenPointwise, Identity, check_block
from repopt_jax.messages import quote
from repopt_jax.tree_paths import errors_at, layer_at

ModelT = TypeVar("ModelT", bound=nnx.Module)


def copy_model(model: ModelT) -> ModelT:
    """A copy that shares no array with `model`, which a step that donates the copy's would delete.

    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> copy_model(model).kernel.get_value() is model.kernel.get_value()
    False
    """
    graphdef, state = nnx.split(model)
    copy = jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, state)
    return nnx.merge(graphdef, copy)


def check_layer(layer: Any, block: Block) -> None:
    """Refuse layers that are not one linear map of their `kernel` with outputs on its last axis.

    Raises:
      ValueError: no kernel, a kernel whose last axis is the input or with an axis of stacked
        layers, or groups other than those of a branch.

    >>> from repopt_jax import Full
    >>> check_layer(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), {"full": Full()})
    Traceback (most recent call last):
    ValueError: layer must have a kernel, got a LayerNorm
    """
    name = type(layer).__name__
    if not isinstance(getattr(layer, "kernel", None), nnx.Param):
        raise ValueError(f"layer must have a kernel, got a {name}")
    if getattr(layer, "transpose_kernel", False):
        raise ValueError(
            f"layer must have its outputs on the kernel's last axis, got a {name} with "
            "transpose_kernel=True"
        )
    rank = 2 + len(layer.kernel_size) if hasattr(layer, "kernel_size") else 2
    if isinstance(layer, (nnx.Conv, nnx.ConvTranspose, nnx.Linear)) and layer.kernel.ndim != rank:
        raise ValueError(
            f"layer must be a single one with a kernel of rank {rank}, got a {name} with a kernel "
            f"of shape {layer.kernel.shape}"
        )
    groups = getattr(layer, "feature_group_count", 1)
    for branch_name, branch in block.items():
        # BlockDiagonal and FoldedConv have groups of their own, inside an ordinary layer.
        if isinstance(branch, (Identity, FrozenPointwise)) and branch.groups != groups:
            raise ValueError(
                f"branch {branch_name!r} must have the layer's groups={groups}, got {branch.groups}"
            )


def check_layers(model: nnx.Module, blocks: Mapping[str, Block]) -> None:
    """`check_layer` and `check_block` for every layer in `blocks`; errors name its path.

    Raises:
      ValueError: as those do, or for a kernel that belongs to two layers.
    """
    layers = {**_layers_with_kernel(model), **{path: layer_at(model, path) for path in blocks}}
    for path, block in blocks.items():
        layer = layers[path]
        with errors_at(f"block {path!r}"):
            check_layer(layer, block)
            check_block(block, layer.kernel.shape)
            tied = [
                other
                for other, found in layers.items()
                if found.kernel is layer.kernel
                and other != path
                # A layer that stands at several places has one path, if not two in `blocks`.
                and (found is not layer or other in blocks)
            ]
            if tied:
                raise ValueError(
                    f"the kernel must belong to one layer, got one that is tied to {tied}"
                )


def _layers_with_kernel(model: nnx.Module) -> dict[str, Any]:
    """The layers that have a kernel, by path; one used in several places has one path."""
    return {
        "/".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(model)
        if path and isinstance(getattr(layer, "kernel", None), nnx.Param)
    }


def find_blocks(
    model: nnx.Module,
    rule: Callable[[str, Any], Block | None] | Mapping[str, Block],
) -> dict[str, Block]:
    """The layers of `model` that get branches, by path.

    Args:
      model: a plain network; it is not changed.
      rule: a function of a layer's path and the layer that returns its branches or None, such as
        `repvgg_branches` and the others in `repopt_jax.branches.presets`; or branches by pattern,
        such as ``{"stages/*/conv": block}`` (``*`` stands for any text; the first pattern that
        matches counts). It is asked about every layer that has a `kernel`; a layer used in several
        places has one path.

    Raises:
      ValueError: if `model` has no layer with a kernel, no layer gets branches, a pattern matches
        none, or a layer is refused by `check_layer`.

    >>> from flax import nnx
    >>> from repopt_jax import Full, repvgg_branches
    >>> layers = [nnx.Conv(2, 2, (k, k), rngs=nnx.Rngs(0)) for k in (3, 1, 3)]
    >>> model = nnx.Sequential(*layers)
    >>> list(find_blocks(model, repvgg_branches))
    ['layers/0', 'layers/2']
    >>> list(find_blocks(model, {"layers/[01]": {"conv": Full()}}))
    ['layers/0', 'layers/1']
    """
    if not (callable(rule) or isinstance(rule, Mapping)):
        raise ValueError(
            "rule must be a function, such as repopt_jax.repvgg_branches, or blocks by pattern, "
            f"got {quote(rule)}"
        )
    layers = _layers_with_kernel(model)
    if not layers:
        raise ValueError(
            f"model must be a network of layers that have a kernel, got {quote(model)} without them"
        )
    if isinstance(rule, Mapping):
        idle = [p for p in rule if not fnmatch.filter(layers, p)]
        if idle:
            raise ValueError(
                f"every pattern of rule must match a layer with a kernel, got {idle} for layers "
                f"{sorted(layers)}"
            )
    blocks = {}
    for path, layer in layers.items():
        if isinstance(rule, Mapping):
            block = next((b for p, b in rule.items() if fnmatch.fnmatchcase(path, p)), None)
        else:
            block = rule(path, layer)
        if block is not None:
            with errors_at(f"block {path!r}"):
                check_layer(layer, block)
            blocks[path] = block
    if not blocks:
        raise ValueError(
            f"rule must give branches to some layer, got none for layers {sorted(layers)}"
        )
    return blocks
