"""One function folds every block: what it computes beyond the goldens, and what it refuses."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repopt_jax import Centre, Full, Identity, PooledPointwise
from repopt_jax.deploy import fold_block, fold_pointwise
from repopt_jax.models.layers import BatchNorm

SHAPE = (3, 3, 2, 4)
GROUPS = 2
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape))


def norm(channels):
    bn = types.SimpleNamespace(epsilon=0.1, var=jnp.square(normal(channels)))
    bn.scale, bn.bias, bn.mean = (normal(channels) for _ in range(3))
    return bn


def normalize(x, bn):
    row = {k: getattr(bn, k).reshape(1, 1, 1, -1) for k in ("scale", "bias", "mean", "var")}
    return (x - row["mean"]) / jnp.sqrt(row["var"] + bn.epsilon) * row["scale"] + row["bias"]


def convolve(x, kernel, groups=GROUPS, padding="VALID"):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=layout, feature_group_count=groups
    )


def bordered(x, bn):
    """`x` normalized, with a border of what a 0 becomes."""
    zero = normalize(jnp.zeros((1, 1, 1, x.shape[-1])), bn)
    inside = normalize(x, bn) - zero
    return jnp.pad(inside, ((0, 0), (1, 1), (1, 1), (0, 0))) + zero


def test_folded_branches_compute_what_they_did(x64):
    """Identity, a branch without BatchNorm, a mean over a layer with one, and a last BatchNorm."""
    block = {
        "full": Full(),
        "conv1x1": Centre(1),
        "identity": Identity(groups=GROUPS),
        "pooled": PooledPointwise(),
    }
    weights = {"full": normal(*SHAPE), "conv1x1": normal(1, 1, 2, 4), "pooled": normal(1, 1, 2, 4)}
    norms = {"full": norm(4), "identity": norm(4), "pooled": norm(4)}
    first, last = norm(4), norm(4)
    x = normal(2, 5, 6, 4)
    inner = bordered(convolve(x, weights["pooled"]), first)
    mean = jax.lax.reduce_window(inner, 0.0, jax.lax.add, (1, 3, 3, 1), (1,) * 4, "VALID") / 9
    total = normalize(convolve(x, weights["full"], padding="SAME"), norms["full"])
    total += convolve(x, weights["conv1x1"]) + normalize(x, norms["identity"])
    expected = normalize(total + normalize(mean, norms["pooled"]), last)

    one = weights["pooled"]
    pooled, bias = fold_block({"conv": Full()}, {"conv": one}, {"conv": first}, one.shape)
    kernel, bias = fold_block(
        block, weights | {"pooled": pooled}, norms, SHAPE, biases={"pooled": bias}, norm=last
    )
    found = convolve(x, kernel, padding="SAME") + bias.reshape(1, 1, 1, -1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_folded_pointwise_layer_keeps_its_border(x64):
    pointwise, kernel, bn = normal(1, 1, 2, 6), normal(3, 3, 3, 4), norm(6)
    x = normal(2, 5, 6, 4)
    expected = convolve(bordered(convolve(x, pointwise), bn), kernel)
    first = fold_block({"conv": Full()}, {"conv": pointwise}, {"conv": bn}, pointwise.shape)
    joined, bias = fold_pointwise(kernel, *first, groups=GROUPS)
    found = convolve(x, joined, padding="SAME") + bias.reshape(1, 1, 1, -1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_channel_of_a_norm_stands_for_outputs_in_a_row():
    bn = BatchNorm(2, epsilon=0.0)
    bn.scale[...], bn.bias[...] = jnp.array([2.0, 3.0]), jnp.array([5.0, 7.0])
    kernel, bias = fold_block({"fc": Full()}, {"fc": jnp.ones((1, 4))}, {"fc": bn}, (1, 4))
    assert kernel.tolist() == [[2, 2, 3, 3]]
    assert bias.tolist() == [5, 5, 7, 7]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_half_precision_is_folded_in_float32(dtype):
    bn = BatchNorm(4, param_dtype=dtype)
    weights = {"full": jnp.full(SHAPE, 1 / 3, jnp.bfloat16)}
    bn.scale[...] = jnp.full(4, 1.125, dtype)
    kernel, bias = fold_block({"full": Full()}, weights, {"full": bn}, SHAPE)
    assert kernel.dtype == bias.dtype == jnp.float32
    exact = np.float32(weights["full"]) * 1.125 / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(kernel, exact, rtol=1e-6)  # bfloat16 would be off by 1e-3


def test_layers_with_other_channels_between_them_are_refused():
    with pytest.raises(ValueError, match=r"kernel.*3, 3, 3, 4.*1, 1, 2, 6.*groups=1"):
        fold_pointwise(jnp.ones((3, 3, 3, 4)), jnp.ones((1, 1, 2, 6)), jnp.ones(6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, r"weights of 'full'.*3, 3, 2, 4.*None"),
        ({"weights": {"full": jnp.ones((3, 3, 4, 2))}}, r"weights of 'full'.*3, 3, 4, 2"),
        ({"weights": {"full": jnp.ones(SHAPE), "conv": 1}}, r"weights.*'full'.*'conv'"),
        ({"norms": {"bn": BatchNorm(4)}}, r"norms.*'full'.*'bn'"),
        ({"norms": {"full": BatchNorm(3)}}, r"norms of 'full'.*4.*3"),
        ({"biases": {"conv": jnp.ones(4)}}, r"biases.*'full'.*'conv'"),
        ({"biases": {"full": jnp.ones(3)}}, r"biases of 'full'.*4.*3"),
        (
            {
                "block": {"full": Full(), "identity": Identity(groups=GROUPS)},
                "weights": {"full": jnp.ones(SHAPE), "identity": jnp.ones(2)},
            },
            r"weights of 'identity'.*4,.*2,",
        ),
        ({"norm": BatchNorm(3)}, r"norm .*4.*3"),
        ({"block": {"full": Full(), "conv5x5": Centre(5)}}, r"conv5x5.*3, 3, 2, 4"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    parts = {"block": {"full": Full()}, "weights": {"full": jnp.ones(SHAPE)}, "norms": {}}
    with pytest.raises(ValueError, match=message):
        fold_block(**(parts | changes), kernel_shape=SHAPE)
