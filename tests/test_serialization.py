"""States of the optimizers through Flax, msgpack, pickle and Orbax."""

import pickle

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from test_transforms import BLOCK, BLOCKS, SCALES, assert_trees_equal, make_params, mults_of

from repopt_jax import merge, reparameterize, repopt_adamw, repopt_sgd

WEIGHTS = {name: jnp.ones(branch.weight_shape((3, 3, 2, 2))) for name, branch in BLOCK.items()}


def reparameterized(learning_rate, mults):
    return reparameterize(optax.adamw(learning_rate), BLOCKS, SCALES, weights={"conv": WEIGHTS})


@pytest.mark.parametrize("how", ["flax", "msgpack", "pickle", "orbax"])
@pytest.mark.parametrize("make", [repopt_sgd, repopt_adamw, reparameterized])
def test_states_can_be_serialized(make, how, tmp_path):
    """Into a state of other numbers, and with the same update afterwards."""
    params = make_params()
    if make is reparameterized:
        params["conv"]["kernel"] = merge(BLOCK, WEIGHTS, SCALES["conv"], (3, 3, 2, 2))
    tx = make(1e-3, mults_of(params, "direction" if make is repopt_adamw else "linear"))
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    blank = jax.tree.map(jnp.zeros_like, state)
    if how == "flax":
        found = serialization.from_bytes(blank, serialization.to_bytes(state))
    elif how == "msgpack":
        data = serialization.msgpack_serialize(serialization.to_state_dict(state))
        found = serialization.from_state_dict(blank, serialization.msgpack_restore(data))
    elif how == "pickle":
        found = pickle.loads(pickle.dumps(state))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            found = checkpointer.restore(tmp_path / "state", blank)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert_trees_equal(found, state)
    assert_trees_equal(tx.update(params, found, params), tx.update(params, state, params))
