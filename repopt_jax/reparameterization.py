"""Gradient re-parameterization that is exact under any Optax optimizer.

The multipliers of `repopt_jax.transforms` need an update that is linear in the gradient (SGD) or
forgets its size (Adam). Everything else, such as clipping by the global norm, trust ratios,
factored moments or orthogonalized momentum, looks at the branches' own gradients. Here the
optimizer runs on the branches themselves, which live in its state, and the network stays plain.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repopt_jax.branches import (
    ROUNDING,
    Block,
    as_layout,
    branch_mult,
    check_complete,
    check_layout,
    check_merges,
    in_auto_mode,
    is_known,
    merge,
    outputs_last,
    placed_like,
    pull_back,
    replicated_like,
    split_kernel,
    wide_type,
)
from repopt_jax.tree_paths import by_path, check_updates, errors_at, path_str

if TYPE_CHECKING:
    from jaxtyping import Array

# Input channels of a kernel by which an update tells that something else has moved it.
SAMPLED = 4


class ReparameterizeState(NamedTuple):
    """State of `reparameterize`."""

    scales: dict[str, dict[str, Array]]  # path of a layer -> branch -> (out,), constants
    weights: dict[str, dict[str, Array]]  # path of a layer -> branch -> w_b
    kernels: dict[str, Array]  # path of a layer -> some of the kernel, as it was left
    inner: optax.OptState  # of the optimizer, which sees branch weights in place of kernels


def _is_absent(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


@dataclasses.dataclass(frozen=True)
class _Network:
    """Where the kernels of blocks lie among the parameters, and the tree of their branches.

    Attributes:
      blocks: path of a layer -> its branches.
      kernel: name of the kernels.
      layout: of the kernels.
    """

    blocks: Mapping[str, Block]
    kernel: str
    layout: str

    def place(self, path: str) -> str:
        """The path of a layer's kernel."""
        return f"{path}/{self.kernel}"

    def hidden_scales(self) -> dict[str, dict[str, Array]]:
        """Empty arrays in place of scales: a state has one structure whatever wrappers hide."""
        return {
            path: {name: jnp.zeros(0) for name, branch in block.items() if branch.scaled}
            for path, block in self.blocks.items()
        }

    def inner_tree(self, leaves: Mapping[str, Any], branches: Mapping[str, Mapping]) -> dict:
        """What the optimizer sees: a nested dict with a search network's names of parameters."""
        kernels = {self.place(path) for path in branches}
        named = {path: leaf for path, leaf in leaves.items() if path not in kernels}
        for path, by_name in branches.items():
            named.update({f"{path}/branch_weights/{name}": leaf for name, leaf in by_name.items()})
        tree: dict = {}
        for path, leaf in named.items():
            *parents, name = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaf
        return tree

    def pulled_back(self, gradients: Any, state: ReparameterizeState) -> dict:
        """The gradients that the optimizer sees, from those of the plain network."""
        leaves, pulled = by_path(gradients), {}
        for path, own in state.weights.items():
            gradient = outputs_last(leaves[self.place(path)], self.layout)
            pulled[path] = _pulled_back(self.blocks[path], own, state.scales[path], gradient)
        return self.inner_tree(leaves, pulled)

    def pushed_forward(
        self, moves: dict[str, Array], params: Any, state: ReparameterizeState
    ) -> tuple[dict, dict, dict]:
        """The updates with those of the kernels, the branches' new weights, and samples."""
        leaves, weights, kernels = by_path(params), {}, dict(state.kernels)
        for path, own in state.weights.items():
            weights[path] = {
                n: optax.apply_updates(w, moves[f"{path}/branch_weights/{n}"])
                for n, w in own.items()
            }
            kernel = outputs_last(leaves[self.place(path)], self.layout)
            merged = _merged(self.blocks[path], weights[path], state.scales[path], kernel)
            move = _move(self.place(path), state.kernels[path], merged, kernel)
            moves[self.place(path)] = as_layout(move, self.layout)
            kernels[path] = _sample(optax.apply_updates(kernel, move))
        return moves, weights, kernels

    def of_branches(self, extra_args: dict, params: Any, state: ReparameterizeState) -> dict:
        """Arguments of line searches and of Sophia for what the optimizer sees."""
        own = dict(extra_args)
        if own.get("grad") is not None:
            own["grad"] = self.pulled_back(own["grad"], state)
        for name in ("value_fn", "obj_fn"):
            if own.get(name) is not None:
                own[name] = self._function_of_branches(own[name], params, state)
        return own

    def _function_of_branches(
        self, function: Callable, params: Any, state: ReparameterizeState
    ) -> Callable:
        """`function` of the plain network's parameters, as one of what the optimizer sees."""
        plain = by_path(params)

        @functools.wraps(function)  # line searches read its signature
        def of_branches(tree, *args, **kwargs):
            leaves = by_path(tree)
            for path in state.weights:
                kernel = outputs_last(plain[self.place(path)], self.layout)
                block = self.blocks[path]
                weights = {name: leaves[f"{path}/branch_weights/{name}"] for name in block}
                merged = _merged(block, weights, state.scales[path], kernel).astype(kernel.dtype)
                leaves[self.place(path)] = as_layout(merged, self.layout)
            found = jax.tree_util.tree_map_with_path(lambda p, _: leaves[path_str(p)], params)
            return function(found, *args, **kwargs)

        return of_branches


