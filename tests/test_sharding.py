"""GR on meshes of eight devices, with automatic and explicit axes."""

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


def transforms(params):
    """Everything that keeps constants or weights in its state, made for `params`."""
    weights = init_weights(BLOCK, jax.random.key(0), SHAPE)
    mults = [
        grad_mults(params, {"conv": block}, {"conv": SCALES}, rule)
        for block, rule in ((BLOCK, "linear"), (BLOCK, "direction"), (POOLED, "linear"))
    ]
    dense = {"conv": {"kernel": mults[0]["conv"]["kernel"].dense(SHAPE)}}
    exact = {"blocks": {"conv": BLOCK}, "scales": {"conv": SCALES}, "weights": {"conv": weights}}
    return {
        "sgd": repopt_sgd(0.1, mults[0]),
        "adamw": repopt_adamw(0.1, mults[1]),
        "operator": repopt_sgd(0.1, mults[2]),
        "array": repopt_sgd(0.1, dense),
        "reparameterize": reparameterize(optax.adam(0.1), **exact),
        "split": reparameterize(optax.adam(0.1), {"conv": POOLED}, {"conv": SCALES}),
    }


def start():
    weights = init_weights(BLOCK, jax.random.key(0), SHAPE)
    return {"conv": {"kernel": jax.jit(lambda w: merge(BLOCK, w, SCALES, SHAPE))(weights)}}


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


@pytest.mark.usefixtures("room_for_programs")
@pytest.mark.parametrize("name", transforms(start()))
@pytest.mark.parametrize("axis", [2, 3], ids=["inputs", "outputs"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_kernels_train_split_as_they_are(name, axis, kind):
    """To the numbers of one device, compiled once, with the state beside the shards."""
    expected, _, _ = steps(transforms(start())[name], start())
    mesh = jax.make_mesh((8,), ("d",), (kind,))
    # As jit writes the shardings of its results; else plain SGD would be compiled twice, too.
    rest = [None] * (3 - axis) if kind == AxisType.Explicit else []
    split = NamedSharding(mesh, PartitionSpec(*[None] * axis, "d", *rest))
    with jax.set_mesh(mesh):
        params = jax.device_put(start(), split)
        found, state, compilations = steps(transforms(params)[name], params)
    kernel = found["conv"]["kernel"]
    assert kernel.sharding.is_equivalent_to(split, 4)
    np.testing.assert_allclose(kernel, expected["conv"]["kernel"], rtol=1e-5, atol=1e-6)
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
    state = transforms(params)["reparameterize"].init(params)
    small = state.weights["conv"]["conv1x1"]
    assert small.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    identity = state.weights["conv"]["identity"].sharding.spec
    assert identity == PartitionSpec("d" if axis == 3 else None)
    assert state.scales["conv"]["conv3x3"].sharding.is_fully_replicated


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.parametrize("axis", [2, 3], ids=["inputs", "outputs"])
@pytest.mark.parametrize("name", transforms(start()))
def test_types_of_the_state_stay_as_they_are(name, axis):
    """Shapes, dtypes and shardings, from `init` through an update, with and without jit."""
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Explicit,))
    split = NamedSharding(mesh, PartitionSpec(*[None] * axis, "d"))
    with jax.set_mesh(mesh):
        params = jax.device_put(start(), split)
        tx = transforms(params)[name]
        state = tx.init(params)
        assert types(jax.jit(tx.init)(params)) == types(state)
        updates, after = tx.update(params, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(params)
        assert types(jax.jit(tx.update)(params, state, params)) == types((updates, after))


@pytest.mark.parametrize("name", transforms(start()))
def test_init_takes_shapes_alone(name):
    """As Optax's optimizers do, for the state's structure before there are parameters."""
    abstract = jax.eval_shape(start)
    state = transforms(start())[name].init(abstract)
    concrete = transforms(start())[name].init(start())
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (state, concrete)]
    assert shapes[0] == shapes[1]
