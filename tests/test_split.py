"""Networks trained without branches go on with them: their kernels are split, and nothing jumps."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_networks import drawn
from flax import nnx
from test_branches import every_branch, normal
from test_reparameterization import BLOCKS, SCALES, SHAPES, merged

from repopt_jax import (
    Centre,
    FrozenPointwise,
    Full,
    Identity,
    PooledPointwise,
    merge,
    reparameterize,
    search_network,
    split_kernel,
)
from repopt_jax.models import search_layers

pytestmark = pytest.mark.slow


def split_and_merged(block, kernel, scales):
    """The weights and their sum, by one program."""

    @jax.jit
    def run(kernel, scales):
        weights = split_kernel(block, kernel, scales)
        return weights, merge(block, weights, scales, kernel.shape)

    return run(kernel, scales)


@every_branch
def test_a_kernel_splits_into_weights_that_merge_to_it(branch, shape, groups, x64, strict):
    block = {"first": branch, "full": Full()}
    scales = {name: normal(seed, shape[-1:]) for seed, name in enumerate(block)}
    kernel = normal(5, shape)
    weights, found = split_and_merged(block, kernel, scales)
    np.testing.assert_allclose(found, kernel, rtol=0, atol=1e-10)
    assert np.abs(weights["first"]).max() > 1e-3  # it takes its share


SLOW = {"full": Full(), "frozen": FrozenPointwise(8), "pooled": PooledPointwise()}


@pytest.mark.parametrize(
    ("least", "full"),
    [(1.0, 1.0), (1e-3, 1.0), (1.0, 1e-3)],
    ids=["scales alike", "scales apart", "a small full branch"],
)
def test_a_large_kernel_splits_to_the_last_digits_of_float32(least, full):
    """What the iterations for branches that are no placements leave is a full branch's."""
    shape, rng = (3, 3, 16, 32), np.random.default_rng(0)
    channels = np.geomspace(least, 2.0, 32, dtype=np.float32)
    scales = {name: jnp.asarray(channels * (full if name == "full" else 1)) for name in SLOW}
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    _, found = split_and_merged(SLOW, kernel, scales)
    np.testing.assert_allclose(found, kernel, rtol=0, atol=1e-5)


def test_a_split_is_the_smallest_one(x64):
    """Of all weights that merge to the kernel, by the pseudo-inverse of merging."""
    shape, scales = (3, 2, 4), {n: normal(i, (4,)) for i, n in enumerate(SLOW)}
    kernel = normal(5, shape)
    zeros = {name: jnp.zeros(branch.weight_shape(shape)) for name, branch in SLOW.items()}
    flat, unflatten = jax.flatten_util.ravel_pytree(zeros)
    jacobian = jax.jit(jax.jacobian(lambda w: merge(SLOW, unflatten(w), scales, shape).ravel()))
    smallest = unflatten(jnp.asarray(np.linalg.pinv(jacobian(flat)) @ np.ravel(kernel)))
    weights, _ = split_and_merged(SLOW, kernel, scales)
    assert_close(weights, smallest, 1e-9)


def test_what_no_branch_reaches_is_left_out_of_a_split(x64, strict):
    """A window of 3 without a branch at its border, and a channel whose scale is 0."""
    kernel, scales = normal(0, (3, 2, 2)), {"centre": jnp.array([2.0, 0.0])}
    weights = split_kernel({"centre": Centre(1)}, kernel, scales)["centre"]
    np.testing.assert_allclose(weights[0, :, 0], kernel[1, :, 0] / 2, rtol=1e-15)
    assert (weights[0, :, 1] == 0).all()


def test_scales_whose_squares_overflow_the_kernels_type_split_it_all_the_same():
    kernel, scales = jnp.full((3, 2), 3.0, jnp.float16), {"full": jnp.full(2, 300.0, jnp.float16)}
    weights = split_kernel({"full": Full()}, kernel, scales)["full"]
    assert weights.dtype == jnp.float16
    np.testing.assert_allclose(weights, np.full((3, 2), 0.01), rtol=1e-3)


def trained():
    """Parameters of a plain network."""
    kernels = {path: {"kernel": normal(i, SHAPES[path])} for i, path in enumerate(SHAPES)}
    kernels["conv"]["bias"] = normal(2, (2,))
    return kernels


def loss(params, step):
    leaves = enumerate(jax.tree.leaves(params))
    return sum(jnp.square(jnp.tanh(x) - jnp.cos(i + step)).sum() for i, x in leaves)


