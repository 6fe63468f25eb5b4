"""The pruning rules and their surgery give the numbers of the original code, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pruning_networks import (
    CifarResNet,
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
    add_compactors,
    fold_compactors,
    is_compactor,
    magnitude_masks,
    merge_clusters,
    multiply_adds,
    scale_by_csgd,
    scale_by_gsm,
    scale_by_resrep,
)
from repopt_jax.tree_paths import layer_at, path_str


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
    tx = optax.chain(
        scale_by_gsm(keep),
        optax.add_decayed_weights(decay, kernels),
        optax.sgd(rate, momentum, bool(nesterov)),
    )
    state = tx.init(params)
    for i in range(6):
        grads = {n: jnp.asarray(golden[f"step{i}/grad/{n}"]) for n in params}
        passed, _ = jax.jit(scale_by_gsm(keep).update)(grads, optax.EmptyState(), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        for n, param in params.items():
            np.testing.assert_allclose(param, golden[f"step{i}/param/{n}"], rtol=1e-12)
            np.testing.assert_allclose(
                optax.tree.get(state, "trace")[n], golden[f"step{i}/momentum/{n}"], rtol=1e-12
            )
            if param.ndim >= 2:
                np.testing.assert_array_equal(passed[n] != 0, golden[f"step{i}/mask/{n}"])
    for share in (0.2, 0.1):
        masks = magnitude_masks(params, share)
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
    _, params, _ = nnx.split(CifarResNet(), nnx.Param, ...)
    params = to_paths(section(golden, "init/"), params)
    tx = optax.chain(
        scale_by_csgd(cifar_resnet_channels(), csgd_clusters(golden), strength),
        optax.add_decayed_weights(decay, kernels),
        optax.sgd(rate, momentum, bool(nesterov)),
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(5):
        grads = to_paths(section(golden, f"step{i}/grad/"), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, doubled_biases(updates))
        expected = section(golden, f"step{i}/param/")
        assert len(expected) == (len(jax.tree.leaves(params)) if i in (0, 4) else 0)
        for path, param in jax.tree_util.tree_leaves_with_path(params) if expected else ():
            array = from_torch(expected[torch_name(path_str(path))])
            np.testing.assert_allclose(param, array, rtol=1e-9, err_msg=path_str(path))


def test_csgd_surgery(x64):
    golden = load_golden("csgd_surgery")
    model = load(CifarResNet(), section(golden, "before/"))
    model.eval()
    images = nhwc(golden["input"])
    np.testing.assert_allclose(model(images), golden["output_before"], rtol=1e-10)
    merged = merge_clusters(model, cifar_resnet_channels(), csgd_clusters(golden))
    assert_network(merged, section(golden, "after/"), rtol=1e-12)
    np.testing.assert_allclose(merged(images), golden["output_after"], rtol=1e-10)
    np.testing.assert_allclose(merged(images), model(images), rtol=1e-10)


def resrep_params(golden, prefix):
    """What the file has of a section, by path; the gradients are there for a part only."""
    _, params, _ = nnx.split(compacted_resnet(), nnx.Param, ...)
    arrays = section(golden, prefix)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = {path_str(path): leaf.shape for path, leaf in leaves}
    return {
        path: jnp.asarray(from_torch(arrays[torch_name(path)]).reshape(shape))
        for path, shape in paths.items()
        if torch_name(path) in arrays
    }


def compacted_resnet():
    groups = cifar_resnet_channels()
    return add_compactors(CifarResNet(), groups, [n for n in groups if "block" in n])


def test_resrep(x64):
    golden = load_golden("resrep_steps")
    rate, momentum, compactor_momentum, decay, vector_decay, lasso, keep, more, least = golden[
        "hyper"
    ]
    assert (vector_decay, least) == (0, 1)
    groups = cifar_resnet_channels()
    targets = [name for name in groups if "block" in name]
    counts = multiply_adds(CifarResNet(), (32, 32, 3))
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
    state = tx.init(params)
    update = jax.jit(tx.update)
    order = {path: i for i, path in enumerate(conv_paths())}
    for i in range(8):
        grads = resrep_params(golden, f"step{i}/grad/")
        grads |= {path: jnp.zeros_like(params[path]) for path in params.keys() - grads.keys()}
        updates, state = update(grads, state, params)
        for name in targets:
            (conv,) = groups[name].layers
            mask = golden[f"step{i}/mask/{order[conv]}"]
            np.testing.assert_array_equal(state[0].masks[name], mask, err_msg=f"{i} {name}")
        params = optax.apply_updates(params, doubled_biases(updates))
        for path, expected in resrep_params(golden, f"step{i}/param/").items():
            np.testing.assert_allclose(params[path], expected, rtol=1e-9, err_msg=path)


def test_resrep_conversion(x64):
    golden = load_golden("resrep_conversion")
    model = load(compacted_resnet(), section(golden, "before/"))
    model.eval()
    images = nhwc(golden["input"])
    np.testing.assert_allclose(model(images), golden["output_before"], rtol=1e-10)
    small = fold_compactors(model, cifar_resnet_channels(), threshold=golden["threshold"])
    np.testing.assert_allclose(small(images), golden["output_after"], rtol=1e-10)
    for path in conv_paths():
        layer, norm = layer_at(small, path), layer_at(small, path.removesuffix("conv") + "bn")
        factor = norm.scale / np.sqrt(norm.var + norm.epsilon)
        name = path.replace("/", ".")
        expected = from_torch(golden[f"after/{name}.weight"])
        np.testing.assert_allclose(layer.kernel * factor, expected, rtol=1e-9)
        expected = golden[f"after/{name}.bias"]
        np.testing.assert_allclose(norm.bias - norm.mean * factor, expected, rtol=1e-9)
