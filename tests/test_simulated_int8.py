"""Simulated INT8 rounds as integer hardware does, trains with GR, and is what a file computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_networks import drawn
from flax import nnx

import repopt_jax
from repopt_jax import find_blocks, repvgg_branches
from repopt_jax.branches import grad_mults, merge, split_kernel
from repopt_jax.data import load_dataset
from repopt_jax.deploy import fold
from repopt_jax.deploy.image_set import ImageSet
from repopt_jax.deploy.onnx_export import onnx_model
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.runtime import OnnxNetwork
from repopt_jax.models.layers import BatchNorm
from repopt_jax.models.simulated_int8 import (
    SimulatedInt8,
    float_network,
    simulate_int8,
    simulated_layers,
)
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.tree_paths import by_path, layer_at, path_str

pytestmark = pytest.mark.slow

SIZE = {"num_blocks": (1, 1, 1, 1), "widths": (8, 8, 16, 16, 16), "strides": (1, 1, 2, 2, 1)}
DIGITS = Preprocessing(8, 8, (0.3,) * 3, (0.35,) * 3)


@nnx.jit
def run(model, images):
    return model(images)


def network(images, **options):
    """A network whose BatchNorm has the statistics of `images`."""
    # With seed 0 a number of one image lies on the edge of two steps, where the last bit decides.
    model = drawn(unfilled_model(name="RepOpt-VGG", num_classes=10, **SIZE | options), seed=1)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    run(model, jnp.asarray(images))
    model.eval()
    return model


def layers():
    padding = ((1, 1), (1, 1))
    options = {"padding": padding, "feature_group_count": 2}
    conv = nnx.eval_shape(lambda: nnx.Conv(4, 6, (3, 3), 2, **options, rngs=nnx.Rngs(0)))
    dense = nnx.eval_shape(lambda: nnx.Linear(7, 3, rngs=nnx.Rngs(0)))
    return {"convolution": (drawn(conv), (3, 5, 5, 4)), "dense": (drawn(dense), (5, 7))}


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("kind", ["convolution", "dense"])
def test_a_layer_computes_with_whole_numbers(kind, per_channel):
    """Against numpy's integers: the input, the kernel and the bias in steps, and no other error."""
    layer, shape = layers()[kind]
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    found = SimulatedInt8(nnx.clone(layer), per_channel=per_channel)
    found.largest_input[...] = jnp.float32(0.9)  # some inputs are clipped
    found.use_running_average = True
    axes = tuple(range(kernel.ndim - 1)) if per_channel else None
    of_x, of_kernel = 2.0**-7, rounded_up(np.abs(kernel).max(axes) / 127, bits=7)
    steps = {
        "x": np.clip(np.round(x / of_x), -127, 127),
        "kernel": np.round(kernel / of_kernel),
        "bias": np.round(bias / (of_x * of_kernel)),
    }
    assert np.abs(steps["x"]).max() == 127 and np.abs(steps["kernel"]).max() in (125, 126, 127)
    whole = nnx.clone(layer)
    whole.kernel[...], whole.bias[...] = jnp.asarray(steps["kernel"]), jnp.asarray(steps["bias"])
    sums = np.asarray(whole(jnp.asarray(steps["x"])))
    assert (sums == np.round(sums)).all()
    np.testing.assert_array_equal(found(jnp.asarray(x)), sums * (of_x * of_kernel))


def rounded_up(values, bits):
    """To a number of significant bits."""
    unit = 2.0 ** (np.floor(np.log2(values)) + 1 - bits)
    return np.ceil(values / unit) * unit


def test_steps_stay_whole_in_bfloat16():
    """The layer computes in the type of its parameters."""
    layer = nnx.eval_shape(lambda: nnx.Linear(64, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    layer = drawn(layer)
    plain = nnx.clone(layer)
    plain.dtype = None
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.bfloat16)
    found = SimulatedInt8(layer, per_channel=False)(x)
    expected = SimulatedInt8(plain, per_channel=False)(x.astype(jnp.float32))
    np.testing.assert_array_equal(found, expected)


def test_scales_of_activations_are_moving_averages_of_training_batches():
    layer = SimulatedInt8(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), per_channel=False)
    layer(jnp.array([[-3.0, 1.0]]))
    assert layer.largest_input[...] == 3.0  # the first batch's own
    layer(jnp.array([[0.5, 1.0]]))
    np.testing.assert_allclose(layer.largest_input[...], 0.9 * 3.0 + 0.1 * 1.0, rtol=1e-6)
    layer.eval()
    layer(jnp.array([[100.0, 1.0]]))
    np.testing.assert_allclose(layer.largest_input[...], 2.8, rtol=1e-6)
    assert layer.input_scale == 1 / 32  # the next power of two after 2.8 / 127 = 1 / 45


def test_derivatives_pass_through_the_rounding_and_end_where_it_clips():
    layer = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.array([[1.0], [0.25]])
    layer = SimulatedInt8(layer, per_channel=False)
    layer.eval()
    layer.largest_input[...] = jnp.float32(2.0)
    found = jax.grad(lambda x: layer(x).sum())(jnp.array([[1.99, 5.0]]))
    np.testing.assert_allclose(found, [[1.0, 0.0]], rtol=1e-2)


