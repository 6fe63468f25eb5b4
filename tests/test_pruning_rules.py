"""What each pruning rule computes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pruning_rules import (
    CLUSTERS,
    COUNTS,
    GROUPS,
    RULES,
    assert_close,
    first_update,
    grads_at,
    make_params,
)

from repopt_jax.pruning import (
    ChannelGroup,
    cluster_filters,
    is_compactor,
    magnitude_masks,
    scale_by_csgd,
    scale_by_gsm,
    scale_by_resrep,
)


def test_gsm_passes_the_largest_products_of_all_kernels_together(x64):
    params = make_params()
    params, grads = jax.device_get((params, grads_at(params, 0)))
    grads = jax.tree.map(lambda g: np.where(np.abs(g) < 0.3, 0.0, g), grads)
    products = jax.tree.map(lambda w, g: np.abs(w * g), params, grads)
    kernels = [leaf for leaf in jax.tree.leaves(products) if leaf.ndim >= 2]
    every = np.sort(np.concatenate([leaf.ravel() for leaf in kernels]))[::-1]
    for keep in (2e-3, 0.3, 1.0):
        threshold = every[int(keep * every.size) - 1]
        passed, _ = jax.jit(scale_by_gsm(keep).update)(grads, optax.EmptyState(), params)
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
    params, masks = jax.device_get((params, magnitude_masks(params, 0.25)))
    kernels = [m for m in jax.tree.leaves(masks) if m.ndim >= 2]
    total = sum(m.size for m in kernels)
    assert sum(m.sum() for m in kernels) == total - int(total * 0.75)
    assert all(m.all() for m in jax.tree.leaves(masks) if m.ndim < 2)
    kept = jax.tree.map(lambda w, m: np.where(m, np.abs(w), np.inf).min(), params, masks)
    lost = jax.tree.map(lambda w, m: np.where(m, 0, np.abs(w)).max(), params, masks)
    kernel_sizes = lambda t: [t["a"]["conv"]["kernel"], t["head"]["kernel"]]  # noqa: E731
    assert max(kernel_sizes(lost)) <= min(kernel_sizes(kept))


def test_csgd_is_a_matrix_on_gradients_and_one_on_weights(x64):
    params = make_params()
    trees = params, grads_at(params, 0), first_update(RULES["csgd"](), params)
    params, grads, found = jax.device_get(trees)
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
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(jax.tree.map(np.zeros_like, params), state, params)
        params = jax.tree.map(np.add, params, updates)
    start, end = make_params()["a"]["conv"]["kernel"], params["a"]["conv"]["kernel"]
    start, end = np.asarray(start), np.asarray(end)
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
    state, counts, update = tx.init(params), [], jax.jit(tx.update)
    for _ in range(steps):
        _, state = update(params, state, params)
        masks = jax.device_get(state.masks)
        counts.append(sum(int((~mask).sum()) for mask in masks.values()))
    return counts, masks


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_gsm(0.0), "keep.*0.0"),
        (lambda: scale_by_gsm(1.5), "keep.*1.5"),
        (lambda: scale_by_gsm(1e-4).update(make_params(), (), make_params()), "keep.*1000.*0.0001"),
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
