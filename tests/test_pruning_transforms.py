"""The pruning rules as Optax transformations: what they compute, and under which wrappers."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repopt_jax import Centre, Full, grad_mults, scale_by_grad_mult
from repopt_jax.pruning import (
    ChannelGroup,
    cluster_filters,
    is_compactor,
    magnitude_masks,
    scale_by_csgd,
    scale_by_gsm,
    scale_by_resrep,
)

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


def grads_at(params, step):
    """Gradients that depend on parameters and step."""
    return jax.tree.map(lambda w: jnp.sin(3 * w + step), params)


def train(tx, params, steps=5, state=None, start=0, compilations=1):
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(grads_at(params, i), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(start, start + steps):
        params, state = step(params, state, jnp.asarray(float(i)))
    assert step._cache_size() <= compilations  # it takes what it returns
    return params, state


def sgd(rule, rate=0.05):
    decay = optax.add_decayed_weights(1e-2)
    return optax.chain(RULES[rule](), decay, optax.sgd(rate, 0.9, nesterov=True))


def assert_close(found, expected, rtol=1e-12, atol=0.0):
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)  # noqa: E731
    jax.tree.map(compare, found, expected)


# What each rule computes.


def test_gsm_passes_the_largest_products_of_all_kernels_together(x64):
    params = make_params()
    grads = jax.tree.map(lambda g: jnp.where(jnp.abs(g) < 0.3, 0.0, g), grads_at(params, 0))
    products = jax.tree.map(lambda w, g: np.abs(w * g), params, grads)
    kernels = [leaf for leaf in jax.tree.leaves(products) if leaf.ndim >= 2]
    every = np.sort(np.concatenate([leaf.ravel() for leaf in kernels]))[::-1]
    for keep in (2e-3, 0.3, 1.0):
        threshold = every[int(keep * every.size) - 1]
        passed, _ = scale_by_gsm(keep).update(grads, optax.EmptyState(), params)
        expected = jax.tree.map(
            lambda g, p, t=threshold: g if g.ndim < 2 else np.where(p >= t, g, 0), grads, products
        )
        assert_close(passed, expected, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gsm_counts_exactly_in_narrow_types(dtype):
    """Products of bfloat16 are told apart in float32."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(100, 50)), dtype)}
    grads = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(100, 50)), dtype)}
    passed, _ = scale_by_gsm(0.1).update(grads, optax.EmptyState(), params)
    products = np.abs(np.float32(params["w"]) * np.float32(grads["w"]))
    threshold = np.sort(products.ravel())[-500]
    np.testing.assert_array_equal(passed["w"] != 0, products >= threshold)
    assert passed["w"].dtype == dtype


def test_magnitude_masks_keep_the_share_and_all_vectors(x64):
    params = make_params()
    masks = magnitude_masks(params, 0.25)
    kernels = [m for m in jax.tree.leaves(masks) if m.ndim >= 2]
    total = sum(m.size for m in kernels)
    assert sum(m.sum() for m in kernels) == total - int(total * 0.75)
    assert all(m.all() for m in jax.tree.leaves(masks) if m.ndim < 2)
    kept = jax.tree.map(lambda w, m: jnp.where(m, jnp.abs(w), jnp.inf).min(), params, masks)
    lost = jax.tree.map(lambda w, m: jnp.where(m, 0, jnp.abs(w)).max(), params, masks)
    kernel_sizes = lambda t: [t["a"]["conv"]["kernel"], t["head"]["kernel"]]  # noqa: E731
    assert max(kernel_sizes(lost)) <= min(kernel_sizes(kept))


def test_csgd_is_a_matrix_on_gradients_and_one_on_weights(x64):
    params = make_params()
    grads = grads_at(params, 0)
    found, _ = RULES["csgd"]().update(grads, RULES["csgd"]().init(params), params)
    for name, labels in CLUSTERS.items():
        together = labels[:, None] == labels
        average = together / together.sum(0)
        outside = np.eye(8) - average
        for layer, key, strength in (
            ("conv", "kernel", 0.2),
            ("conv", "bias", 0.02),
            ("bn", "scale", 0.02),
            ("bn", "bias", 0.02),
        ):
            if key in params[name][layer]:
                g, w = grads[name][layer][key], params[name][layer][key]
                expected = g @ average + strength * w @ outside
                np.testing.assert_allclose(found[name][layer][key], expected, rtol=1e-10)
    assert_close(found["head"], grads["head"], rtol=0)


