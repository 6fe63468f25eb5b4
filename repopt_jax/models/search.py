"""From the plain network to its search network and back, for any Flax NNX network.

The plain network is the only network. `find_blocks` names its layers that get branches,
`search_network` swaps them for ones whose kernel is merged from trainable branches,
`searched_scales` reads the result of a search, and `target_network` draws the plain network's
kernels by the Rule of Initialization (RepOptimizers, arXiv 2205.15242, sections 3.2 and 3.3) and
gives the optimizer its parts.

Deviation from the authors' code, which runs every branch: ONE layer runs with the merged kernel,
so that a search step costs what a training step costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.branches import (
    Block,
    check_merges,
    init_weights,
    initial_scales,
    merge,
    split_kernel,
)
from repopt_jax.models.branched_layers import check_layers, copy_model
from repopt_jax.models.checks import check_rngs
from repopt_jax.scales import Scales, check_scales, frozen_seeds
from repopt_jax.tree_paths import errors_at, layer_at

if TYPE_CHECKING:
    from jaxtyping import Array

ModelT = TypeVar("ModelT", bound=nnx.Module)


class ConstantScale(nnx.Variable):
    """A branch's scale where it is not trained."""


class SearchLayer(nnx.Module):
    """A layer whose kernel is ``sum_b s_b * E_b(w_b)``, merged anew at every call.

    Attributes:
      branch_weights: branch name -> ``w_b``, trained.
      branch_scales: branch name -> ``s_b``, shape ``(out,)``, trained in "hs" and constant in
        "csla" networks; scaled branches only.

    Args:
      layer: a layer that `check_layers` lets pass, such as `nnx.Conv` or `nnx.Linear`; its other
        parameters stay what they are, under the names that they had.
      block: branch name -> branch.
      kind: "hs" or "csla".
      scales: branch name -> vector to start from. None: the branches' own initial values.
      rngs: draws the branches' weights. None: their sum is the layer's kernel, see `split_kernel`.
    """

    def __init__(
        self,
        layer: Any,
        block: Block,
        *,
        kind: Literal["hs", "csla"],
        scales: Mapping[str, Array] | None = None,
        rngs: nnx.Rngs | None,
    ):
        self.layer_def, state = nnx.split(layer)
        kernel = state.pop("kernel")[...]
        self.others = tuple(state)
        for name in self.others:
            setattr(self, name, state[name])
        self.block = tuple(block.items())
        self.kernel_shape = kernel.shape
        vectors = scales if scales is not None else initial_scales(block, kernel.shape)
        vectors = {n: jnp.asarray(vectors[n], kernel.dtype) for n, b in self.block if b.scaled}
        if rngs is None:
            weights = split_kernel(block, kernel, vectors)
            check_merges(block, weights, vectors, kernel)
        else:
            weights = init_weights(block, rngs.params(), kernel.shape, kernel.dtype, scales)
        scale_type = nnx.Param if kind == "hs" else ConstantScale
        self.branch_weights = nnx.Dict({n: nnx.Param(w) for n, w in weights.items()})
        self.branch_scales = nnx.Dict({n: scale_type(v) for n, v in vectors.items()})

    @property
    def kernel(self) -> Array:
        """The merged kernel."""
        weights = {name: w[...] for name, w in self.branch_weights.items()}
        scales = {name: s[...] for name, s in self.branch_scales.items()}
        return merge(dict(self.block), weights, scales, self.kernel_shape)

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """The layer's output with the merged kernel."""
        variables = {name: getattr(self, name) for name in self.others}
        layer = nnx.merge(self.layer_def, {"kernel": nnx.Param(self.kernel), **variables})
        return layer(*args, **kwargs)


def swap_layers(node: Any, layers: Mapping[int, tuple[Any, Any]], seen: set[int]) -> Any:
    """`node` with layers swapped, ``id(old) -> (old, new)``, wherever it holds them.

    Modules change in place, so that shared ones stay shared; lists, tuples and dicts are made anew
    where something in them is another.
    """
    if id(node) in layers:
        return layers[id(node)][1]
    if isinstance(node, (dict, list, tuple)):
        old = list(node.values() if isinstance(node, dict) else node)
        new = [swap_layers(item, layers, seen) for item in old]
        if all(a is b for a, b in zip(old, new, strict=True)):
            return node
        if isinstance(node, dict):
            return dict(zip(node, new, strict=True))
        return type(node)(*new) if hasattr(node, "_fields") else type(node)(new)
    if isinstance(node, nnx.Pytree) and id(node) not in seen:
        seen.add(id(node))
        for name, value in list(vars(node).items()):
            new = swap_layers(value, layers, seen)
            if new is not value:
                container = isinstance(new, (dict, list, tuple))
                setattr(node, name, nnx.data(new) if container else new)
    return node


