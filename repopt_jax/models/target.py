"""The plain network as it starts under a RepOptimizer, and what its optimizer needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import jax.numpy as jnp
import optax
from flax import nnx

from repopt_jax.branches import Block, BranchMult, grad_mults, init_weights, merge
from repopt_jax.models.branched_layers import check_layers, copy_model
from repopt_jax.models.checks import check_rngs
from repopt_jax.reparameterization import reparameterize
from repopt_jax.scales import blocks_of, check_scales
from repopt_jax.tree_paths import by_path, layer_at

if TYPE_CHECKING:
    from jaxtyping import Array, PyTree

ModelT = TypeVar("ModelT", bound=nnx.Module)
Weights = dict[str, dict[str, "Array"]]


def start_scales(
    blocks: Mapping[str, Block],
    scales: Mapping[str, Mapping[str, Array]],
    identity: Literal["searched", "one"],
) -> Mapping[str, Mapping[str, Array]]:
    """The vectors that the branches start from: `scales`, with 1 for identities if wanted.

    Args:
      blocks: path of a layer -> its branches.
      scales: path of a layer -> branch name -> vector.
      identity: where identity branches start: "searched", the value in `scales` (the authors'
        default), or "one" (the paper).

    Raises:
      ValueError: `identity` is neither.

    >>> from repopt_jax import Identity
    >>> scales = {"conv": {"identity": jnp.array([0.5, 2.0])}}
    >>> start_scales({"conv": {"identity": Identity()}}, scales, "one")["conv"]["identity"].tolist()
    [1.0, 1.0]
    """
    if identity not in ("searched", "one"):
        raise ValueError(f"identity must be 'searched' or 'one', got {identity!r}")
    if identity == "searched":
        return scales
    return {
        path: {n: v if blocks[path][n].scaled else jnp.ones_like(v) for n, v in vectors.items()}
        for path, vectors in scales.items()
    }


def _draw_kernels(
    model: nnx.Module,
    blocks: Mapping[str, Block],
    scales: Mapping[str, Mapping[str, Array]],
    identity: str,
    rngs: nnx.Rngs,
) -> Weights:
    """Set the kernels of `model` by the Rule of Initialization; return the branches' weights."""
    check_rngs(rngs)
    check_layers(model, blocks)
    check_scales(scales, model, blocks)
    starts = start_scales(blocks, scales, identity)
    drawn = {}
    for path, block in blocks.items():
        kernel = layer_at(model, path).kernel
        weights = init_weights(block, rngs.params(), kernel.shape, kernel.dtype, starts[path])
        vectors = {name: jnp.asarray(v) for name, v in scales[path].items()}
        kernel[...] = merge(block, weights, vectors, kernel.shape)
        drawn[path] = weights
    return drawn


def init_target(
    model: ModelT,
    scales: Mapping[str, Mapping[str, Array]],
    *,
    blocks: Mapping[str, Block] | None = None,
    identity: Literal["searched", "one"] = "searched",
    rngs: nnx.Rngs,
) -> ModelT:
    """Draw the kernels of a plain network by the Rule of Initialization, in place.

    ``W = sum_b s_b * E_b(w_b)`` with every ``w_b`` drawn by its own initializer.

    Args:
      model: a plain network.
      scales: path of a layer -> branch name -> vector.
      blocks: path of a layer -> its branches. None: those that the network states.
      identity: where identity branches start, see `start_scales`.
      rngs: draws the branches' weights.

    Returns:
      `model`.

    Raises:
      ValueError: `identity` is neither, `scales` are not those of the blocks (as ``Scales.check``),
        or a layer or branch is refused.

    >>> from repopt_jax import Full
    >>> model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    >>> scales = {"layers/0": {"full": jnp.array([0.0, 1.0])}}
    >>> model = init_target(model, scales, blocks={"layers/0": {"full": Full()}}, rngs=nnx.Rngs(0))
    >>> bool((model.layers[0].kernel[:, 0] == 0).all())
    True
    """
    _draw_kernels(model, blocks_of(model, blocks), scales, identity, rngs)
    return model


@dataclasses.dataclass(frozen=True)
class Target(Generic[ModelT]):
    """A plain network that starts as its branches would, and the parts of its optimizer.

    Attributes:
      model: the network.
      blocks: path of a layer -> its branches.
      scales: path of a layer -> branch name -> vector.
      weights: path of a layer -> branch name -> the weights whose sum its kernel is.
    """

    model: ModelT
    blocks: Mapping[str, Block]
    scales: Mapping[str, Mapping[str, Array]]
    weights: Weights

    def grad_mults(
        self,
        rule: Literal["linear", "direction"] = "linear",
        *,
        wrt: nnx.filterlib.Filter = nnx.Param,
    ) -> PyTree[BranchMult]:
        """The multipliers for `repopt_sgd` ("linear") or `repopt_adamw` ("direction").

        Args:
          rule: as in `repopt_jax.grad_mults`.
          wrt: the parameters that are trained, as `nnx.Optimizer` takes it. Blocks whose kernels
            it leaves out have no multipliers.
        """
        return grad_mults(nnx.state(self.model, wrt), self._trained(wrt), self.scales, rule)

    def reparameterize(
        self,
        optimizer: optax.GradientTransformation,
        *,
        wrt: nnx.filterlib.Filter = nnx.Param,
    ) -> optax.GradientTransformationExtraArgs:
        """Any optimizer, exactly, started at this network's branches; see `reparameterize`.

        Args:
          optimizer: any Optax optimizer, with its learning rate.
          wrt: the parameters that are trained, as in `grad_mults`.
        """
        blocks = self._trained(wrt)
        return reparameterize(optimizer, blocks, self.scales, weights=self.weights)

    def _trained(self, wrt: nnx.filterlib.Filter) -> dict[str, Block]:
        """The blocks whose kernels `wrt` lets pass."""
        trained = by_path(nnx.state(self.model, wrt))
        return {path: b for path, b in self.blocks.items() if f"{path}/kernel" in trained}


def target_network(
    model: ModelT,
    scales: Mapping[str, Mapping[str, Array]],
    *,
    blocks: Mapping[str, Block] | None = None,
    identity: Literal["searched", "one"] = "searched",
    rngs: nnx.Rngs,
) -> Target[ModelT]:
    """A copy of `model` started by the Rule of Initialization, and the parts of its optimizer.

    Args:
      model: a plain network; it is not changed.
      scales: what the search yielded, such as a `Scales`.
      blocks: path of a layer -> its branches. None: those that the network states.
      identity: where identity branches start, see `start_scales`.
      rngs: draws the branches' weights.

    Raises:
      ValueError: as `init_target` does.

    >>> import optax, repopt_jax
    >>> model = nnx.Sequential(nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0)))
    >>> blocks = repopt_jax.find_blocks(model, repopt_jax.repvgg_branches)
    >>> scales = repopt_jax.Scales.initial(model, blocks)
    >>> target = target_network(model, scales, blocks=blocks, rngs=nnx.Rngs(1))
    >>> closed_form = repopt_jax.repopt_sgd(0.1, target.grad_mults())
    >>> state = closed_form.init(nnx.state(target.model, nnx.Param))
    >>> any_optimizer = target.reparameterize(optax.lamb(1e-3))
    >>> state = any_optimizer.init(nnx.state(target.model, nnx.Param))
    """
    blocks = blocks_of(model, blocks)
    model = copy_model(model)
    return Target(model, blocks, scales, _draw_kernels(model, blocks, scales, identity, rngs))
