"""From any Flax NNX network to its search network, its scales and its target."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from repopt_jax import (
    Centre,
    Diagonal,
    Full,
    Identity,
    LowRank,
    Scales,
    create_model,
    find_blocks,
    init_target,
    load_scales,
    merge,
    repopt_sgd,
    repvgg_branches,
    save_scales,
    search_network,
    searched_scales,
    target_network,
)
from repopt_jax.models import search_layers
from repopt_jax.tree_paths import layer_at, path_str

FULL = {"full": Full()}


class Net(nnx.Module):
    """A user's network: nothing in it knows of branches."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.body = nnx.List(
            [
                nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs),
                nnx.Conv(4, 4, (3, 3), feature_group_count=4, use_bias=False, rngs=rngs),
            ]
        )
        self.head = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for layer in self.body:
            x = jax.nn.relu(layer(x))
        return self.head(x.mean((1, 2)))


BLOCKS = {
    "body/0": {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity(groups=2)},
    "body/1": {"conv3x3": Full(), "identity": Identity(groups=4)},
    "head": {"full": Full(), "diagonal": Diagonal()},
}
SHAPES = {"body/0": (3, 3, 2, 4), "body/1": (3, 3, 1, 4), "head": (4, 4)}


def names(model, kind=nnx.Param):
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, kind))
    return {path_str(path) for path, _ in leaves}


def abstract(make):
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def test_search_network_trains_branches_and_scales_and_keeps_everything_else():
    search = abstract(lambda rngs: search_network(Net(rngs), BLOCKS, rngs=rngs))
    expected = {"stem/kernel", "stem/bias", "body/0/bias", "head/bias"}
    for path, block in BLOCKS.items():
        expected |= {f"{path}/branch_weights/{name}" for name in block}
        expected |= {f"{path}/branch_scales/{n}" for n, b in block.items() if b.scaled}
    assert names(search) == expected
    csla = abstract(lambda rngs: search_network(Net(rngs), BLOCKS, kind="csla", rngs=rngs))
    assert names(csla) == {name for name in expected if "branch_scales" not in name}