def test_csgd_draws_a_cluster_together(x64):
    """Without a gradient the distance to the centre shrinks by the factor 1 - rate * strength."""
    params = make_params()
    tx = optax.chain(RULES["csgd"](), optax.sgd(0.5))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(optax.tree.zeros_like(params), state, params)
        params = optax.apply_updates(params, updates)
    start, end = make_params()["a"]["conv"]["kernel"], params["a"]["conv"]["kernel"]
    distances = [kernel[..., 0] - kernel[..., 2] for kernel in (start, end)]
    np.testing.assert_allclose(distances[1], 0.9**3 * distances[0], rtol=1e-10)


def test_clusters_are_as_many_as_asked_and_hold_equal_filters_together():
    rng = np.random.default_rng(0)
    model = nnx.Sequential(nnx.Linear(20, 12, rngs=nnx.Rngs(0)))
    labels = np.array([0, 1, 2, 0, 3, 3, 1, 4, 4, 4, 2, 0])
    model.layers[0].kernel[...] = jnp.asarray(rng.normal(size=(20, 5)), "float32")[:, labels]
    groups = {"hidden": ChannelGroup({"layers/0": None})}
    found = cluster_filters(model, groups, {"hidden": 5})["hidden"]
    np.testing.assert_array_equal(found, labels)
    for width in (1, 3, 8, 12):  # 8 and 12: more than there are different filters
        found = cluster_filters(model, groups, {"hidden": width})["hidden"]
        assert sorted(set(found.tolist())) == list(range(width))
    for width in (0, 13):
        with pytest.raises(ValueError, match=rf"widths\['hidden'\].*12.*{width}"):
            cluster_filters(model, groups, {"hidden": width})


def share_left(a, b):
    """Of the multiply-adds, with so many channels."""
    return (900 * a / 8 + 1600 * a * b / 64 + 10 * b / 8) / 2510


def resrep_masks(steps, **options):
    """Masked channels of both targets after each step."""
    options = {"keep": 0.3, "lasso": 0.1, "every": 1, **options}
    tx = scale_by_resrep(GROUPS, ["a", "b"], COUNTS, **options)
    params = make_params()
    state, counts = tx.init(params), []
    for _ in range(steps):
        _, state = jax.jit(tx.update)(params, state, params)
        counts.append(sum(int((~mask).sum()) for mask in state.masks.values()))
    return counts, state.masks


def test_resrep_masks_a_few_more_each_time_until_the_network_is_small_enough(x64):
    assert resrep_masks(5, start=1, every=2, more=3)[0] == [0, 0, 3, 3, 6]
    counts, masks = resrep_masks(8, more=3)
    assert counts[:3] == [3, 6, 9] and counts[-1] == counts[-2]
    left = {name: int(mask.sum()) for name, mask in masks.items()}
    assert share_left(**left) <= 0.3
    assert share_left(left["a"] + 1, left["b"]) > 0.3 or share_left(left["a"], left["b"] + 1) > 0.3


def test_resrep_leaves_every_layer_a_channel(x64):
    _, masks = resrep_masks(8, keep=1e-6, more=16)
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1]


def test_resrep_keeps_the_mask_of_a_layer_without_a_small_channel(x64):
    tx = scale_by_resrep(GROUPS, ["a", "b"], COUNTS, keep=0.3, more=1)
    params = make_params()
    params["b"]["bn"]["compactor"] *= 100
    masks = {"a": jnp.ones(8, bool), "b": jnp.arange(8) != 5}
    _, state = tx.update(params, tx.init(params)._replace(masks=masks), params)
    np.testing.assert_array_equal(state.masks["b"], masks["b"])
    assert (~state.masks["a"]).sum() == 2


