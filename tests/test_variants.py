"""The variants of the ablation are what their titles say."""

import ablation
import jax
import numpy as np
import pytest
import variants
from small_run import small_config
from variants import Variant, changed, measure, part_of, row

from repopt_jax.scales import Scales
from repopt_jax.training.parts import initial_scales

VARIANTS = {variant.title: variant for variant in ablation.VARIANTS}


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
        title: part_of(VARIANTS[title], small_config(), scales).init()
        for title in (
            "plain SGD",
            "RepOptimizer (SGD)",
            "gradient rule only",
            "initialization only",
        )
    }


def kernel(state):
    return np.asarray(state.params["stage4"][0]["conv"]["kernel"][...])


def multipliers(state):
    return sum(x.shape == (8,) for x in jax.tree.leaves(state.opt_state[0]))


def test_each_half_of_the_method_is_there_without_the_other(states):
    plain, full = states["plain SGD"], states["RepOptimizer (SGD)"]
    assert (kernel(plain) != kernel(full)).any()
    np.testing.assert_array_equal(kernel(states["gradient rule only"]), kernel(plain))
    np.testing.assert_array_equal(kernel(states["initialization only"]), kernel(full))
    assert multipliers(states["gradient rule only"]) == multipliers(full) > 0
    assert multipliers(states["initialization only"]) == multipliers(plain) == 0


def test_scales_become_what_the_variant_says(scales):
    initial = initial_scales(small_config())
    path, name = "stage4/0/conv", "conv3x3"
    found = {
        how: np.asarray(changed(scales, how, initial)[path][name])
        for how in ("searched", "ones", "initial", "averaged")
    }
    np.testing.assert_array_equal(found["searched"], scales[path][name])
    np.testing.assert_array_equal(found["ones"], 1)
    np.testing.assert_array_equal(found["initial"], initial[path][name])
    np.testing.assert_allclose(found["averaged"], scales[path][name].mean(), rtol=1e-6)


def test_every_optimizer_of_the_table_has_a_sweep():
    assert {variant.rate for variant in ablation.VARIANTS} == ablation.SWEEPS.keys()


def test_a_finished_training_is_read_and_one_of_other_settings_refused(
    tmp_path, scales, monkeypatch
):
    summary = {"eval/top1": 50.0, "train/loss": 1.0, "seconds": 2.0}
    summary["train/images_per_second"] = 3.0
    monkeypatch.setattr(variants, "part_of", lambda *_: None)
    monkeypatch.setattr(variants, "train", lambda *_: (None, summary))
    variant = Variant("some")
    measure(variant, small_config(), scales, tmp_path)
    monkeypatch.delattr(variants, "train")
    assert measure(variant, small_config(), scales, tmp_path)["top1"] == 50
    for other in (
        (variant, small_config(seed=1)),
        (Variant("some", identity="one"), small_config()),
    ):
        with pytest.raises(ValueError, match="holds a training with other settings"):
            measure(*other, scales, tmp_path)
    (tmp_path / "variant.json").unlink()
    with pytest.raises(ValueError, match="holds a training with other settings"):
        measure(variant, small_config(), scales, tmp_path)


def test_a_row_is_mean_and_standard_deviation_over_the_seeds():
    runs = [{"top1": t, "seconds": t, "images_per_second": 1.0} for t in (60.0, 62.0, 67.0)]
    found = row(Variant("some"), runs, 0.1)
    assert found["top1"] == 63
    assert found["top1_deviation"] == pytest.approx(13**0.5)
    assert found["seconds"] == 62
