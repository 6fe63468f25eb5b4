"""What is decayed, and under which names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_transforms import make_params, mults_of

import repopt_jax
from repopt_jax import repopt_sgd
from repopt_jax.tree_paths import path_str


def test_weight_decay_mask_is_the_recipes():
    """Rank 2 and more, and identity vectors of search networks; no BN, bias, scale."""
    size = {"num_blocks": (1, 2, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3, "se": True}
    create = functools.partial(repopt_jax.create_model, "RepOpt-VGG", "hs", **size)
    params = nnx.state(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))), nnx.Param)
    mask = repopt_jax.weight_decay_mask(params)
    decayed = {path_str(path) for path, decay in jax.tree_util.tree_leaves_with_path(mask) if decay}
    assert "stage2/1/conv/branch_weights/identity" in decayed
    assert "stage2/1/conv/branch_weights/conv1x1" in decayed
    assert "linear/kernel" in decayed
    assert "stage0/post_se/down/kernel" in decayed
    assert not any(name.endswith("bias") or "/bn/" in name or "scale" in name for name in decayed)


def test_weight_decay_mask_decays_the_identities_of_repvgg():
    """As the official code does, which goes by the name."""
    block = {"conv3x3": jnp.ones((3, 3, 2, 2)), "bias": jnp.ones(2)}
    norms = {name: {"scale": jnp.ones(2), "bias": jnp.ones(2)} for name in ("bn3x3", "bn_identity")}
    mask = repopt_jax.weight_decay_mask({"stage1": {**block, **norms}})["stage1"]
    assert mask["bn_identity"] == {"scale": True, "bias": False}
    assert mask["bn3x3"] == {"scale": False, "bias": False}
    assert (mask["conv3x3"], mask["bias"]) == (True, False)


def test_weight_decay_mask_goes_by_the_names_of_biases_and_norms_too():
    """An Equinox convolution's bias has rank 3; all of an ensemble's vectors have rank 2."""
    ensemble = {"kernel": jnp.ones((5, 2, 2)), "bias": jnp.ones((5, 2)), "scale": jnp.ones((5, 2))}
    params = {
        "equinox": {"weight": jnp.ones((8, 3, 3, 3)), "bias": jnp.ones((8, 1, 1))},
        "ensemble": ensemble,
        "search": {"branch_scales": {"full": jnp.ones((5, 2))}},
    }
    mask = repopt_jax.weight_decay_mask(params)
    assert mask["equinox"] == {"weight": True, "bias": False}
    assert mask["ensemble"] == {"kernel": True, "bias": False, "scale": False}
    assert mask["search"] == {"branch_scales": {"full": False}}


def test_weight_decay_mask_under_inject_hyperparams_decays_or_is_refused():
    """Optax calls a function that is not in `static_args` with a step count."""
    params = make_params()
    options = {"weight_decay": 0.5, "mask": repopt_jax.weight_decay_mask}
    make = optax.inject_hyperparams(repopt_sgd, static_args=("nesterov", "mask"))
    tx = make(0.1, mults_of(params), **options)
    updates = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]
    expected = -0.1 * 1.9 * 0.5 * params["conv"]["kernel"]
    np.testing.assert_allclose(updates["conv"]["kernel"], expected, rtol=1e-6)
    assert (updates["bn"]["scale"] == 0).all()
    tx = optax.inject_hyperparams(repopt_sgd, static_args=("nesterov",))
    with pytest.raises(ValueError, match=r"params.*static_args"):
        tx(0.1, mults_of(params), **options).init(params)
