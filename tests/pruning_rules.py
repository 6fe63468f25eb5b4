"""The three pruning rules on one set of parameters, for their tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repopt_jax.pruning import ChannelGroup, scale_by_csgd, scale_by_gsm, scale_by_resrep

GROUPS = {
    "a": ChannelGroup({"a/conv": "a/bn"}, ("b/conv",)),
    "b": ChannelGroup({"b/conv": "b/bn"}, ("head",)),
}
COUNTS = {"a/conv": 900, "b/conv": 1600, "head": 10}
CLUSTERS = {"a": np.array([0, 1, 0, 2, 1, 0, 1, 1]), "b": np.array([0, 0, 1, 1, 2, 3, 4, 4])}
RULES = {
    "gsm": lambda: scale_by_gsm(0.3),
    "csgd": lambda: scale_by_csgd(GROUPS, CLUSTERS, 0.2),
    "resrep": lambda: scale_by_resrep(GROUPS, ["a", "b"], COUNTS, keep=0.4, lasso=0.1, every=2),
}


def make_params(seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype or float)  # noqa: E731
    bn = lambda: {"compactor": draw(8, 8), "scale": draw(8), "bias": draw(8)}  # noqa: E731
    return {
        "a": {"conv": {"kernel": draw(3, 3, 3, 8), "bias": draw(8)}, "bn": bn()},
        "b": {"conv": {"kernel": draw(3, 3, 8, 8)}, "bn": bn()},
        "head": {"kernel": draw(8, 10), "bias": draw(10)},
    }


@jax.jit
def grads_at(params, step):
    """Gradients that depend on parameters and step."""
    return jax.tree.map(lambda w: jnp.sin(3 * w + step), params)


def first_update(tx, params):
    """The first update, in one program."""
    return jax.jit(lambda p: tx.update(grads_at(p, 0), tx.init(p), p)[0])(params)


@functools.cache
def jitted_step(tx):
    """One program for all that trains with the same transform."""

    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(grads_at(params, i), state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, steps=5, state=None, start=0, compilations=1):
    state = tx.init(params) if state is None else state
    step = jitted_step(tx)
    before = step._cache_size()
    for i in range(start, start + steps):
        params, state = step(params, state, jnp.asarray(float(i)))
    assert step._cache_size() - before <= compilations  # it takes what it returns
    return params, state


@functools.cache
def sgd(rule, rate=0.05):
    decay = optax.add_decayed_weights(1e-2)
    return optax.chain(RULES[rule](), decay, optax.sgd(rate, 0.9, nesterov=True))


def assert_close(found, expected, rtol=1e-12, atol=0.0):
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)  # noqa: E731
    jax.tree.map(compare, found, expected)
