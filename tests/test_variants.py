"""The variants of the ablation are what their titles say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_run import small_config
from variants import NETWORKS, OPTIMIZERS, QUICK_ROWS, ROWS, changed, part_of

from repopt_jax import Centre, Full, Identity, init_weights, merge, reparameterize
from repopt_jax.data import load_dataset
from repopt_jax.reparameterization import ReparameterizeState
from repopt_jax.scales import Scales
from repopt_jax.training.networks import initial_scales

VARIANTS = {variant.title: variant for _, group in QUICK_ROWS for variant in group}


@pytest.fixture(scope="module")
def scales():
    """Drawn ones, so that they show."""
    rng = np.random.default_rng(0)
    initial = initial_scales(small_config())
    draw = {
        path: {name: rng.normal(1, 0.5, v.shape).astype(np.float32) for name, v in block.items()}
        for path, block in initial.vectors.items()
    }
    return Scales(draw)


@pytest.fixture(scope="module")
def states(scales):
    return {
        title: part_of(VARIANTS[title], small_config(), 0.1, scales, load_dataset).init()
        for title in (
            "plain SGD",
            "RepOptimizer",
            "gradient rule only",
            "initialization only",
        )
    }


def kernel(state):
    return np.asarray(state.params["stage4"][0]["conv"]["kernel"][...])


def cosine_steps(tx, params):
    """The parameters after three updates, where a gradient is the parameter's cosine."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(3):
        params, state = step(params, state)
    return params


def multipliers(state):
    return sum(x.shape == (8,) for x in jax.tree.leaves(state.opt_state[0][0]))


def test_each_half_of_the_method_is_there_without_the_other(states):
    plain, full = states["plain SGD"], states["RepOptimizer"]
    assert (kernel(plain) != kernel(full)).any()
    np.testing.assert_array_equal(kernel(states["gradient rule only"]), kernel(plain))
    np.testing.assert_array_equal(kernel(states["initialization only"]), kernel(full))
    assert multipliers(states["gradient rule only"]) == multipliers(full) > 0
    assert multipliers(states["initialization only"]) == multipliers(plain) == 0


def test_scales_become_what_the_variant_says(scales):
    initial = initial_scales(small_config())
    path, name = "stage4/0/conv", "conv3x3"
    along = {0.25: scales.averaged(), 1.0: scales}
    found = {
        how: np.asarray(changed(along, how, initial)[path][name])
        for how in ("searched", "early", "ones", "initial", "averaged")
    }
    np.testing.assert_array_equal(found["searched"], scales[path][name])
    np.testing.assert_array_equal(found["early"], scales.averaged()[path][name])
    np.testing.assert_array_equal(found["ones"], 1)
    np.testing.assert_array_equal(found["initial"], initial[path][name])
    np.testing.assert_allclose(found["averaged"], scales[path][name].mean(), rtol=1e-6)


def test_titles_tell_the_rows_apart():
    """They are the keys of what the JSON holds; a title means the same for every network."""
    assert len(VARIANTS) == len(QUICK_ROWS[0][1])
    for network, group in ROWS:
        assert network in NETWORKS
        assert all(VARIANTS[variant.title] == variant for variant in group)


def test_muon_orthogonalizes_the_kernels_of_convolutions_and_nothing_else():
    """As matrices of (window * in, out), whose steps have equal singular values, about."""
    rng = np.random.default_rng(0)
    shapes = {"conv": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "dense": {"kernel": (18, 4)}}
    zeros = jax.tree.map(np.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    # Nearly of rank 1, and so would be Adam's step.
    gradients = jax.tree.map(lambda x: 1 + 0.3 * rng.normal(size=x.shape), zeros)
    tx = OPTIMIZERS["muon"](lambda _: 1.0)
    updates, _ = tx.update(gradients, tx.init(zeros), zeros)
    values = np.linalg.svd(np.reshape(updates["conv"]["kernel"], (18, 4)))[1]
    assert values.min() > 0.5 * values.max()
    signs = updates["dense"]["kernel"] / -np.sign(gradients["dense"]["kernel"])
    np.testing.assert_allclose(signs, signs[0, 0], rtol=1e-3)  # Adam's first step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_split_of_a_kernel_into_branches_makes_no_difference(x64, optimizer):
    """So the rows may split kernels that were drawn from other weights."""
    blocks = {"conv": {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}}
    rng = np.random.default_rng(0)
    scales = {"conv": {name: rng.normal(1, 0.5, 4) for name in ("conv3x3", "conv1x1")}}
    block, shape = blocks["conv"], (3, 3, 4, 4)
    drawn = init_weights(block, jax.random.key(0), shape, np.float64, {"identity": np.ones(4)})
    params = {"conv": {"kernel": merge(block, drawn, scales["conv"], shape)}}
    ends = []
    for weights in (None, {"conv": drawn}):
        tx = OPTIMIZERS[optimizer](lambda _: 0.1)
        tx = reparameterize(tx, blocks, scales, weights=weights)
        ends.append(cosine_steps(tx, params)["conv"]["kernel"])
    assert abs(ends[0] - params["conv"]["kernel"]).max() > 0.1
    np.testing.assert_allclose(*ends, atol=1e-10)


def test_rows_of_other_optimizers_train_as_if_on_the_branches(scales):
    """Multiplied ones carry branch weights in their state; plain ones do not."""
    for title, branches in (("plain Muon", False), ("reparameterize(Muon)", True)):
        part = part_of(VARIANTS[title], small_config(), 0.1, scales, load_dataset)
        state = jax.eval_shape(part.tx.init, nnx.state(part.model, nnx.Param))
        assert isinstance(state, ReparameterizeState) == branches


@pytest.mark.parametrize("title", ["plain SGD", "RepOptimizer", "reparameterize(AdamW)"])
def test_a_rate_in_the_state_trains_as_one_in_the_schedule(x64, scales, title):
    """Three updates; the program has no other numbers than that of another rate."""
    part = part_of(VARIANTS[title], small_config(), 0.25, scales, load_dataset)
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.state(part.model, nnx.Param))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    inside = part.schedule
    rated = dataclasses.replace(part, rate=1.0, schedule=lambda count: 0.25 * inside(count))
    ends = [cosine_steps(found.tx, params) for found in (part, rated)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), *ends)
    ends[1] = params
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, ends), strict=True))
