"""Names and layouts: one table says which torch tensor is which variable, for both directions.

The path of a variable is that of a block, a layer in it and an array: ``stage1/0``, ``conv``,
``kernel``. The official code calls the same tensor ``stage1.0``, ``conv``, ``weight``. To read
the weights of another network, add a row to `_LAYERS`; to read another code's files of the same
network, add a `Dialect`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from repopt_jax.torch_files.pickles import TorchFileError

# The pattern of a block's path, and our layers in it -> torch's.
_LAYERS = (
    (
        r"(stage0|stage[1-4]/\d+)/",
        {
            **{"conv": "conv", "conv3x3": "conv_3x3", "conv1x1": "conv_1x1"},
            **{"bn": "bn", "bn3x3": "bn_3x3", "bn1x1": "bn_1x1", "bn_identity": "bn_identity"},
            **{"post_se/down": "post_se.down", "post_se/up": "post_se.up"},
            **{"pre_se/down": "se.down", "pre_se/up": "se.up"},
            # MobileOne's, up to ten copies of a kernel.
            **{f"conv{i}": f"rbr_conv.{i}.conv" for i in range(10)},
            **{f"bn{i}": f"rbr_conv.{i}.bn" for i in range(10)},
            **{"conv_scale": "rbr_scale.conv", "bn_scale": "rbr_scale.bn", "bn_skip": "rbr_skip"},
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
    # RepLKNet, RepMLPNet and YOLOv6.
    (
        r"((?:stem|transitions|stage[1-4]|embeds|backbone|neck)/.+)/",
        {
            **{name: name for name in ("conv", "bn", "conv_small", "bn_small", "down", "up")},
            **{name: name for name in ("large_norm", "ffn_norm", "prebn1", "upsample_transpose")},
            **{"conv3x3": "conv_3x3", "conv1x1": "conv_1x1"},
            **{"bn3x3": "bn_3x3", "bn1x1": "bn_1x1", "bn_identity": "bn_identity"},
        },
    ),
    (r"(conv_embedding)/", {"conv": "conv", "bn": "bn"}),
    (
        r"()",
        {
            **{name: name for name in ("linear", "conv_stem", "bn1", "conv_head", "classifier")},
            **{name: name for name in ("norm", "head")},
        },
    ),
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


class Dialect(NamedTuple):
    """The names that one code base has for a network of ours.

    Attributes:
      family: what messages call it.
      mark: pattern of a name that only it has.
      words: parts of its names, each after a dot or at the start -> the official parts.
      fused: whether its convolutions have taken in the BatchNorms after them.
      epsilon: of these BatchNorms.
      other: how the names of further parts begin, such as heads, which the network of ours lacks.
    """

    family: str
    mark: str
    words: Mapping[str, str]
    fused: bool = False
    epsilon: float = 1e-5
    other: tuple[str, ...] = ()

    def official(self, name: str) -> str:
        """The official name of one of its own."""
        return _replaced(self.words, name)

    def own(self, name: str) -> str:
        """Its own name of an official one."""
        return _replaced({new: old for old, new in self.words.items()}, name)


def _replaced(words: Mapping[str, str], name: str) -> str:
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
    return re.sub(rf"(?<![^.])(?:{pattern})", lambda match: words[match[0]], name)


def _deploy(
    family: str, mark: str, words: Mapping[str, str], layer: str, official: str = "", **options: Any
) -> Dialect:
    """The form in which the block called `official` is one `layer` with a bias."""
    conv, bn = f"{official}conv", f"{official}bn"
    fused = {f"{layer}.weight": f"{conv}.weight", f"{layer}.bias": f"{bn}.bias"}
    return Dialect(f"{family} in deploy form", mark, {**words, **fused}, fused=True, **options)


OFFICIAL = Dialect("RepOptimizers", "", {})
_TIMM = {
    **{"stem.": "stage0.", **{f"stages.{i}.": f"stage{i + 1}." for i in range(4)}},
    **{"attn.fc1.": "se.down.", "attn.fc2.": "se.up.", "head.fc.": "linear."},
}
_TIMM_REPVGG = {
    **{"conv_kxk.conv.": "conv_3x3.", "conv_kxk.bn.": "bn_3x3."},
    **{"conv_1x1.conv.": "conv_1x1.", "conv_1x1.bn.": "bn_1x1.", "identity.": "bn_identity."},
}
_TIMM_MOBILEONE = {"conv_kxk.": "rbr_conv.", "conv_scale.": "rbr_scale.", "identity.": "rbr_skip."}
_TIMM_BLOCK = r"(stem|stages\.[0-3]\.\d+)"
_RBR = {
    **{"rbr_dense.conv.": "conv_3x3.", "rbr_dense.bn.": "bn_3x3."},
    **{"rbr_1x1.conv.": "conv_1x1.", "rbr_1x1.bn.": "bn_1x1.", "rbr_identity.": "bn_identity."},
}
_PLUS = {f"stage{i}.blocks.": f"stage{i[0]}." for i in ("1", "2", "3_first", "4")}
_PLUS_BLOCK = r"stage([124]|3_first|3_second)\.blocks\.\d+\.rbr_"
_AUX = ("stage1_aux.", "stage2_aux.", "stage3_first_aux.")
_REPLK = {
    **{f"stages.{i}.blocks.": f"stage{i + 1}." for i in range(4)},
    **{"prelkb_bn.": "large_norm.", "preffn_bn.": "ffn_norm."},
    **{"large_kernel.lkb_origin.": "large.", "large_kernel.small_conv.conv.": "large.conv_small."},
    "large_kernel.small_conv.bn.": "large.bn_small.",
}
_LKB = r"stages\.\d\.blocks\.\d+\.large_kernel\."
_REPMLP = {
    **{f"stages.{i}.": f"stage{i + 1}." for i in range(4)},
    **{"gp.fc1.": "gp.down.", "gp.fc2.": "gp.up.", "prebn2.": "ffn.ffn_norm."},
    **{"ffn_block.ffn_fc1.": "ffn.pw1.", "ffn_block.ffn_fc2.": "ffn.pw2.", "head_norm.": "norm."},
}
_REPMLP_TRAINING = {
    **{"fc3.": "fc3.conv.", "fc3_bn.": "fc3.bn."},
    **{"repconv1.": "fc3.repconv1.", "repconv3.": "fc3.repconv3."},
}
# YOLOv6 before version 0.3 has shorter names for layers without branches.
_YOLOV6_OLD = {
    f"{layer}.{part}.": f"{layer.replace('.cv', '.sppf.cv')}.block.{part}."
    for layer in (
        *("neck.reduce_layer0", "neck.reduce_layer1", "neck.downsample1", "neck.downsample2"),
        *("ERBlock_5.2.cv1", "ERBlock_5.2.cv2"),
    )
    for part in ("conv", "bn")
}
_YOLOV6 = r"(backbone|neck)\..+\."
_MOBILEONE = {"se.reduce.": "se.down.", "se.expand.": "se.up."}
DIALECTS = (
    Dialect("RepVGGplus", rf"{_PLUS_BLOCK}(dense|1x1|identity)\..+", {**_RBR, **_PLUS}, other=_AUX),
    _deploy("RepVGGplus", rf"{_PLUS_BLOCK}reparam\..+", _PLUS, "rbr_reparam", other=_AUX),
    Dialect("RepVGG", r"stage(0|\d\.\d+)\.rbr_(dense|1x1|identity)\..+", _RBR),
    _deploy("RepVGG", r"stage(0|\d\.\d+)\.rbr_reparam\..+", {}, "rbr_reparam"),
    Dialect(
        "timm's RepVGG",
        rf"{_TIMM_BLOCK}\.(conv_kxk\.conv|conv_1x1\.conv)\..+",
        {**_TIMM, **_TIMM_REPVGG},
    ),
    Dialect(
        "timm's MobileOne",
        rf"{_TIMM_BLOCK}\.(conv_kxk\.\d|conv_scale)\..+",
        {**_TIMM, **_TIMM_MOBILEONE},
    ),
    _deploy(
        "timm's RepVGG or MobileOne", rf"{_TIMM_BLOCK}\.reparam_conv\..+", _TIMM, "reparam_conv"
    ),
    Dialect("MobileOne", r"stage(0|\d\.\d+)\.rbr_(conv|scale|skip)\..+", _MOBILEONE),
    _deploy("MobileOne", r"stage(0|\d\.\d+)\.reparam_conv\..+", _MOBILEONE, "reparam_conv"),
    Dialect(
        "RepGhostNet",
        r"blocks\.\d\.\d\.ghost[12]\.fusion_bn\.0\..+",
        {"fusion_bn.0.": "fusion_bn."},
    ),
    Dialect(
        "RepGhostNet in deploy form",
        r"blocks\.\d\.\d\.ghost[12]\.cheap_operation\.(weight|bias)",
        {
            "cheap_operation.weight": "cheap_operation.0.weight",
            "cheap_operation.bias": "final_bn.bias",
        },
        fused=True,
    ),
    _deploy("RepLKNet", rf"{_LKB}lkb_reparam\..+", _REPLK, "large_kernel.lkb_reparam", "large."),
    Dialect("RepLKNet", rf"{_LKB}.+", _REPLK),
    Dialect(
        "RepMLPNet",
        r"stages\.\d\.\d+\.repmlp_block\.fc3_bn\..+",
        {**_REPMLP, **_REPMLP_TRAINING},
    ),
    _deploy("RepMLPNet", r"stages\.\d\.\d+\.repmlp_block\.fc3\..+", _REPMLP, "fc3", "fc3."),
    Dialect(
        "YOLOv6 before version 0.3",
        r"neck\.reduce_layer0\.conv\.weight",
        {**_RBR, **_YOLOV6_OLD},
        other=("detect.",),
    ),
    _deploy(
        "YOLOv6",
        rf"{_YOLOV6}rbr_reparam\..+",
        {"block.conv.bias": "block.bn.bias"},
        "rbr_reparam",
        epsilon=1e-3,
        other=("detect.",),
    ),
    Dialect("YOLOv6", rf"{_YOLOV6}rbr_dense\..+", _RBR, other=("detect.",)),
    Dialect("YOLOv6 with RepOptimizers", rf"{_YOLOV6}conv\.weight", {}, other=("detect.",)),
)


def dialect_of(names: Collection[str]) -> Dialect:
    """The dialect of a state dict with these names.

    That of RepVGGplus depends on the file: its ``stage3_first`` has half of stage 3's blocks,
    rounded down, and ``stage3_second`` counts the others from 0.

    Raises:
      TorchFileError: the two are not halves of one stage.
    """
    marked = (d for d in DIALECTS if any(re.fullmatch(d.mark, name) for name in names))
    dialect = next(marked, OFFICIAL)
    if not dialect.family.startswith("RepVGGplus"):
        return dialect
    found = [re.match(r"stage3_(first|second)\.blocks\.(\d\d?)\.", name) for name in names]
    first, second = (
        max((int(match[2]) + 1 for match in found if match and match[1] == half), default=0)
        for half in ("first", "second")
    )
    if second - first not in (0, 1):
        raise TorchFileError(f"stage3_first, stage3_second must be halves, got {first}, {second}")
    later = {f"stage3_second.blocks.{i}.": f"stage3.{first + i}." for i in range(second)}
    return dialect._replace(words={**dialect.words, **later})


def to_official(weights: Mapping[str, np.ndarray]) -> tuple[Dialect, dict[str, np.ndarray]]:
    """The dialect of a state dict, and the same weights under the official names.

    A fused convolution becomes one with a BatchNorm that only adds the bias: mean 0, scale 1 and
    variance ``1 - epsilon``. Its network is a plain one.

    >>> weights = {"stage0.rbr_reparam.bias": np.ones(2), "stage1.0.rbr_1x1.bn.bias": np.ones(2)}
    >>> dialect, official = to_official(weights)
    >>> dialect.family, list(official)
    ('RepVGG', ['stage0.rbr_reparam.bias', 'stage1.0.bn_1x1.bias'])
    """
    dialect = dialect_of(weights)
    kept = {name: v for name, v in weights.items() if not name.startswith(dialect.other)}
    official = {dialect.official(name): value for name, value in kept.items()}
    if dialect.fused:
        for name, bias in list(official.items()):
            bn = name.removesuffix("bias")
            if name.endswith("bn.bias") and f"{bn}weight" not in official:
                if name.endswith("fc3.bn.bias"):
                    pixels = np.shape(official.get(f"{bn[:-3]}conv.weight"))[1]
                    bias = official[name] = _bias_of_sets(dialect.own(name), bias, pixels)
                official[f"{bn}weight"] = np.ones_like(bias)
                official[f"{bn}running_mean"] = np.zeros_like(bias)
                official[f"{bn}running_var"] = np.full_like(bias, 1 - dialect.epsilon)
    return dialect, official


def _bias_of_sets(name: str, bias: np.ndarray, pixels: int) -> np.ndarray:
    """One bias for each set of RepMLPNet's channels: all of a set's pixels have the same."""
    by_set = bias.reshape(-1, pixels)
    if not np.allclose(by_set, by_set[:, :1], rtol=1e-3, atol=1e-5):
        raise ValueError(f"{name} must have one number for all {pixels} pixels of a set")
    return by_set[:, 0]


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
        match = re.fullmatch(rf"{block}({'|'.join(layers)}|\w+/branch_\w+)/(\w+)", path)
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
