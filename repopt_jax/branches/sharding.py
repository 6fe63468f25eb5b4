"""Where branches lie: their weights beside the kernel's shards, their algebra left to XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repopt_jax.branches.branch import is_known

if TYPE_CHECKING:
    from jaxtyping import Array


def _sharding_of(x: Array) -> NamedSharding | None:
    """The mesh and the axes of `x`; None on one device, or where `jax.jit` leaves them open."""
    found = getattr(x, "sharding", None) if is_known(x) else jax.typeof(x).sharding
    return found if isinstance(found, NamedSharding) and not found.mesh.empty else None


def placed_like(x: Any, kernel: Array) -> Array:
    """A copy of `x` on the devices of `kernel`, split along the last axes that both have.

    An axis of another length than the kernel's is not split.

    >>> placed_like([1.0, 2.0], jnp.ones((3, 3, 4, 2))).tolist()
    [1.0, 2.0]
    """
    copy, found = jnp.array(x), _sharding_of(kernel)
    if found is None:
        return copy
    axes = (*found.spec, *(None,) * (kernel.ndim - len(found.spec)))
    pairs = zip(reversed(copy.shape), reversed(kernel.shape), reversed(axes), strict=False)
    spec = [axis if size == whole else None for size, whole, axis in pairs]
    return _put(copy, found, spec[::-1])


def replicated_like(x: Any, kernel: Array) -> Array:
    """A copy of `x` on every device of `kernel`."""
    copy, found = jnp.array(x), _sharding_of(kernel)
    return copy if found is None else _put(copy, found, [None] * copy.ndim)


def _put(x: Array, kernel: NamedSharding, axes: list) -> Array:
    # As jit states the sharding of its results: otherwise the second step is compiled anew.
    while axes and axes[-1] is None and AxisType.Explicit not in kernel.mesh.axis_types:
        axes = axes[:-1]
    sharding = NamedSharding(kernel.mesh, PartitionSpec(*axes))
    return jax.device_put(x, sharding) if is_known(x) else jax.sharding.reshard(x, sharding)


def in_auto_mode(function: Callable, like: Any, *args: Any) -> Any:
    """``function(*args)`` with results that are split as the arrays in `like` are.

    Under an explicit mesh every operation must say how its result is split, which a branch's
    `embed` and its transpose do not. XLA decides instead, as it does under other meshes.
    """
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    meshes = [sharding.mesh for sharding in jax.tree.leaves(shardings)]
    axes = {
        name
        for mesh in meshes
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    if not axes:
        return function(*args)
    return jax.sharding.auto_axes(function, axes=tuple(axes), out_sharding=shardings)(*args)
