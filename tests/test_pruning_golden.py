"""The pruning rules and their surgery give the numbers of the original code, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pruning_networks import (
    CifarResNet,
    Sequential,
    assert_network,
    cifar_resnet_channels,
    conv_paths,
    from_torch,
    load,
    load_golden,
    nhwc,
    section,
    to_paths,
    torch_name,
)

from repopt_jax.pruning import (
    Aofp,
    ChannelGroup,
    Follower,
    add_compactors,
    fold_compactors,
    is_compactor,
    magnitude_masks,
    merge_clusters,
    multiply_adds,
    prune_filters,
    scale_by_csgd,
    scale_by_gsm,
    scale_by_resrep,
)
from repopt_jax.tree_paths import by_path, layer_at, path_str

pytestmark = pytest.mark.slow


def kernels(params):
    return jax.tree.map(lambda w: w.ndim >= 2, params)


def doubled_biases(updates):
    """The original's optimizers give biases twice the learning rate."""
    return jax.tree_util.tree_map_with_path(
        lambda path, u: 2 * u if path_str(path).endswith("bias") else u, updates
    )


@pytest.mark.parametrize("name", ["gsm_sgd", "gsm_sgd_nesterov"])
def test_gsm(name, x64):
    golden = load_golden(name)
    rate, momentum, decay, vector_decay, keep, nesterov = golden["hyper"]
    assert vector_decay == 0
    params = {n: jnp.asarray(a) for n, a in section(golden, "init/").items() if "running" not in n}
    gsm = scale_by_gsm(keep)
    tx = optax.chain(
        gsm,
        optax.add_decayed_weights(decay, kernels),
        optax.sgd(rate, momentum, bool(nesterov)),
    )

    @jax.jit
    def step(grads, state, params):
        passed, _ = gsm.update(grads, optax.EmptyState(), params)
        updates, state = tx.update(grads, state, params)
        return passed, optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for i in range(6):
        grads = {n: jnp.asarray(golden[f"step{i}/grad/{n}"]) for n in params}
        passed, params, state = step(grads, state, params)
        for n, param in params.items():
            np.testing.assert_allclose(param, golden[f"step{i}/param/{n}"], rtol=1e-12)
            np.testing.assert_allclose(
                optax.tree.get(state, "trace")[n], golden[f"step{i}/momentum/{n}"], rtol=1e-12
            )
            if param.ndim >= 2:
                mask = np.asarray(passed[n]) != 0
                np.testing.assert_array_equal(mask, golden[f"step{i}/mask/{n}"])
    for share in (0.2, 0.1):
        masks = jax.jit(lambda params, share=share: magnitude_masks(params, share))(params)
        for n, mask in section(golden, f"prune{share}/mask/").items():
            np.testing.assert_array_equal(masks[n], mask)


def csgd_clusters(golden):
    """Clusters by group, of the layer that leads it."""
    order = {path: golden[f"clusters/{i}"] for i, path in enumerate(conv_paths())}
    groups = cifar_resnet_channels()
    for group in groups.values():
        for layer in group.layers:
            np.testing.assert_array_equal(order[layer], order[next(iter(group.layers))])
    return {name: order[next(iter(group.layers))] for name, group in groups.items()}


def test_csgd(x64):
    golden = load_golden("csgd_steps")
    rate, momentum, decay, vector_decay, strength, nesterov = golden["hyper"]
    assert vector_decay == 0
    params = nnx.state(nnx.eval_shape(CifarResNet), nnx.Param)
    params = to_paths(section(golden, "init/"), params)
    tx = optax.chain(
        scale_by_csgd(cifar_resnet_channels(), csgd_clusters(golden), strength),
        optax.add_decayed_weights(decay, kernels),
        optax.sgd(rate, momentum, bool(nesterov)),
    )

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, doubled_biases(updates)), state

    state = jax.jit(tx.init)(params)
    for i in range(5):
        grads = to_paths(section(golden, f"step{i}/grad/"), params)
        params, state = step(grads, state, params)
        expected = section(golden, f"step{i}/param/")
        assert len(expected) == (len(jax.tree.leaves(params)) if i in (0, 4) else 0)
        for path, param in by_path(params).items() if expected else ():
            array = from_torch(expected[torch_name(path)])
            np.testing.assert_allclose(param, array, rtol=1e-9, err_msg=path)


