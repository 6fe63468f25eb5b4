"""RepVGG and MobileOne: published sizes, and the numbers of the authors' own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repopt_jax.deploy import fold
from repopt_jax.models.mobileone import MOBILEONE_SIZES
from repopt_jax.models.repopt_vgg import REPVGG_SIZES
from repopt_jax.torch_files import import_weights, recognize
from repopt_jax.torch_files.names import from_torch
from repopt_jax.torch_files.weights import unfilled_model

# Millions of parameters in training form (as timm counts them) and in deploy form, as published;
# None: not published.
MILLIONS = {
    "RepVGG-A0": (9.11, 8.30),
    "RepVGG-A1": (14.09, 12.78),
    "RepVGG-A2": (28.21, 25.49),
    "RepVGG-B0": (15.82, 14.33),
    "RepVGG-B1": (57.42, 51.82),
    "RepVGG-B1g2": (None, 41.36),
    "RepVGG-B1g4": (39.97, 36.12),
    "RepVGG-B2": (89.02, 80.31),
    "RepVGG-B2g2": (None, None),
    "RepVGG-B2g4": (61.76, 55.77),
    "RepVGG-B3": (123.09, 110.96),
    "RepVGG-B3g2": (None, None),
    "RepVGG-B3g4": (83.83, 75.62),
    "RepVGG-D2se": (133.33, 120.39),
    "RepVGGplus-L2pse": (None, None),
    "MobileOne-S0": (5.29, 2.08),
    "MobileOne-S1": (4.83, 4.76),
    "MobileOne-S2": (7.88, 7.81),
    "MobileOne-S3": (10.17, 10.08),
    "MobileOne-S4": (14.95, 14.84),
}
TINY = {
    "repvgg_g4_tiny": {
        "name": "RepVGG",
        "num_blocks": (2, 2, 3, 1),
        "widths": (8, 8, 16, 16, 32),
        "groups": 4,
    },
    "repvgg_d2se_tiny": {
        "name": "RepVGG",
        "num_blocks": (2, 2, 3, 1),
        "widths": (16, 16, 16, 32, 32),
        "pre_se": True,
    },
    "mobileone_tiny": {
        "name": "MobileOne",
        "num_blocks": (1, 2, 2, 1),
        "widths": (8, 8, 16, 32, 64),
        "copies": 3,
        "se_blocks": (0, 0, 0, 0),
    },
    "mobileone_se_tiny": {
        "name": "MobileOne",
        "num_blocks": (1, 2, 2, 1),
        "widths": (8, 8, 16, 32, 64),
        "copies": 1,
        "se_blocks": (0, 0, 1, 1),
    },
}
BASELINE = {"RepVGG": "repvgg", "MobileOne": "mobileone"}


def baseline(name):
    return "mobileone" if name.startswith("MobileOne") else "repvgg"


def size(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("name", [*REPVGG_SIZES, *MOBILEONE_SIZES])
def test_parameter_counts_are_the_published_ones(name):
    """Of the training form, and of the plain network once its BatchNorms are biases."""
    model = unfilled_model(name=name, kind=baseline(name))
    plain = unfilled_model(name=name, kind="target")
    norms = sum(block.bn.scale.shape[0] for _, block in plain.layers())
    for published, count in zip(MILLIONS[name], (size(model), size(plain) - norms), strict=True):
        assert published is None or abs(count / 1e6 - published) <= 0.01


def split(golden, part):
    """The state dict of one form, and the images in our layout."""
    weights = {k.removeprefix(f"{part}/"): golden[k] for k in golden if k.startswith(f"{part}/")}
    return weights, golden["input"].transpose(0, 2, 3, 1)


@pytest.fixture
def family(request, golden_family):
    return np.load(golden_family / f"{request.param}.npz")


def read(weights, dtype=jnp.float64):
    model = import_weights(unfilled_model(**recognize(weights), param_dtype=dtype), weights)
    model.eval()
    return model


@pytest.mark.parametrize(("family", "options"), TINY.items(), indirect=["family"])
def test_training_form_gives_the_authors_outputs_and_deploy_tensors(family, options, x64, strict):
    weights, images = split(family, "train")
    found = recognize(weights)
    wanted = {**options, "kind": baseline(options["name"]), "num_classes": 5}
    assert {k: v for k, v in found.items() if k != "se"} == wanted
    model = read(weights)
    np.testing.assert_allclose(model(images), family["output"], rtol=1e-10)
    folded = fold(model)
    np.testing.assert_allclose(folded(images), family["output"], rtol=1e-10)
    deploy, _ = split(family, "deploy")
    for path, block in folded.layers():
        place = path.replace("/", ".")
        part = "reparam_conv" if "mobileone" in wanted["kind"] else "rbr_reparam"
        kernel, bias = (deploy[f"{place}.{part}.{name}"] for name in ("weight", "bias"))
        np.testing.assert_allclose(
            block.conv.kernel[...], from_torch(kernel), rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(block.conv.bias[...], bias, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("family", "options"), TINY.items(), indirect=["family"])
def test_deploy_form_is_read_as_the_plain_network(family, options, x64, strict):
    weights, images = split(family, "deploy")
    found = recognize(weights)
    plain = {k: v for k, v in options.items() if k != "copies"}
    wanted = {**plain, "kind": "target", "num_classes": 5}
    assert {k: v for k, v in found.items() if k != "se"} == wanted
    np.testing.assert_allclose(read(weights)(images), family["output"], rtol=1e-10)