class Small(nnx.Module):
    """A convolution that changes the size, one with an identity, and a dense layer."""

    def __init__(self, rngs):
        options = {"padding": ((1, 1), (1, 1)), "param_dtype": jnp.float64, "rngs": rngs}
        self.stem = nnx.Conv(3, 4, (3, 3), 2, **options)
        self.body = nnx.Conv(4, 4, (3, 3), **options)
        self.head = nnx.Linear(4, 5, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.body(jax.nn.relu(self.stem(x)))).mean((1, 2)))


def test_gr_equals_training_the_branches_in_simulated_int8(x64):
    """The kernels as sums of branches with constant scales, under SGD with momentum."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 8, 8, 3)))
    plain = drawn(nnx.eval_shape(lambda: Small(nnx.Rngs(0))))
    model = simulate_int8(plain, per_channel=True)
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    blocks, labels = find_blocks(plain, repvgg_branches), jnp.arange(4)
    kernels = {path: layer_at(model, path).kernel[...] for path in blocks}
    scales = {
        path: {name: jnp.asarray(rng.uniform(0.5, 1.5, kernels[path].shape[-1])) for name in block}
        for path, block in blocks.items()
    }

    def loss(params):
        logits = nnx.merge(graphdef, params, stats, copy=True)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def merged(parts):
        weights, others = parts
        new = {p: merge(b, weights[p], scales[p], kernels[p].shape) for p, b in blocks.items()}
        return jax.tree_util.tree_map_with_path(
            lambda path, value: new.get(path_str(path).removesuffix("/kernel"), value), others
        )

    def trained(tx, params, loss):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(4):
            params, state = step(params, state)
        return params

    mults = grad_mults(params, blocks, scales)
    chain = optax.chain(repopt_jax.scale_by_grad_mult(mults), optax.sgd(0.05, 0.9))
    found = trained(chain, params, loss)
    weights = jax.jit(
        lambda: {p: split_kernel(b, kernels[p], scales[p]) for p, b in blocks.items()}
    )()
    parts = trained(optax.sgd(0.05, 0.9), (weights, params), lambda parts: loss(merged(parts)))
    expected = by_path(jax.jit(merged)(parts))
    for path, value in by_path(found).items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-9, atol=1e-12, err_msg=path)
    moved = by_path(params)["body/kernel"] - expected["body/kernel"]
    assert np.abs(moved).max() > 1e-3


def calibrated(model, images, *, per_channel):
    """In simulated INT8, with scales of activations found on images."""
    model = simulate_int8(fold(model), per_channel=per_channel)
    model.train()
    for batch in np.array_split(images, 4):
        run(model, jnp.asarray(batch))
    model.eval()
    return model


@pytest.mark.parametrize(
    ("per_channel", "se"), [(False, False), (True, True)], ids=["tensor", "channel, squeeze-excite"]
)
def test_onnxruntime_computes_the_simulated_logits(per_channel, se):
    """On all 360 evaluation images of digits, whichever way the kernels are stored."""
    data = load_dataset("digits")
    training = DIGITS(data.train.images[:64])
    model = calibrated(network(training, se=se), training, per_channel=per_channel)
    exact = np.asarray(run(model, jnp.asarray(DIGITS(data.eval.images))))
    for float_kernels in (False, True):
        graph = onnx_model(model, DIGITS, name="tiny", float_kernels=float_kernels)
        found = OnnxNetwork(graph)(data.eval.images)
        assert np.abs(found - exact).max() < 1e-3 < 0.03 * exact.std()
    rounding = run(float_network(model), jnp.asarray(DIGITS(data.eval.images))) - exact
    assert np.abs(rounding).max() > 1e-3  # the float network is another one


def test_onnxruntime_computes_the_simulated_logits_of_photographs(tfds_dir):
    """On 100 images of CIFAR-10."""
    splits = {"train_split": "train[:40]", "eval_split": "test[:100]"}
    images = ImageSet(load_dataset("cifar10_jpeg", data_dir=tfds_dir, **splits))
    preprocessing = Preprocessing(32, 32)
    training = preprocessing(np.concatenate(images.calibration(40)))
    model = calibrated(network(training), training, per_channel=False)
    ((evaluation, _),) = images.evaluation(100)
    exact = np.asarray(run(model, jnp.asarray(preprocessing(evaluation))))
    found = OnnxNetwork(onnx_model(model, preprocessing, name="tiny"))(evaluation)
    assert np.abs(found - exact).max() < 1e-3 < 0.03 * exact.std()


def test_every_convolution_and_dense_layer_is_simulated():
    """Of GhostNet, in shortcuts and squeeze-excite too; the copy's layers are its own."""

    def both():
        size = {"width": 0.1, "num_classes": 5}
        folded = fold(repopt_jax.create_model("RepOpt-GhostNet", **size, rngs=nnx.Rngs(0)))
        return folded, simulate_int8(folded, per_channel=False)

    folded, simulated = nnx.eval_shape(both)
    kernels = [path for path in by_path(nnx.state(folded)) if path.endswith("/kernel")]
    assert sorted(f"{path}/kernel" for path in simulated_layers(simulated)) == sorted(kernels)
    assert not simulated_layers(folded)
