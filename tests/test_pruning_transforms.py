"""The pruning rules under Optax's wrappers, and with gradient re-parameterization."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pruning_rules import (
    CLUSTERS,
    RULES,
    assert_close,
    first_update,
    grads_at,
    make_params,
    sgd,
    train,
)

from repopt_jax import Centre, Full, grad_mults, scale_by_grad_mult


@pytest.mark.parametrize("rule", RULES)
def test_types_stay(rule):
    params = make_params(dtype="bfloat16")
    tx = RULES[rule]()
    updates = jax.eval_shape(lambda p: tx.update(grads_at(p, 0), tx.init(p), p)[0], params)
    assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"bfloat16"}


@pytest.mark.parametrize("rule", RULES)
def test_masked_parameters_are_left_alone_and_not_counted(rule, x64):
    params = make_params()
    mask = jax.tree.map(lambda _: True, params) | {"head": {"kernel": False, "bias": False}}
    tx = optax.masked(RULES[rule](), mask)
    updates = first_update(tx, params)
    assert_close(updates["head"], grads_at(params, 0)["head"], rtol=0)
    shown = {name: params[name] for name in ("a", "b")}
    expected = first_update(RULES[rule](), shown)
    assert_close({name: updates[name] for name in shown}, expected)


@pytest.mark.parametrize("rule", RULES)
def test_partition(rule, x64):
    params = make_params()
    labels = jax.tree.map(lambda _: "rest", params) | {"head": {"kernel": "head", "bias": "head"}}
    tx = optax.partition({"rest": sgd(rule), "head": optax.adam(0.01)}, labels)
    found, _ = train(tx, params)
    shown = {name: params[name] for name in ("a", "b")}
    expected, _ = train(sgd(rule), shown)
    assert_close({name: found[name] for name in shown}, expected)


@pytest.mark.parametrize("rule", RULES)
def test_multi_steps_updates_once_for_two_halves(rule, x64):
    """MultiSteps averages in float32."""
    params = make_params()
    tx, plain = optax.MultiSteps(sgd(rule), 2), sgd(rule)
    state, plain_state = tx.init(params), plain.init(params)
    update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
    for i in range(4):
        grads = grads_at(params, i)
        expected, plain_state = plain_update(grads, plain_state, params)
        for share in (0.5, 1.5):
            updates, state = update(jax.tree.map(lambda g, s=share: s * g, grads), state, params)
        assert_close(updates, expected, rtol=1e-5, atol=1e-7)
        params = optax.apply_updates(params, expected)


@pytest.mark.parametrize("rule", RULES)
def test_training_resumes_from_plain_arrays(rule, x64):
    whole, _ = train(sgd(rule), make_params(), 6)
    params, state = train(sgd(rule), make_params(), 3)
    saved = flax.serialization.to_bytes(state)
    fresh = sgd.__wrapped__(rule)
    blank = fresh.init(jax.tree.map(jnp.ones_like, params))
    restored = flax.serialization.from_bytes(blank, saved)
    resumed, _ = train(fresh, params, 3, jax.tree.map(jnp.asarray, restored), start=3)
    assert_close(resumed, whole, rtol=0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("rule", RULES)
def test_sharded_parameters_stay_sharded(rule, axis_type, x64):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:4])
    params = make_params()

    def spread(leaf):
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "x" if leaf.shape[-1] == 8 else None)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    expected, _ = train(sgd(rule), params)
    with jax.set_mesh(mesh):
        spreaded = jax.tree.map(spread, params)
        found, _ = train(sgd(rule), spreaded, compilations=2)  # constants reach all devices
    assert_close(found, expected, rtol=1e-10)
    assert found["a"]["conv"]["kernel"].sharding.spec[-1] == "x"
    assert found["a"]["bn"]["compactor"].sharding.spec[-1] == "x"


@pytest.mark.parametrize("rule", RULES)
def test_states_of_networks_are_taken_as_dicts_are(rule, x64):
    params = make_params()
    state = nnx.State(jax.tree.map(nnx.Param, params))
    found = first_update(RULES[rule](), state)
    expected = first_update(RULES[rule](), params)
    assert_close(jax.tree.leaves(nnx.to_pure_dict(found)), jax.tree.leaves(expected), rtol=0)


BLOCK = {"conv3x3": Full(), "conv1x1": Centre(1)}
SCALES = {
    name: {"conv3x3": np.linspace(0.2, 2.0, 8), "conv1x1": np.linspace(-1.0, 1.5, 8)}
    for name in ("a/conv", "b/conv")
}


def gr(params):
    mults = grad_mults(params, {name: BLOCK for name in SCALES}, SCALES)
    return scale_by_grad_mult(mults)


def updated_by(*transforms):
    return first_update(optax.chain(*transforms), make_params())


def test_gsm_before_gr_asks_the_loss_and_after_gr_the_branches(x64):
    """Before: weights by their effect on the loss. After: by that times their multiplier."""
    params = make_params()
    plain = updated_by(RULES["gsm"]())
    before = updated_by(RULES["gsm"](), gr(params))
    multiplied = updated_by(gr(params))
    expected = jax.tree.map(
        lambda p, m: np.where(p == 0, 0.0, m), *map(jax.device_get, (plain, multiplied))
    )
    assert_close(before, expected, rtol=0)
    after = updated_by(gr(params), RULES["gsm"]())
    pairs = zip(*map(jax.tree.leaves, (params, multiplied)), strict=True)
    products = [np.abs(w * g) for w, g in pairs]
    every = np.sort(np.concatenate([p.ravel() for p in products if p.ndim >= 2]))
    threshold = every[-int(0.3 * every.size)]
    kernel = params["a"]["conv"]["kernel"] * multiplied["a"]["conv"]["kernel"]
    chosen = [np.asarray(t["a"]["conv"]["kernel"] != 0) for t in (before, after)]
    np.testing.assert_array_equal(chosen[1], np.abs(kernel) >= threshold)
    assert (chosen[0] != chosen[1]).any()


def test_resrep_and_gr_commute(x64):
    params = make_params()
    assert_close(
        updated_by(RULES["resrep"](), gr(params)), updated_by(gr(params), RULES["resrep"]()), 0
    )


def test_csgd_keeps_equal_filters_equal_only_after_gr(x64):
    def spread(*transforms):
        """How far filters of a cluster, equal at the start, are apart in the end."""
        labels = CLUSTERS["a"]
        first = np.array([np.flatnonzero(labels == label)[0] for label in labels])
        params = make_params()
        params["a"]["conv"]["kernel"] = params["a"]["conv"]["kernel"][..., first]
        tx = optax.chain(*transforms, optax.add_decayed_weights(1e-2), optax.sgd(0.05, 0.9))
        kernel = np.asarray(train(tx, params)[0]["a"]["conv"]["kernel"])
        return abs(kernel - kernel[..., first]).max()

    assert spread(gr(make_params()), RULES["csgd"]()) < 1e-14
    assert spread(RULES["csgd"](), gr(make_params())) > 1e-2
