"""Names and axes: which torch tensor is which variable of ours.

One table per network family, read in both directions. A row holds a torch name, the path of the
variable and, beside them, the axes: our axis ``i`` is torch's axis ``axes[i]``. ``{block}`` stands
for the same block in both, with dots in torch and slashes here; a row without a path names what
torch keeps and we do not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

CONV = (2, 3, 1, 0)  # OIHW -> HWIO
DENSE = (1, 0)  # out, in -> in, out
SAME = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A torch name, our path (None: torch only) and the order of the axes (None: the same)."""

    torch: str
    path: str | None
    axes: tuple[int, ...] | None = SAME


def _batch_norm(torch: str, path: str) -> tuple[Row, ...]:
    return (
        Row(f"{torch}.weight", f"{path}/scale"),
        Row(f"{torch}.bias", f"{path}/bias"),
        Row(f"{torch}.running_mean", f"{path}/mean"),
        Row(f"{torch}.running_var", f"{path}/var"),
        Row(f"{torch}.num_batches_tracked", None),
    )


VGG_BLOCK = r"stage0|stage[1-4]/\d+"
VGG = (
    # target
    Row("{block}.conv.weight", "{block}/conv/kernel", CONV),
    *_batch_norm("{block}.bn", "{block}/bn"),
    # hs and csla
    Row("{block}.conv.weight", "{block}/conv/branch_weights/conv3x3", CONV),
    Row("{block}.conv_1x1.weight", "{block}/conv/branch_weights/conv1x1", CONV),
    Row("{block}.scale_conv.weight", "{block}/conv/branch_scales/conv3x3"),
    Row("{block}.scale_1x1.weight", "{block}/conv/branch_scales/conv1x1"),
    Row("{block}.scale_identity.weight", "{block}/conv/branch_weights/identity"),
    # repvgg
    Row("{block}.conv_3x3.weight", "{block}/conv3x3/kernel", CONV),
    *_batch_norm("{block}.bn_3x3", "{block}/bn3x3"),
    Row("{block}.conv_1x1.weight", "{block}/conv1x1/kernel", CONV),
    *_batch_norm("{block}.bn_1x1", "{block}/bn1x1"),
    *_batch_norm("{block}.bn_identity", "{block}/bn_identity"),
    # folded
    Row("{block}.conv.bias", "{block}/conv/bias"),
    # all kinds
    Row("{block}.post_se.down.weight", "{block}/post_se/down/kernel", CONV),
    Row("{block}.post_se.down.bias", "{block}/post_se/down/bias"),
    Row("{block}.post_se.up.weight", "{block}/post_se/up/kernel", CONV),
    Row("{block}.post_se.up.bias", "{block}/post_se/up/bias"),
    Row("linear.weight", "linear/kernel", DENSE),
    Row("linear.bias", "linear/bias"),
)

GHOST_BLOCK = r"stages/\d/\d(?:/ghost[12])?"  # the stages are called blocks in torch
GHOST = (
    # target
    Row("{block}.cheap_operation.0.weight", "{block}/cheap_conv/kernel", CONV),
    *_batch_norm("{block}.final_bn", "{block}/final_bn"),
    # hs and csla
    Row("{block}.cheap_operation.0.weight", "{block}/cheap_conv/branch_weights/conv", CONV),
    Row("{block}.cheap_operation.1.weight", "{block}/cheap_conv/branch_scales/conv"),
    Row("{block}.fusion_scale.weight", "{block}/cheap_conv/branch_weights/identity"),
    # rep
    *_batch_norm("{block}.cheap_operation.1", "{block}/cheap_bn"),
    *_batch_norm("{block}.fusion_bn", "{block}/fusion_bn"),
    # all kinds
    Row("{block}.primary_conv.0.weight", "{block}/primary_conv/kernel", CONV),
    *_batch_norm("{block}.primary_conv.1", "{block}/primary_bn"),
    Row("{block}.conv_dw.weight", "{block}/conv_dw/kernel", CONV),
    *_batch_norm("{block}.bn_dw", "{block}/bn_dw"),
    Row("{block}.se.conv_reduce.weight", "{block}/se/down/kernel", CONV),
    Row("{block}.se.conv_reduce.bias", "{block}/se/down/bias"),
    Row("{block}.se.conv_expand.weight", "{block}/se/up/kernel", CONV),
    Row("{block}.se.conv_expand.bias", "{block}/se/up/bias"),
    Row("{block}.shortcut.0.weight", "{block}/shortcut/conv_dw/kernel", CONV),
    *_batch_norm("{block}.shortcut.1", "{block}/shortcut/bn_dw"),
    Row("{block}.shortcut.2.weight", "{block}/shortcut/conv_pw/kernel", CONV),
    *_batch_norm("{block}.shortcut.3", "{block}/shortcut/bn_pw"),
    Row("{block}.conv.weight", "{block}/conv/kernel", CONV),
    *_batch_norm("{block}.bn1", "{block}/bn1"),
    Row("conv_stem.weight", "conv_stem/kernel", CONV),
    *_batch_norm("bn1", "bn1"),
    Row("conv_head.weight", "conv_head/kernel", CONV),
    Row("conv_head.bias", "conv_head/bias"),
    Row("classifier.weight", "classifier/kernel", DENSE),
    Row("classifier.bias", "classifier/bias"),
)

TABLES = ((VGG, VGG_BLOCK), (GHOST, GHOST_BLOCK))

# What a search leaves in a state dict: torch name -> block, branch. Blocks of one name belong
# together; the layer inside a block that they scale is called `conv` here. Modules of other
# packages that use the names of the official code (YOLOv6) are covered by them.
SCALE_NAMES = (
    (re.compile(r"(.*)\.scale_conv\.weight"), "conv3x3"),
    (re.compile(r"(.*)\.scale_1x1\.weight"), "conv1x1"),
    (re.compile(r"(.*)\.scale_identity\.weight"), "identity"),
    (re.compile(r"(.*)\.cheap_operation\.1\.weight"), "conv"),
    (re.compile(r"(.*)\.fusion_scale\.weight"), "identity"),
)
GHOST_MARK = ".fusion_scale."  # elsewhere, cheap_operation.1 is a BatchNorm
VGG_LAYER, GHOST_LAYER = "conv", "cheap_conv"


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


def torch_names(path: str) -> list[tuple[str, tuple[int, ...] | None]]:
    """Every torch name and axes that the tables have for a variable's path.

    >>> torch_names("stage1/0/conv/kernel")
    [('stage1.0.conv.weight', (2, 3, 1, 0))]
    """
    found = []
    for row, block in _rows():
        if row.path is None:
            continue
        pattern = re.escape(row.path).replace(r"\{block\}", f"(?P<block>{block})")
        match = re.fullmatch(pattern, path)
        if match:
            name = torch_block(match.groupdict().get("block", ""))
            found.append((row.torch.format(block=name), row.axes))
    return found


def is_torch_only(name: str) -> bool:
    """Whether a torch name is known to have no variable here.

    >>> is_torch_only("stage0.bn.num_batches_tracked")
    True
    """
    for row, block in _rows():
        inside = block.replace("/", r"\.").replace("stages", "blocks")
        pattern = row.torch.replace(".", r"\.").replace("{block}", f"(?:{inside})")
        if row.path is None and re.fullmatch(pattern, name):
            return True
    return False


def _rows() -> Iterator[tuple[Row, str]]:
    """Every row of every table, and the pattern of its blocks."""
    return ((row, block) for table, block in TABLES for row in table)