def test_resrep_looks_at_any_number_of_channels_once_the_network_is_small_enough(x64):
    """Two of `a` made it so; now the least are four of `b`, more than the limit of 2 + 1."""
    tx = scale_by_resrep(GROUPS, ["a", "b"], COUNTS, keep=0.755, more=1)
    params = make_params()
    params["b"]["bn"]["compactor"] *= jnp.array([[1e-3] * 4 + [1.0] * 4])
    masks = {"a": jnp.arange(8) < 6, "b": jnp.ones(8, bool)}
    assert share_left(6, 8) <= 0.755 < share_left(8, 5)
    _, state = tx.update(params, tx.init(params)._replace(masks=masks), params)
    np.testing.assert_array_equal(state.masks["b"], [False] * 4 + [True] * 4)


def test_resrep_resets_gradients_and_shrinks_all_columns(x64):
    params = make_params()
    tx = RULES["resrep"]()
    updates, state = tx.update(grads_at(params, 0), tx.init(params), params)
    for name, mask in state.masks.items():
        w, g = params[name]["bn"]["compactor"], grads_at(params, 0)[name]["bn"]["compactor"]
        assert 0 < mask.sum() < 8
        lasso = 0.1 * w / np.linalg.norm(w, axis=0, keepdims=True)
        expected = np.asarray(g) * np.asarray(mask)[None] + lasso
        np.testing.assert_allclose(updates[name]["bn"]["compactor"], expected, rtol=1e-12)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), zero)
    assert (updates["a"]["bn"]["compactor"] == 0).all()  # and no division by zero


# Under wrappers.


@pytest.mark.parametrize("rule", RULES)
def test_types_stay(rule):
    params = make_params(dtype="bfloat16")
    tx = RULES[rule]()
    updates, _ = tx.update(grads_at(params, 0), tx.init(params), params)
    assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"bfloat16"}


@pytest.mark.parametrize("rule", RULES)
def test_masked_parameters_are_left_alone_and_not_counted(rule, x64):
    params = make_params()
    mask = jax.tree.map(lambda _: True, params) | {"head": {"kernel": False, "bias": False}}
    tx = optax.masked(RULES[rule](), mask)
    grads = grads_at(params, 0)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_close(updates["head"], grads["head"], rtol=0)
    shown = {name: params[name] for name in ("a", "b")}
    expected, _ = RULES[rule]().update(grads_at(shown, 0), RULES[rule]().init(shown), shown)
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
    blank = sgd(rule).init(jax.tree.map(jnp.ones_like, params))
    restored = flax.serialization.from_bytes(blank, saved)
    resumed, _ = train(sgd(rule), params, 3, jax.tree.map(jnp.asarray, restored), start=3)
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
    grads = nnx.State(jax.tree.map(nnx.Param, grads_at(params, 0)))
    found, _ = RULES[rule]().update(grads, RULES[rule]().init(state), state)
    expected, _ = RULES[rule]().update(grads_at(params, 0), RULES[rule]().init(params), params)
    assert_close(jax.tree.leaves(nnx.to_pure_dict(found)), jax.tree.leaves(expected), rtol=0)


# With gradient re-parameterization.

BLOCK = {"conv3x3": Full(), "conv1x1": Centre(1)}
SCALES = {
    name: {"conv3x3": np.linspace(0.2, 2.0, 8), "conv1x1": np.linspace(-1.0, 1.5, 8)}
    for name in ("a/conv", "b/conv")
}


def gr(params):
    mults = grad_mults(params, {name: BLOCK for name in SCALES}, SCALES)
    return scale_by_grad_mult(mults)


def first_update(*transforms):
    params = make_params()
    tx = optax.chain(*transforms)
    return tx.update(grads_at(params, 0), tx.init(params), params)[0]


