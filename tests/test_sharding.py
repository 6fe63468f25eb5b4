"""GR on meshes of eight devices, with automatic and explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repopt_jax import (
    Centre,
    Full,
    Identity,
    PooledPointwise,
    grad_mults,
    init_weights,
    merge,
    reparameterize,
    repopt_adamw,
    repopt_sgd,
)

SHAPE = (3, 3, 8, 8)
BLOCK = {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}
POOLED = {"conv3x3": Full(), "conv1x1": PooledPointwise()}
SCALES = {"conv3x3": jnp.linspace(-1.0, 2.0, 8), "conv1x1": jnp.linspace(1.0, 0.5, 8)}


@functools.cache
def weights():
    return jax.device_get(init_weights(BLOCK, jax.random.key(0), SHAPE))


@functools.cache
def start():
    merged = jax.jit(lambda weights: merge(BLOCK, weights, SCALES, SHAPE))
    return {"conv": {"kernel": merged(weights())}}


def sgd(params, block=BLOCK, dense=False):
    mults = grad_mults(params, {"conv": block}, {"conv": SCALES})
    if dense:
        mults = {"conv": {"kernel": mults["conv"]["kernel"].dense(SHAPE)}}
    return repopt_sgd(0.1, mults)


def exact(block, weights=None):
    weights = weights and {"conv": weights}
    return reparameterize(optax.adam(0.1), {"conv": block}, {"conv": SCALES}, weights=weights)


# Everything that keeps constants or weights in its state, made for parameters.
TRANSFORMS = {
    "sgd": sgd,
    "adamw": lambda params: repopt_adamw(
        0.1, grad_mults(params, {"conv": BLOCK}, {"conv": SCALES}, "direction")
    ),
    "operator": lambda params: sgd(params, POOLED),
    "array": lambda params: sgd(params, dense=True),
    "reparameterize": lambda params: exact(BLOCK, weights()),
    "split": lambda params: exact(POOLED),
}


def steps(tx, params, count=3):
    """The parameters and the state after some updates, and how often they were compiled."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return params, state, step._cache_size()


@functools.cache
def expected_kernel(name):
    """On one device."""
    return np.asarray(steps(TRANSFORMS[name](start()), start())[0]["conv"]["kernel"])


@pytest.mark.usefixtures("room_for_programs")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("axis", [2, 3], ids=["inputs", "outputs"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_kernels_train_split_as_they_are(name, axis, kind):
    """To the numbers of one device, compiled once, with the state beside the shards."""
    expected = expected_kernel(name)
    mesh = jax.make_mesh((8,), ("d",), (kind,))
    # As jit writes the shardings of its results; else plain SGD would be compiled twice, too.
    rest = [None] * (3 - axis) if kind == AxisType.Explicit else []
    split = NamedSharding(mesh, PartitionSpec(*[None] * axis, "d", *rest))
    with jax.set_mesh(mesh):
        params = jax.device_put(start(), split)
        found, state, compilations = steps(TRANSFORMS[name](params), params)
    kernel = found["conv"]["kernel"]
    assert kernel.sharding.is_equivalent_to(split, 4)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)
    assert compilations == 1
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == 8
        if leaf.shape == SHAPE:
            assert leaf.sharding.is_equivalent_to(split, 4)


@pytest.mark.parametrize("axis", [2, 3], ids=["inputs", "outputs"])
def test_weights_of_a_small_branch_lie_beside_the_kernels_shards(axis):
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Explicit,))
    spec = PartitionSpec(*[None] * axis, "d")
    params = jax.device_put(start(), NamedSharding(mesh, spec))
    state = TRANSFORMS["reparameterize"](params).init(params)
    small = state.weights["conv"]["conv1x1"]
    assert small.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    identity = state.weights["conv"]["identity"].sharding.spec
    assert identity == PartitionSpec("d" if axis == 3 else None)
    assert state.scales["conv"]["conv3x3"].sharding.is_fully_replicated


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.parametrize("axis", [2, 3], ids=["inputs", "outputs"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_types_of_the_state_stay_as_they_are(name, axis):
    """Shapes, dtypes and shardings, from `init` through an update, with and without jit."""
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Explicit,))
    split = NamedSharding(mesh, PartitionSpec(*[None] * axis, "d"))
    with jax.set_mesh(mesh):
        params = jax.device_put(start(), split)
        tx = TRANSFORMS[name](params)
        state = tx.init(params)
        assert types(jax.jit(tx.init)(params)) == types(state)
        updates, after = tx.update(params, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(params)
        assert types(jax.jit(tx.update)(params, state, params)) == types((updates, after))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_init_takes_shapes_alone(name):
    """As Optax's optimizers do, for the state's structure before there are parameters."""
    abstract = jax.eval_shape(start)
    state = TRANSFORMS[name](start()).init(abstract)
    concrete = TRANSFORMS[name](start()).init(start())
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (state, concrete)]
    assert shapes[0] == shapes[1]
