"""RepOpt-VGG, its layers and the networks made from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_networks import drawn
from flax import nnx

import repopt_jax
from repopt_jax import create_model, init_target, search_network
from repopt_jax.deploy import fold
from repopt_jax.models.layers import BatchNorm, conv, linear, materialize
from repopt_jax.models.repopt_vgg import RepVGGBlock
from repopt_jax.models.search import search_layers
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.tree_paths import layer_at

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_draws")]

SIZE = {"num_blocks": (1, 2, 1, 1), "widths": (4, 4, 6, 8, 8), "num_classes": 3}


def small(kind="target", **options):
    """A network as it begins, but for its kernels; JAX would compile each draw."""
    options = {"param_dtype": jnp.float64, **SIZE, **options}
    return drawn(unfilled_model(name="RepOpt-VGG", kind=kind, **options))


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("RepOpt-VGG-B1", 51.8),
        ("RepOpt-VGG-B2", 80.3),
        ("RepOpt-VGG-L1", 76.0),
        ("RepOpt-VGG-L2", 118.1),
    ],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    """As deployed: kernels with a bias each instead of BatchNorm."""
    model = nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    norms = sum(m.scale.shape[0] for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm))
    assert round((count - norms) / 1e6, 1) == millions


@pytest.mark.parametrize("group", [None, 2])
def test_batch_norm_is_torchs_over_each_group(group, x64, strict):
    """Biased variance normalizes, unbiased variance runs, groups are averaged."""
    x = normal(0, (4, 3, 3, 5))
    bn = BatchNorm(5, group=group, param_dtype=jnp.float64)
    bn.scale[...], bn.bias[...] = normal(1, (5,)), normal(2, (5,))
    found = bn(x)
    groups = np.asarray(x).reshape(1 if group is None else 2, -1, 3, 3, 5)
    mean, var = groups.mean((1, 2, 3), keepdims=True), groups.var((1, 2, 3), keepdims=True)
    scaled = (groups - mean) / np.sqrt(var + 1e-5) * np.asarray(bn.scale) + np.asarray(bn.bias)
    np.testing.assert_allclose(found, scaled.reshape(x.shape), rtol=1e-12)
    unbiased = groups.var((1, 2, 3), ddof=1).mean(0)
    np.testing.assert_allclose(bn.var[...], 0.9 + 0.1 * unbiased, rtol=1e-12)
    np.testing.assert_allclose(bn.mean[...], 0.1 * groups.mean((1, 2, 3)).mean(0), rtol=1e-12)
    bn.eval()
    evaluated = (np.asarray(x) - np.asarray(bn.mean)) / np.sqrt(np.asarray(bn.var) + 1e-5)
    evaluated = evaluated * np.asarray(bn.scale) + np.asarray(bn.bias)
    np.testing.assert_allclose(bn(x), evaluated, rtol=1e-12)


def test_batch_norm_takes_statistics_of_bfloat16_in_float32():
    x = (100 + normal(0, (64, 4, 4, 2))).astype(jnp.bfloat16)
    bn = BatchNorm(2)
    y = bn(x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float32)
    np.testing.assert_allclose(bn.mean[...], 0.1 * wide.mean((0, 1, 2)), rtol=1e-6)


def test_batch_norm_refuses_a_group_that_does_not_divide():
    with pytest.raises(ValueError, match=r"bn_group.*3"):
        BatchNorm(2, group=3)(jnp.ones((4, 2)))


@pytest.mark.parametrize("use_bias", [False, True])
def test_layers_start_from_torchs_bounds(use_bias):
    """``U(-a, a)`` with ``a = 1 / sqrt(fan_in)``, for biases too."""
    types = {"dtype": None, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    found = [(conv(64, 256, 3, groups=2, use_bias=use_bias, **types), 32 * 9)]
    found.append((linear(256, 512, **types), 256))
    for layer, fan_in in found:
        assert layer.bias is not None or (layer is found[0][0] and not use_bias)
        for values in (layer.kernel, layer.bias):
            if values is not None:
                assert -1 <= values.min() * fan_in**0.5 < -0.95
                assert 0.95 < values.max() * fan_in**0.5 <= 1


def test_squeeze_excite_comes_last_and_gates_by_the_averages(x64, strict):
    """``y = x * sigmoid(up(relu(down(average of x))))`` of the block's output ``x``."""
    model, x = small(se=True), normal(0, (2, 6, 6, 3))
    se, model.stage0.post_se = model.stage0.post_se, None
    y = np.asarray(model.stage0(x))
    assert y.min() == 0  # after the ReLU
    hidden = y.mean((1, 2)) @ np.asarray(se.down.kernel)[0, 0]
    se.down.bias[...] = -hidden.mean(0)  # one image below zero, one above
    hidden = np.maximum(hidden - hidden.mean(0), 0)
    gate = hidden @ np.asarray(se.up.kernel)[0, 0] + np.asarray(se.up.bias)
    gate = 1 / (1 + np.exp(-gate))
    model.stage0.post_se = se
    np.testing.assert_allclose(model.stage0(x), y * gate[:, None, None], rtol=1e-12)


