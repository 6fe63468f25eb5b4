"""Shared by all checks: training for some steps, and comparing the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax.branches import Block
from repopt_jax.models import search_layers
from repopt_jax.tree_paths import layer_at

if TYPE_CHECKING:
    from jaxtyping import Array, PyTree


def random_scales(
    model: Any, blocks: Mapping[str, Block], *, mixed: bool, seed: int = 0
) -> dict[str, dict[str, Array]]:
    """Scales of size 0.5 to 1.5, of both signs if `mixed`, for every branch of `blocks`."""
    rng = np.random.default_rng(seed)

    def draw(width):
        sign = rng.choice([-1.0, 1.0], width) if mixed else 1.0
        return jnp.asarray(rng.uniform(0.5, 1.5, width) * sign)

    return {
        path: {name: draw(layer_at(model, path).kernel.shape[-1]) for name in block}
        for path, block in blocks.items()
    }


def train(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    loss: Callable[[nnx.Module, PyTree], Array],
    batches: PyTree,
) -> nnx.Module:
    """`model` after one step of `tx` for every entry of the leading axis of `batches`."""
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
        start = (params, rest, tx.init(params))
        return jax.lax.scan(step, start, batches)[0][:2]

    return nnx.merge(graphdef, *run(params, rest, batches))


@nnx.jit
def _kernels(plain: nnx.Module, csla: nnx.Module) -> dict[str, tuple[Array, Array]]:
    return {
        path: (layer_at(plain, path).kernel[...], layer.kernel)
        for path, layer in search_layers(csla).items()
    }


def differences(plain: nnx.Module, csla: nnx.Module) -> dict[str, float]:
    """``max|W_plain - W_csla| / max|W_csla|`` by path of the layer."""
    return {
        path: float(np.abs(found - true).max() / np.abs(true).max())
        for path, (found, true) in jax.device_get(_kernels(plain, csla)).items()
    }
