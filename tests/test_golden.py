"""Equality with the official PyTorch code, in float64: forward, multipliers and training.

The folder of its results is not part of the project; without it these tests skip.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import repopt_jax
from repopt_jax.models import search_layers
from repopt_jax.torch_files import (
    export_weights,
    load_torch_scales,
    load_torch_weights,
    read_state_dict,
)
from repopt_jax.torch_files.weights import fill, unfilled_model, variables
from repopt_jax.training.optimizer import clip_by_global_norm
from repopt_jax.training.step import cross_entropy
from repopt_jax.tree_paths import layer_at

FLOAT64 = {"param_dtype": jnp.float64}


@pytest.fixture
def summary(golden):
    return json.loads((golden / "summary.json").read_text())


@pytest.fixture
def batches(golden, x64):
    with np.load(golden / "batches.npz") as arrays:
        return {name: jnp.asarray(arrays[name]) for name in arrays}


def load(golden, name, **options):
    return load_torch_weights(golden / f"{name}.pth", **FLOAT64, **options)


def relative(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def train(model, tx, batches, smoothing):
    """`model` after all golden batches in order, and their losses."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, images, labels):
        net = nnx.merge(graphdef, params, rest, copy=True)
        value = cross_entropy(net(images), labels, smoothing).mean()
        return value, nnx.state(net, nnx.Not(nnx.Param))

    @jax.jit
    def step(params, rest, opt_state, images, labels):
        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, value

    opt_state, losses = jax.jit(tx.init)(params), []
    for images, labels in zip(batches["images"], batches["labels"], strict=True):
        params, rest, opt_state, value = step(params, rest, opt_state, images, labels)
        losses.append(float(value))
    return nnx.merge(graphdef, params, rest), losses


def plain_mults(model):
    return jax.tree.map(lambda _: None, nnx.state(model, nnx.Param))


def sgd(setup, mults):
    return repopt_jax.repopt_sgd(
        setup["lr"],
        mults,
        momentum=setup["momentum"],
        nesterov=setup["nesterov"],
        weight_decay=setup["weight_decay"],
        mask=repopt_jax.weight_decay_mask,
    )


def golden_scales(golden):
    """The scales of the target: those of the search network's start, of mixed sign."""
    weights = read_state_dict(golden / "vgg_hs_init.pth")
    return {
        path: {name: np.asarray(weights[key]) for name, key in block.items()}
        for path, block in (
            (f"{block.replace('.', '/')}/conv", names)
            for block, names in _scale_keys(weights).items()
        )
    }


def _scale_keys(weights):
    names = {"scale_conv": "conv3x3", "scale_1x1": "conv1x1", "scale_identity": "identity"}
    blocks = {}
    for key in weights:
        block, _, scale = key.removesuffix(".weight").rpartition(".")
        if scale in names:
            blocks.setdefault(block, {})[names[scale]] = key
    return blocks


def assert_same_weights(model, golden, name, bound):
    """Every parameter and running statistic agrees, relative to its tensor's largest value.

    Tensors below 1e-15 are zero but for roundings, and have to be so in both: biases whose
    gradient a later BatchNorm makes zero, and running means of channels that have mean zero.
    """
    found, wanted = export_weights(model), read_state_dict(golden / f"{name}.pth")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if np.abs(value).max() < 1e-15:
            assert np.abs(found[key]).max() < 1e-15, key
        elif not key.endswith("num_batches_tracked"):
            assert relative(found[key], value) <= bound, key


@pytest.mark.parametrize(
    ("weights", "logits"),
    [
        ("vgg_hs_after", "vgg_hs_eval_logits"),
        ("vgg_target_after", "vgg_target_eval_logits"),
        ("vgg_repvgg_init", "vgg_repvgg_init_eval_logits"),
        ("vgg_repvgg_after", "vgg_repvgg_eval_logits"),
        ("vgg_target_se", "vgg_target_se_eval_logits"),
    ],
)
def test_logits(weights, logits, golden, summary, batches, x64):
    model = load(golden, weights)
    model.eval()
    assert relative(jax.jit(model)(batches["eval_images"]), summary[logits]) <= 1e-10


def test_multipliers(golden, x64):
    model = load(golden, "vgg_target_init")
    scales = golden_scales(golden)
    with np.load(golden / "vgg_grad_mults_sgd.npz") as arrays:
        wanted = [arrays[name].transpose(2, 3, 1, 0) for name in sorted(arrays)]
    mults = [repopt_jax.branch_mult(b, scales[path]) for path, b in model.blocks().items()]
    shapes = [dense.shape for dense in wanted]
    pairs = list(zip(mults, shapes, strict=True))
    found = jax.jit(lambda: [mult.dense(shape, jnp.float64) for mult, shape in pairs])()
    for one, dense in zip(found, wanted, strict=True):
        assert relative(one, dense) <= 1e-12