def _pulled_back(block: Block, weights: Mapping, scales: Mapping, gradient: Array) -> dict:
    """The branches' gradients, in the types of their weights and split as these are."""
    wide = gradient.astype(wide_type(gradient.dtype))
    back = in_auto_mode(functools.partial(pull_back, block), weights, scales, wide)
    return {name: back[name].astype(w.dtype) for name, w in weights.items()}


def _merged(block: Block, weights: Mapping, scales: Mapping, kernel: Array) -> Array:
    """The kernel of branches, split over devices as `kernel` is."""
    merged = functools.partial(merge, block, kernel_shape=kernel.shape)
    return in_auto_mode(merged, kernel, weights, scales)


def _sample(kernel: Array) -> Array:
    """At most `SAMPLED` input channels of a kernel, on all of its devices."""
    stride = -(-kernel.shape[-2] // SAMPLED)
    channels = len(range(0, kernel.shape[-2], stride))
    like = replicated_like(jnp.zeros((*kernel.shape[:-2], channels, kernel.shape[-1])), kernel)
    return in_auto_mode(lambda kernel: kernel[..., ::stride, :], like, kernel)


def _started(
    path: str, block: Block, weights: Mapping | None, scales: Mapping, kernel: Array
) -> tuple[dict, dict, Array]:
    """Scales, weights and a sample of the kernel beside its shards, if they fit each other."""
    scales = {n: replicated_like(scales[n], kernel) for n, b in block.items() if b.scaled}
    with errors_at(f"block {path!r}"):
        mult = branch_mult(block, scales)
        mult.check("linear")
        mult.check_fits(kernel.shape)
        if weights is None:
            shapes = {n: branch.weight_shape(kernel.shape) for n, branch in block.items()}
            like = {n: placed_like(jnp.zeros(shape), kernel) for n, shape in shapes.items()}
            weights = in_auto_mode(functools.partial(split_kernel, block), like, kernel, scales)
        weights = {n: placed_like(weights[n], kernel) for n in block}
        for name, branch in block.items():
            wanted = branch.weight_shape(kernel.shape)
            if weights[name].shape != wanted:
                raise ValueError(
                    f"weights of {name!r} must have the shape {wanted}, got {weights[name].shape}"
                )
        check_merges(block, weights, scales, kernel)
    sample = _sample(_merged(block, weights, scales, kernel).astype(kernel.dtype))
    return scales, weights, sample


def _move(place: str, left: Array, merged: Array, kernel: Array) -> Array:
    """The update that takes `kernel` to `merged`; refused if it is not where it was `left`."""
    found = _sample(kernel)
    bound = ROUNDING * float(jnp.finfo(kernel.dtype).eps) * jnp.abs(left).max()
    stays = jnp.abs(found - left).max() <= bound
    if is_known(stays) and not stays:
        raise ValueError(
            f"params[{place!r}] must be where the last update left it, got entries "
            f"that are off by up to {jnp.abs(found - left).max():.2g}: something else moves it"
        )
    # The difference to the kernel rather than the merged moves: roundings do not add up.
    move = (merged - kernel.astype(merged.dtype)).astype(kernel.dtype)
    return jnp.where(stays, move, jnp.full_like(move, jnp.nan))


def reparameterize(
    optimizer: optax.GradientTransformation,
    blocks: Mapping[str, Block],
    scales: Mapping[str, Mapping[str, Array]],
    *,
    weights: Mapping[str, Mapping[str, Array]] | None = None,
    kernel: str = "kernel",
    layout: str = "IO",
) -> optax.GradientTransformationExtraArgs:
    r"""Train merged kernels exactly as `optimizer` would train their branches.

    With the kernel's gradient ``G``, branches ``E_b``, scales ``s_b`` and weights ``w_b``::

        g_b = E_b^T(s_b * G)                   pulled back
        w_b <- w_b + optimizer(g_b, w_b)       the branches' own step
        W <- sum_b s_b * E_b(w_b)              pushed forward

    Forward and backward pass are those of the plain network. Parameters without branches go
    through the same `optimizer`, so norms over all gradients are those of the network of branches.
    The optimizer sees the parameter names of a search network: ``conv/branch_weights/conv3x3`` in
    place of ``conv/kernel``, in a nested dict. Masks, labels by path and schedules work as there.

    The closed-form multipliers (`repopt_sgd`, `repopt_adamw`, `scale_by_grad_mult`) are enough,
    and cheaper, for SGD with momentum, Nesterov and decay, and for Adam and Lion up to their
    ``eps``. This transform is for everything else: clipping, LAMB, LARS, Adafactor, Muon,
    RMSProp, and branches that are not 0/1 placements under Adam.

    Memory: the state holds the branch weights and whatever `optimizer` keeps per branch instead of
    per kernel, for 3x3 and 1x1 branches 10/9 of the kernels each. Measured for RepOpt-VGG-B1: with
    momentum 430 MiB instead of 198, with Adam 649 instead of 396, and 63 MiB during an update.

    The kernel follows the weights in the state, so nothing else may move it: wrappers that scale
    updates or average parameters go inside. Every update compares a few input channels with those
    that the last one left. What is off by more than rounding is refused; under ``jax.jit``, where
    nothing can be raised, the kernel's update is NaN.

    Args:
      optimizer: any Optax optimizer, with its learning rate.
      blocks: path of a layer -> its branches.
      scales: path of a layer -> branch name -> ``(out,)``, such as a `Scales`.
      weights: path of a layer -> branch name -> ``w_b``, where the branches start; a copy stays in
        the host's memory. They are what the kernels were merged from, and ``init`` checks it (not
        under ``jax.jit``, where values are unknown). `target_network` takes care of this. None:
        ``init`` splits the kernels that it is given (`split_kernel`), so that a network trained
        without branches goes on with them.
      kernel: name of the kernels, as in `grad_mults`.
      layout: of the kernels, as in `grad_mults`.

    Returns:
      An optax.GradientTransformationExtraArgs.

    Raises:
      ValueError: here, if `optimizer` is none, or a block lacks scales or weights; by ``init``, if
        a block has no kernel, does not fit it, has scales of another shape or weights that do not
        merge to it, or cannot be split exactly; by ``update`` without parameters.

    >>> import repopt_jax
    >>> block = {"conv3x3": repopt_jax.Full(), "conv1x1": repopt_jax.Centre(1)}
    >>> scales = {"conv3x3": jnp.array([2.0]), "conv1x1": jnp.array([-1.0])}
    >>> w = repopt_jax.init_weights(block, jax.random.key(0), (3, 3, 1, 1))
    >>> params = {"conv": {"kernel": repopt_jax.merge(block, w, scales, (3, 3, 1, 1))}}
    >>> tx = reparameterize(optax.sgd(0.1), {"conv": block}, {"conv": scales}, weights={"conv": w})
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> [[round(float(u), 3) for u in row] for row in updates["conv"]["kernel"][..., 0, 0]]
    [[-0.4, -0.4, -0.4], [-0.4, -0.5, -0.4], [-0.4, -0.4, -0.4]]

    A trained kernel is split:

    >>> trained = {"conv": {"kernel": jnp.full((3, 3, 1, 1), 5.0)}}
    >>> tx = reparameterize(optax.sgd(0.1), {"conv": block}, {"conv": scales})
    >>> tx.init(trained).weights["conv"]["conv1x1"].item()
    -1.0
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"optimizer must have init and update as Optax's, got {optimizer!r}")
    check_layout(layout)
    check_complete("scales", scales, blocks)
    if weights is not None:
        check_complete("weights", weights, blocks)
        # NumPy arrays: they take no device memory, and donating the state does not delete them.
        weights = {
            path: {n: w if not is_known(w) else np.asarray(w) for n, w in weights[path].items()}
            for path in blocks
        }
    inner, network = optax.with_extra_args_support(optimizer), _Network(blocks, kernel, layout)

    def init_fn(params):
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            return jax.eval_shape(init_fn, params)
        # None stands for no parameter, as in Equinox; wrappers hide others.
        named = by_path(params, is_leaf=_is_absent)
        own_scales, own_weights = network.hidden_scales(), {}
        if not named:  # optax.tree.map_params asks where in the state the parameters are
            kernels = dict.fromkeys(blocks, 0.0)
            return ReparameterizeState(own_scales, params, kernels, inner.init(params))
        missing = [path for path in blocks if network.place(path) not in named]
        if missing and not any(isinstance(x, optax.MaskedNode) for x in named.values()):
            raise ValueError(f"every block needs a kernel in params, missing: {missing}")
        leaves = {path: leaf for path, leaf in named.items() if not _is_absent(leaf)}
        kernels = dict.fromkeys(blocks, jnp.zeros(0))
        for path, block in blocks.items():
            if network.place(path) in leaves:
                kernel = outputs_last(leaves[network.place(path)], layout)
                own_scales[path], own_weights[path], kernels[path] = _started(
                    path, block, weights and weights[path], scales[path], kernel
                )
        state = inner.init(network.inner_tree(leaves, own_weights))
        return ReparameterizeState(own_scales, own_weights, kernels, state)

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("params must be given to update: the kernels follow the branches")
        check_updates(updates, params)
        moves, inner_state = inner.update(
            network.pulled_back(updates, state),
            state.inner,
            network.inner_tree(by_path(params), state.weights),
            **network.of_branches(extra_args, params, state),
        )
        moves, weights, kernels = network.pushed_forward(by_path(moves), params, state)
        outer = jax.tree_util.tree_map_with_path(lambda path, _: moves[path_str(path)], updates)
        return outer, ReparameterizeState(state.scales, weights, kernels, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
