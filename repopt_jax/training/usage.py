"""What the devices do: memory, share of their peak speed, and a profile on request."""

from __future__ import annotations

import functools
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
) -> float:
    """Floating-point operations of the network on one picture; a training step takes three times.

    Args:
      graphdef: of the model in evaluation mode.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      stats: all else in it, likewise.
      image_shape: height, width, channels.
    """

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return float(_forward.lower(graphdef, params, stats, images).cost_analysis()["flops"])


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, stats, images):
    return nnx.merge(graphdef, params, stats)(images)


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

    def step(self, step: int):
        """To be called before each step is dispatched."""
        if step == self._begin < self._end:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif step == self._end:
            self.close()

    def close(self):
        """Write what has been recorded."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
