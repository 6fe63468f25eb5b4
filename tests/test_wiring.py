"""The part `target` trains as its branches would, through the steps that `train.py` takes.

In float64, with scales that a search has moved away from where it began: were the initialization or
the multipliers made from other scales, the two networks would part.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from small_run import small_config

import repopt_jax.weight_decay as weight_decay
from repopt_jax.models import repopt_ghost
from repopt_jax.models.search import search_layers
from repopt_jax.training.devices import make_mesh, put_batch
from repopt_jax.training.networks import initial_scales
from repopt_jax.training.parts import prepare_parts
from repopt_jax.training.step import jitted_train_step
from repopt_jax.tree_paths import layer_at

STEPS = 10
NETWORKS = {
    "RepOpt-VGG": {},
    "RepOpt-GhostNet": {
        "model__name": "RepOpt-GhostNet",
        "model__width": 0.1,
        "model__num_blocks": None,
        "model__widths": None,
        "model__strides": None,
    },
}


def config_of(network, optimizer="sgd", identity="searched"):
    config = small_config(dtype="float64", identity=identity, **NETWORKS[network])
    for section in (config.search, config.target):
        section.batch_size, section.bn_group, section.accumulation = 32, 8, 2
        section.schedule.warmup_epochs = 0.0
        section.schedule.base_lr = 0.8
    config.search.schedule.base_lr = 3.0
    config.target.ema_decay = 0.7
    config.target.optimizer.update({"name": optimizer, "weight_decay": 0.05, "eps": 1e-11})
    if optimizer == "adamw":
        config.target.schedule.base_lr = 0.04
    return config


@pytest.fixture(autouse=True)
def _a_short_ghost(monkeypatch):
    """Two of sixteen bottlenecks, which compile in a fraction of the time."""
    monkeypatch.setattr(repopt_ghost, "STAGES", repopt_ghost.STAGES[1:3])


@pytest.fixture(autouse=True)
def _ghosts_identities_decay(monkeypatch):
    """As the plain kernel does, which the official search of RepOpt-GhostNet does not match."""
    monkeypatch.setattr(weight_decay, "GHOST_IDENTITY", "no such name")


def trained(part):
    state, batches = part.init(), part.train_batches()
    for _ in range(STEPS):
        batch = put_batch(part.mesh, next(batches))
        state, _ = jitted_train_step(part.graphdef, part.tx, part.options, state, batch)
    return state


@functools.cache
def searched(network):
    """The scales of a search of some steps, which are far from those that it began with."""
    config = config_of(network)
    part = prepare_parts(config, ("search",), make_mesh(devices=jax.devices()[:1]))["search"]
    scales = part.scales_of(trained(part), STEPS, {"eval/top1": 0.0})
    start = initial_scales(config).flat()
    moved = [abs(vector / start[name] - 1).max() for name, vector in scales.flat().items()]
    assert min(moved) > 0.01
    return scales


CASES = [
    ("RepOpt-VGG", "sgd", "searched"),
    ("RepOpt-VGG", "adamw", "searched"),
    pytest.param("RepOpt-VGG", "sgd", "one", marks=pytest.mark.slow),
    pytest.param("RepOpt-VGG", "adamw", "one", marks=pytest.mark.slow),
    pytest.param("RepOpt-GhostNet", "sgd", "one", marks=pytest.mark.slow),
    pytest.param("RepOpt-GhostNet", "adamw", "searched", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("network", "optimizer", "identity"), CASES)
def test_the_target_equals_its_branches_after_ten_steps(x64, network, optimizer, identity):
    """Kernels, BatchNorm and averages; with accumulation, and decay of the kernels alone."""
    config = config_of(network, optimizer, identity)
    mesh = make_mesh(devices=jax.devices()[:1])
    # As `run` does: prepared before the scales are known.
    parts = prepare_parts(config, ("target", "csla"), mesh)
    target, csla = (part.with_scales(searched(network)) for part in parts.values())
    states = trained(target), trained(csla)
    for plain, branches in zip(*(networks(s) for s in states), strict=True):
        plain = nnx.merge(target.graphdef, *plain)
        branches = nnx.merge(csla.graphdef, *branches)
        plain.eval()
        branches.eval()
        for path, layer in search_layers(branches).items():
            ours, theirs = layer_at(plain, path).kernel[...], layer.kernel
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * abs(theirs).max())
        images = target.dataset.eval.images[:8] / 255.0
        ours, theirs = logits(plain, images), logits(branches, images)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7)


@nnx.jit
def logits(model, images):
    return model(images)


def networks(state):
    """The network as it is and its moving averages."""
    return [(state.params, state.stats), state.ema]
