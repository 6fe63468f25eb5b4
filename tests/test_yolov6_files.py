"""Checkpoints as YOLOv6 writes them: whole pickled modules, in half precision."""

import re

import numpy as np
import pytest
import torch_file_builder as build
from family_networks import TINY, assert_same, drawn

from repopt_jax import Scales, load_scales, searched_scales
from repopt_jax.files import load_weights, variables
from repopt_jax.torch_files import export_weights
from repopt_jax.torch_files.weights import unfilled_model

pytestmark = pytest.mark.slow

NETWORK = TINY["efficientrep_reppan_tiny"]


def pickled(weights, kinds=("yolov6.models.yolo.Model", "yolov6.layers.common.LinearAddBlock")):
    """A whole module of YOLOv6 in half precision that has these weights."""
    own, parts = {}, {}
    for name, value in weights.items():
        first, _, rest = name.partition(".")
        (parts.setdefault(first, {}) if rest else own)[rest or first] = value
    tensors = {k: build.tensor(np.asarray(v, np.float16)) for k, v in own.items()}
    buffers = {k: v for k, v in tensors.items() if k.startswith("running_")}
    parameters = {k: build.parameter(v) for k, v in tensors.items() if k not in buffers}
    modules = {k: pickled(v, kinds[1:] or kinds) for k, v in parts.items()}
    return build.module(kinds[0], parameters, buffers, modules)


def yolov6_file(path, weights):
    """A checkpoint with a detection head and averages."""
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    model = pickled({**weights, "detect.stems.0.conv.weight": np.ones((4, 4, 1, 1))})
    path.write_bytes(build.archive_of({"model": model, "ema": None, "epoch": 299}))
    return path


def exact_network(kind):
    """Every number of it is another one that float16 has."""
    model = unfilled_model(**NETWORK, kind=kind)
    return drawn(model, lambda rng, shape: rng.integers(256, 1024, shape) / 512)


# How YOLOv6 calls a layer of each kind of block.
LAYERS = {"hs": "conv_1x1", "target": "conv", "repvgg": "rbr_1x1.conv"}


@pytest.mark.parametrize(("kind", "old"), [("hs", True), ("target", False), ("repvgg", True)])
def test_checkpoints_are_read_by_name(kind, old, tmp_path):
    """Under the names of today's code and of the releases before version 0.3."""
    model = exact_network(kind)
    weights = export_weights(model)
    assert f"backbone.ERBlock_2.0.{LAYERS[kind]}.weight" in weights
    if old:
        layers = r"(neck\.(?:reduce_layer|downsample)\d|ERBlock_5\.2)\.(?:sppf\.(cv\d)\.)?block\."
        weights = {re.sub(layers, r"\1.\2.", k).replace("..", "."): v for k, v in weights.items()}
        assert "neck.reduce_layer1.bn.bias" in weights
        assert "backbone.ERBlock_5.2.cv2.conv.weight" in weights
    loaded = load_weights(yolov6_file(tmp_path / "yolov6s_opt.pt", weights))
    assert bool(loaded.blocks()) == (kind != "repvgg")
    assert_same(variables(loaded), variables(model))


def test_scales_go_into_backbone_and_neck_by_name(tmp_path):
    search = exact_network("hs")
    scales = load_scales(yolov6_file(tmp_path / "yolov6s_scale.pt", export_weights(search)))
    plain = unfilled_model(**NETWORK)
    scales.check(plain)
    assert scales == Scales(searched_scales(search).vectors, scales.metadata)
    names = scales["backbone/ERBlock_4/1/block/1/conv"], scales["neck/Rep_n3/conv1/conv"]
    assert [list(block) for block in names] == [
        ["conv3x3", "conv1x1", "identity"],
        ["conv3x3", "conv1x1"],
    ]
