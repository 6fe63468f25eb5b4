"""Devices: the mesh, where the state and the batches live on it.

One mesh with the axes ``data`` and ``fsdp``. Batches are split over both, the state is replicated
over ``data`` and split over ``fsdp`` along the output channels, which all of a kernel, its
BatchNorm and its compact multiplier share. On one device the same code places everything there.

Readers who look for `pmap`: it is in maintenance mode; `jax.jit` with `NamedSharding` is what it
and `pjit` became.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jaxtyping import PyTree

# Splitting small arrays costs more communication than it saves memory.
FSDP_MIN_SIZE = 2**16


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """A mesh over all devices.

    Args:
      fsdp: over how many devices to split the state; must divide the number of devices, and of
        those of a slice where there are several: of TPUs, or what jax takes for one of GPUs, a
        host. The state is never split across them.
      devices: the devices. None: all.

    Raises:
      ValueError: if `fsdp` does not divide the number of devices.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1}
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    of_a_slice = len(devices) // slices
    if fsdp < 1 or of_a_slice % fsdp:
        among = f" of each of {slices} slices" if slices > 1 else ""
        raise ValueError(f"fsdp must divide the number of devices {of_a_slice}{among}, got {fsdp}")
    axes, types = ("data", "fsdp"), (AxisType.Auto,) * 2
    shape = (of_a_slice // fsdp, fsdp)
    if slices == 1:
        return jax.make_mesh(shape, axes, types, devices=devices)
    grid = mesh_utils.create_hybrid_device_mesh(
        shape, (slices, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, axes, axis_types=types)


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """The sharding of every array of `state` (arrays or `jax.ShapeDtypeStruct`)."""
    fsdp = mesh.shape["fsdp"]

    def place(leaf):
        split = fsdp > 1 and leaf.size >= FSDP_MIN_SIZE and leaf.shape[-1] % fsdp == 0
        spec = (None,) * (leaf.ndim - 1) + ("fsdp",) if split else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, state)


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """`tree` whole on every device, so that every process can read it."""
    return _replicator(mesh)(tree)


@functools.cache
def _replicator(mesh: Mesh):
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays from this process's part of a batch, split over all devices."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}


def samples_per_group(batch_size: int, accumulation: int, bn_group: int | None, mesh: Mesh) -> int:
    """Samples per BatchNorm group: `bn_group`, or all that a device holds at a time if None.

    A group that spans devices would need communication in every layer, so it is refused.

    Raises:
      ValueError: if the batch cannot be divided into parts, devices and groups.

    >>> samples_per_group(256, 1, 32, make_mesh(devices=jax.devices()[:1]))
    32
    """
    if batch_size < 1 or accumulation < 1:
        raise ValueError(
            f"batch_size and accumulation must be at least 1, got {batch_size} and {accumulation}"
        )
    if batch_size % (mesh.size * accumulation):
        raise ValueError(
            f"batch_size must be divisible by {mesh.size} devices times accumulation "
            f"{accumulation}, got {batch_size}"
        )
    per_device = batch_size // (mesh.size * accumulation)
    group = per_device if bn_group is None else bn_group
    if group < 1 or per_device % group:
        raise ValueError(
            f"bn_group must divide the {per_device} samples that a device holds at a time "
            f"(batch_size {batch_size}, {mesh.size} devices, accumulation {accumulation}), "
            f"got {group}"
        )
    return group
