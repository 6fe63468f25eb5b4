"""Kernels that are stacked along first axes: layers of a scan, members of an ensemble."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repopt_jax import Centre, Full, Identity, PooledPointwise, grad_mults, repopt_sgd
from repopt_jax import scale_by_grad_mult as by_mult

BLOCKS = {"conv": {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}}
OPERATOR = {"conv": {"conv3x3": Full(), "pooled": PooledPointwise()}}
RNG = np.random.default_rng(0)
SHAPE = (3, 3, 4, 4)


def single(blocks, scales, kernel, layout="IO"):
    """The product of one kernel alone."""
    mults = grad_mults({"conv": {"kernel": kernel}}, blocks, {"conv": scales}, layout=layout)
    return mults["conv"]["kernel"](kernel)


@pytest.mark.parametrize("blocks", [BLOCKS, OPERATOR], ids=["placements", "operator"])
@pytest.mark.parametrize("stack", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["HWIO", "OIHW"])
def test_each_kernel_of_a_stack_has_its_own_multiplier(blocks, stack, layout, x64):
    """With scales of its own, and with those of all where they are not stacked."""
    shape = SHAPE if layout == "HWIO" else (4, 4, 3, 3)
    kernel = jnp.asarray(RNG.normal(size=(*stack, *shape)))
    shared, own = list(blocks["conv"])[:2]
    scales = {shared: jnp.arange(4.0), own: jnp.asarray(RNG.normal(size=(*stack, 4)))}
    params = {"conv": {"kernel": kernel}}
    options = {"layout": layout, "window_rank": 2}
    tx = by_mult(grad_mults(params, blocks, {"conv": scales}, **options))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    for index in np.ndindex(stack):
        alone = {shared: scales[shared], own: scales[own][index]}
        expected = single(blocks, alone, kernel[index], layout)
        np.testing.assert_allclose(updates["conv"]["kernel"][index], expected, rtol=1e-12)


def test_three_layers_of_3x3_are_no_kernel_of_3x3x3():
    """The issue's case: the centre of every layer, not of the middle one alone."""
    params = {"conv": {"kernel": jnp.ones((3, *SHAPE))}}
    blocks = {"conv": {"conv3x3": Full(), "conv1x1": Centre(1)}}
    scales = {"conv": {"conv3x3": jnp.ones(4), "conv1x1": jnp.ones(4)}}
    stacked = grad_mults(params, blocks, scales, window_rank=2)["conv"]["kernel"]
    centres = stacked(params["conv"]["kernel"])[:, 1, 1, 0, 0]
    assert centres.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"kernel_shape must .* 2 axes, got \(3, 3, 3"):
        stacked.dense(params["conv"]["kernel"].shape)


def test_scales_of_another_stack_are_refused_by_shape():
    params = {"conv": {"kernel": jnp.ones((3, *SHAPE))}}
    scales = {"conv3x3": jnp.ones((2, 4)), "conv1x1": jnp.ones(4)}
    mults = grad_mults(params, BLOCKS, {"conv": scales}, window_rank=2)
    with pytest.raises(ValueError, match=r"grad_mults\['conv/kernel'\].*\(3, 4\).*\(2, 4\)"):
        by_mult(mults).init(params)


def test_a_negative_window_rank_is_refused():
    params = {"conv": {"kernel": jnp.ones(SHAPE)}}
    scales = {"conv": {"conv3x3": jnp.ones(4), "conv1x1": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"window_rank.*-1"):
        grad_mults(params, BLOCKS, scales, window_rank=-1)


def test_updates_of_another_shape_than_their_parameters_are_refused():
    """A gradient per sample would be taken for a kernel of one more axis."""
    params = {"conv": {"kernel": jnp.ones(SHAPE)}}
    scales = {"conv": {"conv3x3": jnp.ones(4), "conv1x1": jnp.ones(4)}}
    tx = repopt_sgd(0.1, grad_mults(params, BLOCKS, scales))
    per_sample = {"conv": {"kernel": jnp.ones((3, *SHAPE))}}
    with pytest.raises(ValueError, match=r"updates\['conv/kernel'\].*\(3, 3, 4, 4\).*\(3, 3, 3"):
        tx.update(per_sample, tx.init(params), params)


def test_an_ensemble_under_vmap_has_a_scale_set_per_member(x64):
    """Each member trains as it would alone, `repopt_sgd` made inside `jax.vmap`."""
    members = 3
    kernels = jnp.asarray(RNG.normal(size=(members, *SHAPE)))
    scales = {n: jnp.asarray(RNG.normal(size=(members, 4))) for n in ("conv3x3", "conv1x1")}

    def train(kernel, scales):
        params = {"conv": {"kernel": kernel}}
        tx = repopt_sgd(0.1, grad_mults(params, BLOCKS, {"conv": scales}))
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
            params = optax.apply_updates(params, updates)
        return params["conv"]["kernel"]

    together = jax.vmap(train)(kernels, scales)
    for i in range(members):
        alone = train(kernels[i], {n: s[i] for n, s in scales.items()})
        np.testing.assert_allclose(together[i], alone, rtol=1e-12)
