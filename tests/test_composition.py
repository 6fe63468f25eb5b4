"""How GR composes with other Optax transformations: each row of the README's table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from repopt_jax import Full, grad_mults, repopt_adamw, repopt_sgd, scale_by_grad_mult

SCALES = {"a": {"full": np.array([0.5, 2.0])}, "b": {"full": np.array([1.5, -1.0])}}
BLOCKS = {"a": {"full": Full()}, "b": {"full": Full()}}
RATE = 0.05


def make_params():
    rng = np.random.default_rng(0)
    return {name: {"kernel": jnp.asarray(rng.normal(size=(3, 2)))} for name in ("a", "b")}


def branch_params(params):
    """The branch weights ``w`` of the kernels ``s * w``: what the CSLA network trains."""
    return {n: {"kernel": p["kernel"] / SCALES[n]["full"][None]} for n, p in params.items()}


def merged(weights):
    return {n: {"kernel": p["kernel"] * SCALES[n]["full"][None]} for n, p in weights.items()}


def loss(params, step):
    noise = jnp.cos(step + jnp.arange(6.0)).reshape(3, 2)
    return sum(jnp.sum(jnp.square(jnp.tanh(p["kernel"]) - noise)) for p in params.values())


def train(tx, params, view=lambda p: p, steps=10, final=lambda p, s: p):
    state = tx.init(params)

    @jax.jit
    def step(params, state, i):
        value, grads = jax.value_and_grad(lambda p: loss(view(p), i))(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, jnp.asarray(float(i)))
    return view(final(params, state))


def assert_equivalent(target_tx, csla_tx, rtol=1e-12, **options):
    """The merged kernels train as the branches do."""
    params = make_params()
    target = train(target_tx, params, **options)
    csla = train(csla_tx, branch_params(params), merged, **options)
    for name in params:
        np.testing.assert_allclose(target[name]["kernel"], csla[name]["kernel"], rtol=rtol)
        assert abs(target[name]["kernel"] - params[name]["kernel"]).max() > 1e-3


def mults(rule="linear"):
    return grad_mults(make_params(), BLOCKS, SCALES, rule)


def plain_sgd(rate=RATE, momentum=0.9, nesterov=True, weight_decay=0.0):
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum, nesterov))


def test_masked(x64):
    """Only "a" is re-parameterized; "b" of the CSLA network has no scales then."""
    params = make_params()
    mask = {"a": {"kernel": True}, "b": {"kernel": False}}
    tx = optax.chain(optax.masked(scale_by_grad_mult(mults()), mask), optax.sgd(RATE, 0.9))
    found = train(tx, params)
    weights = {"a": branch_params(params)["a"], "b": params["b"]}
    view = lambda p: {"a": merged({"a": p["a"]})["a"], "b": p["b"]}  # noqa: E731
    expected = train(optax.sgd(RATE, 0.9), weights, view)
    for name in params:
        np.testing.assert_allclose(found[name]["kernel"], expected[name]["kernel"], rtol=1e-12)


def test_masking_a_transform_for_some_parameters_refuses_unknown_paths(x64):
    mask = {"a": {"kernel": True}, "b": {"kernel": False}}
    wrong = {"a": {"kernel": None}}
    with pytest.raises(ValueError, match=r"missing: \['b/kernel'\]"):
        scale_by_grad_mult(wrong).init(make_params())
    optax.masked(scale_by_grad_mult(mults()), mask).init(make_params())


@pytest.mark.parametrize("wrapper", [optax.multi_transform, optax.partition])
def test_partition(wrapper, x64):
    """SGD for one half and AdamW for the other, each with the multipliers of its rule."""
    params = make_params()
    labels = {"a": {"kernel": "sgd"}, "b": {"kernel": "adamw"}}
    target = {"sgd": repopt_sgd(RATE, mults()), "adamw": repopt_adamw(RATE, mults("direction"))}
    csla = {"sgd": plain_sgd(), "adamw": optax.adamw(RATE, weight_decay=1e-2)}
    found = train(wrapper(target, labels), params)
    expected = train(wrapper(csla, labels), branch_params(params), merged)
    np.testing.assert_allclose(found["a"]["kernel"], expected["a"]["kernel"], rtol=1e-12)
    np.testing.assert_allclose(found["b"]["kernel"], expected["b"]["kernel"], rtol=1e-5)


def test_inject_hyperparams(x64):
    """Rate, momentum and decay live in the state and can be changed between steps."""
    params = make_params()
    make = optax.inject_hyperparams(repopt_sgd, static_args=("nesterov",))
    tx = make(learning_rate=RATE, grad_mults=mults(), momentum=0.9, weight_decay=1e-2)
    assert_equivalent(tx, plain_sgd(weight_decay=1e-2))
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    updates, _ = tx.update(params, state, params)
    assert (updates["a"]["kernel"] == 0).all()


def test_multi_steps(x64):
    """As exact as MultiSteps itself, which counts and averages in float32."""
    target = optax.MultiSteps(repopt_sgd(RATE, mults()), 2).gradient_transformation()
    csla = optax.MultiSteps(plain_sgd(), 2).gradient_transformation()
    assert_equivalent(target, csla, rtol=1e-6)


def test_apply_if_finite(x64):
    params = make_params()
    tx = optax.apply_if_finite(repopt_sgd(RATE, mults()), 3)
    assert_equivalent(tx, optax.apply_if_finite(plain_sgd(), 3))
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    updates, state = tx.update(bad, tx.init(params), params)
    assert (updates["a"]["kernel"] == 0).all()
    assert not state.last_finite


def test_lookahead(x64):
    """Slow and fast weights are averaged linearly, so the equivalence holds."""

    def run(tx, params, view):
        pair = optax.LookaheadParams.init_synced(params)
        optimizer = optax.lookahead(tx, 3, 0.5)
        state = optimizer.init(pair)
        for i in range(8):
            grads = jax.grad(lambda p: loss(view(p), jnp.asarray(float(i))))(pair.fast)  # noqa: B023
            updates, state = optimizer.update(grads, state, pair)
            pair = optax.apply_updates(pair, updates)
        return view(pair.slow)

    params = make_params()
    found = run(repopt_sgd(RATE, mults()), params, lambda p: p)
    expected = run(plain_sgd(), branch_params(params), merged)
    np.testing.assert_allclose(found["a"]["kernel"], expected["a"]["kernel"], rtol=1e-12)


def test_ema_of_the_parameters(x64):
    """The average of merged kernels is the merged average."""

    def averaged(tx, params, view):
        ema = optax.ema(0.9, debias=False)
        state, average = tx.init(params), ema.init(params)
        for i in range(8):
            grads = jax.grad(lambda p: loss(view(p), jnp.asarray(float(i))))(params)  # noqa: B023
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            smooth, average = ema.update(params, average)
        return view(smooth)

    params = make_params()
    found = averaged(repopt_sgd(RATE, mults()), params, lambda p: p)
    expected = averaged(plain_sgd(), branch_params(params), merged)
    np.testing.assert_allclose(found["b"]["kernel"], expected["b"]["kernel"], rtol=1e-12)


def test_schedule_free(x64):
    """Schedule-free SGD interpolates linearly between its sequences."""
    target = optax.contrib.schedule_free(repopt_sgd(RATE, mults(), momentum=0.0), RATE, b1=0.9)
    csla = optax.contrib.schedule_free(plain_sgd(momentum=0.0, nesterov=False), RATE, b1=0.9)
    final = lambda p, s: optax.contrib.schedule_free_eval_params(s, p)  # noqa: E731
    assert_equivalent(target, csla, final=final)


@pytest.mark.parametrize(
    "direction",
    [optax.scale_by_adam(eps=1e-14), optax.scale_by_lion(), optax.scale_by_sign()],
    ids=["adam", "lion", "sign"],
)
def test_after_a_direction_only_preconditioner(direction, x64):
    """Adam, Lion, signSGD: rule "direction", right after the preconditioner."""
    tail = (optax.add_decayed_weights(1e-2), optax.scale_by_learning_rate(RATE))
    target = optax.chain(direction, scale_by_grad_mult(mults("direction"), rule="direction"), *tail)
    assert_equivalent(target, optax.chain(direction, *tail), rtol=1e-9)


def test_schedules_and_gradient_averaging_are_linear(x64):
    """What only adds and multiplies by numbers may stand anywhere."""
    schedule = optax.cosine_decay_schedule(RATE, 10)
    target = optax.chain(repopt_sgd(schedule, mults()), optax.scale(0.5))
    assert_equivalent(target, optax.chain(plain_sgd(schedule), optax.scale(0.5)))


@pytest.mark.parametrize("clip", [optax.clip_by_global_norm(0.5), optax.clip(0.1)])
def test_clipping_the_merged_gradient_breaks_the_equivalence(x64, clip):
    target = optax.chain(clip, repopt_sgd(RATE, mults()))
    with pytest.raises(AssertionError, match="Not equal"):
        assert_equivalent(target, optax.chain(clip, plain_sgd()))


def test_multiplying_after_adams_preconditioner_by_the_linear_rule_is_wrong(x64):
    """Why the two rules must not be confused."""
    wrong = optax.chain(optax.scale_by_adam(), scale_by_grad_mult(mults()), optax.scale(-RATE))
    right = optax.chain(optax.scale_by_adam(), optax.scale(-RATE))
    with pytest.raises(AssertionError, match="Not equal"):
        assert_equivalent(wrong, right, rtol=1e-3)


def test_options_are_those_of_optax(x64):
    """No momentum, scheduled decay, and the types and epsilon of the moments."""
    decay = optax.linear_schedule(0.1, 0.0, 5)
    target = repopt_sgd(RATE, mults(), momentum=None, weight_decay=decay)
    assert_equivalent(target, optax.chain(optax.add_decayed_weights(decay), optax.sgd(RATE)))
    assert len(jax.tree.leaves(target.init(make_params()))) == 2 + 1 + 0  # scales and the count
    half = {"accumulator_dtype": jnp.bfloat16}
    state = repopt_sgd(RATE, mults(), **half).init(make_params())
    expected = optax.sgd(RATE, 0.9, **half).init(make_params())
    assert [x.dtype for x in jax.tree.leaves(state[2])] == [
        x.dtype for x in jax.tree.leaves(expected[0])
    ]
    adam = {"eps": 0.0, "eps_root": 1e-4, "weight_decay": decay}
    found = repopt_adamw(RATE, mults("direction"), **adam)
    assert_equivalent(found, optax.adamw(RATE, **adam), rtol=1e-9)
    moments = repopt_adamw(RATE, mults("direction"), mu_dtype=jnp.bfloat16).init(make_params())[1]
    assert moments.mu["a"]["kernel"].dtype == jnp.bfloat16


def test_partition_keeps_a_dense_multiplier_in_its_own_group_only():
    """And map_params finds the moments, and nothing else, in a state with hidden multipliers."""
    dense = jax.tree.map(jnp.ones_like, make_params())
    labels = {"a": {"kernel": "sgd"}, "b": {"kernel": "adamw"}}
    tx = optax.partition(
        {"sgd": repopt_sgd(RATE, dense), "adamw": repopt_adamw(RATE, dense)}, labels
    )
    state = tx.init(make_params())
    moments, multipliers = 3 * 6, 2 * 6  # of six entries each: a momentum, two moments
    count_of_adam = 1
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(sizes) == moments + multipliers + count_of_adam
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    moved = [(a != b).any() for a, b in zip(*map(jax.tree.leaves, (state, doubled)), strict=True)]
    assert sum(s for s, m in zip(sizes, moved, strict=True) if m) == moments


def test_none_stands_for_a_whole_subtree(x64):
    params = {"net": make_params(), "norm": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}
    part = {"net": {"a": mults()["a"], "b": None}, "norm": None}
    whole = {
        "net": {"a": mults()["a"], "b": {"kernel": None}},
        "norm": {"scale": None, "bias": None},
    }
    found, expected = (scale_by_grad_mult(m) for m in (part, whole))
    found, _ = found.update(params, found.init(params))
    expected, _ = expected.update(params, expected.init(params))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match=r"surplus: \['nor'\]"):
        scale_by_grad_mult({**part, "nor": None}).init(params)
    with pytest.raises(ValueError, match=r"missing: \['normal'\]"):
        scale_by_grad_mult(part).init({**params, "normal": jnp.ones(2)})


@pytest.mark.parametrize("rule", ["linear", "direction"])
def test_split_real_and_imaginary_around_the_multiplier(rule, x64):
    """Both parts of a complex kernel take its multiplier."""
    params = jax.tree.map(lambda x: x * (2 - 3j), make_params())
    tx = optax.contrib.split_real_and_imaginary(scale_by_grad_mult(mults(rule), rule=rule))
    updates, _ = tx.update(params, tx.init(params), params)
    for name, scale in SCALES.items():
        factor = scale["full"] ** 2 if rule == "linear" else abs(scale["full"])
        np.testing.assert_allclose(updates[name]["kernel"], params[name]["kernel"] * factor[None])
