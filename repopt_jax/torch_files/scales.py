"""Scales out of torch files, and back under the official names; needs numpy alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from repopt_jax.models.repopt_ghost import FAMILY as GHOST
from repopt_jax.models.repopt_ghost import GHOST_SIZES, GHOST_WIDTHS, ghost_modules, ghost_width
from repopt_jax.models.repopt_vgg import scale_widths, size_name
from repopt_jax.scales import Scales
from repopt_jax.torch_files.limits import TorchFileError
from repopt_jax.torch_files.modules import state_dict
from repopt_jax.torch_files.names import (
    GHOST_LAYER,
    GHOST_MARK,
    SCALE_NAMES,
    VGG_LAYER,
    block_path,
    torch_block,
)
from repopt_jax.torch_files.reader import read_torch_file
from repopt_jax.torch_files.standin import Standin

# Where checkpoints keep their weights, the likeliest first.
WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "net", "ema", "model_ema")
BRANCH_ORDER = ("conv3x3", "conv1x1", "conv", "identity")
GHOST_MODULES = ghost_modules(1.0)


def find_state_dict(content: Any) -> dict[str, np.ndarray]:
    """The weights inside what `read_torch_file` returned.

    Checkpoints that keep them under ``model``, ``state_dict`` or ``ema`` are unwrapped, pickled
    modules turned into their state dict, and a prefix ``module.`` of all names is removed.

    Raises:
      TorchFileError: there are none.

    >>> list(find_state_dict({"model": {"module.a": np.ones(1)}, "epoch": 3}))
    ['a']
    """
    for _ in range(4):
        if isinstance(content, Standin):
            content = state_dict(content)
        if not isinstance(content, dict):
            raise TorchFileError(f"it holds a {type(content).__name__} and no weights")
        arrays = {k: v for k, v in content.items() if isinstance(v, np.ndarray)}
        if arrays and len(arrays) == len(content) and all(isinstance(k, str) for k in arrays):
            while all(name.startswith("module.") for name in arrays):
                arrays = {name.removeprefix("module."): v for name, v in arrays.items()}
            return arrays
        inner = [k for k in WEIGHT_KEYS if isinstance(content.get(k), (dict, Standin))]
        if not inner:
            break
        content = content[inner[0]]
    raise TorchFileError(
        f"it has no weights under any of {', '.join(WEIGHT_KEYS)}, but {[*map(str, content)][:8]}"
    )


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The weights of a torch file by name; see `find_state_dict`.

    Raises:
      TorchFileError: with the file's name and what is wrong with it.
    """
    content = read_torch_file(path)
    try:
        return find_state_dict(content)
    except TorchFileError as error:
        raise TorchFileError(f"{os.fspath(path)} cannot be used: {error}") from None


def load_torch_scales(path: str | os.PathLike) -> Scales:
    """Scales from a torch file: released scales, search checkpoints, YOLOv6 modules.

    Every vector named as the official code names scales is taken; all other weights are left
    out. Where the blocks are those of a RepOpt-VGG or a RepOpt-GhostNet, its size is recognized
    and all vectors are checked against it.

    Raises:
      TorchFileError: the file cannot be read, holds no scales, or not those of one network.
    """
    try:
        return scales_in(read_state_dict(path))
    except ValueError as error:
        if os.fspath(path) in str(error):
            raise
        raise TorchFileError(f"{os.fspath(path)} cannot be used: {error}") from None


def scales_in(weights: Mapping[str, np.ndarray]) -> Scales:
    """The scales among the weights of a state dict; see `load_torch_scales`.

    >>> weights = {"stage0.scale_conv.weight": np.ones(2), "stage0.scale_1x1.weight": np.ones(2)}
    >>> list(scales_in(weights)), scales_in(weights).metadata["model"]
    (['stage0/conv'], 'unknown')
    """
    blocks: dict[str, dict[str, np.ndarray]] = {}
    ghosts = {name.split(GHOST_MARK)[0] for name in weights if GHOST_MARK in name}
    for name, value in weights.items():
        for pattern, branch in SCALE_NAMES:
            match = pattern.fullmatch(name)
            if match is None or (branch == "conv" and match[1] not in ghosts):
                continue
            if value.ndim != 1 or value.dtype.kind not in "fV":
                raise TorchFileError(
                    f"{name} must be a vector of floats, got shape {value.shape} of {value.dtype}"
                )
            layer = GHOST_LAYER if match[1] in ghosts else VGG_LAYER
            path = f"{block_path(match[1])}/{layer}"
            blocks.setdefault(path, {})[branch] = value.astype(np.float32)
    if not blocks:
        raise TorchFileError("it has no scales (scale_conv, scale_1x1, scale_identity)")
    ordered = {
        path: {name: block[name] for name in BRANCH_ORDER if name in block}
        for path, block in blocks.items()
    }
    not_finite = [
        p for p, b in ordered.items() if not all(np.isfinite(v).all() for v in b.values())
    ]
    if not_finite:
        raise TorchFileError(f"scales must be finite, which those of {not_finite} are not")
    model = "unknown"
    if all(re.fullmatch(r"stage0/conv|stage[1-4]/\d+/conv", path) for path in ordered):
        model = _recognize_vgg(ordered)
    elif all(path in GHOST_MODULES for path in ordered):
        model = _recognize_ghost(ordered)
    return Scales(ordered, {"source": "converted from torch", "model": model})


