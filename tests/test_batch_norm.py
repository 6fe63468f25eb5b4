"""BatchNorm's one pass and its own derivative give the numbers of the plain formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repopt_jax.models.layers import batch_normalize

EPSILON = 1e-5


def plain(x, scale, bias):
    axes = tuple(range(1, x.ndim - 1))
    mean = x.mean(axes, keepdims=True)
    var = jnp.square(x - mean).mean(axes, keepdims=True)
    vectors = (v.reshape((1,) * (x.ndim - 1) + v.shape) for v in (scale, bias))
    scale, bias = vectors
    return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias


def own(x, scale, bias):
    return batch_normalize(x, scale, bias, EPSILON)[0]


def plain_relu(x, scale, bias):
    return jax.nn.relu(plain(x, scale, bias))


def own_relu(x, scale, bias):
    return batch_normalize(x, scale, bias, EPSILON, True)[0]


both = pytest.mark.parametrize("own, plain", [(own, plain), (own_relu, plain_relu)])


def drawn(dtype=np.float64, shape=(3, 4, 5, 2, 6)):
    """Groups of images, scale, bias and a cotangent."""
    draw = np.random.default_rng(0).normal
    channels = shape[-1:]
    return [jnp.asarray(draw(1, 2, s), dtype) for s in (shape, channels, channels, shape)]


def loss(normalize):
    def of(x, scale, bias, weight):
        return jnp.sum(normalize(x, scale, bias) ** 2 * weight)

    return of


@both
def test_derivatives_are_those_of_the_plain_formula(x64, own, plain):
    *inputs, weight = drawn()

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(normalize, *inputs):
        return normalize(*inputs), *jax.grad(loss(normalize), argnums=(0, 1, 2))(*inputs, weight)

    (found, *ours), (wanted, *expected) = (with_gradients(f, *inputs) for f in (own, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-12)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-11)


@both
def test_second_derivatives_are_right_too(x64, own, plain):
    """As a penalty on the gradient takes them."""
    x, scale, bias, weight = drawn(shape=(2, 3, 2, 2))

    def penalty(normalize):
        inner = jax.grad(loss(normalize), argnums=(0, 1))
        return lambda x: sum(jnp.sum(g**2) for g in inner(x, scale, bias, weight))

    ours, expected = (jax.jit(jax.grad(penalty(f)))(x) for f in (own, plain))
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e3])
def test_a_mean_of_a_thousand_deviations_does_not_lose_the_variance(mean):
    """In float32, where E[x^2] - E[x]^2 is off by a tenth."""
    x = np.random.default_rng(0).normal(mean, 1, (2, 8, 16, 16, 4)).astype(np.float32)
    exact = x.astype(np.float64).var((1, 2, 3))
    y, found_mean, var = batch_normalize(jnp.asarray(x), jnp.ones(4), jnp.zeros(4), EPSILON)
    np.testing.assert_allclose(var.reshape(2, 4), exact, rtol=1e-5)
    np.testing.assert_allclose(found_mean.reshape(2, 4), x.mean((1, 2, 3), np.float64), 1e-6, 1e-6)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean((1, 2, 3), keepdims=True)) / np.sqrt(
        wide.var((1, 2, 3), keepdims=True) + EPSILON
    )
    np.testing.assert_allclose(y, expected, atol=1e-3 if mean else 1e-5)


@both
def test_bfloat16_keeps_its_type_and_float32_statistics(own, plain):
    x, scale, bias, weight = drawn(np.float32)
    half = x.astype(jnp.bfloat16)
    y, mean, var = batch_normalize(half, scale, bias, EPSILON)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    found = jax.eval_shape(jax.grad(loss(own), argnums=(0, 1, 2)), half, scale, bias, weight)
    assert [g.dtype for g in found] == [jnp.bfloat16, jnp.float32, jnp.float32]
    wide = half.astype(jnp.float32)
    y = own(half, scale, bias)
    np.testing.assert_allclose(y, plain(wide, scale, bias), rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(mean, wide.mean((1, 2, 3), keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("own", [own, own_relu])
def test_the_derivative_keeps_no_array_of_the_inputs_size_but_the_input(own):
    *inputs, _ = drawn(np.float32)
    x = inputs[0].astype(jnp.bfloat16)
    _, pull_back = jax.vjp(own, x, *inputs[1:])
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.size >= x.size]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]


def test_forward_mode_is_refused():
    *inputs, _ = drawn(np.float32)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(own, tuple(inputs), tuple(inputs))
