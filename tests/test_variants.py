"""The variants of the ablation are what their titles say."""

import jax
import numpy as np
import pytest
from small_run import small_config
from variants import QUICK_ROWS, changed, part_of

from repopt_jax.data import load_dataset
from repopt_jax.scales import Scales
from repopt_jax.training.parts import initial_scales

VARIANTS = {variant.title: variant for _, group in QUICK_ROWS for variant in group}


@pytest.fixture(scope="module")
def scales():
    """Drawn ones, so that they show."""
    rng = np.random.default_rng(0)
    initial = initial_scales(small_config())
    draw = {
        path: {name: rng.normal(1, 0.5, v.shape).astype(np.float32) for name, v in block.items()}
        for path, block in initial.vectors.items()
    }
    return Scales(draw)


@pytest.fixture(scope="module")
def states(scales):
    return {
        title: part_of(VARIANTS[title], small_config(), scales, load_dataset).init()
        for title in (
            "plain SGD",
            "RepOptimizer",
            "gradient rule only",
            "initialization only",
        )
    }


def kernel(state):
    return np.asarray(state.params["stage4"][0]["conv"]["kernel"][...])


def multipliers(state):
    return sum(x.shape == (8,) for x in jax.tree.leaves(state.opt_state[0]))


def test_each_half_of_the_method_is_there_without_the_other(states):
    plain, full = states["plain SGD"], states["RepOptimizer"]
    assert (kernel(plain) != kernel(full)).any()
    np.testing.assert_array_equal(kernel(states["gradient rule only"]), kernel(plain))
    np.testing.assert_array_equal(kernel(states["initialization only"]), kernel(full))
    assert multipliers(states["gradient rule only"]) == multipliers(full) > 0
    assert multipliers(states["initialization only"]) == multipliers(plain) == 0


def test_scales_become_what_the_variant_says(scales):
    initial = initial_scales(small_config())
    path, name = "stage4/0/conv", "conv3x3"
    along = {0.25: scales.averaged(), 1.0: scales}
    found = {
        how: np.asarray(changed(along, how, initial)[path][name])
        for how in ("searched", "early", "ones", "initial", "averaged")
    }
    np.testing.assert_array_equal(found["searched"], scales[path][name])
    np.testing.assert_array_equal(found["early"], scales.averaged()[path][name])
    np.testing.assert_array_equal(found["ones"], 1)
    np.testing.assert_array_equal(found["initial"], initial[path][name])
    np.testing.assert_allclose(found["averaged"], scales[path][name].mean(), rtol=1e-6)
