"""Whole networks of the siblings' papers: the numbers of the authors' own code, in both forms."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_networks import TINY, baseline, deploy_form, read
from flax import nnx
from pruning_networks import load_golden, section

from repopt_jax.deploy import fold
from repopt_jax.torch_files import export_weights, recognize
from repopt_jax.torch_files.names import to_official
from repopt_jax.torch_files.weights import unfilled_model

pytestmark = pytest.mark.slow


def computed(model, images):
    """Outputs before and after folding, and the folded layers: one program, compiled once."""

    def run(images):
        folded = fold(model)
        layers = {
            "/".join(map(str, path)): (layer.kernel[...], layer.bias[...])
            for path, layer in nnx.iter_modules(folded)
            if isinstance(layer, nnx.Conv)
        }
        return model(images), folded(images), layers

    return jax.device_get(jax.jit(run)(images))


@pytest.fixture(scope="module", params=TINY)
def authors(request):
    """A network's file, and what our network computes with the weights of either form."""
    arrays = load_golden(request.param)
    images = arrays["input"].transpose(0, 2, 3, 1)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        train = read(section(arrays, "train/"))
        plain = read(deploy_form(arrays))
        return types.SimpleNamespace(
            name=request.param,
            arrays=arrays,
            train=train,
            of_train=computed(train, jnp.asarray(images)),
            of_deploy=computed(plain, jnp.asarray(images)),
        )


def assert_outputs(found, arrays):
    """Logits, or three maps in torch's layout."""
    several = isinstance(found, (list, tuple))
    outputs = [y.transpose(0, 3, 1, 2) for y in found] if several else [found]
    names = ["output0", "output1", "output2"] if several else ["output"]
    for output, name in zip(outputs, names, strict=True):
        wanted = arrays[name]
        np.testing.assert_allclose(output, wanted, rtol=1e-10, atol=1e-12 * np.abs(wanted).max())


def test_either_form_is_recognized(authors):
    found = recognize(section(authors.arrays, "train/"))
    assert found.pop("small", 5) == 5
    assert not found.pop("se", False)
    assert found == {**TINY[authors.name], "kind": baseline(authors.name)}
    found = recognize(deploy_form(authors.arrays))
    assert not found.pop("se", False)
    size = {k: v for k, v in TINY[authors.name].items() if k != "copies"}
    assert found == {**size, "kind": "target"}


def test_training_form_gives_the_authors_outputs_unfolded_and_folded(authors):
    outputs, folded, _ = authors.of_train
    assert_outputs(outputs, authors.arrays)
    assert_outputs(folded, authors.arrays)


def test_deploy_form_gives_the_authors_outputs(authors):
    outputs, _, _ = authors.of_deploy
    assert_outputs(outputs, authors.arrays)


def test_folded_kernels_are_the_authors(authors):
    found, wanted = authors.of_train[2], authors.of_deploy[2]
    assert found.keys() == wanted.keys()
    for path, layer in wanted.items():
        for ours, theirs in zip(found[path], layer, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_as_many_layers_have_branches_as_the_authors_have(authors):
    layer = r"train/.*\.(rbr_dense\.conv|rbr_conv\.0\.conv|lkb_origin\.conv|fc3)\.weight"
    wanted = [k for k in authors.arrays if re.fullmatch(layer, k)]
    blocks = unfilled_model(**TINY[authors.name]).blocks()
    assert len(blocks) == len(wanted)
    assert not authors.train.blocks()
    identities = sum("identity" in block for block in blocks.values())
    assert identities == sum(
        k.endswith(("rbr_identity.weight", "rbr_skip.weight")) for k in authors.arrays
    )


def test_training_form_is_exported_under_its_authors_names(authors):
    """RepVGG's under those that the same layers have in the code of RepOptimizers."""
    weights = section(authors.arrays, "train/")
    if authors.name.startswith("repvgg"):
        _, weights = to_official(weights)
    exported = export_weights(authors.train)
    counts = {k for k in exported if k.endswith("num_batches_tracked")}
    assert exported.keys() - counts == weights.keys() - counts
    for key in exported.keys() - counts:
        np.testing.assert_array_equal(exported[key], weights[key])