def test_search_network_computes_what_the_plain_one_does_with_merged_kernels(x64):
    """Grouped and depthwise convolutions, dense layers, with and without a bias."""
    rng = np.random.default_rng(0)
    scales = {p: {n: rng.normal(size=4) for n in block} for p, block in BLOCKS.items()}

    @nnx.jit
    def outputs(x):
        plain = Net(nnx.Rngs(0))
        search = search_network(plain, BLOCKS, scales=scales, rngs=nnx.Rngs(1))
        found = search(x)
        for path, layer in search_layers(search).items():
            weights = {name: w[...] for name, w in layer.branch_weights.items()}
            vectors = {name: jnp.asarray(v, jnp.float32) for name, v in scales[path].items()}
            kernel = merge(BLOCKS[path], weights, vectors, SHAPES[path])
            plain_layer = plain.head if path == "head" else plain.body[int(path[-1])]
            plain_layer.kernel[...] = kernel
        return found, plain(x)

    found, expected = outputs(rng.normal(size=(2, 6, 6, 3)).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_identities_of_a_search_start_at_the_scales_that_it_is_given():
    """Not at their branches' own value, which is 1."""
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    scales = {"layers/0": {"identity": jnp.array([0.5, 2.0])}}
    blocks = {"layers/0": {"identity": Identity()}}
    search = search_network(model, blocks, kind="csla", scales=scales, rngs=nnx.Rngs(0))
    assert jnp.diag(search.layers[0].kernel).tolist() == [0.5, 2.0]


@pytest.fixture
def graph_mode():
    """Flax's mode that lets a network share layers; the default in versions that have but one."""
    with getattr(nnx, "set_graph_mode", lambda _: contextlib.nullcontext())(True):
        yield


class Shared(nnx.Module):
    """One layer at two places."""

    def __init__(self, rngs):
        self.first = nnx.Linear(2, 2, rngs=rngs)
        self.again = nnx.List([self.first])

    def __call__(self, x):
        return self.again[0](jnp.tanh(self.first(x)))


def test_shared_layer_stays_shared(graph_mode):
    model = Shared(nnx.Rngs(0))
    blocks = find_blocks(model, lambda path, layer: FULL)
    assert len(blocks) == 1
    search = search_network(model, blocks, rngs=nnx.Rngs(0))
    assert search.first is search.again[0]
    assert len(search_layers(search)) == 1
    assert isinstance(model.first, nnx.Linear)  # the plain network is not changed
    with pytest.raises(ValueError, match=r"'first'.*'again/0'"):
        search_network(model, {"first": FULL, "again/0": FULL}, rngs=nnx.Rngs(0))


def test_unknown_kind_and_path_are_refused():
    with pytest.raises(ValueError, match=r"kind.*target"):
        search_network(abstract(Net), BLOCKS, kind="target", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"path.*tail"):
        search_network(abstract(Net), {"tail": FULL}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "rngs", [0, jax.random.key(0), nnx.Rngs(dropout=0)], ids=["a seed", "a key", "no params"]
)
def test_what_is_no_rngs_is_refused(rngs):
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    blocks = {"layers/0": FULL}
    scales = Scales.initial(model, blocks)
    for use in (
        lambda: create_model("RepOpt-VGG-A0", rngs=rngs),
        lambda: search_network(model, blocks, rngs=rngs),
        lambda: init_target(model, scales, blocks=blocks, rngs=rngs),
        lambda: target_network(model, scales, blocks=blocks, rngs=rngs),
    ):
        with pytest.raises(ValueError, match=r"rngs must draw .* got (0|a \w+)$"):
            use()


def test_scales_go_from_the_search_to_a_file_to_the_target(tmp_path):
    """The whole loop on a user's network, with the multiplied step at its end."""
    model = nnx.jit(lambda: Net(nnx.Rngs(0)))()
    found = searched_scales(search_network(model, BLOCKS, rngs=nnx.Rngs(1)))
    save_scales(tmp_path / "scales.safetensors", found)
    scales = load_scales(tmp_path / "scales.safetensors")
    scales.check(model, BLOCKS)
    target = target_network(model, scales, blocks=BLOCKS, rngs=nnx.Rngs(2))
    for path, block in BLOCKS.items():
        kernel = (
            target.model.head.kernel if path == "head" else target.model.body[int(path[-1])].kernel
        )
        expected = merge(block, target.weights[path], scales[path], SHAPES[path])
        np.testing.assert_allclose(kernel[...], expected, rtol=1e-6, atol=1e-7)
    params = nnx.state(target.model, nnx.Param)
    ones = jax.tree.map(jnp.ones_like, params)
    sgd = repopt_sgd(1.0, target.grad_mults(), momentum=0.0)
    exact = target.reparameterize(optax.sgd(1.0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.jit(sgd.update)(ones, sgd.init(params), params)[0],
        jax.jit(exact.update)(ones, exact.init(params), params)[0],
    )


def test_a_target_has_the_multipliers_of_either_rule():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    scales = {"layers/0": {"full": jnp.array([3.0, -0.5])}}
    target = target_network(model, scales, blocks={"layers/0": FULL}, rngs=nnx.Rngs(1))
    for rule, wanted in (("linear", [9.0, 0.25]), ("direction", [3.0, 0.5])):
        mult = target.grad_mults(rule)["layers"][0]["kernel"].get_value()
        assert mult.rule == rule
        assert mult.dense((2, 2))[0].tolist() == wanted


def test_target_is_a_copy_and_refuses_scales_that_do_not_fit():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    before = np.asarray(model.layers[0].kernel)
    blocks = {"layers/0": FULL}
    scales = Scales.initial(model, blocks)
    target = target_network(model, scales, blocks=blocks, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model.layers[0].kernel, before)
    assert abs(target.model.layers[0].kernel - before).max() > 1e-3
    with pytest.raises(ValueError, match="surplus layers/0/full"):
        target_network(model, scales, blocks={"layers/0": {"other": Full()}}, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("use", [Scales.initial, lambda m: Scales({}).check(m)])
def test_blocks_must_be_given_for_models_that_state_none(use):
    with pytest.raises(ValueError, match=r"blocks.*Net"):
        use(abstract(Net))


def test_scales_found_with_another_frozen_factor_are_refused():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    blocks = {"layers/0": {"low_rank": LowRank(1, seed=3)}}
    scales = searched_scales(search_network(model, blocks, rngs=nnx.Rngs(0)))
    scales.check(model, blocks)
    other = {"layers/0": {"low_rank": LowRank(1, seed=4)}}
    with pytest.raises(ValueError, match=r"layers/0/low_rank.*4.*3"):
        scales.check(model, other)


def test_identity_starts_as_searched_or_at_one():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    blocks = {"layers/0": {"identity": Identity()}}
    scales = {"layers/0": {"identity": jnp.array([0.5, 2.0])}}

    def diagonal(**options):
        net = init_target(model, scales, blocks=blocks, rngs=nnx.Rngs(0), **options)
        return jnp.diag(net.layers[0].kernel[...]).tolist()

    assert diagonal() == [0.5, 2.0]
    assert diagonal(identity="one") == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"identity.*zero"):
        diagonal(identity="zero")
    with pytest.raises(ValueError, match=r"scales.*layers/0/identity"):
        init_target(model, {}, blocks=blocks, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"layers/0": {"full": jnp.ones(2)}}, "missing layers/0/centre$"),
        ({"layers/0": {"full": jnp.ones(2), "centre": jnp.ones(1)}}, r"shape \(2,\), got \(1,\)$"),
        (
            {"layers/0": {"full": jnp.ones(2), "centre": jnp.ones(2)}, "b": {"c": jnp.ones(2)}},
            "surplus b/c$",
        ),
    ],
    ids=["missing", "width", "surplus"],
)
def test_scales_of_another_network_are_refused(scales, message):
    """By whatever takes them, also where they would broadcast or be passed over."""
    model = nnx.Sequential(nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0)))
    blocks = {"layers/0": {"full": Full(), "centre": Centre(1)}}
    for take in (init_target, target_network):
        with pytest.raises(ValueError, match=f"^scales.*{message}"):
            take(model, scales, blocks=blocks, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"^scales.*{message}"):
        search_network(model, blocks, scales=scales, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", ["search", "target"])
def test_a_step_that_donates_the_copy_leaves_the_given_model_intact(make):
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    blocks = {"layers/0": FULL}

    def copy():
        if make == "search":
            return search_network(model, blocks, rngs=nnx.Rngs(1))
        scales = Scales.initial(model, blocks)
        return target_network(model, scales, blocks=blocks, rngs=nnx.Rngs(1)).model

    before = np.array(model.layers[0].bias)  # a view of it would keep it from being donated
    halve = jax.jit(lambda p: jax.tree.map(lambda x: x / 2, p), donate_argnums=0)
    halve(nnx.state(copy(), nnx.Param))
    np.testing.assert_array_equal(model.layers[0].bias, before)
    halve(nnx.state(copy(), nnx.Param))


class Holder(nnx.Pytree):
    """A layer in an object that is no module."""

    def __init__(self, layer):
        self.conv = layer


CONTAINERS = {
    "list": lambda a, b: nnx.List([a, b]),
    "data list": lambda a, b: nnx.data([a, b]),
    "tuple": lambda a, b: nnx.data((a, b)),
    "nested": lambda a, b: nnx.data([(a,), {"b": [b]}]),
    "dict": lambda a, b: nnx.Dict({"0": a, "x": b}),
    "data dict": lambda a, b: nnx.data({"0": a, "x": b}),
    "holder": lambda a, b: nnx.data((Holder(a), Holder(b))),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_layers_in_any_container_are_searched(container):
    """`find_blocks` names them; the search network and the target have them all."""

    class Contained(nnx.Module):
        def __init__(self):
            convs = [nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(i)) for i in range(2)]
            self.inside = CONTAINERS[container](*convs)

    model = Contained()
    blocks = find_blocks(model, repvgg_branches)
    assert len(blocks) == 2
    csla = search_network(model, blocks, kind="csla", rngs=nnx.Rngs(7))
    scales = searched_scales(csla)
    assert list(scales) == list(blocks)
    target = target_network(model, scales, blocks=blocks, rngs=nnx.Rngs(7))
    for path, layer in search_layers(csla).items():
        kernel = layer_at(target.model, path).kernel
        np.testing.assert_allclose(kernel[...], layer.kernel, rtol=1e-6, atol=1e-7)
        assert isinstance(layer_at(model, path), nnx.Conv)
