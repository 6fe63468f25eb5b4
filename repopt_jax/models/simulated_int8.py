"""Simulated INT8: a folded network that computes what an INT8 graph of it computes.

Quantization-aware training trains such a network. The simulation agrees with runtimes to the bit,
whether they compute in integers or in floats, because no number in it needs more digits than
float32 has: layers add up whole numbers of steps, the step of an activation is a power of two, and
that of a kernel has 7 significant bits. (Sums may have 17 bits then; larger ones are rare.)

Papers: quantization-aware training, arXiv 1712.05877, section 3; steps that are powers of two,
arXiv 1903.08066. Zero is a step, and there are 127 on either side of it.

Not by Qwix (0.1.8): its layers keep their statistics by changing modules from inside JAX's traces,
which Flax refuses under `jax.value_and_grad` of a merged model, as the training step has it, and in
convolutions that trace a part of themselves, as `small_maps` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.models.branched_layers import copy_model
from repopt_jax.models.search import swap_layers

if TYPE_CHECKING:
    from jaxtyping import Array

ModelT = TypeVar("ModelT", bound=nnx.Module)

STEPS = 127
KERNEL_BITS, ACTIVATION_BITS = 7, 1  # significant ones in the size of a step
MOMENTUM = 0.1  # share of a batch in the scales of activations


def kernel_scale(kernel: Array, *, per_channel: bool) -> Array:
    """The size of a step of a kernel: its largest number is 127 steps, or a little less.

    Args:
      kernel: with its outputs on the last axis.
      per_channel: one size for every output, with axes of 1 before. False: one for all.

    >>> kernel = jnp.array([[254.0, 1.0], [-127.0, -25.4]])
    >>> [kernel_scale(kernel, per_channel=each).round(1).tolist() for each in (False, True)]
    [2.0, [[2.0, 0.20000000298023224]]]
    """
    axes = tuple(range(kernel.ndim - 1)) if per_channel else None
    largest = jax.lax.stop_gradient(jnp.abs(kernel).max(axes, keepdims=per_channel))
    return step_size(largest, KERNEL_BITS)


def in_steps(x: Array, scale: Array, steps: float | None = STEPS) -> Array:
    """``clip(round(x / scale), -steps, steps)``, whose derivative is that of ``clip(x / scale)``.

    Args:
      x: any array.
      scale: size of a step, which has no derivative.
      steps: where to clip. None: nowhere.

    >>> x = jnp.array([-300.0, 0.6, 1.5, 2.5])
    >>> in_steps(x, 1.0).tolist(), jax.grad(lambda x: in_steps(x, 2.0).sum())(x).tolist()
    ([-127.0, 1.0, 2.0, 2.0], [0.0, 0.5, 0.5, 0.5])
    """
    x = x / jax.lax.stop_gradient(scale)
    if steps is not None:
        x = jnp.clip(x, -steps, steps)
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def step_size(largest: Array, bits: int) -> Array:
    """The size of a step: ``largest / 127``, rounded up to a number of `bits` significant bits.

    Where `largest` is zero, so that any size will do, it is that of 1.

    >>> step_size(jnp.array([254.0, 300.0, 0.0]), 1).tolist()
    [2.0, 4.0, 0.015625]
    """
    mantissa, exponent = jnp.frexp(jnp.where(largest > 0, largest, 1) / STEPS)
    return jnp.ldexp(jnp.ceil(mantissa * 2**bits), exponent - bits)


class SimulatedInt8(nnx.Module):
    """A convolution or dense layer that computes as its INT8 version does.

    With ``sx`` and ``sk`` the sizes of a step of the input and of the kernel::

        y = sx * sk * (clip(round(x / sx)) * round(kernel / sk) + round(bias / (sx * sk)))

    ``127 * sk`` is the largest number of the kernel as it is now, ``127 * sx`` a moving average of
    the largest inputs in training batches, both rounded up, see `step_size`. Derivatives pass
    through the rounding, and end where numbers are clipped. All of it is in the type of the kernel.

    Args:
      layer: the layer, which keeps its parameters' names.
      per_channel: one ``sk`` for every output. False: one for all.
    """

    def __init__(self, layer: nnx.Conv | nnx.Linear, *, per_channel: bool):
        layer.dtype = None  # steps must stay whole numbers in sums, which bfloat16 rounds
        self.layer_def = nnx.graphdef(layer)
        self.kernel, self.bias = layer.kernel, layer.bias
        self.largest_input = nnx.BatchStat(jnp.zeros((), layer.kernel.dtype))
        self.per_channel = per_channel
        self.use_running_average = False  # `train` and `eval` set it

    @property
    def input_scale(self) -> Array:
        """The size of a step of the input."""
        return step_size(self.largest_input[...], ACTIVATION_BITS)

    def __call__(self, x: Array) -> Array:
        """Run the layer; in training also update the input's scale."""
        kernel = self.kernel[...]
        x = x.astype(kernel.dtype)
        if not self.use_running_average:
            old, new = self.largest_input[...], jax.lax.stop_gradient(jnp.abs(x).max())
            self.largest_input[...] = jnp.where(old > 0, old + MOMENTUM * (new - old), new)
        scale = kernel_scale(kernel, per_channel=self.per_channel)
        product_scale = self.input_scale * scale
        steps = {"kernel": nnx.Param(in_steps(kernel, scale, None))}
        if self.bias is not None:
            steps["bias"] = nnx.Param(in_steps(self.bias[...], product_scale.ravel(), None))
        layer = nnx.merge(self.layer_def, steps)
        return layer(in_steps(x, self.input_scale)) * product_scale

    def in_floats(self) -> nnx.Conv | nnx.Linear:
        """The layer that computes in floats."""
        biases = {} if self.bias is None else {"bias": self.bias}
        return nnx.merge(self.layer_def, {"kernel": self.kernel, **biases})


def simulate_int8(model: ModelT, *, per_channel: bool) -> ModelT:
    """A copy of a folded network that computes in simulated INT8.

    Every `nnx.Conv` and `nnx.Linear` becomes a `SimulatedInt8` with the same parameters. The scales
    of activations are found in training.

    Args:
      model: of `fold`, or any network of your own without BatchNorm.
      per_channel: one scale for each output of a kernel. False: one for each kernel.

    >>> layer = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> layer.kernel[...] = jnp.array([[1.0], [0.5]])
    >>> model = simulate_int8(nnx.Sequential(layer), per_channel=False)
    >>> x = jnp.array([[1.0, 1.0]])
    >>> round(model(x).item(), 4)  # 1.5 in floats
    1.4996
    """
    copy = copy_model(model)
    layers = [m for _, m in nnx.iter_modules(copy) if isinstance(m, (nnx.Conv, nnx.Linear))]
    new = {id(layer): (layer, SimulatedInt8(layer, per_channel=per_channel)) for layer in layers}
    return swap_layers(copy, new, set())


def simulated_layers(model: nnx.Module) -> dict[str, SimulatedInt8]:
    """The layers in simulated INT8 by path; none of any other network."""
    found = nnx.iter_modules(model)
    return {"/".join(map(str, path)): m for path, m in found if isinstance(m, SimulatedInt8)}


def float_network(model: ModelT) -> ModelT:
    """A copy of a network of `simulate_int8` that computes in floats, with the same parameters.

    >>> model = nnx.Sequential(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    >>> x = jnp.ones((1, 2))
    >>> (float_network(simulate_int8(model, per_channel=True))(x) == model(x)).item()
    True
    """
    copy = copy_model(model)
    new = {id(layer): (layer, layer.in_floats()) for layer in simulated_layers(copy).values()}
    return swap_layers(copy, new, set())