def search_network(
    model: ModelT,
    blocks: Mapping[str, Block],
    *,
    kind: Literal["hs", "csla"] = "hs",
    scales: Mapping[str, Mapping[str, Array]] | None = None,
    keep_kernels: bool = False,
    rngs: nnx.Rngs | None = None,
) -> ModelT:
    """A copy of `model` in which the layers named by `blocks` are merged from branches.

    Args:
      model: a plain network; it is not changed.
      blocks: path of a layer -> its branches.
      kind: "hs" to train the scales, "csla" to hold them constant.
      scales: path of a layer -> branch name -> vector to start from. None: the branches' own
        initial values.
      keep_kernels: whether the search goes on from the kernels of `model`, a trained network: the
        branches' weights are those of `split_kernel`, and the copy computes what `model` does.
      rngs: draws the branches' weights. None: only with `keep_kernels`.

    Raises:
      ValueError: unknown kind, neither `keep_kernels` nor `rngs`, kernels to keep that are no sum
        of their branches, a path without a layer, two paths of one layer, `scales` that are
        not those of the blocks (as ``Scales.check``), or a layer or branch for which there is no
        equivalence; see `check_layer` and `check_block`.

    >>> from flax import nnx
    >>> import repopt_jax
    >>> model = nnx.Sequential(nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0)))
    >>> blocks = {"layers/0": {"conv3x3": repopt_jax.Full(), "conv1x1": repopt_jax.Centre(1)}}
    >>> search = search_network(model, blocks, rngs=nnx.Rngs(0))
    >>> searched_scales(search)["layers/0"]["conv1x1"].tolist()
    [1.0, 1.0]
    >>> kept = search_network(model, blocks, keep_kernels=True)
    >>> bool(jnp.allclose(kept.layers[0].kernel, model.layers[0].kernel[...]))
    True
    """
    if kind not in ("hs", "csla"):
        raise ValueError(f"kind of a search network must be 'hs' or 'csla', got {kind!r}")
    if not keep_kernels and rngs is None:
        raise ValueError("rngs must be given unless keep_kernels=True, got None")
    if rngs is not None:
        check_rngs(rngs)
    check_layers(model, blocks)
    if scales is not None:
        check_scales(scales, model, blocks)
    model = copy_model(model)
    swapped = {}
    for path, block in blocks.items():
        vectors = None if scales is None else scales[path]
        layer = layer_at(model, path)
        with errors_at(f"block {path!r}"):
            draws = None if keep_kernels else rngs
            new = SearchLayer(layer, block, kind=kind, scales=vectors, rngs=draws)
        swapped[id(layer)] = layer, new  # both, so that no other object gets the same id
    swap_layers(model, swapped, set())
    missed = [path for path in blocks if not isinstance(layer_at(model, path), SearchLayer)]
    if missed:
        raise ValueError(
            f"every layer of blocks must stand in modules, lists, tuples or dicts, got {missed}"
        )
    return model


def search_layers(model: nnx.Module) -> dict[str, SearchLayer]:
    """The search layers of a network by path, in network order."""
    found = nnx.iter_modules(model)
    return {"/".join(map(str, path)): m for path, m in found if isinstance(m, SearchLayer)}


def searched_scales(model: nnx.Module, metadata: Mapping[str, str] | None = None) -> Scales:
    """The `Scales` of a search network: trained scales and identity vectors, as float32.

    Args:
      model: of `search_network`, or of `create_model` with the kind "hs" or "csla".
      metadata: facts about the search to keep with them. None: only the seeds of frozen factors.

    Raises:
      ValueError: if `model` has no search layers.

    >>> from repopt_jax import Full
    >>> plain = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> search = search_network(plain, {"layers/0": {"full": Full(scale=2.0)}}, rngs=nnx.Rngs(0))
    >>> searched_scales(search)["layers/0"]["full"].tolist()
    [2.0, 2.0, 2.0]
    """
    layers = search_layers(model)
    if not layers:
        raise ValueError(
            f"model must be a search network, got a {type(model).__name__} without search layers"
        )
    vectors = {}
    seeds = frozen_seeds({path: dict(layer.block) for path, layer in layers.items()})
    for path, layer in layers.items():
        found = {
            n: layer.branch_scales[n] if b.scaled else layer.branch_weights[n]
            for n, b in layer.block
        }
        vectors[path] = {name: np.asarray(v[...], np.float32) for name, v in found.items()}
    return Scales(vectors, {**seeds, **(metadata or {})})
