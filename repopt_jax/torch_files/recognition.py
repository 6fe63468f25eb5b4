"""Recognition of the network that a state dict belongs to, by names and shapes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from repopt_jax.messages import listed, quote
from repopt_jax.models.create import FAMILIES, GHOST, MOBILEONE, REPVGG, VGG
from repopt_jax.models.repopt_ghost import ghost_width
from repopt_jax.models.repopt_vgg import LAST_GROUPED
from repopt_jax.torch_files.modules import OUTERMOST
from repopt_jax.torch_files.names import OFFICIAL, SCALES, Dialect, block_path, to_official
from repopt_jax.torch_files.pickles import TorchFileError

# Tensors of a block that have as many rows as the block has outputs, in networks of all kinds.
_ROWS = re.compile(
    r"(stage0|stage[1-4]\.\d+|blocks\.\d\.\d\.ghost[12])\."
    r"(?:conv|conv_3x3|scale_conv|rbr_conv\.0\.conv|cheap_operation\.[01]|fusion_scale)\.weight"
)
# The name of a tensor that only one kind of network has -> that kind, for every family.
_KINDS = {
    "stage0.scale_conv.weight": "hs",
    "stage0.conv_3x3.weight": "repvgg",
    "stage0.rbr_conv.0.conv.weight": "mobileone",
    "stage0.conv.weight": "target",
    "blocks.0.0.ghost1.fusion_scale.weight": "hs",
    "blocks.0.0.ghost1.fusion_bn.weight": "rep",
    "blocks.0.0.ghost1.final_bn.weight": "target",
}
# Pattern of a name of a network whose weights are not read -> that network.
_OTHERS = {
    r".*ERBlock_\d\..*": "YOLOv6",
    r".*\.rbr_(dense|1x1)\.[01]\..*": "YOLOv7",
    r".*\.(square_conv|fused_conv)\..*": "ACNet",
    r".*\.dbb_(origin|reparam)\..*": "a network of Diverse Branch Blocks",
}
_FIRSTS = ("stage0", *(f"stage{i}.0" for i in range(1, 5)))


def recognize_size(
    weights: Mapping[str, np.ndarray], dialect: Dialect = OFFICIAL
) -> dict[str, Any] | None:
    """Name and size of the network, as arguments of `create_model`; None for no network of ours.

    No file holds strides: a stage of which the first block has an identity has a stride of 1, all
    others are taken for 2, as published.

    Args:
      weights: arrays under the official names.
      dialect: the names that the file has, which tell RepVGG from RepOpt-VGG.

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
        if width is None:
            return None
        name = FAMILIES[GHOST].name_of({"width": width})
        return {"name": name} if name else {"name": GHOST, "width": width}
    if any(block_path(first) not in rows for first in _FIRSTS):
        return None
    counts = tuple(sum(key.startswith(f"stage{i}/") for key in rows) for i in range(1, 5))
    pointwise = ("stage1.1.conv.weight", "stage1.1.rbr_conv.0.conv.weight")
    if any(np.shape(weights.get(name))[2:] == (1, 1) for name in pointwise):
        return _mobileone_size(weights, rows, counts)
    return _vgg_size(weights, rows, counts, dialect)


def _vgg_size(weights, rows, num_blocks, dialect) -> dict[str, Any]:
    widths = tuple(rows[block_path(first)] for first in _FIRSTS)
    size = {"num_blocks": num_blocks, "widths": widths}
    options = {"groups": _groups(weights, rows, num_blocks)}
    for option, part in {"pre_se": ".se.", "se": ".post_se."}.items():
        options[option] = any(part in name for name in weights)
    family = VGG if dialect is OFFICIAL else REPVGG
    name = FAMILIES[family].name_of({**size, **options}) or family
    identities = ("scale_identity.weight", "bn_identity.weight")
    strides = tuple(1 if any(f"{b}.{i}" in weights for i in identities) else 2 for b in _FIRSTS)
    told = {"strides": strides} if 1 in strides else {}
    told |= {"groups": options["groups"]} if options["groups"] > 1 else {}
    told |= {"pre_se": True} if options["pre_se"] else {}
    return {"name": name, **size, **told, "se": options["se"]}


