"""RepOpt-GhostNet's search networks train as the official ones do, decay included."""

import json

import ghost_by_branch as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_networks import drawn
from flax import nnx
from test_golden import plain_mults, relative, sgd, train

import repopt_jax
from repopt_jax.models import repopt_ghost
from repopt_jax.torch_files import export_weights, read_state_dict
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.tree_paths import path_str

pytestmark = pytest.mark.slow

SETUP = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-2}


@pytest.fixture
def network(monkeypatch):
    """Makes a search network of two bottlenecks, with identity vectors other than 1."""
    monkeypatch.setattr(repopt_ghost, "STAGES", repopt_ghost.STAGES[:4:3])

    def make(kind):
        size = {"width": 0.1, "num_classes": 5, "param_dtype": jnp.float64}
        return drawn(unfilled_model(name="RepOpt-GhostNet", kind=kind, **size))

    return make


@pytest.mark.parametrize("kind", ["hs", "csla"])
def test_search_networks_train_as_the_reference_does(kind, network, x64):
    """Three steps of SGD with a decay that would show at the second."""
    model = network(kind)
    rng = np.random.default_rng(1)
    batches = {"images": rng.normal(size=(3, 4, 64, 64, 3)), "labels": rng.integers(0, 5, (3, 4))}
    start = {n: w for n, w in export_weights(model).items() if w.dtype.kind == "f"}
    pairs = zip(batches["images"], batches["labels"], strict=True)
    wanted, wanted_losses = reference.train(start, kind, pairs, **SETUP, smoothing=0.1)
    tx = sgd({**SETUP, "nesterov": True}, plain_mults(model))
    model, losses = train(model, tx, jax.tree.map(jnp.asarray, batches), 0.1)
    assert relative(losses, wanted_losses) <= 1e-9
    found = export_weights(model)
    for name, value in wanted.items():
        if np.abs(value).max() > 1e-14:  # else a gradient that is zero but for rounding
            assert relative(found[name], value) <= 1e-8, name


def test_reparameterize_decays_what_the_search_networks_do(network, x64):
    plain = network("csla")
    names = set()

    def decayed(params):
        mask = repopt_jax.weight_decay_mask(params)
        leaves = jax.tree_util.tree_leaves_with_path(mask)
        names.update(path_str(path) for path, leaf in leaves if leaf)
        return mask

    decayed(nnx.state(plain, nnx.Param))
    wanted = set(names)
    assert not any("identity" in name for name in wanted)
    assert sum("branch_weights/conv" in name for name in wanted) == 4
    names.clear()

    size = {"name": "RepOpt-GhostNet", "width": 0.1, "num_classes": 5}
    scales = repopt_jax.Scales.initial(unfilled_model(**size))

    def started():
        rngs = nnx.Rngs(0)
        model = repopt_jax.create_model(**size, rngs=rngs)
        target = repopt_jax.target_network(model, scales, rngs=rngs)
        tx = target.reparameterize(optax.chain(optax.add_decayed_weights(1e-2, decayed)))
        return tx.init(nnx.state(target.model, nnx.Param))

    nnx.eval_shape(started)
    assert names == wanted


def test_the_reference_is_the_official_network(golden, x64):
    summary = json.loads((golden / "summary.json").read_text())
    weights = read_state_dict(golden / "ghost_hs_init.pth")
    weights = {n: jnp.asarray(w, w.dtype) for n, w in weights.items() if w.dtype.kind == "f"}
    with np.load(golden / "ghost_batches.npz") as arrays:
        images = jnp.asarray(arrays["eval_images"])
    found = jax.jit(reference.logits)(weights, images)
    assert relative(found, summary["ghost_hs_eval_logits"]) <= 1e-10
