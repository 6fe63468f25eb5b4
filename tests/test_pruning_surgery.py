"""A pruned network computes what the network did whose channels were off or equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_networks import begun
from flax import nnx

from repopt_jax import Scales, find_blocks, grad_mults, repvgg_branches
from repopt_jax.models.layers import BatchNorm, conv, linear
from repopt_jax.pruning import (
    Aofp,
    ChannelGroup,
    Follower,
    add_compactors,
    fold_compactors,
    merge_clusters,
    multiply_adds,
    prune_filters,
    repopt_vgg_channels,
)
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.tree_paths import layer_at, path_str

pytestmark = pytest.mark.slow


class Own(nnx.Module):
    """A shortcut, a depthwise layer on it, biases, and a dense layer after flatten."""

    def __init__(self, groups=6):
        types = {"dtype": None, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.stem = conv(3, 6, 3, use_bias=True, **types)
        self.conv1 = conv(6, 5, 3, use_bias=True, **types)
        self.bn1 = BatchNorm(5, param_dtype=jnp.float64)
        self.conv2 = conv(5, 6, 3, **types)
        self.bn2 = BatchNorm(6, param_dtype=jnp.float64)
        self.depthwise = conv(6, 6, 3, groups=groups, use_bias=True, **types)
        self.head = linear(4 * 4 * 6, 7, **types)

    def __call__(self, x):
        x = jax.nn.relu(self.stem(x))
        x = jax.nn.relu(x + self.bn2(self.conv2(jax.nn.relu(self.bn1(self.conv1(x))))))
        x = jax.nn.relu(self.depthwise(x))
        return self.head(x.reshape(x.shape[0], -1))


def own(**options):
    return begun(nnx.eval_shape(lambda: Own(**options)))


OWN = {
    "trunk": ChannelGroup(
        {"stem": None, "conv2": "bn2", "depthwise": None}, readers=("conv1", "head")
    ),
    "inner": ChannelGroup({"conv1": "bn1"}, readers=("conv2",)),
}
OWN_FOLLOWERS = {"trunk": Follower("conv1", "bn1"), "inner": Follower("conv2", "bn2")}
IMAGES = (2, 4, 4, 3)


def vgg(**options):
    model = unfilled_model(
        name="RepOpt-VGG",
        num_blocks=(1, 2, 1, 1),
        widths=(4, 4, 6, 8, 8),
        num_classes=3,
        strides=(1, 1, 2, 2, 1),
        param_dtype=jnp.float64,
        **options,
    )
    begun(model)
    groups = repopt_vgg_channels(model)
    followers = {name: Follower(group.readers[-1]) for name, group in groups.items()}
    return model, groups, followers


def shaken(model):
    """Every parameter and statistic a number of its own, as after training; evaluation mode."""
    rng = np.random.default_rng(0)

    def shake(path, leaf):
        noise = rng.uniform(-0.5, 0.5, leaf.shape) + 0.6 * ("var" in path_str(path))
        return jnp.asarray(np.asarray(leaf) + noise, leaf.dtype)

    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(shake, state))
    model.eval()
    return model


def run(model, x):
    return jax.jit(lambda x: model(x))(x)


def images(shape=IMAGES):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float64)


def some_masks(groups, model):
    """A third of every group's channels off."""
    widths = {n: layer_at(model, next(iter(g.layers))).kernel.shape[-1] for n, g in groups.items()}
    return {n: np.arange(width) % 3 != 1 for n, width in widths.items()}


@pytest.mark.parametrize("make", ["own", "vgg", "vgg with squeeze-excite"])
def test_pruned_network_is_the_masked_one(make, x64):
    if make == "own":
        model, groups, followers = own(), OWN, OWN_FOLLOWERS
    else:
        model, groups, followers = vgg(se="squeeze" in make)
        assert len(groups) == (12 if "squeeze" in make else 6)
    model, x = shaken(model), images()
    search = Aofp(groups, followers, steps=1, threshold=1.0)
    masks = some_masks(groups, model)
    state = search.init(model)._replace(base_masks={n: jnp.asarray(m) for n, m in masks.items()})

    @nnx.jit  # one program, where JAX would compile one for every cut
    def both(model):
        small = prune_filters(model, groups, masks)
        return small, small(x), search.forward(state, model, x)[0], model(x)

    small, found, masked, whole = both(model)
    np.testing.assert_allclose(found, masked, rtol=1e-10)
    assert np.abs(whole - masked).max() > 1e-3  # what was off did count
    for name, group in groups.items():
        for layer in group.layers:
            assert layer_at(small, layer).kernel.shape[-1] == masks[name].sum()


