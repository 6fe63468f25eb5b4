"""`reparameterize` with optimizers that ask for more, and inside what maps or hides its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from test_reparameterization import (
    assert_trains_as_branches,
    exact,
    gradients,
    plain_params,
    train,
    train_both,
)

from repopt_jax import Full, merge, reparameterize
from repopt_jax.tree_paths import by_path

SEARCHES = {
    "lbfgs": optax.lbfgs,  # with the zoom line search
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_line_searches_see_the_branches(name, x64):
    asked = ("value", "grad", "value_fn")
    make = SEARCHES[name]
    found, expected = train_both(exact(make()), make(), steps=4, asked=asked, pace=0.0)
    assert abs(found["conv"]["kernel"] - plain_params()["conv"]["kernel"]).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found, expected)


def test_gradients_per_sample_are_refused_by_name():
    params = plain_params(jnp.float32)
    tx = exact(optax.sgd(0.1), jnp.float32)
    per_sample = jax.tree.map(lambda x: np.stack([x, x]), params)
    with pytest.raises(ValueError, match=r"updates\['conv/bias'\].*\(2,\).*\(2, 2\)"):
        tx.update(per_sample, jax.jit(tx.init)(params), params)


def wrapped(name):
    adam = exact(optax.adam(1e-2), jnp.float32)
    labels = {"conv": "exact", "dense": "sgd", "head": "exact"}
    return {
        "alone": adam,
        "partition": optax.partition({"exact": adam, "sgd": optax.sgd(0.1)}, labels),
    }[name]


@pytest.mark.parametrize("name", ["alone", "partition"])
def test_map_params_finds_the_branch_weights_and_their_moments(name):
    tx = wrapped(name)
    state = jax.jit(tx.init)(plain_params(jnp.float32))
    larger = jax.jit(lambda state: optax.tree.map_params(tx, lambda x: x + 1, state))(state)
    before, after = by_path(jax.device_get(state)), by_path(jax.device_get(larger))
    moved = {path for path in before if (before[path] != after[path]).any()}
    expected = {p for p in before if "/weights/" in f"/{p}" or "/mu/" in p or "/nu/" in p}
    assert moved == expected
    assert len(expected) == (3 * 5 + 2 * 2 if name == "alone" else 3 * 3 + 2 * 2)


def test_hidden_kernels_leave_nothing_of_their_size_in_the_state():
    state = jax.eval_shape(wrapped("partition").init, plain_params(jnp.float32))
    hidden = [x for path, x in by_path(state).items() if "dense" in path]
    assert hidden
    assert all(x.size == 0 for x in hidden)


def test_complex_kernels_train_as_their_branches(x64):
    """`split_real_and_imaginary` belongs inside."""
    block, scales = {"a": Full(), "b": Full()}, {"a": jnp.arange(4.0), "b": jnp.ones(4)}
    rng = np.random.default_rng(0)
    weights = {n: jnp.asarray(rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4))) for n in "ab"}
    view = lambda p: {"dense": {"kernel": merge(block, p["b"], scales, (3, 4))}}  # noqa: E731
    adam = optax.contrib.split_real_and_imaginary(optax.adam(1e-2))
    tx = reparameterize(adam, {"dense": block}, {"dense": scales}, weights={"dense": weights})

    def train(tx, params, view):
        @jax.jit
        def step(params, state, i):
            def error(params):
                return jnp.square(jnp.abs(view(params)["dense"]["kernel"] - 1j * i)).sum()

            gradients = jax.tree.map(jnp.conj, jax.grad(error)(params))
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for i in range(3):
            params, state = step(params, state, i)
        return view(params)["dense"]["kernel"]

    found = train(tx, view({"b": weights}), lambda p: p)
    np.testing.assert_allclose(found, train(adam, {"b": weights}, view), atol=1e-13)
    with pytest.raises(ValueError, match=r"kernel in params.*\['dense'\]"):
        optax.contrib.split_real_and_imaginary(tx).init(view({"b": weights}))


SYNCED = {
    "sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.05), sync_period=2, opaque_mode=False),
    "mechanize": optax.contrib.mechanize,
}


@pytest.mark.parametrize("name", SYNCED)
def test_sam_and_mechanize_are_exact_inside(name, x64):
    inside, csla = exact(SYNCED[name](optax.sgd(0.1))), SYNCED[name](optax.sgd(0.1))
    found, expected = train_both(inside, csla, steps=6, asked=(), pace=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found, expected)


def test_sam_outside_is_refused(x64):
    tx = optax.with_extra_args_support(SYNCED["sam"](exact(optax.sgd(0.1))))
    params, _ = train(tx, plain_params(), steps=6, asked=(), pace=0.0)
    assert np.isnan(params["conv"]["kernel"]).all()


def test_lookahead_outside_is_refused(x64):
    """Its slow weights pull the fast ones back, which the branches do not see."""
    pair = optax.LookaheadParams.init_synced(plain_params())
    tx = optax.lookahead(exact(optax.sgd(0.1)), 2, 0.5)
    state = tx.init(pair)
    with pytest.raises(ValueError, match=r"params\['\w+/kernel'\]"):
        for i in range(4):
            updates, state = tx.update(gradients(pair.fast, float(i)), state, pair)
            pair = optax.apply_updates(pair, updates)


def three_updates(tx, jit=True):
    """The kernel "dense" after three updates."""
    update = jax.jit(tx.update) if jit else tx.update
    params = plain_params()
    state = tx.init(params)
    for i in range(3):
        updates, state = update(gradients(params, float(i)), state, params)
        params = optax.apply_updates(params, updates)
    return params["dense"]["kernel"]


MOVERS = {
    "scale": lambda tx: optax.chain(tx, optax.scale(0.9)),
    "frozen": lambda tx: optax.chain(tx, optax.scale(0.0)),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "mechanize": optax.contrib.mechanize,
}


@pytest.mark.parametrize("mover", MOVERS)
def test_a_kernel_that_something_else_moves_is_refused(mover, x64):
    """By a sentence, and under jit by NaN in its update."""
    tx = MOVERS[mover](exact(optax.sgd(0.1)))
    tx = optax.with_extra_args_support(tx)
    assert np.isnan(three_updates(tx)).all()
    with pytest.raises(ValueError, match=r"params\['\w+/kernel'\]"):
        three_updates(tx, jit=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda tx: optax.contrib.schedule_free(tx, 0.1),
        lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
        lambda tx: optax.chain(tx, optax.scale(0.5)),
    ],
    ids=["schedule_free", "reduce_on_plateau", "scale"],
)
def test_what_moves_parameters_is_exact_inside(make, x64):
    assert_trains_as_branches(exact(make(optax.sgd(0.1))), make(optax.sgd(0.1)))