def test_csgd_surgery(x64):
    golden = load_golden("csgd_surgery")
    model = load(nnx.eval_shape(CifarResNet), section(golden, "before/"))
    model.eval()
    images = nhwc(golden["input"])
    clusters = csgd_clusters(golden)

    @nnx.jit
    def both(model):
        merged = merge_clusters(model, cifar_resnet_channels(), clusters)
        return merged, model(images), merged(images)

    merged, before, after = both(model)
    assert_network(merged, section(golden, "after/"), rtol=1e-12)
    np.testing.assert_allclose(before, golden["output_before"], rtol=1e-10)
    np.testing.assert_allclose(after, golden["output_after"], rtol=1e-10)
    np.testing.assert_allclose(after, before, rtol=1e-10)


def resrep_params(golden, prefix):
    """What the file has of a section, by path; the gradients are there for a part only."""
    params = nnx.state(compacted_resnet(), nnx.Param)
    arrays = section(golden, prefix)
    return {
        path: jnp.asarray(from_torch(arrays[torch_name(path)]).reshape(param.shape))
        for path, param in by_path(params).items()
        if torch_name(path) in arrays
    }


@functools.cache
def compacted_resnet():
    """Without numbers."""
    groups = cifar_resnet_channels()
    compacted = [name for name in groups if "block" in name]
    return nnx.eval_shape(lambda: add_compactors(CifarResNet(), groups, compacted))


def test_resrep(x64):
    golden = load_golden("resrep_steps")
    rate, momentum, compactor_momentum, decay, vector_decay, lasso, keep, more, least = golden[
        "hyper"
    ]
    assert (vector_decay, least) == (0, 1)
    groups = cifar_resnet_channels()
    targets = [name for name in groups if "block" in name]
    counts = multiply_adds(nnx.eval_shape(CifarResNet), (32, 32, 3))
    for stage in (2, 3):  # the original's count of a 1x1 projection
        counts[f"stage{stage}/projection/conv"] *= 4
    assert sum(counts.values()) == golden["flops_original"]
    rule = scale_by_resrep(
        groups, targets, counts, keep=keep, lasso=lasso, start=2, every=1, more=int(more)
    )
    rest = optax.chain(optax.add_decayed_weights(decay, kernels), optax.sgd(rate, momentum))
    labels = lambda params: jax.tree.map(str, is_compactor(params))  # noqa: E731
    tx = optax.chain(
        rule, optax.partition({"True": optax.sgd(rate, compactor_momentum), "False": rest}, labels)
    )
    params = resrep_params(golden, "step0/grad/")
    params = {path: resrep_params(golden, "init/")[path] for path in params}

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, doubled_biases(updates)), state

    state = jax.jit(tx.init)(params)
    order = {path: i for i, path in enumerate(conv_paths())}
    for i in range(8):
        grads = resrep_params(golden, f"step{i}/grad/")
        grads |= {path: np.zeros_like(params[path]) for path in params.keys() - grads.keys()}
        params, state = step(grads, state, params)
        for name in targets:
            (conv,) = groups[name].layers
            mask = golden[f"step{i}/mask/{order[conv]}"]
            np.testing.assert_array_equal(state[0].masks[name], mask, err_msg=f"{i} {name}")
        for path, expected in resrep_params(golden, f"step{i}/param/").items():
            np.testing.assert_allclose(params[path], expected, rtol=1e-9, err_msg=path)


def test_resrep_conversion(x64):
    golden = load_golden("resrep_conversion")
    model = load(compacted_resnet(), section(golden, "before/"))
    model.eval()
    images = nhwc(golden["input"])
    small = fold_compactors(model, cifar_resnet_channels(), threshold=golden["threshold"])
    before, after = jax.jit(lambda images: (model(images), small(images)))(images)
    np.testing.assert_allclose(before, golden["output_before"], rtol=1e-10)
    np.testing.assert_allclose(after, golden["output_after"], rtol=1e-10)
    for path in conv_paths():
        layer, norm = layer_at(small, path), layer_at(small, path.removesuffix("conv") + "bn")
        factor = norm.scale / np.sqrt(norm.var + norm.epsilon)
        name = path.replace("/", ".")
        expected = from_torch(golden[f"after/{name}.weight"])
        np.testing.assert_allclose(
            np.asarray(layer.kernel) * np.asarray(factor), expected, rtol=1e-9
        )
        expected = golden[f"after/{name}.bias"]
        np.testing.assert_allclose(norm.bias - norm.mean * factor, expected, rtol=1e-9)