def equal_in_clusters(model, groups, clusters):
    """A copy of a network whose channels are those of the first of their cluster."""
    places = {}
    for name, group in groups.items():
        labels = clusters[name]
        first = np.array([np.flatnonzero(labels == label)[0] for label in labels])
        places |= {f"{path}/": first for path in (*group.layers, *group.norms)}

    def even(path, leaf):
        path = path_str(path)
        first = next((f for start, f in places.items() if path.startswith(start)), None)
        return leaf if first is None else jnp.asarray(np.asarray(leaf)[..., first], leaf.dtype)

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(even, state))


@pytest.mark.parametrize("make", ["own", "vgg with squeeze-excite"])
def test_merging_equal_channels_changes_nothing(make, x64):
    model, groups = (own(), OWN) if make == "own" else vgg(se=True)[:2]
    labels = [0, 1, 0, 2, 1, 1, 3, 0]
    widths = {name: len(mask) for name, mask in some_masks(groups, model).items()}
    clusters = {name: np.array(labels[:width]) for name, width in widths.items()}
    model = equal_in_clusters(shaken(model), groups, clusters)

    @nnx.jit
    def both(model):
        small = merge_clusters(model, groups, clusters)
        return small, small(images()), model(images())

    small, found, expected = both(model)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(nnx.state(m))) for m in (small, model)]
    assert sizes[0] < 0.7 * sizes[1]


def test_the_first_channel_of_a_cluster_stays_and_its_readers_add_up(x64):
    """Also where channels are not quite equal, as training leaves them."""
    model = shaken(own())
    small = merge_clusters(model, OWN, {"inner": np.array([0, 1, 0, 1, 2])})
    for layer, name in (("conv1", "kernel"), ("conv1", "bias"), ("bn1", "mean"), ("bn1", "scale")):
        before, after = (getattr(layer_at(m, layer), name)[...] for m in (model, small))
        np.testing.assert_array_equal(after, before[..., np.array([0, 1, 4])])
    wide, narrow = (m.conv2.kernel[...] for m in (model, small))
    np.testing.assert_allclose(narrow[:, :, 1], wide[:, :, 1] + wide[:, :, 3], rtol=1e-12)
    np.testing.assert_array_equal(narrow[:, :, 2], wide[:, :, 4])


def test_folding_compactors_changes_nothing_but_what_they_forgot(x64):
    model, groups, _ = vgg()
    compacted = add_compactors(shaken(model), groups, ["stage1/0", "stage3/0"])
    np.testing.assert_allclose(run(compacted, images()), run(shaken(model), images()), rtol=1e-10)
    rng = np.random.default_rng(2)
    for norm in ("stage1/0/bn", "stage3/0/bn"):
        compactor = layer_at(compacted, norm).compactor
        compactor[...] += jnp.asarray(rng.normal(size=compactor.shape))
        compactor[...] = compactor[...].at[:, 1].set(0.0)
    small = fold_compactors(compacted, groups)
    np.testing.assert_allclose(run(small, images()), run(compacted, images()), rtol=1e-10)
    assert layer_at(small, "stage1/0/conv").kernel.shape == (3, 3, 4, 3)
    assert layer_at(small, "stage2/0/conv").kernel.shape == (3, 3, 3, 6)


def test_folding_takes_a_layer_bias_along(x64):
    model = shaken(add_compactors(own(), OWN, ["inner"]))
    small = fold_compactors(model, OWN)
    np.testing.assert_allclose(run(small, images()), run(model, images()), rtol=1e-10)


def test_a_layer_keeps_its_largest_channel_where_all_are_forgotten(x64):
    model = add_compactors(shaken(own()), OWN, ["inner"])
    model.bn1.compactor[...] = jnp.eye(5) * jnp.array([[1e-7, 1e-6, 5e-6, 1e-8, 0.0]])
    small = fold_compactors(model, OWN)
    assert small.conv1.kernel.shape[-1] == 1
    bn = model.bn1.layer
    bias = bn.bias + (model.conv1.bias - bn.mean) * bn.scale / jnp.sqrt(bn.var + bn.epsilon)
    np.testing.assert_allclose(small.bn1.bias, 5e-6 * bias[2:3], rtol=1e-10)


def test_folding_keeps_the_largest_channels_up_to_a_multiple(x64):
    model = add_compactors(shaken(own()), OWN, ["inner"])
    norms = np.array([1e-7, 1e-6, 2.0, 1e-8, 3.0])
    model.bn1.compactor[...] = jnp.diag(norms)
    for multiple, kept in ((1, [2, 4]), (2, [2, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 4])):
        small = fold_compactors(model, OWN, multiple=multiple)
        np.testing.assert_array_equal(small.conv2.kernel, model.conv2.kernel[:, :, np.array(kept)])
    assert fold_compactors(model, OWN, multiple=8).conv1.kernel.shape[-1] == 5


