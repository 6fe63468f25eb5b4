"""What the devices do: memory, share of their peak speed, and a profile on request."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

if TYPE_CHECKING:
    from jaxtyping import PyTree

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
      graphdef: of the model in evaluation mode.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      stats: all else in it, likewise.
      image_shape: height, width, channels.
    """

    def forward(params, stats, images):
        return nnx.merge(graphdef, params, stats)(images)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return _flops(jax.make_jaxpr(forward)(params, stats, images).jaxpr)


def _flops(jaxpr) -> int:
    # XLA's own count is not to be had before compilation on GPU and TPU.
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
    """Most bytes in use at a time on the first local device; None where jax does not know."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Profile:
    """Records some steps for TensorBoard's profiler, into ``<workdir>/profile``.

    Args:
      workdir: the part's directory.
      first: number of steps done before; ten more pass by unrecorded.
      steps: how many to record; 0 for none.
    """

    def __init__(self, workdir: epath.PathLike, first: int, steps: int):
        self._folder = str(epath.Path(workdir) / "profile")
        self._begin, self._end = first + 11, first + 11 + steps
        self._running = False

    def step(self, step: int, state: PyTree):
        """To be called before each step is dispatched, with the state that it starts from."""
        if step == self._begin < self._end:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif step == self._end and self._running:
            jax.block_until_ready(state)
            self.close()

    def close(self):
        """Write what has been recorded."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