def steps(tx, params, view=lambda p: p, count=10):
    @jax.jit
    def step(params, state, i):
        grads = jax.grad(lambda p: loss(view(p), i))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for i in range(count):
        params, state = step(params, state, float(i))
    return view(params)


def assert_close(found, expected, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), found, expected)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, 0.9), optax.lamb(1e-2)], ids=["sgd", "lamb"])
def test_a_trained_network_goes_on_as_the_branches_of_its_kernels(optimizer, x64):
    """Ten steps in float64 equal ten of the branches, trained by hand from the same weights."""
    params = trained()

    @jax.jit
    def split(params):
        return {
            path: {"branch_weights": split_kernel(block, params[path]["kernel"], SCALES[path])}
            for path, block in BLOCKS.items()
        }

    branches = split(params)
    branches["conv"]["bias"] = params["conv"]["bias"]
    assert_close(merged(branches), params)
    found = steps(reparameterize(optimizer, BLOCKS, SCALES), params)
    assert_close(found, steps(optimizer, branches, merged))
    moves = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), found, params)
    assert min(jax.tree.leaves(moves)) > 1e-4


def test_the_first_kernel_of_the_branches_is_the_trained_one(x64):
    params = trained()
    tx = reparameterize(optax.sgd(0.0), BLOCKS, SCALES)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert_close(updates, jax.tree.map(np.zeros_like, params))
    branches = {path: {"branch_weights": state.weights[path]} for path in BLOCKS}
    branches["conv"]["bias"] = params["conv"]["bias"]
    assert_close(merged(branches), params)


class Net(nnx.Module):
    """A network that was trained without branches, and has a kernel in each of several forms."""

    def __init__(self, rngs):
        options = {"param_dtype": jnp.float64, "rngs": rngs}
        self.stem = nnx.Conv(3, 4, (3, 3), **options)
        self.body = nnx.Conv(4, 4, (3, 3), feature_group_count=2, **options)
        self.head = nnx.Linear(4, 5, **options)

    def __call__(self, x):
        x = jax.nn.relu(self.body(jax.nn.relu(self.stem(x))))
        return self.head(x.mean((1, 2)))


NET_BLOCKS = {
    "stem": {"conv3x3": Full(), "conv1x1": Centre(1, scale=0.5)},
    "body": {"conv3x3": Full(scale=-2.0), "conv1x1": Centre(1), "identity": Identity(groups=2)},
}


@pytest.mark.parametrize("kind", ["hs", "csla"])
@pytest.mark.parametrize("given", [False, True], ids=["initial scales", "given scales"])
def test_a_search_that_keeps_kernels_starts_at_the_logits_of_the_trained_network(kind, given, x64):
    model, images = drawn(nnx.eval_shape(lambda: Net(nnx.Rngs(0)))), normal(0, (2, 8, 8, 3))
    scales = {p: {n: normal(3, (4,)) for n in b} for p, b in NET_BLOCKS.items()} if given else None

    @nnx.jit
    def searched(model):
        search = search_network(model, NET_BLOCKS, kind=kind, scales=scales, keep_kernels=True)
        return search, search(images), model(images)

    search, found, expected = searched(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    layers = search_layers(search)
    assert sorted(layers) == sorted(NET_BLOCKS)
    weights = [w[...] for layer in layers.values() for w in layer.branch_weights.values()]
    assert all(np.abs(w).max() > 1e-3 for w in weights)


def test_a_search_draws_or_keeps_kernels(x64):
    with pytest.raises(ValueError, match=r"rngs .* keep_kernels"):
        nnx.eval_shape(lambda: search_network(Net(nnx.Rngs(0)), NET_BLOCKS))


@pytest.mark.parametrize("value", [1.0, np.nan], ids=["out of reach", "not a number"])
def test_a_kernel_that_is_no_sum_of_its_branches_is_not_split(value):
    """It would jump to the nearest one without a word."""
    block = {"conv1x1": Centre(1)} if value == 1.0 else {"conv3x3": Full()}
    params = {"conv": {"kernel": jnp.full((3, 3, 2, 2), value)}}
    scales = {"conv": {name: jnp.ones(2) for name in block}}
    with pytest.raises(ValueError, match=r"'conv'.*weights"):
        reparameterize(optax.sgd(0.1), {"conv": block}, scales).init(params)
    start = nnx.initializers.constant(value)
    model = nnx.Sequential(nnx.Conv(2, 2, (3, 3), kernel_init=start, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"'layers/0'.*weights"):
        search_network(model, {"layers/0": block}, keep_kernels=True)
