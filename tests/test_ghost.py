"""RepOpt-GhostNet and the networks made from it; equality with the official code is elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_networks import assert_same, drawn
from flax import nnx

import repopt_jax
from repopt_jax import create_model
from repopt_jax.branches import Identity
from repopt_jax.deploy import fold
from repopt_jax.files import load_weights, save_weights, variables
from repopt_jax.models import repopt_ghost
from repopt_jax.models.layers import BatchNorm
from repopt_jax.models.repopt_ghost import GHOST_SIZES
from repopt_jax.torch_files import TorchFileError, export_weights, import_weights, recognize
from repopt_jax.torch_files.scales import official_names, scales_in
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.training.step import StepOptions, loss_function
from repopt_jax.tree_paths import layer_at

pytestmark = pytest.mark.slow

NAME = "RepOpt-GhostNet"


@functools.cache
def traced(name, kind, **options):
    """A network without values; to trace one takes half a second."""
    return unfilled_model(name=name, kind=kind, **options)


def shapes(kind="target", name=NAME, num_classes=3, **options):
    """A network without values that its test may change."""
    options = options or {"width": 0.1}
    return nnx.clone(traced(name, kind, num_classes=num_classes, **options))


def published(name, kind="target"):
    return shapes(kind, name, num_classes=1000, param_dtype=jnp.float32)


def small(kind="target", seed=0, dtype=np.float32, **options):
    """A network of width 0.1 with values between 0.5 and 1 or, of kernels, about 0."""
    rng = np.random.default_rng(seed)

    def draw(_, shape):
        if len(shape) > 1:
            bound = np.prod(shape[:-1]) ** -0.5
            return rng.uniform(-bound, bound, shape)
        return rng.uniform(0.5, 1, shape)

    return drawn(shapes(kind, param_dtype=dtype, width=0.1, **options), draw)


def images(size=2, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(1).normal(size=(size, 32, 32, 3)).astype(dtype), dtype)


def count(model, kind=nnx.Param):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, kind)))


@pytest.mark.parametrize(
    ("width", "millions"),
    [(0.5, 2.3), (0.58, 2.5), (0.8, 3.3), (1.0, 4.1), (1.11, 4.5), (1.3, 5.5), (2.0, 9.8)],
)
def test_parameter_counts_are_the_published_ones(width, millions):
    """RepGhost's paper, table 3."""
    model = published(f"{NAME}-{width}x")
    assert round(count(model) / 1e6, 1) == millions


def test_the_training_form_of_repghost_has_its_authors_count():
    model = published(f"{NAME}-0.5x", "rep")
    assert round(count(model) / 1e6, 3) == 2.314


def test_every_module_states_its_two_branches():
    """The branches' scales start anew with every run of as many output channels."""
    model = shapes()
    blocks = model.blocks()
    assert len(blocks) == 32
    for path, block in blocks.items():
        channels = layer_at(model, path).kernel.shape[-1]
        assert block["identity"] == Identity(groups=channels)
    starts = [block["conv"].scale for block in blocks.values()]
    runs = [n for bottlenecks in (1, 2, 2, 4, 2, 5) for n in range(1, 2 * bottlenecks + 1)]
    np.testing.assert_allclose(starts, [(2 / (n + 1)) ** 0.5 for n in runs])
    assert shapes("rep").blocks() == {}


def test_search_network_computes_conv_plus_identity(x64, strict):
    module = small("hs", dtype=np.float64).stages[2][0].ghost1
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 4)))
    layer = module.cheap_conv
    convolved = jax.lax.conv_general_dilated(
        x, layer.branch_weights["conv"][...], (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4,
    )  # fmt: skip
    expected = convolved * layer.branch_scales["conv"][...].reshape(1, 1, 1, -1)
    expected += x * layer.branch_weights["identity"][...].reshape(1, 1, 1, -1)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_squeeze_excite_gates_by_a_hard_sigmoid(x64, strict):
    """``clip(x / 6 + 1 / 2, 0, 1)``, which differs from the sigmoid by up to 0.07."""
    se = small(dtype=np.float64).stages[3][0].se
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, se.up.kernel.shape[-1])))
    gate = se.up(jax.nn.relu(se.down(x.mean((1, 2), keepdims=True))))
    np.testing.assert_allclose(se(x), x * np.clip(gate / 6 + 0.5, 0, 1), rtol=1e-12)


