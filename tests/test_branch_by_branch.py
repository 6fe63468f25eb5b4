"""The method's claim, against a reference that shares no code with the package."""

import json

import branch_by_branch as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_networks import begun
from flax import nnx
from test_golden import load, relative, train

import repopt_jax
from repopt_jax.models import search_layers
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.tree_paths import layer_at

OPTIMIZERS = {
    "sgd": (repopt_jax.repopt_sgd, "linear", reference.SGD, 1e-11),
    # AdamW's epsilon is matched to first order where several branches meet.
    "adamw": (repopt_jax.repopt_adamw, "direction", reference.ADAMW, 1e-5),
}


@pytest.fixture(scope="module")
def results():
    with np.load(reference.FILE) as arrays:
        return {name: arrays[name] for name in arrays}


def network(kind, start, scales):
    """The plain or the CSLA network, started as the reference."""
    model = unfilled_model(
        name="RepOpt-VGG", kind=kind, num_blocks=reference.NUM_BLOCKS, widths=reference.WIDTHS,
        strides=reference.STRIDES, num_classes=reference.CLASSES, param_dtype=jnp.float64,
    )  # fmt: skip
    begun(model)
    for path, branches in model.blocks().items():
        place = path.removesuffix("/conv")
        layer, norm = layer_at(model, path), layer_at(model, f"{place}/bn")
        norm.scale[...], norm.bias[...] = start[place]["gamma"], start[place]["beta"]
        if kind == "target":
            layer.kernel[...] = jnp.asarray(reference.merged(start[place], scales[place]))
        else:
            for name in branches:
                layer.branch_weights[name][...] = start[place][name]
            for name, scale in scales[place].items():
                layer.branch_scales[name][...] = scale
    head = start["linear"]
    model.linear.kernel[...], model.linear.bias[...] = head["kernel"], head["bias"]
    return model


@pytest.mark.parametrize("kind", ["target", "csla"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_networks_train_as_the_reference_does(optimizer, kind, results, x64):
    make, rule, setup, bound = OPTIMIZERS[optimizer]
    bound = bound if kind == "target" else 1e-11  # branches have Adam's own epsilon
    start, scales, _, batches = reference.draw()
    model = network(kind, start, scales)
    params = nnx.state(model, nnx.Param)
    mults = jax.tree.map(lambda _: None, params)
    if kind == "target":
        by_layer = {f"{place}/conv": vectors for place, vectors in scales.items()}
        mults = repopt_jax.grad_mults(params, model.blocks(), by_layer, rule)
    mask = repopt_jax.weight_decay_mask
    tx = make(setup["lr"], mults, weight_decay=setup["weight_decay"], mask=mask)
    images, labels = (np.stack(column) for column in zip(*batches, strict=True))
    batches = {"images": images, "labels": labels}
    model, losses = train(model, tx, batches, setup["smoothing"])
    layers = [layer_at(model, path) for path in model.blocks()]
    kernels = jax.jit(lambda: [layer.kernel[...] for layer in layers])()
    norms = [layer_at(model, path.replace("conv", "bn")) for path in model.blocks()]
    found = {
        "kernels": [np.ravel(kernel) for kernel in kernels],
        "mean": [norm.mean[...] for norm in norms],
        "var": [norm.var[...] for norm in norms],
        "linear": [model.linear.kernel[...]],
        "losses": [np.asarray(losses)],
    }
    for name, parts in found.items():
        wanted = results[f"{optimizer}/{name}"]
        assert relative(np.concatenate(parts), wanted) <= bound, name


@pytest.mark.slow
def test_the_file_is_what_the_reference_gives(results, x64):
    found = reference.results()
    assert found.keys() == results.keys()
    for name, value in found.items():
        assert relative(value, results[name]) <= 1e-11, name


def parts_of(model):
    """The reference's form of a CSLA network that was read from an official file."""
    trained, scales, strides = {}, {}, {}
    for path, layer in search_layers(model).items():
        place = path.removesuffix("/conv")
        norm = layer_at(model, f"{place}/bn")
        strides[place] = 2 if place == "stage0" or place.endswith("/0") else 1
        scales[place] = {n: s[...] for n, s in layer.branch_scales.items()}
        trained[place] = {n: w[...] for n, w in layer.branch_weights.items()}
        trained[place] |= {"gamma": norm.scale[...], "beta": norm.bias[...]}
    trained["linear"] = {"kernel": model.linear.kernel[...], "bias": model.linear.bias[...]}
    return trained, scales, strides


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_reference_trains_as_the_official_code_does(optimizer, golden, x64):
    """So that the file beside this test stands for the official results."""
    with np.load(golden / "batches.npz") as arrays:
        images, labels = jnp.asarray(arrays["images"]), jnp.asarray(arrays["labels"])
    summary = json.loads((golden / "summary.json").read_text())
    batches = list(zip(images, labels, strict=True))
    method, setup = getattr(reference, optimizer), OPTIMIZERS[optimizer][2]
    start = parts_of(load(golden, "vgg_hs_init", kind="csla"))
    after, running, losses = reference.train(*start, batches, method, setup)
    assert relative(losses, summary[f"vgg_csla_{optimizer}_losses"]) <= 1e-9
    truth = load(golden, f"vgg_csla_{optimizer}_after", kind="csla")
    wanted, scales, _ = parts_of(truth)
    for place in running:
        kernels = [reference.merged(part[place], scales[place]) for part in (after, wanted)]
        assert relative(*kernels) <= 1e-9, place
        assert relative(running[place]["var"], layer_at(truth, f"{place}/bn").var[...]) <= 1e-9
    assert relative(after["linear"]["kernel"], wanted["linear"]["kernel"]) <= 1e-9