def sequential_channels():
    return {
        "0": ChannelGroup({"c0/conv": "c0/bn"}, ("c1/conv",)),
        "1": ChannelGroup({"c1/conv": "c1/bn"}, ("c2/conv",)),
    }


def without_base_path(arrays):
    return {name.replace("base_path.", ""): array for name, array in arrays.items()}


def test_aofp(x64):
    """Two searches in a network that really trains, with the original's draws."""
    golden = load_golden("aofp_steps")
    rate, momentum, decay, vector_decay, steps, threshold = golden["hyper"]
    assert vector_decay == 0
    followers = {"0": Follower("c1/conv", "c1/bn", jax.nn.relu), "1": Follower("c2/conv", "c2/bn")}
    search = Aofp(
        sequential_channels(), followers, steps=int(steps), threshold=threshold, warm_up=1
    )
    model = load(nnx.eval_shape(Sequential), without_base_path(section(golden, "init/")))
    state = search.init(model)
    tx = optax.chain(optax.add_decayed_weights(decay, kernels), optax.sgd(rate, momentum))
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    opt_state = tx.init(params)
    labels = jnp.asarray(golden["label"])

    @jax.jit
    def step(params, stats, opt_state, state, images):
        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            logits, damages = search.forward(state, model, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (damages, nnx.state(model, nnx.Not(nnx.Param)))

        (value, (damages, stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, doubled_biases(updates))
        return params, stats, opt_state, search.update(state, damages), value, damages

    for i in range(16):
        drawn = search.draw(state)
        masks = {n: jnp.asarray(golden[f"step{i}/score_mask/{n}"], bool) for n in followers}
        for n, mask in masks.items():  # another draw, but of as many filters
            assert drawn.score_masks[n].sum() == mask.sum()
        state = state._replace(score_masks=masks)
        images = nhwc(golden[f"step{i}/input"])
        params, stats, opt_state, state, value, damages = step(
            params, stats, opt_state, state, images
        )
        np.testing.assert_allclose(value, golden[f"step{i}/loss"], rtol=1e-9)
        for n in followers:
            np.testing.assert_allclose(
                damages[n], golden[f"step{i}/t_value/{n}"], rtol=1e-9, atol=1e-20
            )
            np.testing.assert_array_equal(state.base_masks[n], golden[f"step{i}/base_mask/{n}"])
            expected = golden[f"step{i}/search_space/{n}"]
            np.testing.assert_array_equal(state.search_sets[n], expected)
        if arrays := without_base_path(section(golden, f"step{i}/state/")):
            assert_network(nnx.merge(graphdef, params, stats), arrays, rtol=1e-9)


def test_aofp_surgery(x64):
    golden = load_golden("aofp_surgery")
    model = load(nnx.eval_shape(Sequential), without_base_path(section(golden, "before/")))
    model.eval()
    masks = section(golden, "base_mask/")
    images = nhwc(golden["input"])
    search = Aofp(sequential_channels(), {"0": Follower("c1/conv")}, steps=1, threshold=1.0)
    state = search.init(model)._replace(base_masks={n: jnp.asarray(m) for n, m in masks.items()})
    followers = {"0": Follower("c1/conv"), "1": Follower("c2/conv")}
    search = dataclasses.replace(search, followers=followers)
    state = state._replace(score_masks=state.base_masks)

    @nnx.jit
    def both(model):
        small = prune_filters(model, sequential_channels(), masks)
        return small, search.forward(state, model, images)[0], small(images)

    small, before, after = both(model)
    assert_network(small, section(golden, "after/"), rtol=1e-12)
    np.testing.assert_allclose(before, golden["output_before"], rtol=1e-10)
    np.testing.assert_allclose(after, golden["output_after"], rtol=1e-10)
