"""RepLKNet, RepMLPNet and YOLOv6's backbone and necks: the numbers of the authors' own code."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from repopt_jax import Scales, create_model, grad_mults, init_target, repopt_sgd
from repopt_jax.check_equivalence.layers import METHODS
from repopt_jax.check_equivalence.training import differences, start
from repopt_jax.deploy import fold
from repopt_jax.files import load_weights, save_weights, variables
from repopt_jax.models.create import FAMILIES
from repopt_jax.models.replknet import REPLKNET_SIZES
from repopt_jax.models.repmlpnet import REPMLPNET_SIZES
from repopt_jax.models.yolov6 import YOLOV6_SIZES
from repopt_jax.torch_files import TorchFileError, export_weights, import_weights, recognize
from repopt_jax.torch_files.names import from_torch, to_torch, torch_name
from repopt_jax.torch_files.weights import unfilled_model

WIDTHS = (4, 6, 8, 10, 12, 6, 4, 4, 6, 6, 8)
REPEATS = (1, 2, 2, 3, 1, 2, 1, 2, 1)
TINY = {
    "replknet_tiny": {
        "name": "RepLKNet",
        "num_blocks": (1, 1, 2, 1),
        "widths": (8, 12, 16, 20),
        "kernel_sizes": (11, 9, 7, 5),
        "ratio": 1.0,
        "num_classes": 5,
    },
    "repmlpnet_tiny": {
        "name": "RepMLPNet",
        "num_blocks": (1, 2),
        "widths": (8, 16),
        "patches": (4, 2),
        "sets": (2, 4),
        "num_classes": 5,
    },
    "efficientrep_reppan_tiny": {
        "name": "YOLOv6",
        "num_blocks": REPEATS,
        "widths": WIDTHS,
        "neck": "RepPAN",
    },
    "efficientrep_bifpan_tiny": {
        "name": "YOLOv6",
        "num_blocks": REPEATS,
        "widths": WIDTHS,
        "neck": "BiFPAN",
    },
}


def baseline(name):
    return FAMILIES[TINY[name]["name"]].baseline


def maps(outputs):
    """What a network gives, in torch's layout."""
    several = isinstance(outputs, (list, tuple))
    return [np.asarray(y).transpose(0, 3, 1, 2) for y in outputs] if several else [outputs]


def assert_outputs(model, golden):
    outputs = maps(model(golden["input"].transpose(0, 2, 3, 1)))
    names = ["output"] if "output" in golden else ["output0", "output1", "output2"]
    for found, name in zip(outputs, names, strict=True):
        wanted = golden[name]
        assert np.abs(found - wanted).max() <= 1e-10 * np.abs(wanted).max()


@pytest.fixture
def golden(request, golden_family):
    return np.load(golden_family / f"{request.param}.npz")


def state_dict(golden, part):
    return {k.removeprefix(f"{part}/"): golden[k] for k in golden if k.startswith(f"{part}/")}


def deploy(golden):
    """The state dict of the deploy form; RepLKNet's file has its merged kernels alone."""
    if found := state_dict(golden, "deploy"):
        return found
    train = state_dict(golden, "train")
    rest = {k: v for k, v in train.items() if not re.search(r"lkb_origin|small_conv", k)}
    return rest | state_dict(golden, "merged")


def read(weights):
    model = import_weights(unfilled_model(**recognize(weights), param_dtype=jnp.float64), weights)
    model.eval()
    return model


cases = pytest.mark.parametrize(("golden", "name"), [(n, n) for n in TINY], indirect=["golden"])


@cases
def test_training_form_gives_the_authors_outputs_unfolded_and_folded(golden, name, x64, strict):
    weights = state_dict(golden, "train")
    found = recognize(weights)
    assert found.pop("small", 5) == 5
    assert found == {**TINY[name], "kind": baseline(name)}
    model = read(weights)
    assert_outputs(model, golden)
    assert_outputs(fold(model), golden)


@cases
def test_folded_kernels_are_the_authors(golden, name, x64):
    folded = fold(read(state_dict(golden, "train")))
    plain = read(deploy(golden))
    layers = {p: layer for p, layer in nnx.iter_modules(folded) if isinstance(layer, nnx.Conv)}
    compared = 0
    for path, layer in nnx.iter_modules(fold(plain)):
        if isinstance(layer, nnx.Conv):
            compared += 1
            np.testing.assert_allclose(layers[path].kernel, layer.kernel, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(layers[path].bias, layer.bias, rtol=1e-10, atol=1e-12)
    assert compared == len(layers)


@cases
def test_deploy_form_is_read_as_the_plain_network(golden, name, x64, strict):
    found = recognize(deploy(golden))
    assert found == {**TINY[name], "kind": "target"}
    assert_outputs(read(deploy(golden)), golden)


@cases
def test_training_form_is_exported_under_its_authors_names(golden, name, x64):
    weights = state_dict(golden, "train")
    exported = export_weights(read(weights))
    exported = {k: v for k, v in exported.items() if not k.endswith("num_batches_tracked")}
    assert exported.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(exported[key], value)
