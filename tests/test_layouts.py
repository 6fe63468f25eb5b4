"""Kernels as other frameworks name and lay them out train as Flax's do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repopt_jax import (
    Centre,
    Diagonal,
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

BLOCKS = {
    "conv": {"conv3x3": Full(), "conv1x1": Centre(1)},
    "grouped": {"full": Full(), "identity": Identity(groups=2)},
    "line": {"full": Full(), "centre": Centre(1)},
    "dense": {"full": Full(), "diagonal": Diagonal()},
}
SHAPES = {"conv": (3, 5, 2, 4), "grouped": (3, 3, 2, 4), "line": (3, 2, 4), "dense": (4, 4)}
RNG = np.random.default_rng(0)
SCALES = {p: {n: RNG.normal(size=4) for n, b in k.items() if b.scaled} for p, k in BLOCKS.items()}
FRAMEWORKS = {  # the kernel's name, its layout, and its axes in terms of ours
    "Equinox": ("weight", "OIHW", lambda k: np.moveaxis(k, (-1, -2), (0, 1))),
    "Haiku": ("w", "HWIO", lambda k: k),
}


@functools.cache
def weights():
    keys = jax.random.split(jax.random.key(0), len(BLOCKS))
    return {
        path: init_weights(block, key, SHAPES[path], jnp.float64)
        for key, (path, block) in zip(keys, BLOCKS.items(), strict=True)
    }


@functools.cache
def kernels():
    @jax.jit
    def merged(drawn, scales):
        return {p: merge(b, drawn[p], scales[p], SHAPES[p]) for p, b in BLOCKS.items()}

    return merged(weights(), SCALES)


OPTIMIZERS = {
    "sgd": lambda params, **names: repopt_sgd(0.1, grad_mults(params, BLOCKS, SCALES, **names)),
    "adamw": lambda params, **names: repopt_adamw(
        0.1, grad_mults(params, BLOCKS, SCALES, "direction", **names)
    ),
    "reparameterize": lambda params, **names: reparameterize(
        optax.adam(0.1), BLOCKS, SCALES, weights=weights(), **names
    ),
}


def trained(tx, params):
    """After three steps down the cosine of every entry."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_names_and_layouts_of_other_frameworks(framework, optimizer, x64):
    name, layout, view = FRAMEWORKS[framework]
    ours = {path: {"kernel": kernel} for path, kernel in kernels().items()}
    theirs = {
        path: {name: jnp.asarray(view(np.asarray(kernel)))} for path, kernel in kernels().items()
    }
    expected = trained(optimizer(ours), ours)
    tx = optimizer(theirs, kernel=name, layout=layout)
    for path, found in trained(tx, theirs).items():
        wanted = view(np.asarray(expected[path]["kernel"]))
        np.testing.assert_allclose(found[name], wanted, rtol=1e-12, atol=1e-14)


def test_operator_multipliers_take_either_layout(x64):
    block = {"full": Full(), "pooled": PooledPointwise()}
    scales = {"conv": {"full": jnp.arange(4.0), "pooled": jnp.arange(4.0) + 1}}
    ours = {"conv": {"kernel": kernels()["conv"]}}
    view = FRAMEWORKS["Equinox"][2]
    theirs = {"conv": {"weight": jnp.asarray(view(ours["conv"]["kernel"]))}}
    blocks, names = {"conv": block}, {"kernel": "weight", "layout": "OIHW"}
    expected = trained(repopt_sgd(0.1, grad_mults(ours, blocks, scales)), ours)
    found = trained(repopt_sgd(0.1, grad_mults(theirs, blocks, scales, **names)), theirs)
    wanted = view(np.asarray(expected["conv"]["kernel"]))
    np.testing.assert_allclose(found["conv"]["weight"], wanted, rtol=1e-12)


def test_a_layout_without_outputs_at_an_end_is_refused():
    params = {"conv": {"kernel": jnp.ones((3, 3, 2, 2))}}
    blocks, scales = {"conv": {"full": Full()}}, {"conv": {"full": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"layout.*IOHW"):
        grad_mults(params, blocks, scales, layout="IOHW")
    with pytest.raises(ValueError, match=r"layout.*IOHW"):
        reparameterize(optax.sgd(0.1), blocks, scales, weights={"conv": {}}, layout="IOHW")
