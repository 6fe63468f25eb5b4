"""The search of AOFP: its draws, its decisions, and what it leaves alone."""

import dataclasses

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repopt_jax.pruning import Aofp, ChannelGroup, Follower


class Two(nnx.Module):
    """A convolution, and a dense layer that reads its images flattened."""

    def __init__(self):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4 * 4 * 6, 5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        x = jax.nn.relu(self.conv(x))
        return self.head(x.reshape(x.shape[0], -1))


GROUPS = {"conv": ChannelGroup({"conv": None}, ("head",))}
FOLLOWERS = {"conv": Follower("head")}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), "float32")


def search(**options):
    return Aofp(GROUPS, FOLLOWERS, **{"steps": 3, "threshold": 0.5, **options})


def run(aofp, state, damages):
    """One step for each of `damages`, given as a function of the score mask."""
    for _ in range(len(damages)):
        state = aofp.draw(state)
        damage = damages[int(state.count)](np.asarray(state.score_masks["conv"]))
        state = aofp.update(state, {"conv": jnp.asarray(damage)})
    return state


def test_draws_are_random_halves_of_the_search_set_after_the_warm_up():
    aofp = search(warm_up=2)
    state = aofp.init(Two())
    seen = []
    for _ in range(8):
        state = aofp.draw(state)
        seen.append(tuple(np.asarray(state.score_masks["conv"])))
        state = state._replace(count=state.count + 1)
    assert [sum(mask) for mask in seen] == [6, 6, 3, 3, 3, 3, 3, 3]
    assert len(set(seen[2:])) > 2
    off = jnp.array([False, True, True, True, True, True])
    drawn = aofp.draw(state._replace(search_sets={"conv": off}, base_masks={"conv": off}))
    mask = drawn.score_masks["conv"]
    assert mask.sum() == 3 and not mask[0]  # two of five, and the one that has gone


def test_the_damage_is_what_the_follower_misses():
    aofp, model = search(), Two()
    state = aofp.init(model)
    off = jnp.array([True, True, False, True, False, True])
    outputs, damages = aofp.forward(state._replace(score_masks={"conv": off}), model, IMAGES)
    np.testing.assert_array_equal(outputs, model(IMAGES))
    x = jax.nn.relu(model.conv(IMAGES))
    part = model.head((x * off.astype(x.dtype)[None, None, None]).reshape(2, -1))
    expected = jnp.square(outputs - part).sum() / jnp.square(outputs).sum()
    np.testing.assert_allclose(damages["conv"], expected, rtol=1e-6)
    assert damages["conv"] > 0.01


def test_masked_filters_get_no_gradient_and_the_damage_gives_none():
    aofp, model = search(), Two()
    mask = jnp.array([True, True, False, True, True, True])
    state = aofp.init(model)._replace(base_masks={"conv": mask}, score_masks={"conv": ~mask})
    graphdef, params = nnx.split(model)

    def loss(params, weight):
        outputs, damages = aofp.forward(state, nnx.merge(graphdef, params), IMAGES)
        return jnp.square(outputs).sum() + weight * damages["conv"]

    grads = jax.jit(jax.grad(loss))(params, 0.0)
    assert (grads["conv"]["kernel"][..., 2] == 0).all() and (grads["conv"]["bias"][2] == 0).all()
    assert (grads["conv"]["kernel"][..., 3] != 0).any()
    with_damage = jax.jit(jax.grad(loss))(params, 1e6)
    jax.tree.map(np.testing.assert_array_equal, grads, with_damage)


def test_the_least_damaging_filters_go_and_the_harmful_stay():
    """Filters 1 and 4 do harm; two searches mask the others, and no third finds more."""
    aofp = search(steps=40)
    harm = lambda mask: 1.0 if not (mask[1] and mask[4]) else 0.0  # noqa: E731
    state = run(aofp, aofp.init(Two()), [harm] * 400)
    np.testing.assert_array_equal(
        state.base_masks["conv"], [False, True, False, False, True, False]
    )


def test_one_filter_stays():
    aofp = search(steps=2)
    state = run(aofp, aofp.init(Two()), [lambda mask: 0.0] * 60)
    assert state.base_masks["conv"].sum() == 1
    np.testing.assert_array_equal(state.search_sets["conv"], state.base_masks["conv"])


def test_a_search_resumes_from_plain_arrays():
    aofp = search()
    damages = [lambda mask, i=i: 0.1 * i * float(mask[0]) for i in range(12)]
    whole = run(aofp, aofp.init(Two()), damages)
    half = run(aofp, aofp.init(Two()), damages[:7])
    restored = flax.serialization.from_bytes(aofp.init(Two()), flax.serialization.to_bytes(half))
    for _ in range(5):
        restored = aofp.draw(jax.tree.map(jnp.asarray, restored))
        damage = damages[int(restored.count)](np.asarray(restored.score_masks["conv"]))
        restored = aofp.update(restored, {"conv": jnp.asarray(damage)})
    jax.tree.map(np.testing.assert_array_equal, restored, whole)
    other = run(dataclasses.replace(aofp, seed=1), aofp.init(Two()), damages)
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(whole), strict=True)
    )


def test_a_step_compiles_once():
    aofp = search()
    graphdef, params = nnx.split(Two())
    traced = []

    @jax.jit
    def step(params, state):
        traced.append(0)
        state = aofp.draw(state)
        _, damages = aofp.forward(state, nnx.merge(graphdef, params), IMAGES)
        return aofp.update(state, damages)

    state = aofp.init(Two())
    for _ in range(3):
        state = step(params, state)
    assert len(traced) == 1
    model = Two()
    aofp.forward(state, model, IMAGES)
    assert isinstance(model.conv, nnx.Conv) and isinstance(model.head, nnx.Linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"followers": {}}, "followers"),
        ({"followers": {"other": Follower("head")}}, r"followers.*'other'"),
        ({"followers": {"conv": Follower("conv")}}, r"followers\['conv'\].*'conv'"),
        ({"steps": 0}, "steps.*0"),
        ({"threshold": 0.0}, r"threshold.*0\.0"),
        ({"warm_up": -1}, "warm_up.*-1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Aofp(**{"groups": GROUPS, "followers": FOLLOWERS, "steps": 3, "threshold": 0.5, **options})
