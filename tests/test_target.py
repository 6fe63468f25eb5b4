"""`target_network` for a part of the parameters, and networks with tied kernels."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from repopt_jax import (
    Centre,
    Full,
    Scales,
    find_blocks,
    repopt_sgd,
    repvgg_branches,
    search_network,
    target_network,
)
from repopt_jax.models.branched_layers import check_layers


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.body = nnx.Conv(2, 2, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.body(jax.nn.relu(self.stem(x)))


def make_target():
    model = Net(nnx.Rngs(0))
    blocks = {"stem": {"full": Full()}, "body": {"full": Full(scale=2.0), "centre": Centre(1)}}
    scales = Scales.initial(model, blocks)
    return target_network(model, scales, blocks=blocks, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("how", ["grad_mults", "reparameterize"])
def test_what_wrt_leaves_out_is_not_trained(how):
    """A block outside `wrt` stays where it is; the other trains as with all parameters."""
    body = nnx.All(nnx.Param, nnx.PathContains("body"))
    kernels = {}
    for wrt in (nnx.Param, body):
        target = make_target()
        if how == "grad_mults":
            tx = repopt_sgd(0.1, target.grad_mults(wrt=wrt))
        else:
            tx = target.reparameterize(optax.sgd(0.1, 0.9, nesterov=True), wrt=wrt)
        optimizer = nnx.Optimizer(target.model, tx, wrt=wrt)
        graph, trained, rest = nnx.split(target.model, wrt, ...)

        def loss(trained, graph=graph, rest=rest):
            return jnp.square(nnx.merge(graph, trained, rest)(jnp.ones((1, 4, 4, 2)))).mean()

        optimizer.update(target.model, jax.grad(loss)(trained))
        kernels[wrt] = target.model
    start = make_target().model
    np.testing.assert_array_equal(kernels[body].stem.kernel[...], start.stem.kernel[...])
    np.testing.assert_allclose(
        kernels[body].body.kernel[...], kernels[nnx.Param].body.kernel[...], rtol=1e-6
    )
    assert abs(kernels[body].body.kernel[...] - start.body.kernel[...]).max() > 1e-3
    assert abs(kernels[nnx.Param].stem.kernel[...] - start.stem.kernel[...]).max() > 1e-5


# Flax refuses them by itself where it has no graph mode, and names both layers, too.
graph_mode = pytest.mark.skipif(
    os.environ.get("NNX_GRAPH_MODE") == "false", reason="Flax is without its graph mode"
)


@graph_mode
@pytest.mark.parametrize("use", ["search", "target"])
@pytest.mark.parametrize("listed", ["both", "one"])
def test_tied_kernels_are_refused_and_both_layers_named(use, listed):
    """Branches of one layer would untie it from the other."""
    model = Net(nnx.Rngs(0))
    model.body.kernel = model.stem.kernel
    blocks = find_blocks(model, repvgg_branches)
    if listed == "one":
        del blocks["body"]
    with pytest.raises(ValueError, match=r"'(stem|body)'.*tied.*'(stem|body)'"):
        if use == "search":
            search_network(model, blocks, rngs=nnx.Rngs(0))
        else:
            target_network(model, Scales.initial(model, blocks), blocks=blocks, rngs=nnx.Rngs(0))


@graph_mode
def test_one_layer_under_two_paths_of_blocks_is_refused():
    model = Net(nnx.Rngs(0))
    model.body = model.stem
    block = {"full": Full()}
    for path in ("body", "stem"):
        check_layers(model, {path: block})
    with pytest.raises(ValueError, match="tied"):
        check_layers(model, {"body": block, "stem": block})
