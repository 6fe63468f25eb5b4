"""The official recipe, as its configuration file states it, on real images of ImageNet."""

import pathlib
import runpy

import numpy as np
import pytest

from repopt_jax.scales import Scales, save_scales
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.parts import prepare
from repopt_jax.training.report import read_metrics
from repopt_jax.training.run import run

REPOSITORY = pathlib.Path(__file__).parents[1]
FLAGS = {
    "parts": ("target",),
    "model.num_blocks": (1, 1, 1, 1),  # else it takes minutes
    "model.widths": (4, 4, 4, 8, 8),
    "target.data.image_size": 32,
    "target.batch_size": 80,  # 3 steps of the 240 images, on 8 devices
    "target.bn_group": 10,
    "target.epochs": 1.0,
    "target.schedule.warmup_epochs": 0.0,
    "target.eval_batch_size": 80,  # 120 images: the last batch is a partial one
    "log_every": 1,
}


@pytest.mark.slow
def test_the_recipe_trains_on_encoded_images_and_is_evaluated_on_all(tfds_dir, tmp_path):
    """RandAugment, bfloat16, SGD with multipliers, 1000 classes."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "imagenet.py"))["get_config"]()
    scales = tmp_path / "scales.safetensors"
    config.update_from_flattened_dict(FLAGS | {"target.data.data_dir": tfds_dir})
    save_scales(scales, Scales.initial(prepare(config, "plain", make_mesh()).build()))
    config.scales = str(scales)
    summary = run(config, tmp_path / "run")["parts"]["target"]
    records = read_metrics(tmp_path / "run" / "target" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    losses = [record["train/loss"] for record in records]
    assert np.isfinite(losses).all() and abs(losses[0] - np.log(1000)) < 1.5
    hits = summary["eval/top1"] * 120 / 100
    assert hits == pytest.approx(round(hits), abs=1e-4)
    assert summary["eval/top5"] >= summary["eval/top1"]
