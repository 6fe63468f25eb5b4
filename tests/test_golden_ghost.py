"""Equality of RepOpt-GhostNet with the official PyTorch code, in float64; see test_golden.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_golden import assert_same_weights, load, relative, sgd, train

import repopt_jax
from repopt_jax.torch_files import export_weights, load_torch_scales, read_state_dict
from repopt_jax.torch_files.names import torch_block
from repopt_jax.torch_files.scales import official_names
from repopt_jax.torch_files.weights import unfilled_model


@pytest.fixture
def summary(golden):
    return json.loads((golden / "summary.json").read_text())


@pytest.fixture
def batches(golden, x64):
    with np.load(golden / "ghost_batches.npz") as arrays:
        return {name: jnp.asarray(arrays[name]) for name in arrays}


def golden_scales(golden, model):
    """The scales of the target, which are those of the search network."""
    weights = read_state_dict(golden / "ghost_hs_init.pth")
    names = {"conv": "cheap_operation.1.weight", "identity": "fusion_scale.weight"}
    return {
        path: {
            branch: weights[f"{torch_block(path.removesuffix('/cheap_conv'))}.{name}"]
            for branch, name in names.items()
        }
        for path in model.blocks()
    }


@pytest.mark.parametrize(
    ("weights", "logits"),
    [
        ("ghost_hs_init", "ghost_hs_eval_logits"),
        ("ghost_rep", "ghost_rep_eval_logits"),
        ("ghost_target_after", "ghost_target_eval_logits"),
    ],
)
def test_logits(weights, logits, golden, summary, batches, x64):
    model = load(golden, weights)
    model.eval()
    assert relative(jax.jit(model)(batches["eval_images"]), summary[logits]) <= 1e-10


def test_multipliers(golden, x64):
    model = load(golden, "ghost_target_init")
    scales = golden_scales(golden, model)
    mults = {path: repopt_jax.branch_mult(b, scales[path]) for path, b in model.blocks().items()}
    with np.load(golden / "ghost_grad_mults_sgd.npz") as arrays:
        wanted = [arrays[name].transpose(2, 3, 1, 0) for name in sorted(arrays)]
    shapes = dict(zip(mults, [dense.shape for dense in wanted], strict=True))
    found = jax.jit(lambda: [m.dense(shapes[p], jnp.float64) for p, m in mults.items()])()
    for path, one, dense in zip(mults, found, wanted, strict=True):
        assert relative(one, dense) <= 1e-12, path


@pytest.mark.slow
def test_target_training_with_sgd(golden, summary, batches, x64):
    model, setup = load(golden, "ghost_target_init"), summary["setup"]
    params = nnx.state(model, nnx.Param)
    mults = repopt_jax.grad_mults(params, model.blocks(), golden_scales(golden, model))
    model, losses = train(model, sgd(setup, mults), batches, setup["label_smoothing"])
    assert relative(losses, summary["ghost_target_losses"]) <= 1e-9
    assert_same_weights(model, golden, "ghost_target_after", 1e-9)


def test_initial_scales_of_the_search(golden, summary):
    size = {"width": summary["setup"]["ghost_width"], "num_classes": 10}
    model = unfilled_model(name="RepOpt-GhostNet", **size)
    found = official_names(repopt_jax.Scales.initial(model))
    assert found.keys() == summary["ghost_hs_initial_scales"].keys()
    for name, (value,) in summary["ghost_hs_initial_scales"].items():
        np.testing.assert_allclose(found[name], value, rtol=1e-7)


def test_released_scales_fit_their_model(official_scales):
    scales = load_torch_scales(official_scales / "RepOptGhostNet_0_5x_scales.pth")
    assert scales.metadata["model"] == "RepOpt-GhostNet-0.5x"
    scales.check(unfilled_model(name="RepOpt-GhostNet-0.5x"))


@pytest.mark.parametrize("name", ["ghost_target_init", "ghost_hs_init", "ghost_rep"])
def test_round_trip_of_the_official_weights_is_bit_exact(name, golden, x64):
    wanted = read_state_dict(golden / f"{name}.pth")
    (count,) = {int(v) for k, v in wanted.items() if k.endswith("num_batches_tracked")}
    found = export_weights(load(golden, name), num_batches_tracked=count)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)