def test_target_training_with_sgd(golden, summary, batches, x64):
    model, setup = load(golden, "vgg_target_init"), summary["setup"]
    params = nnx.state(model, nnx.Param)
    mults = repopt_jax.grad_mults(params, model.blocks(), golden_scales(golden))
    model, losses = train(model, sgd(setup, mults), batches, setup["label_smoothing"])
    assert relative(losses, summary["vgg_target_losses"]) <= 1e-9
    assert_same_weights(model, golden, "vgg_target_after", 1e-9)


def test_search_training_with_clipping(golden, summary, batches, x64):
    model, setup = load(golden, "vgg_hs_init"), summary["setup"]
    clip = clip_by_global_norm(setup["hs_clip_norm"])
    tx = optax.chain(clip, sgd(setup, plain_mults(model)))
    model, losses = train(model, tx, batches, setup["label_smoothing"])
    assert relative(losses, summary["vgg_hs_losses"]) <= 1e-9
    assert_same_weights(model, golden, "vgg_hs_after", 1e-9)


def test_csla_training_with_sgd(golden, summary, batches, x64):
    model, setup = load(golden, "vgg_hs_init", kind="csla"), summary["setup"]
    tx = sgd(setup, plain_mults(model))
    model, losses = train(model, tx, batches, setup["label_smoothing"])
    assert relative(losses, summary["vgg_csla_sgd_losses"]) <= 1e-9
    assert_same_weights(model, golden, "vgg_csla_sgd_after", 1e-9)


def test_repvgg_training_with_sgd(golden, summary, batches, x64):
    model, setup = load(golden, "vgg_repvgg_init"), summary["setup"]
    tx = sgd(setup, plain_mults(model))
    model, losses = train(model, tx, batches, setup["label_smoothing"])
    assert relative(losses, summary["vgg_repvgg_losses"]) <= 1e-9
    assert_same_weights(model, golden, "vgg_repvgg_after", 1e-9)


def test_target_training_with_adamw_follows_the_branches(golden, summary, batches, x64):
    """The truth is the CSLA network under torch's AdamW; the official optimizer misses by 5e-3."""
    setup = summary["setup"]
    csla = load(golden, "vgg_hs_init", kind="csla")
    layers = search_layers(csla)
    kernels = jax.jit(lambda: {f"{path}/kernel": layer.kernel for path, layer in layers.items()})()
    target = unfilled_model(
        name="RepOpt-VGG",
        num_blocks=setup["num_blocks"],
        widths=(8, 8, 16, 32, 128),
        num_classes=setup["num_classes"],
        **FLOAT64,
    )
    fill(target, {**variables(csla), **kernels})
    scales = golden_scales(golden)
    params = nnx.state(target, nnx.Param)
    mults = repopt_jax.grad_mults(params, target.blocks(), scales, "direction")
    tx = repopt_jax.repopt_adamw(
        setup["adamw_lr"],
        mults,
        weight_decay=setup["weight_decay"],
        mask=repopt_jax.weight_decay_mask,
    )
    target, losses = train(target, tx, batches, setup["label_smoothing"])
    assert relative(losses, summary["vgg_csla_adamw_losses"]) <= 1e-5
    truth = load_torch_weights(golden / "vgg_csla_adamw_after.pth", kind="csla", **FLOAT64)
    layers = search_layers(truth)
    kernels = jax.jit(lambda: {path: layer.kernel for path, layer in layers.items()})()
    for path, wanted in kernels.items():
        assert relative(layer_at(target, path).kernel[...], wanted) <= 1e-5, path


def test_initial_scales_of_the_search(golden, summary, quick_draws):
    setup = summary["setup"]
    size = {"num_blocks": setup["num_blocks"], "widths": (8, 8, 16, 32, 128), "num_classes": 10}

    made = nnx.jit(lambda: repopt_jax.create_model("RepOpt-VGG", "hs", **size, rngs=nnx.Rngs(0)))
    found = repopt_jax.torch_files.official_names(repopt_jax.searched_scales(made()))
    assert found.keys() == summary["hs_initial_scales"].keys()
    for name, (value,) in summary["hs_initial_scales"].items():
        np.testing.assert_allclose(found[name], value, rtol=1e-7)


def test_released_scales_fit_their_models(official_scales):
    for name in ("B1", "B2", "L1", "L2"):
        scales = load_torch_scales(official_scales / f"RepOpt-VGG-{name}-scales.pth")
        assert scales.metadata["model"] == f"RepOpt-VGG-{name}"
        scales.check(unfilled_model(name=f"RepOpt-VGG-{name}"))


def test_released_scales_have_the_share_of_negatives_that_was_reported(official_scales):
    """B1 0.73 % of channels, L1 4.4 %: the case in which the official AdamW is wrong."""
    for name, share in (("B1", 0.0073), ("L1", 0.044)):
        scales = load_torch_scales(official_scales / f"RepOpt-VGG-{name}-scales.pth")
        flat = np.concatenate(
            [v for block in scales.values() for n, v in block.items() if n != "identity"]
        )
        assert abs((flat < 0).mean() - share) < share / 2