def test_materialize_changes_nothing():
    x = normal(0, (2, 3, 3, 4)).astype(jnp.float32)
    assert (jax.jit(materialize)(x) == x).all()


@pytest.mark.usefixtures("optimized")
def test_a_block_costs_the_same_however_many_stand_before_it():
    """What `materialize` is for: XLA would compute the sums of all earlier blocks anew."""

    def flops(count):
        types = {"se": False, "bn_group": None, "dtype": None, "param_dtype": jnp.float32}
        blocks = [RepVGGBlock(2, 2, 1, **types, rngs=nnx.Rngs(0)) for _ in range(count)]
        graphdef, state = nnx.split(nnx.Sequential(*blocks))
        run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
        return run.lower(state, jnp.ones((2, 8, 8, 2))).compile().cost_analysis()["flops"]

    one, two, four = map(flops, (1, 2, 4))
    assert four - two <= 1.01 * 2 * (two - one)


def test_search_network_equals_branch_by_branch_form(x64, strict):
    """One convolution with the merged kernel computes what the branches compute."""
    model = small("hs")
    layer = model.stage2[1].conv
    assert "identity" in dict(layer.block)
    layer.branch_scales["conv3x3"][...] = normal(3, (6,))
    layer.branch_weights["identity"][...] = normal(4, (6,))
    x = normal(5, (2, 6, 6, 6))

    def branch(name, padding):
        y = jax.lax.conv_general_dilated(
            x, layer.branch_weights[name][...], (1, 1), padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y * layer.branch_scales[name][...].reshape(1, 1, 1, -1)

    identity = x * layer.branch_weights["identity"][...].reshape(1, 1, 1, -1)
    expected = branch("conv3x3", ((1, 1), (1, 1))) + branch("conv1x1", "VALID") + identity
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_csla_is_hs_with_constant_scales(x64):
    hs, csla = small("hs"), small("csla")
    x = normal(0, (2, 6, 6, 6))
    run = nnx.jit(lambda layer: layer(x))
    np.testing.assert_array_equal(run(hs.stage2[1].conv), run(csla.stage2[1].conv))
    trained = [str(p) for p, _ in jax.tree_util.tree_leaves_with_path(nnx.state(csla, nnx.Param))]
    assert not any("branch_scales" in path for path in trained)
    trained = [str(p) for p, _ in jax.tree_util.tree_leaves_with_path(nnx.state(hs, nnx.Param))]
    assert any("branch_scales" in path for path in trained)


def test_search_network_leaves_the_plain_one_alone():
    plain = small(param_dtype=jnp.float32)
    nnx.eval_shape(lambda: search_network(plain, plain.blocks(), rngs=nnx.Rngs(0)))
    assert isinstance(plain.stage0.conv, nnx.Conv)


def test_search_keeps_a_bias_and_other_layers():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    block = {"full": repopt_jax.Full(), "identity": repopt_jax.Identity()}
    search = search_network(model, {"layers/0": block}, rngs=nnx.Rngs(0))
    model.layers[0].bias[...] = jnp.arange(3.0)
    search.layers[0].bias[...] = jnp.arange(3.0)
    model.layers[0].kernel[...] = search.layers[0].kernel
    np.testing.assert_allclose(search(jnp.ones((2, 3))), model(jnp.ones((2, 3))), rtol=1e-6)


def test_search_starts_from_the_official_scales():
    """1 in the first block of a stage, sqrt(2 / i) in block i, identity 1."""
    size = {**SIZE, "num_blocks": (1, 4, 1, 1)}

    @jax.jit
    def started():
        """Without the kernels, so that nothing is drawn."""
        layers = search_layers(create_model("RepOpt-VGG", "hs", **size, rngs=nnx.Rngs(0)))
        found = {p: (x.branch_scales, x.branch_weights, x.block) for p, x in layers.items()}
        return {
            path: {n: (scales if branch.scaled else weights)[n][...] for n, branch in block}
            for path, (scales, weights, block) in found.items()
        }

    scales = started()
    for i, value in enumerate([1.0, 2**0.5, 1.0, (2 / 3) ** 0.5]):
        np.testing.assert_allclose(scales[f"stage2/{i}/conv"]["conv1x1"], value, rtol=1e-6)
        np.testing.assert_allclose(scales[f"stage2/{i}/conv"]["conv3x3"], value, rtol=1e-6)
    assert (scales["stage2/3/conv"]["identity"] == 1).all()


def test_init_target_draws_the_merged_start_of_the_branches(x64):
    """With the same keys, the target starts where the CSLA network starts."""
    plain = small()
    scales = repopt_jax.Scales(
        {
            path: {n: np.asarray(normal(i + j, v.shape)) for j, (n, v) in enumerate(b.items())}
            for i, (path, b) in enumerate(repopt_jax.Scales.initial(plain).items())
        }
    )

    @nnx.jit
    def kernels(plain):
        blocks = plain.blocks()
        csla = search_network(plain, blocks, kind="csla", scales=scales, rngs=nnx.Rngs(7))
        target = init_target(plain, scales, rngs=nnx.Rngs(7))
        layers = search_layers(csla)
        return {p: (layer_at(target, p).kernel[...], layers[p].kernel) for p in layers}

    for ours, theirs in kernels(plain).values():
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "se"),
    [("target", False), ("target", True), ("hs", True), ("csla", False), ("repvgg", True)],
)
def test_folded_network_computes_the_same(kind, se, x64):
    model = small(kind, se=se, num_blocks=(1, 1, 1, 1), strides=(2, 1, 2, 1, 1))
    model.eval()
    x = normal(1, (2, 8, 8, 3))
    folded = fold(model)
    ours, theirs = jax.jit(lambda x: (folded(x), model(x)))(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    assert not any(isinstance(m, BatchNorm) for _, m in nnx.iter_modules(folded))
    with pytest.raises(ValueError, match=r"blocks.*FoldedBlock"):
        fold(folded)


def test_computation_in_bfloat16_keeps_parameters_in_float32():
    model = small(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    graphdef, state = nnx.split(model)
    run = lambda state, x: nnx.merge(graphdef, state, copy=True)(x)  # noqa: E731
    x = jnp.ones((2, 32, 32, 3), jnp.bfloat16)
    assert jax.eval_shape(run, state, x).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RepOpt-VGG-B9",), "name.*'RepOpt-VGG-B2'.*RepOpt-VGG with num_blocks.*RepOpt-VGG-B9"),
        (("VGG",), "name must be one of the sizes of .*'RepLKNet'.*got 'VGG'"),
        (("RepOpt-VGG",), r"\['num_blocks', 'widths'\]"),
        (("RepOpt-VGG-A0", "plain"), "kind.*plain"),
    ],
)
def test_create_model_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(*arguments, rngs=nnx.Rngs(0))


def test_network_refuses_sequences_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"strides.*5.*\(2, 2\)"):
        small(strides=(2, 2))