def _groups(weights, rows, num_blocks) -> int:
    """The groups of a VGG's layers 2, 4, ..., from the first of them that has a kernel."""
    layers = ["stage0", *(f"stage{s}/{i}" for s, n in enumerate(num_blocks, 1) for i in range(n))]
    for i in range(2, min(len(layers), LAST_GROUPED + 1), 2):
        for name in ("conv", "conv_3x3"):
            shape = np.shape(weights.get(f"{layers[i].replace('/', '.')}.{name}.weight"))
            if len(shape) == 4 and shape[1] and layers[i - 1] in rows:
                return rows[layers[i - 1]] // shape[1]
    return 1


def _mobileone_size(weights, rows, counts) -> dict[str, Any]:
    pairs = tuple(count // 2 for count in counts)
    lasts = [f"stage{i}/{count - 1}" for i, count in enumerate(counts, 1)]
    gated = [
        sum(f"stage{i}.{j}.se.down.weight" in weights for j in range(n))
        for i, n in enumerate(counts, 1)
    ]
    size = {
        "num_blocks": pairs,
        "widths": (rows["stage0"], *(rows.get(last, 0) for last in lasts)),
        "se_blocks": tuple(n // 2 for n in gated),
    }
    name = FAMILIES[MOBILEONE].name_of(size) or MOBILEONE
    copies = sum(f"stage1.0.rbr_conv.{i}.conv.weight" in weights for i in range(len(weights)))
    # A plain network does not show how many copies it could have.
    return {"name": name, **size, **({"copies": copies} if copies else {})}


def _shape(official: Mapping[str, np.ndarray], dialect: Dialect, name: str) -> tuple[int, ...]:
    """The shape of the kernel or scale of a layer that the network has at any rate."""
    name = f"{name}.weight"
    if name not in official:
        found = dialect.own(name)
        raise TorchFileError(f"it looks like {dialect.family}, but {found} is missing")
    return official[name].shape


def _count(official: Mapping[str, np.ndarray], pattern: str) -> int:
    return sum(re.fullmatch(rf"{pattern}\.weight", name) is not None for name in official)


def _replknet(official: Mapping[str, np.ndarray], dialect: Dialect) -> dict[str, Any]:
    shape, stages = functools.partial(_shape, official, dialect), range(1, 5)
    firsts = [shape(f"stage{i}.0.pw1.conv") for i in stages]
    small = official.get("stage1.0.large.conv_small.weight")
    return {
        "num_blocks": tuple(_count(official, rf"stage{i}\.\d+\.large\.conv") for i in stages),
        "widths": tuple(width for _, width, *_ in firsts),
        "kernel_sizes": tuple(shape(f"stage{i}.0.large.conv")[2] for i in stages),
        "ratio": firsts[0][0] / firsts[0][1],
        **({"kind": "target"} if small is None else {"small": small.shape[2], "kind": "replknet"}),
    }


def _repmlpnet(official: Mapping[str, np.ndarray], dialect: Dialect) -> dict[str, Any]:
    shape = functools.partial(_shape, official, dialect)
    stages = range(1, 2 + _count(official, r"embeds\.\d\.conv"))
    dense = [shape(f"stage{i}.0.repmlp_block.fc3.conv") for i in stages]
    units = [_count(official, rf"stage{i}\.\d+\.repmlp_block\.fc3\.conv") for i in stages]
    return {
        "num_blocks": tuple(units),
        "widths": tuple(shape(f"stage{i}.0.prebn1")[0] for i in stages),
        "patches": tuple(math.isqrt(pixels) for _, pixels, *_ in dense),
        "sets": tuple(rows // pixels for rows, pixels, *_ in dense),
        "kind": "repmlpnet" if any(".repconv" in name for name in official) else "target",
    }


def _yolov6(official: Mapping[str, np.ndarray], dialect: Dialect) -> dict[str, Any]:
    shape = functools.partial(_shape, official, dialect)
    stages = [f"backbone.ERBlock_{i}.1" for i in range(2, 6)]
    stages += [f"neck.Rep_{name}" for name in ("p4", "p3", "n3", "n4")]
    kinds = {"scale_conv": "hs", "conv_3x3": "repvgg", "conv": "target"}
    layer = next((n for n in kinds if f"backbone.stem.{n}.weight" in official), "conv")
    kernel = "conv" if layer == "scale_conv" else layer
    blocks = [1 + _count(official, rf"{re.escape(s)}\.block\.\d+\.{kernel}") for s in stages]
    stem, *rows = (
        shape(f"{first}.{kernel}")[0]
        for first in ("backbone.stem", *(f"{stage}.conv1" for stage in stages))
    )
    p4, p3, n3, n4 = rows[4:]
    d3, d4 = (shape(f"neck.downsample{i}.block.conv")[0] for i in (2, 1))
    return {
        "num_blocks": (1, *blocks),
        "widths": (stem, *rows[:4], p4, p3, d3, n3, d4, n4),
        "bifpan": any(".Bifusion" in name for name in official),
        "kind": kinds[layer],
    }


# Family, the first word of a dialect's name -> the function that finds its sizes.
_LATER = {"RepLKNet": _replknet, "RepMLPNet": _repmlpnet, "YOLOv6": _yolov6}


def _recognize_later(official: Mapping[str, np.ndarray], dialect: Dialect) -> dict[str, Any]:
    """As `recognize`, for the families of `_LATER`."""
    family = dialect.family.split()[0]
    found = _LATER[family](official, dialect)
    if FAMILIES[family].classifies:
        found["num_classes"] = _shape(official, dialect, "head")[0]
    return {"name": FAMILIES[family].name_of(found) or family, **found}


def recognize(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arguments of `create_model` for the network whose state dict this is.

    Search checkpoints are taken for kind "hs"; "csla" has the same names.

    Args:
      weights: torch name -> array, under the names of any of `DIALECTS` or the official ones.

    Raises:
      TorchFileError: it is no network of ours; the message says what it looks like, and what is
        missing.
    """
    dialect, official = to_official(weights)
    if dialect.family.split()[0] in _LATER:
        return _recognize_later(official, dialect)
    for pattern, family in _OTHERS.items():
        if any(re.fullmatch(pattern, name) for name in weights):
            raise TorchFileError(f"it looks like {family}, of which at most scales are read")
    kinds = [kind for name, kind in _KINDS.items() if name in official]
    size = recognize_size(official, dialect)
    is_ghost = any(name.startswith(("conv_stem.", "blocks.0.0.ghost1.")) for name in official)
    head = "classifier.weight" if is_ghost else "linear.weight"
    classes = np.shape(official.get(head))
    if size is None or not kinds or not classes:
        raise TorchFileError(_refusal(dialect, official, is_ghost, head))
    return {**size, "kind": kinds[0], "num_classes": classes[0]}


def _refusal(dialect: Dialect, official: Mapping[str, Any], is_ghost: bool, head: str) -> str:
    """Why these weights are no network of ours."""
    firsts = [f"blocks.{i}.0.ghost1" for i in range(9)] if is_ghost else _FIRSTS
    missing = [
        f"{first}." for first in firsts if not any(n.startswith(f"{first}.") for n in official)
    ]
    if len(missing) == len(firsts):
        prefix = next((m[1] for name in official if (m := OUTERMOST.match(name))), None)
        if prefix:
            others = [quote(name) for name in official if not name.startswith(prefix)]
            return f"it has more than the network {quote(prefix)}: {listed(others, ', ')}"
        names = ", ".join(quote(name) for name in list(official)[:3])
        return f"it is no network of {listed(FAMILIES, ', ')}: its names are {names}, ..."
    missing += [head] if head not in official else []
    scales = tuple(f".{module}.weight" for module in SCALES)
    if all(name.endswith(scales) for name in official):
        return (
            "it holds scales alone, which `load_scales` and `repopt-convert` without --weights read"
        )
    family = (GHOST if is_ghost else VGG) if dialect is OFFICIAL else dialect.family
    if missing:
        found = ", ".join(dialect.own(name).strip(".") for name in missing)
        return f"it looks like {family}, but {found} is missing"
    numbers = [n for n, v in official.items() if n.endswith(".weight") and np.ndim(v) == 0]
    if numbers:
        return f"it looks like {family}, but {dialect.own(numbers[0])} is a single number"
    fault = (
        "the channels of its modules are those of no width" if is_ghost else "a stage has no kernel"
    )
    return f"it looks like {family}, but {fault}"
