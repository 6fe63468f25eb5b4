"""Devices: the mesh, the places of state and batches on it, and the devices' speed and memory.

One mesh with the axes ``data`` and ``fsdp``. Batches are split over both, the state is replicated
over ``data`` and split over ``fsdp`` along the output channels, which all of a kernel, its
BatchNorm and its compact multiplier share. On one device the same code places everything there.

Readers who look for `pmap`: it is in maintenance mode; `jax.jit` with `NamedSharding` is what it
and `pjit` became.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jaxtyping import PyTree

# Splitting small arrays costs more communication than it saves memory.
FSDP_MIN_SIZE = 2**16

# Peak floating-point operations per second of one device in bfloat16 without sparsity, by what
# `device_kind` begins with. From the makers' data sheets.
PEAK_BFLOAT16 = {
    "TPU v2": 22.5e12,  # per core, as jax counts; a chip has two
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


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
    return jax.jit(_identity, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)


def _identity(x):  # one function, so that jax compiles it once
    return x


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


def peak_flops(device_kind: str) -> float | None:
    """Peak speed of a device in bfloat16; None where it is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
    """
    known = sorted(PEAK_BFLOAT16, key=len, reverse=True)
    return next((PEAK_BFLOAT16[k] for k in known if device_kind.startswith(k)), None)


def forward_flops(
    graphdef: nnx.GraphDef, params: PyTree, stats: PyTree, image_shape: tuple[int, int, int]
) -> int:
    """Floating-point operations of the network on one image; a training step takes three times.

    Two per multiplication of convolutions and matrix products, those with padding included, as
    papers count; all else is left out, the merging of a search's kernels too.

    Args:
      graphdef: of the model.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      stats: all else in it, likewise.
      image_shape: height, width, channels.
    """

    def forward(params, stats, images):
        model = nnx.merge(graphdef, params, stats)
        model.eval()
        return model(images)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return _flops(jax.make_jaxpr(forward)(params, stats, images).jaxpr)


def _flops(jaxpr) -> int:
    # On GPU and TPU, XLA counts only after compiling.
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // outputs
        elif name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "cond":  # what another platform would run costs at most as much
            total += max(_flops(branch.jaxpr) for branch in parameters["branches"])
        else:
            for value in parameters.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += parameters.get("length", 1) * _flops(inner)
    return total


def peak_memory() -> int | None:
    """Peak memory of the first local device in bytes; None where jax does not know it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Profile:
    """Records some steps for TensorBoard's profiler, into ``<workdir>/profile``.

    Args:
      workdir: the part's directory.
      first: number of steps done before; the next ten are not recorded.
      steps: how many to record, and the rest of a chunk; 0 for none.
    """

    def __init__(self, workdir: epath.PathLike, first: int, steps: int):
        self._folder = str(epath.Path(workdir) / "profile")
        self._begin, self._steps = first + 11, steps
        self._end: int | None = None  # known while it records

    def step(self, step: int, state: PyTree):
        """To be called before a chunk is dispatched, with its first step and the state then."""
        if self._end is None and self._steps and step >= self._begin:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._end, self._steps = step + self._steps, 0
        elif self._end is not None and step >= self._end:
            jax.block_until_ready(state)
            self.close()

    def close(self):
        """Write what has been recorded."""
        if self._end is not None:
            self._end = None
            jax.profiler.stop_trace()