def test_gsm_before_gr_asks_the_loss_and_after_gr_the_branches(x64):
    """Before: weights by their effect on the loss. After: by that times their multiplier."""
    params = make_params()
    plain = first_update(RULES["gsm"]())
    before = first_update(RULES["gsm"](), gr(params))
    multiplied = first_update(gr(params))
    expected = jax.tree.map(lambda p, m: jnp.where(p == 0, 0.0, m), plain, multiplied)
    assert_close(before, expected, rtol=0)
    after = first_update(gr(params), RULES["gsm"]())
    pairs = zip(*map(jax.tree.leaves, (params, multiplied)), strict=True)
    products = [jnp.abs(w * g) for w, g in pairs]
    every = np.sort(np.concatenate([p.ravel() for p in products if p.ndim >= 2]))
    threshold = every[-int(0.3 * every.size)]
    kernel = params["a"]["conv"]["kernel"] * multiplied["a"]["conv"]["kernel"]
    chosen = [np.asarray(t["a"]["conv"]["kernel"] != 0) for t in (before, after)]
    np.testing.assert_array_equal(chosen[1], np.abs(kernel) >= threshold)
    assert (chosen[0] != chosen[1]).any()


def test_resrep_and_gr_commute(x64):
    params = make_params()
    assert_close(
        first_update(RULES["resrep"](), gr(params)), first_update(gr(params), RULES["resrep"]()), 0
    )


def test_csgd_keeps_equal_filters_equal_only_after_gr(x64):
    def spread(*transforms):
        """How far filters of a cluster, equal at the start, are apart in the end."""
        labels = CLUSTERS["a"]
        first = np.array([np.flatnonzero(labels == label)[0] for label in labels])
        params = make_params()
        params["a"]["conv"]["kernel"] = params["a"]["conv"]["kernel"][..., first]
        tx = optax.chain(*transforms, optax.add_decayed_weights(1e-2), optax.sgd(0.05, 0.9))
        kernel = train(tx, params)[0]["a"]["conv"]["kernel"]
        return abs(kernel - kernel[..., first]).max()

    assert spread(gr(make_params()), RULES["csgd"]()) < 1e-14
    assert spread(RULES["csgd"](), gr(make_params())) > 1e-2


# Refusals.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_gsm(0.0), "keep.*0.0"),
        (lambda: scale_by_gsm(1.5), "keep.*1.5"),
        (lambda: first_update(scale_by_gsm(1e-4)), "keep.*1000.*0.0001"),
        (lambda: magnitude_masks(make_params(), 2.0), "keep.*2.0"),
        (lambda: scale_by_csgd(GROUPS, CLUSTERS, -0.1), "strength.*-0.1"),
        (lambda: scale_by_csgd(GROUPS, {"c": np.zeros(8, int)}, 0.1), "clusters.*'c'"),
        (lambda: scale_by_resrep(GROUPS, ["c"], COUNTS, keep=0.5), "targets.*'c'"),
        (lambda: scale_by_resrep(GROUPS, ["a"], COUNTS, keep=1.0), "keep.*1.0"),
        (lambda: scale_by_resrep(GROUPS, ["a"], COUNTS, keep=0.5, lasso=-1.0), "lasso.*-1.0"),
        (lambda: scale_by_resrep(GROUPS, ["a"], COUNTS, keep=0.5, every=0), "every.*0"),
        (lambda: scale_by_resrep(GROUPS, ["a"], COUNTS, keep=0.5, start=-1), "start.*-1"),
        (lambda: scale_by_resrep(GROUPS, ["a"], COUNTS, keep=0.5, more=0), "more.*0"),
        (lambda: scale_by_resrep(GROUPS, ["a"], {"a/conv": 9}, keep=0.5), "counts.*b/conv"),
        (lambda: RULES["resrep"]().init({"head": jnp.ones(2)}), "targets.*a/bn/compactor"),
        (
            lambda: scale_by_csgd(GROUPS, {"a": np.zeros(5, int)}, 0.1).init(make_params()),
            r"clusters.*'a/.*\(8,\).*\(5,\)",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", RULES)
def test_updates_without_parameters_are_refused(rule):
    params = make_params()
    with pytest.raises(ValueError, match="params"):
        RULES[rule]().update(params, RULES[rule]().init(params))


def test_compactors_are_told_from_other_parameters():
    found = is_compactor(make_params())
    assert found["a"]["bn"] == {"compactor": True, "scale": False, "bias": False}
    assert not found["head"]["kernel"]
