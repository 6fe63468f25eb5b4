"""Scales from torch files, and back under the official names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import numpy as np

from repopt_jax.models.create import GHOST
from repopt_jax.models.repopt_ghost import ghost_modules
from repopt_jax.scales import Scales, in_network_order
from repopt_jax.torch_files.modules import Weights, read_torch_weights, usable
from repopt_jax.torch_files.names import SCALES, block_path, torch_block
from repopt_jax.torch_files.pickles import TorchFileError
from repopt_jax.torch_files.recognition import recognize_size
from repopt_jax.torch_files.weights import unfilled_model


def load_torch_scales(path: str | os.PathLike, key: str | None = None) -> Scales:
    """Scales from a torch file: released scales, search checkpoints, YOLOv6 modules.

    Every vector named as the official code names scales is taken; all other weights are left
    out. Where the blocks are those of a RepOpt-VGG or a RepOpt-GhostNet, its size is recognized
    and all vectors are checked against it.

    Args:
      path: a file written by torch, or a safetensors file with torch's names.
      key: where in the file the weights are, such as ``state_dict_ema``. None: the likeliest.

    Raises:
      TorchFileError: the file cannot be read, holds no scales, or not those of one network.
    """
    weights = read_torch_weights(path, key)
    with usable(path):
        return scales_of(weights)


def scales_of(weights: Weights) -> Scales:
    """The scales of a torch file, with the place where they were as metadata."""
    scales = scales_in(weights.arrays)
    place = f", under {weights.key}" if weights.key else ""
    return Scales(scales.vectors, {**scales.metadata, "source": f"converted from torch{place}"})


def scales_in(weights: Mapping[str, np.ndarray]) -> Scales:
    """The scales among the weights of a state dict; see `load_torch_scales`.

    >>> weights = {"stage0.scale_conv.weight": np.ones(2), "stage0.scale_1x1.weight": np.ones(2)}
    >>> list(scales_in(weights)), scales_in(weights).metadata["model"]
    (['stage0/conv'], 'unknown')
    """
    blocks: dict[str, dict[str, np.ndarray]] = {}
    for name, value in weights.items():
        match = re.fullmatch(rf"(.+)\.({'|'.join(map(re.escape, SCALES))})\.weight", name)
        if match is None:
            continue
        if match[2] == "cheap_operation.1" and f"{match[1]}.fusion_scale.weight" not in weights:
            continue  # a BatchNorm
        if value.ndim != 1 or value.dtype.kind not in "fV":
            raise TorchFileError(
                f"{name} must be a vector of floats, got shape {value.shape} of {value.dtype}"
            )
        if not np.isfinite(value.astype(np.float32)).all():
            raise TorchFileError(f"{name} must be finite, as scales are")
        layer, branch = SCALES[match[2]]
        blocks.setdefault(f"{block_path(match[1])}/{layer}", {})[branch] = value.astype(np.float32)
    if not blocks:
        ours = "; its names are those of our files, which need no conversion"
        raise TorchFileError(
            "it has no scales under torch's names (scale_conv, scale_1x1, scale_identity)"
            + ours * any("/" in name for name in weights)
        )
    for path, block in blocks.items():
        lengths = {branch: len(vector) for branch, vector in block.items()}
        if 0 in lengths.values() or len(set(lengths.values())) > 1:
            raise TorchFileError(f"vectors of {path} must be of one length above 0, got {lengths}")
    vectors = {
        path: {b: blocks[path][b] for _, b in SCALES.values() if b in blocks[path]}
        for path in sorted(blocks, key=in_network_order)  # safetensors files have another one
    }
    model = _model(Scales(vectors))
    return Scales(vectors, {"source": "converted from torch", "model": model})


def _model(scales: Scales) -> str:
    """The network's name, or "unknown"; refuses blocks that are not all of one network of ours."""
    size = recognize_size(official_names(scales))
    if size is None:
        if scales.keys() <= ghost_modules(1.0).keys():
            raise TorchFileError(f"its blocks are not those of a {GHOST}, of any width")
        return "unknown"
    try:
        scales.check(unfilled_model(**size))
    except ValueError as error:
        raise TorchFileError(f"its blocks are not one {size['name']}: {error}") from None
    return size["name"]


def official_names(scales: Scales) -> dict[str, np.ndarray]:
    """The vectors under the names of the official code, for a torch file.

    Raises:
      ValueError: a layer or branch that the official code does not know.

    >>> vectors = {"stage0/conv": {"conv3x3": np.ones(2), "conv1x1": np.ones(2)}}
    >>> list(official_names(Scales(vectors)))
    ['stage0.scale_conv.weight', 'stage0.scale_1x1.weight']
    """
    layers = {key: name for name, key in SCALES.items()}
    found = {}
    for path, block in scales.items():
        parent, _, layer = path.rpartition("/")
        for branch, vector in block.items():
            if (layer, branch) not in layers:
                raise ValueError(f"the official code has no branch {branch!r} of a layer {path!r}")
            found[f"{torch_block(parent)}.{layers[layer, branch]}.weight"] = np.asarray(vector)
    return found