@pytest.mark.parametrize("kind", ["target", "rep"])
def test_the_second_module_of_a_bottleneck_has_no_relu(kind):
    bottleneck = small(kind).stages[0][0]
    x = float32(np.random.default_rng(0).normal(size=(2, 4, 4, 4)))

    @nnx.jit
    def run(bottleneck):
        first = bottleneck.ghost1(x)
        return first.min(), bottleneck.ghost2(first).min()

    first, second = run(bottleneck)
    assert first == 0
    assert second < 0


def test_no_convolution_has_a_bias_but_those_of_the_head_and_the_gates():
    modules = nnx.iter_modules(shapes())
    biased = {path for path, m in modules if isinstance(m, nnx.Conv) and m.bias is not None}
    assert {path[-1] if "se" not in path else "se" for path in biased} == {"conv_head", "se"}


def assert_same_outputs(compute, x):
    expected, found = jax.jit(compute)(x)
    assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()


def test_folded_network_computes_the_same(monkeypatch, x64):
    """Two of its bottlenecks, which have all of the parts."""
    monkeypatch.setattr(repopt_ghost, "STAGES", repopt_ghost.STAGES[:4:3])
    size = {"width": 0.1, "num_classes": 3, "param_dtype": np.float64}
    model = drawn(unfilled_model(name=NAME, kind="rep", **size))
    model.eval()
    assert_same_outputs(lambda x: (model(x), fold(model)(x)), images())
    folded = nnx.eval_shape(lambda: fold(model))
    assert not any(isinstance(m, BatchNorm) for _, m in nnx.iter_modules(folded))
    with pytest.raises(ValueError, match=r"blocks.*folded RepOptGhost"):
        fold(folded)


@pytest.mark.parametrize("kind", ["target", "hs"])
def test_folded_bottleneck_computes_the_same(kind, x64):
    """The one with all its parts: strided, with squeeze-excite and with layers as shortcut."""
    model = small(kind, dtype=np.float64)
    model.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 4)))
    assert_same_outputs(lambda x: (model.stages[3][0](x), fold(model).stages[3][0](x)), x)


def headed(dropout):
    """A network without stages, the head of which gets the same from every image."""
    model = small(dropout=dropout)
    options = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    model.conv_stem, model.bn1 = nnx.Conv(3, 96, (1, 1), **options), BatchNorm(96)
    model.stages = nnx.List([])
    model.conv_head.kernel[...] *= 0
    model.classifier.kernel[...] = float32(np.full((1280, 3), 1 / 1280))
    return model


def float32(array):
    return jnp.asarray(np.asarray(array, np.float32), np.float32)


def test_dropout_drops_its_share_of_the_head_in_training_alone():
    """Kept entries grow, so that the mean stays; evaluation needs no key and drops nothing."""
    model, plain = headed(0.5), headed(0.0)
    x = images(8, np.float32)
    run = nnx.jit(lambda model, key=None: model(x, key=key))
    first, second = (run(model, jax.random.key(seed)) for seed in (0, 1))
    assert not np.allclose(first, second)
    assert not np.allclose(first[0], first[1])  # every image has its own
    np.testing.assert_allclose((first + second).mean(0) / 2, run(plain)[0], rtol=0.05)
    with pytest.raises(ValueError, match=r"key.*0\.5"):
        run(model)
    model.eval()
    np.testing.assert_allclose(run(model), run(plain), rtol=1e-6)


