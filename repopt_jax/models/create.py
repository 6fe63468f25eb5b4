"""`create_model`: every network of the project by its published name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from flax import nnx

from repopt_jax.models.repopt_ghost import FAMILY as GHOST
from repopt_jax.models.repopt_ghost import GHOST_SIZES, RepGhost, RepOptGhost
from repopt_jax.models.repopt_vgg import SIZES, RepOptVGG, RepVGGBlock, stage_widths
from repopt_jax.models.search import search_network

if TYPE_CHECKING:
    from jaxtyping import Array

VGG = "RepOpt-VGG"
KINDS = ("target", "hs", "csla", "repvgg", "rep")
# The structural baseline of each family, under the name that its authors gave it.
BASELINES = {VGG: "repvgg", GHOST: "rep"}
OPTIONS = {
    VGG: ("num_blocks", "widths", "strides", "se", "bn_group", "dtype", "param_dtype"),
    GHOST: ("width", "dropout", "bn_group", "dtype", "param_dtype"),
}
NEEDED = {VGG: ("num_blocks", "widths"), GHOST: ("width",)}


def create_model(
    name: str,
    kind: Literal["target", "hs", "csla", "repvgg", "rep"] = "target",
    *,
    num_classes: int = 1000,
    scales: Mapping[str, Mapping[str, Array]] | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> RepOptVGG | RepOptGhost:
    """Create a network.

    Args:
      name: a published size, such as ``RepOpt-VGG-B1`` or ``RepOpt-GhostNet-0.5x``; or a size
        of your own: ``RepOpt-VGG`` with `num_blocks` and `widths`, or ``RepOpt-GhostNet`` with
        `width`.
      kind: "target", the plain network; "hs", its search network with trainable scales; "csla",
        the same with constant scales; "repvgg" (VGG) or "rep" (GhostNet), the baseline with a BN
        in every branch.
      num_classes: outputs of the last layer.
      scales: what the scales of "hs" and "csla" start from, by path and branch. None: the
        search's initial values. Other kinds have no scales; see `init_target`.
      rngs: draws the parameters.
      **options: of `RepOptVGG`: num_blocks, widths, strides, se; of `RepOptGhost`: width,
        dropout; of both: bn_group, dtype, param_dtype.

    Raises:
      ValueError: unknown name or kind, an option of the other family, or scales for a kind that
        has none.

    >>> import repopt_jax
    >>> from flax import nnx
    >>> model = repopt_jax.create_model("RepOpt-VGG-A0", num_classes=10, rngs=nnx.Rngs(0))
    >>> len(model.blocks())
    22
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if scales is not None and kind not in ("hs", "csla"):
        raise ValueError(f"scales are taken by the kinds 'hs' and 'csla' only, got kind {kind!r}")
    family, size = _size(name)
    if kind in BASELINES.values() and kind != BASELINES[family]:
        raise ValueError(f"kind {kind!r} must be {BASELINES[family]!r} for {name!r}")
    if surplus := sorted(options.keys() - set(OPTIONS[family])):
        raise ValueError(f"options of {name!r} must be among {OPTIONS[family]}, got {surplus}")
    options = size | options
    if missing := sorted(set(NEEDED[family]) - options.keys()):
        raise ValueError(f"name {name!r} needs {' and '.join(NEEDED[family])}, missing {missing}")
    if family == VGG:
        baseline = {"block_type": RepVGGBlock} if kind == "repvgg" else {}
        model = RepOptVGG(num_classes=num_classes, rngs=rngs, **options, **baseline)
    else:
        baseline = {"module_type": RepGhost} if kind == "rep" else {}
        model = RepOptGhost(num_classes=num_classes, rngs=rngs, **options, **baseline)
    if kind in ("hs", "csla"):
        return search_network(model, model.blocks(), kind=kind, scales=scales, rngs=rngs)
    return model


def _size(name: str) -> tuple[str, dict[str, Any]]:
    """The family of a name and the options that it stands for."""
    if name in SIZES:
        num_blocks, multipliers = SIZES[name]
        return VGG, {"num_blocks": num_blocks, "widths": stage_widths(multipliers)}
    if name in GHOST_SIZES:
        return GHOST, {"width": GHOST_SIZES[name]}
    if name not in (VGG, GHOST):
        raise ValueError(
            f"name must be one of {sorted((*SIZES, *GHOST_SIZES))}, {VGG!r} with num_blocks and "
            f"widths, or {GHOST!r} with width, got {name!r}"
        )
    return name, {}