def _recognize_vgg(blocks: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The name of a RepOpt-VGG; refuses blocks that are not all of one such network."""
    counts, widths = [], []
    for stage in range(5):
        inside = [path for path in blocks if path.startswith(f"stage{stage}/")]
        if not inside:
            return "unknown"
        counts.append(len(inside))
        widths.append(len(next(iter(blocks[inside[0]].values()))))
    wanted = scale_widths(counts[1:], widths)
    found = {f"{p}/{name}": len(v) for p, block in blocks.items() for name, v in block.items()}
    # With strides of 1 the first block of a stage may have an identity, too.
    surplus = {k for k in found.keys() - wanted.keys() if not k.endswith("/0/conv/identity")}
    _refuse_differences("RepOpt-VGG", wanted, found, surplus)
    return size_name(counts[1:], widths) or "RepOpt-VGG"


def _recognize_ghost(blocks: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The name of a RepOpt-GhostNet; refuses blocks that are not all of one such network."""
    widths = {path: len(next(iter(block.values()))) for path, block in blocks.items()}
    # Without a width that fits, the nearest published one says what is wrong.
    ratio = max(n / GHOST_MODULES[path] for path, n in widths.items())
    width = ghost_width(widths) or min(GHOST_WIDTHS, key=lambda w: abs(w - ratio))
    wanted = {f"{p}/{b}": n for p, n in ghost_modules(width).items() for b in ("conv", "identity")}
    found = {f"{p}/{name}": len(v) for p, block in blocks.items() for name, v in block.items()}
    _refuse_differences(GHOST, wanted, found, found.keys() - wanted.keys())
    return next((name for name, size in GHOST_SIZES.items() if size == width), GHOST)


def _refuse_differences(
    family: str, wanted: Mapping[str, int], found: Mapping[str, int], surplus: Iterable[str]
) -> None:
    missing = wanted.keys() - found.keys()
    wrong = [f"{k} has {found[k]} channels, not {w}" for k, w in wanted.items()
             if k in found and found[k] != w]  # fmt: skip
    problems = [f"missing {k}" for k in missing] + [f"surplus {k}" for k in surplus] + wrong
    if problems:
        raise TorchFileError(f"its blocks are not one {family}: " + "; ".join(sorted(problems)))


def official_names(scales: Scales) -> dict[str, np.ndarray]:
    """The vectors under the names of the official code, for a torch file.

    Raises:
      ValueError: a layer or branch that the official code does not know.

    >>> vectors = {"stage0/conv": {"conv3x3": np.ones(2), "conv1x1": np.ones(2)}}
    >>> list(official_names(Scales(vectors)))
    ['stage0.scale_conv.weight', 'stage0.scale_1x1.weight']
    """
    suffixes = {
        (VGG_LAYER, "conv3x3"): "scale_conv.weight",
        (VGG_LAYER, "conv1x1"): "scale_1x1.weight",
        (VGG_LAYER, "identity"): "scale_identity.weight",
        (GHOST_LAYER, "conv"): "cheap_operation.1.weight",
        (GHOST_LAYER, "identity"): "fusion_scale.weight",
    }
    found = {}
    for path, block in scales.items():
        parent, _, layer = path.rpartition("/")
        for name, vector in block.items():
            if (layer, name) not in suffixes:
                raise ValueError(f"the official code has no branch {name!r} of a layer {path!r}")
            found[f"{torch_block(parent)}.{suffixes[layer, name]}"] = np.asarray(vector)
    return found
