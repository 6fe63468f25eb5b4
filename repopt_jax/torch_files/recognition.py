"""Recognition of the network that a state dict belongs to, by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from repopt_jax.models.create import VGG
from repopt_jax.models.repopt_ghost import FAMILY as GHOST
from repopt_jax.models.repopt_ghost import GHOST_SIZES, ghost_width
from repopt_jax.models.repopt_vgg import size_name
from repopt_jax.torch_files.names import block_path
from repopt_jax.torch_files.pickles import TorchFileError

# Tensors of a block that have as many rows as the block has outputs, in networks of all kinds.
_ROWS = re.compile(
    r"(stage0|stage[1-4]\.\d+|blocks\.\d\.\d\.ghost[12])\."
    r"(?:conv|conv_3x3|scale_conv|cheap_operation\.[01]|fusion_scale)\.weight"
)
# The name of a tensor that only one kind of network has -> that kind, for either family.
_KINDS = {
    "stage0.scale_conv.weight": "hs",
    "stage0.conv_3x3.weight": "repvgg",
    "stage0.conv.weight": "target",
    "blocks.0.0.ghost1.fusion_scale.weight": "hs",
    "blocks.0.0.ghost1.fusion_bn.weight": "rep",
    "blocks.0.0.ghost1.final_bn.weight": "target",
}


def recognize_size(weights: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Name and size of the network, as arguments of `create_model`; None for no network of ours.

    No file holds strides: a stage of which the first block has an identity has a stride of 1, all
    others are taken for 2, as published.

    >>> recognize_size({"stage0.conv.weight": np.ones((4, 3, 3, 3))}) is None
    True
    """
    rows = {
        block_path(match[1]): value.shape[0]
        for name, value in weights.items()
        if (match := _ROWS.fullmatch(name)) and value.ndim
    }
    if any(path.startswith("stages/") for path in rows):
        last = np.shape(weights.get("blocks.9.0.conv.weight"))
        width = ghost_width({f"{k}/cheap_conv": n for k, n in rows.items()}, *last[:1])
        names = [name for name, size in GHOST_SIZES.items() if size == width]
        if names:
            return {"name": names[0]}
        return None if width is None else {"name": GHOST, "width": width}
    firsts = ("stage0", *(f"stage{i}.0" for i in range(1, 5)))
    num_blocks = tuple(sum(key.startswith(f"stage{i}/") for key in rows) for i in range(1, 5))
    widths = tuple(rows.get(block_path(first)) for first in firsts)
    if None in widths:
        return None
    name = size_name(num_blocks, widths) or VGG
    size = {"name": name, "num_blocks": num_blocks, "widths": widths}
    identities = ("scale_identity.weight", "bn_identity.weight")
    strides = tuple(1 if any(f"{b}.{i}" in weights for i in identities) else 2 for b in firsts)
    return {**size, "strides": strides} if 1 in strides else size


def recognize(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arguments of `create_model` for the network whose state dict this is.

    Search checkpoints are taken for kind "hs"; "csla" has the same names.

    Raises:
      TorchFileError: it is no network of ours.
    """
    kinds = [kind for name, kind in _KINDS.items() if name in weights]
    is_ghost = "conv_stem.weight" in weights
    classes = np.shape(weights.get("classifier.weight" if is_ghost else "linear.weight"))
    size = recognize_size(weights)
    if size is None or not kinds or not classes:
        raise TorchFileError(
            f"it is no {GHOST}: the channels of its modules are those of no width, or its last "
            "layers are not all there"
            if is_ghost
            else f"it is no {VGG}: stages 0 to 4 and linear are not all there"
        )
    found = {**size, "kind": kinds[0], "num_classes": classes[0]}
    return found if is_ghost else {**found, "se": any(".post_se." in name for name in weights)}