def test_the_network_is_not_changed_and_shares_no_array(x64):
    model = shaken(own())
    before = jax.tree.map(np.array, nnx.state(model))
    masks = {"inner": np.array([True, True, True, False, True])}
    small = prune_filters(model, OWN, masks)
    addresses = [
        {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(m))}
        for m in (model, small)
    ]
    assert not addresses[0] & addresses[1]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_layers_know_their_new_sizes(x64):
    """So a pruned network gets branches and multipliers as any other does."""
    model, groups, _ = vgg()
    small = prune_filters(model, groups, some_masks(groups, model))
    blocks = find_blocks(small, repvgg_branches)
    scales = Scales.initial(small, blocks)
    assert set(grad_mults(nnx.state(small, nnx.Param), blocks, scales)) == set(
        nnx.state(small, nnx.Param)
    )
    small = prune_filters(own(), OWN, some_masks(OWN, own()))
    layers = small.conv1, small.depthwise, small.head
    sizes = [(m.in_features, m.out_features) for m in layers]
    assert sizes == [(4, 3), (4, 4), (4 * 4 * 4, 7)]
    assert small.depthwise.feature_group_count == 4
    assert small.conv1.kernel_shape == small.conv1.kernel.shape


def test_multiply_adds_of_every_layer(x64):
    counts = multiply_adds(own(), (4, 4, 3))
    assert counts == {
        "conv1": 16 * 9 * 6 * 5,
        "conv2": 16 * 9 * 5 * 6,
        "depthwise": 16 * 9 * 6,
        "head": 16 * 6 * 7,
        "stem": 16 * 9 * 3 * 6,
    }


class Twice(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(5, 5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(self.layer(x))


def test_multiply_adds_of_a_layer_that_runs_twice():
    assert multiply_adds(Twice(), (5,)) == {"layer": 2 * 25}


REFUSED = {
    "two widths": ({"a": ChannelGroup({"stem": None, "conv1": "bn1"})}, r"'a'.*6.*5"),
    "a reader of another width": ({"a": ChannelGroup({"conv1": "bn1"}, ("conv1",))}, r"'conv1'.*5"),
    "no BatchNorm": ({"a": ChannelGroup({"stem": "conv2"})}, r"'conv2'.*Conv"),
    "no such layer": ({"a": ChannelGroup({"stam": None})}, r"'stam'"),
    "a layer twice": (
        {"a": ChannelGroup({"stem": None}), "b": ChannelGroup({"stem": None})},
        "'b'.*layers.*'stem'",
    ),
    "a reader twice": (
        {
            "a": ChannelGroup({"stem": None}, ("head",)),
            "b": ChannelGroup({"conv2": None}, ("head",)),
        },
        "'b'.*readers.*'head'",
    ),
    "a grouped reader": ({"a": ChannelGroup({"stem": None}, ("depthwise",))}, r"'depthwise'.*6"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_groups_that_do_not_fit_are_refused(case, x64):
    groups, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prune_filters(own(), groups, {})


def test_grouped_layers_are_refused(x64):
    with pytest.raises(ValueError, match=r"'depthwise'.*3 groups"):
        prune_filters(own(groups=3), OWN, {})


def test_masks_and_clusters_that_do_not_fit_are_refused(x64):
    model = own()
    with pytest.raises(ValueError, match=r"masks\['inner'\].*\(5,\).*\(4,\)"):
        prune_filters(model, OWN, {"inner": np.ones(4, bool)})
    with pytest.raises(ValueError, match=r"masks\['inner'\].*at least one"):
        prune_filters(model, OWN, {"inner": np.zeros(5, bool)})
    with pytest.raises(ValueError, match=r"masks.*'outer'"):
        prune_filters(model, OWN, {"outer": np.ones(5, bool)})
    with pytest.raises(ValueError, match=r"clusters\['inner'\].*\[0, 1, 3, 3, 0\]"):
        merge_clusters(model, OWN, {"inner": np.array([0, 1, 3, 3, 0])})
    with pytest.raises(ValueError, match=r"targets.*'trunk'.*'stem'"):
        add_compactors(model, OWN, ["trunk"])
    with pytest.raises(ValueError, match=r"targets.*'outer'"):
        add_compactors(model, OWN, ["outer"])
    layers = {"depthwise": ChannelGroup({"depthwise": "bn2"})}
    with pytest.raises(ValueError, match=r"targets.*'depthwise'"):
        add_compactors(model, layers, ["depthwise"])
    model.bn1.scale = None
    with pytest.raises(ValueError, match=r"targets.*'bn1'.*scale"):
        add_compactors(model, OWN, ["inner"])
    with pytest.raises(ValueError, match=r"multiple.*0"):
        fold_compactors(model, OWN, multiple=0)
    with pytest.raises(ValueError, match=r"compactors"):
        fold_compactors(model, OWN)
