"""Layers that behave as torch's do: grouped BatchNorm, squeeze-excite, initial values.

Deviations from `flax.nnx`: BatchNorm takes its statistics over groups of consecutive samples, as
data-parallel torch training does over the samples of one GPU, and keeps the *unbiased* variance
in the running value; convolutions and dense layers start from torch's default distribution.
Images are NHWC, kernels HWIO.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.branches import uniform_fan_in, wide_type
from repopt_jax.models.small_maps import conv_general_dilated

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float


def layer_types(
    *, bn_group: int | None = None, norm: Mapping[str, float] | None = None, **types: Any
) -> dict[str, Any]:
    """The options of a network that are not those of its BatchNorms."""
    del bn_group, norm
    return types


def conv(
    in_features: int,
    out_features: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    use_bias: bool = False,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution padded by ``size // 2`` on every side, as torch pads it.

    "SAME" would pad a strided convolution on one side only. Even windows, those of patches, are
    not padded.
    """
    layer = nnx.Conv(
        in_features,
        out_features,
        (size, size),
        stride,
        padding=((size // 2 * (size % 2),) * 2,) * 2,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=uniform_fan_in,
        conv_general_dilated=conv_general_dilated,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
    if use_bias:
        draw_bias(layer, rngs)
    return layer


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A dense layer with torch's initial weights and bias, ``U(+-1 / sqrt(in_features))``."""
    layer = nnx.Linear(
        in_features,
        out_features,
        kernel_init=uniform_fan_in,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
    draw_bias(layer, rngs)
    return layer


def draw_bias(layer: nnx.Conv | nnx.ConvTranspose | nnx.Linear, rngs: nnx.Rngs) -> None:
    """Give the bias the bounds of the kernel; its own shape does not know the fan-in."""
    bound = 1 / math.sqrt(math.prod(layer.kernel.shape[:-1]))
    shape, dtype = layer.bias.shape, layer.bias.dtype
    # `layer.bias[...] = ` would ask a traced array for its sharding, which takes long to refuse.
    layer.bias.set_value(jax.random.uniform(rngs.params(), shape, dtype, -bound, bound))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_normalize(
    x: Float[Array, "groups group *window channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    epsilon: float,
    relu: bool = False,
) -> tuple[Array, Array, Array]:
    """Normalize every group by its own mean and variance, with ReLU after it if wanted.

    With ``m`` and ``v`` the mean and the biased variance of a group and channel::

        y = (x - m) / sqrt(v + epsilon) * scale + bias
        y = max(y, 0), if `relu`

    Both statistics come from one pass over `x`, and the derivative keeps `x` and no other array of
    its size; it finds from `x` where ReLU was at work. ``m`` and ``v`` have no derivative. A second
    derivative by `jax.grad` is right; `jax.jvp` is refused, as of every function with a derivative
    of its own.

    Args:
      x: its groups come first.
      scale: by channel.
      bias: by channel.
      epsilon: added to the variance.
      relu: whether ReLU follows. Its own derivative would read one more array.

    Returns:
      ``y`` in the type of `x`, and ``m`` and ``v`` with axes of size 1 in the wide type.

    >>> y, mean, var = batch_normalize(jnp.array([[[1.0], [3.0]]]), jnp.ones(1), jnp.zeros(1), 0.0)
    >>> y.ravel().tolist(), mean.item(), var.item()
    ([-1.0, 1.0], 2.0, 1.0)
    """
    return _normalize_forward(x, scale, bias, epsilon, relu)[0]


def _normalize_forward(x, scale, bias, epsilon, relu):
    wide = x.astype(wide_type(x.dtype))
    axes = tuple(range(1, x.ndim - 1))
    # E[x^2] - E[x]^2 would lose the variance where the mean is large; deviations from any one
    # value of the group keep it, and need no second pass.
    origin = wide[(slice(None), *(slice(1) for _ in axes))]
    deviation = wide - origin
    first = deviation.mean(axes, keepdims=True)
    second = jnp.square(deviation).mean(axes, keepdims=True)
    mean, var = origin + first, jnp.maximum(second - jnp.square(first), 0)
    rate = jax.lax.rsqrt(var + epsilon)
    y = _normalized(wide, mean, rate, scale, bias).astype(x.dtype)
    return (jnp.maximum(y, 0) if relu else y, mean, var), (x, mean, rate, scale, bias)


def _normalized(wide, mean, rate, scale, bias):
    return (wide - mean) * (rate * _match(scale, wide)) + _match(bias, wide)


def _normalize_backward(epsilon, relu, saved, cotangents):
    del epsilon
    x, mean, rate, scale, bias = saved
    g = cotangents[0]
    if relu:
        # Else XLA would keep from the forward pass where ReLU was at work: one more large array.
        x, g = jax.lax.optimization_barrier((x, g))
    wide, g = x.astype(mean.dtype), g.astype(mean.dtype)
    if relu:
        g = jnp.where(_normalized(wide, mean, rate, scale, bias) > 0, g, 0)
    normal = (wide - mean) * rate
    axes = tuple(range(1, x.ndim - 1))
    sum_g, sum_gn = g.sum(axes, keepdims=True), (g * normal).sum(axes, keepdims=True)
    count = x.size // (x.shape[0] * x.shape[-1])
    dx = (g - sum_g / count - normal * (sum_gn / count)) * (rate * _match(scale, g))
    by_channel = (total.reshape(-1, x.shape[-1]).sum(0) for total in (sum_gn, sum_g))
    return dx.astype(x.dtype), *(total.astype(scale.dtype) for total in by_channel)


batch_normalize.defvjp(_normalize_forward, _normalize_backward)


class BatchNorm(nnx.Module):
    """BatchNorm whose statistics span groups of `group` consecutive samples.

    In training, with ``m`` and ``v`` the mean and biased variance of a group::

        y = (x - m) / sqrt(v + epsilon) * scale + bias

    and the running values move by ``momentum`` towards the average over the groups of ``m`` and
    of the unbiased ``v``. In evaluation the running values replace ``m`` and ``v``. Statistics
    are float32 (float64 for float64 inputs) whatever the type of ``x``.

    Args:
      features: size of the last axis.
      group: samples per group; must divide the batch. None: the whole batch is one group.
      momentum: share of the new statistics in the running ones.
      epsilon: added to the variance.
      param_dtype: of scale, bias and running statistics.

    Raises:
      ValueError: when called with a batch that `group` does not divide.

    >>> import jax.numpy as jnp
    >>> bn = BatchNorm(1, group=2)
    >>> bn(jnp.array([[0.0], [2.0], [100.0], [102.0]])).round(2).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    >>> bn.mean.tolist(), bn.var.round(2).tolist()
    ([5.099999904632568], [1.100000023841858])
    """

    def __init__(
        self,
        features: int,
        *,
        group: int | None = None,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(features, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(features, param_dtype))
        self.group = group
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_running_average = False

    def __call__(self, x: Float[Array, "batch *window channels"], relu: bool = False) -> Array:
        """Normalize `x`, and rectify it if `relu`; in training, update the running statistics."""
        if self.use_running_average:
            wide = x.astype(wide_type(x.dtype))
            mean, var, scale, bias = (
                _match(v[...], wide) for v in (self.mean, self.var, self.scale, self.bias)
            )
            factor = jax.lax.rsqrt(var + self.epsilon) * scale
            y = ((wide - mean) * factor + bias).astype(x.dtype)
            return jax.nn.relu(y) if relu else y
        group = x.shape[0] if self.group is None else self.group
        if x.shape[0] % group:
            raise ValueError(f"bn_group must divide the batch of {x.shape[0]}, got {group}")
        # Whole groups lie on one device, so this reshape of a sharded batch moves nothing.
        grouped = x.reshape(x.shape[0] // group, group, *x.shape[1:])
        y, mean, var = batch_normalize(grouped, self.scale[...], self.bias[...], self.epsilon, relu)
        count = math.prod(grouped.shape[1:-1])
        self._track(self.mean, mean)
        self._track(self.var, var * (count / max(count - 1, 1)))
        return y.reshape(x.shape)

    def _track(self, running: nnx.Variable, statistic: Array) -> None:
        new = statistic.reshape(-1, statistic.shape[-1]).mean(0).astype(running.dtype)
        # Not by `running[...] = `, as in `draw_bias`.
        running.set_value((1 - self.momentum) * running[...] + self.momentum * new)


def _match(vector: Array, x: Array) -> Array:
    """`vector` over the last axis with the rank and type of `x`."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape[-1:])


def materialize(x: Float[Array, "batch height width channels"]) -> Array:
    """`x` unchanged, as an array that later layers read instead of computing it anew.

    XLA's CPU backend fuses a residual sum into each of its readers, the sum before it included,
    so that a chain of n blocks costs n^2 (16 RepVGG blocks: 88 s to compile and 229 ms a step,
    with this 8 s and 44 ms). It drops optimization barriers, but does not fuse a convolution
    with the unit matrix. Other backends keep `x` as it is.
    """

    def convolve(x):
        unit = jnp.eye(x.shape[-1], dtype=x.dtype)[None, None]
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, unit, (1, 1), "VALID", dimension_numbers=layout)

    return jax.lax.platform_dependent(x, cpu=convolve, default=lambda x: x)


class SqueezeExcite(nnx.Module):
    """Multiply every channel by a gate computed from all channels' averages.

    ``y = x * gate(up(relu(down(average of x over height and width))))``

    Args:
      features: channels of the input and output.
      hidden: channels between `down` and `up`.
      gate: from any number to 0..1.

    Raises:
      ValueError: `hidden` is below 1, as where a network's share of few channels is rounded down.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        gate: Callable[[Array], Array] = jax.nn.sigmoid,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden} for {features} channels")
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.down = conv(features, hidden, 1, use_bias=True, **types)
        self.up = conv(hidden, features, 1, use_bias=True, **types)
        self.gate = gate

    def __call__(
        self, x: Float[Array, "batch height width channels"], seen: Array | None = None
    ) -> Array:
        """Gate `x` by the averages of `seen`. None: by its own."""
        pooled = (x if seen is None else seen).mean((1, 2), keepdims=True)
        return x * self.gate(self.up(jax.nn.relu(self.down(pooled))))
