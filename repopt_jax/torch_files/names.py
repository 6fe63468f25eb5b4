"""Names and layouts: one table says which torch tensor is which variable, for both directions.

The path of a variable is that of a block, a layer in it and an array: ``stage1/0``, ``conv``,
``kernel``. The official code calls the same tensor ``stage1.0``, ``conv``, ``weight``. To read
the weights of another network, add a row to `_LAYERS`.
"""

from __future__ import annotations

import re

import numpy as np

# The pattern of a block's path, and our layers in it -> torch's.
_LAYERS = (
    (
        r"(stage0|stage[1-4]/\d+)/",
        {
            **{"conv": "conv", "conv3x3": "conv_3x3", "conv1x1": "conv_1x1"},
            **{"bn": "bn", "bn3x3": "bn_3x3", "bn1x1": "bn_1x1", "bn_identity": "bn_identity"},
            **{"post_se/down": "post_se.down", "post_se/up": "post_se.up"},
        },
    ),
    (
        r"(stages/\d/\d(?:/ghost[12])?)/",
        {
            **{"primary_conv": "primary_conv.0", "primary_bn": "primary_conv.1"},
            **{"cheap_conv": "cheap_operation.0", "cheap_bn": "cheap_operation.1"},
            **{"fusion_bn": "fusion_bn", "final_bn": "final_bn", "conv": "conv", "bn1": "bn1"},
            **{"conv_dw": "conv_dw", "bn_dw": "bn_dw"},
            **{"se/down": "se.conv_reduce", "se/up": "se.conv_expand"},
            **{"shortcut/conv_dw": "shortcut.0", "shortcut/bn_dw": "shortcut.1"},
            **{"shortcut/conv_pw": "shortcut.2", "shortcut/bn_pw": "shortcut.3"},
        },
    ),
    (r"()", {name: name for name in ("linear", "conv_stem", "bn1", "conv_head", "classifier")}),
)
_ARRAYS = {
    "kernel": "weight",
    "scale": "weight",  # of a BatchNorm
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# What a search network has in a layer's place: layer, branch -> torch's layers with the branch's
# weight and with its scale. Modules of other packages (YOLOv6) use these names, too.
_BRANCHES = {
    ("conv", "conv3x3"): {"weights": "conv", "scales": "scale_conv"},
    ("conv", "conv1x1"): {"weights": "conv_1x1", "scales": "scale_1x1"},
    ("cheap_conv", "conv"): {"weights": "cheap_operation.0", "scales": "cheap_operation.1"},
    ("conv", "identity"): {"weights": "scale_identity"},
    ("cheap_conv", "identity"): {"weights": "fusion_scale"},
}
# What a scales file has of these: torch's layer -> layer, branch. An identity counts as a scale.
SCALES = {names.get("scales", names["weights"]): key for key, names in _BRANCHES.items()}


def torch_block(path: str) -> str:
    """The torch name of a block.

    >>> torch_block("stages/0/1/ghost1")
    'blocks.0.1.ghost1'
    """
    return re.sub("^stages/", "blocks/", path).replace("/", ".")


def block_path(name: str) -> str:
    """The path of a torch block.

    >>> block_path("blocks.0.1.ghost1")
    'stages/0/1/ghost1'
    """
    return re.sub("^blocks/", "stages/", name.replace(".", "/"))


def torch_name(path: str) -> str | None:
    """The torch name of a variable; None if the official code has none.

    >>> torch_name("stage1/0/conv/kernel"), torch_name("stage0/conv/branch_scales/conv3x3")
    ('stage1.0.conv.weight', 'stage0.scale_conv.weight')
    """
    for block, layers in _LAYERS:
        match = re.fullmatch(block + r"(.+)/(.+?)", path)
        if match is None:
            continue
        parent, layer, array = match.groups()
        branch = re.fullmatch(r"(\w+)/branch_(weights|scales)", layer)
        if branch:
            name, array = _BRANCHES.get((branch[1], array), {}).get(branch[2]), "weight"
        else:
            name, array = layers.get(layer), _ARRAYS.get(array)
        if name and array:
            return f"{torch_block(parent)}.{name}.{array}".lstrip(".")
    return None


def from_torch(array: np.ndarray) -> np.ndarray:
    """An array in our layout: OIHW becomes HWIO, (out, in) becomes (in, out), vectors stay.

    >>> from_torch(np.ones((4, 2, 3, 3))).shape
    (3, 3, 2, 4)
    """
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array


def to_torch(array: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`.

    >>> to_torch(np.ones((3, 3, 2, 4))).shape
    (4, 2, 3, 3)
    """
    return array.transpose(-1, -2, *range(array.ndim - 2)) if array.ndim > 1 else array
