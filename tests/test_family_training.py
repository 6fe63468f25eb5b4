"""The siblings' plain networks under their RepOptimizers train as their networks of branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_networks import TINY, drawn

from repopt_jax.check_equivalence.layers import METHODS
from repopt_jax.check_equivalence.training import differences
from repopt_jax.models.search import search_layers
from repopt_jax.torch_files.weights import fill, unfilled_model, variables

pytestmark = pytest.mark.slow

# One block with an identity and one without are enough, and compile in less time.
SIZES = {
    **TINY,
    "repvgg_g4_tiny": {**TINY["repvgg_g4_tiny"], "num_blocks": (2, 1, 2, 1)},
    "repvgg_d2se_tiny": {**TINY["repvgg_d2se_tiny"], "num_blocks": (1, 1, 2, 1)},
    "mobileone_tiny": {**TINY["mobileone_tiny"], "num_blocks": (1, 1, 2, 1)},
    "mobileone_se_tiny": {**TINY["mobileone_se_tiny"], "num_blocks": (1, 1, 1, 1)},
    "replknet_tiny": {**TINY["replknet_tiny"], "num_blocks": (1, 1, 1, 1)},
    "repmlpnet_tiny": {**TINY["repmlpnet_tiny"], "num_blocks": (1, 1)},
    "efficientrep_reppan_tiny": {
        **TINY["efficientrep_reppan_tiny"],
        "num_blocks": (1, 1, 2, 1, 1, 1, 1, 2, 1),
    },
}


def started(size):
    """The plain network, that of branches with the same kernels, and the latter's scales.

    As `check_equivalence.training.start` makes them; nothing is drawn by a program of its own.
    """
    plain = unfilled_model(**size, param_dtype=jnp.float64)

    csla = drawn(unfilled_model(**size, kind="csla", param_dtype=jnp.float64))
    layers, scales, rng = search_layers(csla), {}, np.random.default_rng(1)
    for path, layer in layers.items():
        for scale in layer.branch_scales.values():
            scale.set_value(scale[...] * rng.choice([-1.0, 1.0], scale.shape))
        scales[path] = {name: scale[...] for name, scale in layer.branch_scales.items()}
    kernels = jax.jit(lambda: {f"{path}/kernel": layer.kernel for path, layer in layers.items()})()
    return fill(plain, {**variables(csla), **kernels}), csla, scales


CASES = [name for name in SIZES if name != "efficientrep_bifpan_tiny"]


@pytest.mark.parametrize("name", CASES)
def test_gr_follows_the_branches(name, x64):
    """For three steps, with scales of both signs."""
    plain, csla, scales = started(SIZES[name])
    fewest = min(map(len, plain.blocks().values()))
    assert fewest > 1 or SIZES[name]["name"] == "MobileOne"
    images = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 32, 32, 3)))

    def loss(network, batch):
        return sum(jnp.square(y - 1).mean() for y in jax.tree.leaves(network(batch)))

    found = differences(plain, csla, scales, METHODS["multiplier: SGD"], loss, images)
    assert len(found) == len(plain.blocks())
    assert max(found.values()) < 1e-10
