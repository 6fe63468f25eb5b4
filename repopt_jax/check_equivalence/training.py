"""Shared by all checks: both networks start alike, train on the same batches, and are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from flax import nnx

from repopt_jax.branches import Block, grad_mults
from repopt_jax.models import search_layers, search_network
from repopt_jax.reparameterization import reparameterize
from repopt_jax.tree_paths import layer_at

if TYPE_CHECKING:
    from jaxtyping import Array, PyTree

    Loss = Callable[[nnx.Module, PyTree], Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """How the network of branches and the plain one are trained.

    Attributes:
      csla: makes the optimizer of the network of branches.
      rule: of the multipliers. None: the plain network trains under `reparameterize`.
      repopt: makes the plain network's optimizer from multipliers; None with `reparameterize`.
      bound: the largest relative difference that passes.
    """

    csla: Callable[[], optax.GradientTransformation]
    rule: str | None = None
    repopt: Callable[[Any], optax.GradientTransformation] | None = None
    bound: float = 1e-11


def start(
    plain: nnx.Module, blocks: Mapping[str, Block], *, mixed: bool, rngs: nnx.Rngs
) -> tuple[nnx.Module, nnx.Module, dict[str, dict[str, np.ndarray]]]:
    """`plain` with the merged kernels of a network of branches, that network, and its scales.

    The scales have sizes of 0.5 to 1.5, and both signs if `mixed`.
    """
    rng = np.random.default_rng(0)

    def draw(width):
        sign = rng.choice([-1.0, 1.0], width) if mixed else 1.0
        return rng.uniform(0.5, 1.5, width) * sign

    widths = {path: layer_at(plain, path).kernel.shape[-1] for path in blocks}
    scales = {p: {name: draw(widths[p]) for name in block} for p, block in blocks.items()}
    csla = search_network(plain, blocks, kind="csla", scales=scales, rngs=rngs)
    for path, layer in search_layers(csla).items():
        layer_at(plain, path).kernel[...] = layer.kernel
    return plain, csla, scales


def differences(
    plain: nnx.Module,
    csla: nnx.Module,
    scales: Mapping[str, Mapping[str, Array]],
    method: Method,
    loss: Loss,
    batches: PyTree,
) -> dict[str, float]:
    """``max|W_plain - W_csla| / max|W_csla|`` by path of the layer; needs float64.

    Both networks of `start` are trained by `method`, one step for every entry of the leading axis
    of `batches`, on `loss` of a network and a batch.
    """
    layers = search_layers(csla)
    blocks = {path: dict(layer.block) for path, layer in layers.items()}
    if method.rule is None:
        weights = {
            path: {name: w[...] for name, w in layer.branch_weights.items()}
            for path, layer in layers.items()
        }
        tx = reparameterize(method.csla(), blocks, scales, weights=weights)
    else:
        params = nnx.state(plain, nnx.Param)
        tx = method.repopt(grad_mults(params, blocks, scales, method.rule))
    found = _trained_kernels(plain, layers, tx, loss, batches)
    true = _trained_kernels(csla, layers, method.csla(), loss, batches)
    return {p: float(np.abs(found[p] - true[p]).max() / np.abs(true[p]).max()) for p in layers}


def _trained_kernels(model, paths, tx, loss: Loss, batches) -> dict[str, np.ndarray]:
    """Kernels by path of the layer after one step of `tx` for every batch."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def value(params, rest, batch):
        net = nnx.merge(graphdef, params, rest, copy=True)
        return loss(net, batch), nnx.state(net, nnx.Not(nnx.Param))

    def step(carry, batch):
        params, rest, opt_state = carry
        grads, rest = jax.grad(value, has_aux=True)(params, rest, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), None

    @jax.jit
    def run(params, rest, batches):
        (params, rest, _), _ = jax.lax.scan(step, (params, rest, tx.init(params)), batches)
        trained = nnx.merge(graphdef, params, rest)
        return {path: layer_at(trained, path).kernel[...] for path in paths}

    return jax.device_get(run(params, rest, batches))
