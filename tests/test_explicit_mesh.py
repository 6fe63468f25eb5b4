"""Networks on a mesh with explicit axes, the default of `jax.make_mesh`."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import repopt_jax

VGG = ("RepOpt-VGG", {"num_blocks": (1, 1, 1, 1), "widths": (8, 8, 8, 16, 16), "se": True})
MOBILE = ("MobileOne", {"num_blocks": (1, 1, 1, 1), "widths": (8, 8, 8, 16, 16), "copies": 2})


def losses(mesh, graph, params, rest):
    """Two steps of plain SGD with the images split over the mesh's devices."""
    tx = optax.sgd(0.1)
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    labels = np.arange(16) % 10
    found = []

    @jax.jit
    def step(params, rest, images, labels):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            all_losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
            return all_losses.mean(), nnx.split(model, nnx.Param, ...)[2]

        (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, _ = tx.update(gradients, tx.init(params))
        return optax.apply_updates(params, updates), rest, value

    with jax.set_mesh(mesh):
        params, rest = jax.device_put((params, rest), NamedSharding(mesh, PartitionSpec()))
        batch = jax.device_put((images, labels), NamedSharding(mesh, PartitionSpec("data")))
        for _ in range(2):
            params, rest, value = step(params, rest, *batch)
            found.append(float(value))
    return found


@pytest.mark.usefixtures("quick_draws")
@pytest.mark.parametrize(
    ("network", "kind"),
    [
        (VGG, "target"),
        pytest.param(MOBILE, "mobileone", marks=pytest.mark.slow),
    ],
)
def test_a_network_trains_on_an_explicit_mesh_as_on_an_automatic_one(network, kind):
    name, options = network
    model = repopt_jax.create_model(
        name, kind, num_classes=10, bn_group=2, **options, rngs=nnx.Rngs(0)
    )
    parts = nnx.split(model, nnx.Param, ...)
    found = {}
    for axes in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), (axes,))
        found[axes] = losses(mesh, *parts)
    assert found[AxisType.Explicit] == pytest.approx(found[AxisType.Auto], rel=1e-5)