def test_training_step_draws_anew_what_is_dropped():
    """From the key that it gets, which is another one at every step."""
    options = StepOptions(mean=(0.5,) * 3, std=(0.25,) * 3)
    labels = jnp.arange(8) % 3
    images = jnp.full((8, 32, 32, 3), 128, jnp.uint8)

    def losses(dropout):
        model = headed(dropout)
        model.classifier.kernel[...] = float32(np.linspace(-1, 1, 1280 * 3).reshape(1280, 3) ** 3)
        graphdef, params, stats = nnx.split(model, nnx.Param, ...)
        loss = jax.jit(loss_function(graphdef, options))
        return [float(loss(params, stats, images, labels, jax.random.key(i))[0]) for i in (0, 1)]

    first, second = losses(0.5)
    assert first != second
    first, second = losses(0.0)
    assert first == second


def test_bfloat16_is_the_type_of_the_computation_alone():
    model = shapes(width=0.1, dropout=0.2, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    graphdef, state = nnx.split(model)
    x = jnp.ones((2, 32, 32, 3), jnp.bfloat16)

    def run(state):
        return nnx.merge(graphdef, state, copy=True)(x, key=jax.random.key(0))

    assert jax.eval_shape(run, state).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["hs", "csla"])
def test_a_search_network_states_the_blocks_of_the_plain_one(kind):
    """So that scales can be checked against either."""
    plain, search = shapes(), small(kind)
    assert search.blocks() == plain.blocks()
    scales = repopt_jax.Scales.initial(plain)
    jax.eval_shape(lambda: scales.check(search))  # compiles nothing


@pytest.mark.parametrize("kind", ["target", "hs", "csla", "rep"])
def test_round_trip_is_bit_exact(kind):
    model = small(kind)
    exported = export_weights(model, num_batches_tracked=7)
    other = import_weights(small(kind, seed=5), exported)
    assert_same(variables(other), variables(model))
    found = recognize(exported)
    stated = "hs" if kind == "csla" else kind
    assert found == {"name": NAME, "width": 0.1, "kind": stated, "num_classes": 3}


def test_weights_file_round_trip(tmp_path):
    model = small("rep")
    facts = {"name": NAME, "kind": "rep", "width": 0.1, "num_classes": 3}
    save_weights(tmp_path / "w.safetensors", model, facts)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert_same(variables(loaded), variables(model))


@pytest.mark.parametrize("name", GHOST_SIZES)
def test_every_published_size_is_recognized_by_its_scales(name):
    model = published(name)
    ones = {
        path: {branch: np.ones(layer_at(model, path).kernel.shape[-1]) for branch in block}
        for path, block in model.blocks().items()
    }
    scales = scales_in(official_names(repopt_jax.Scales(ones)))
    assert scales.metadata["model"] == name
    scales.check(model)


def test_half_a_network_is_refused():
    names = official_names(repopt_jax.Scales.initial(published(f"{NAME}-0.5x")))
    del names["blocks.8.3.ghost2.cheap_operation.1.weight"]
    with pytest.raises(TorchFileError, match="missing stages/8/3/ghost2/cheap_conv/conv"):
        scales_in(names)
    weights = export_weights(small())
    weights["blocks.0.0.ghost1.cheap_operation.0.weight"] = np.ones((9, 1, 3, 3))
    with pytest.raises(TorchFileError, match="RepOpt-GhostNet"):
        recognize(weights)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((NAME,), {}, r"RepOpt-GhostNet.*width"),
        ((NAME,), {"width": 0.0}, r"width.*0\.0"),
        ((NAME,), {"width": 0.1, "dropout": 1.0}, r"dropout.*1\.0"),
        ((f"{NAME}-0.6x",), {}, "name.*RepOpt-GhostNet-0.6x"),
        ((f"{NAME}-0.5x",), {"se": True}, r"width.*\['se'\]"),
        ((f"{NAME}-0.5x", "repvgg"), {}, "kind.*repvgg.*RepOpt-GhostNet-0.5x"),
        (("RepOpt-VGG-A0", "rep"), {}, "kind.*rep.*RepOpt-VGG-A0"),
        (("RepOpt-VGG-A0",), {"width": 1.0}, r"RepOpt-VGG-A0.*\['width'\]"),
    ],
)
def test_create_model_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(*arguments, **options, rngs=nnx.Rngs(0))
