"""`create_model`: every network of the project by its published name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flax import nnx

from repopt_jax.models.mobileone import FAMILY as MOBILEONE
from repopt_jax.models.mobileone import MOBILEONE_SIZES, MobileOne, MobileOneBlock
from repopt_jax.models.repopt_ghost import FAMILY as GHOST
from repopt_jax.models.repopt_ghost import GHOST_SIZES, RepGhost, RepOptGhost
from repopt_jax.models.repopt_vgg import REPVGG_SIZES, SIZES, RepOptVGG, RepVGGBlock
from repopt_jax.models.search import search_network

if TYPE_CHECKING:
    from jaxtyping import Array

VGG, REPVGG = "RepOpt-VGG", "RepVGG"
KINDS = ("target", "hs", "csla", "repvgg", "rep", "mobileone")


class Family(NamedTuple):
    """Networks of one class.

    Attributes:
      network: the class.
      sizes: published name -> options.
      baseline: kind of the structural baseline, under the name that its authors gave it.
      blocks: the option that makes the baseline.
      needed: options without which there is no size.
      options: other ones, but for those of every family.
    """

    network: type[nnx.Module]
    sizes: Mapping[str, Mapping[str, Any]]
    baseline: str
    blocks: Mapping[str, type]
    needed: tuple[str, ...]
    options: tuple[str, ...]


_VGG = Family(
    RepOptVGG,
    SIZES,
    baseline="repvgg",
    blocks={"block_type": RepVGGBlock},
    needed=("num_blocks", "widths"),
    options=("strides", "groups", "se", "pre_se"),
)
FAMILIES = {
    VGG: _VGG,
    REPVGG: _VGG._replace(sizes=REPVGG_SIZES),
    GHOST: Family(
        RepOptGhost,
        {name: {"width": width} for name, width in GHOST_SIZES.items()},
        baseline="rep",
        blocks={"module_type": RepGhost},
        needed=("width",),
        options=("dropout",),
    ),
    MOBILEONE: Family(
        MobileOne,
        MOBILEONE_SIZES,
        baseline="mobileone",
        blocks={"block_type": MobileOneBlock},
        needed=("num_blocks", "widths"),
        options=("copies", "se_blocks"),
    ),
}
COMMON_OPTIONS = ("bn_group", "dtype", "param_dtype")


def create_model(
    name: str,
    kind: Literal["target", "hs", "csla", "repvgg", "rep", "mobileone"] = "target",
    *,
    num_classes: int = 1000,
    scales: Mapping[str, Mapping[str, Array]] | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> RepOptVGG | RepOptGhost | MobileOne:
    """Create a network.

    Args:
      name: a published size, such as ``RepOpt-VGG-B1``, ``RepVGG-B1g4``, ``MobileOne-S0`` or
        ``RepOpt-GhostNet-0.5x``; or a size of your own: ``RepOpt-VGG``, ``RepVGG`` or
        ``MobileOne`` with `num_blocks` and `widths`, or ``RepOpt-GhostNet`` with `width`.
      kind: "target", the plain network; "hs", its search network with trainable scales; "csla",
        the same with constant scales; "repvgg" (VGG), "rep" (GhostNet) or "mobileone", the
        baseline with a BN in every branch.
      num_classes: outputs of the last layer.
      scales: what the scales of "hs" and "csla" start from, by path and branch. None: the
        search's initial values. Other kinds have no scales; see `init_target`.
      rngs: draws the parameters.
      **options: of `RepOptVGG`: num_blocks, widths, strides, groups, se, pre_se; of `MobileOne`:
        num_blocks, widths, copies, se_blocks; of `RepOptGhost`: width, dropout; of all: bn_group,
        dtype, param_dtype.

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
    family = family_of(name)
    if kind not in ("target", "hs", "csla", family.baseline):
        raise ValueError(f"kind {kind!r} must be {family.baseline!r} for {name!r}")
    allowed = (*family.needed, *family.options, *COMMON_OPTIONS)
    if surplus := sorted(options.keys() - set(allowed)):
        raise ValueError(f"options of {name!r} must be among {allowed}, got {surplus}")
    options = {**family.sizes.get(name, {}), **options}
    if missing := sorted(set(family.needed) - options.keys()):
        needed = " and ".join(family.needed)
        raise ValueError(f"name {name!r} needs {needed}, missing {missing}")
    blocks = family.blocks if kind == family.baseline else {}
    model = family.network(num_classes=num_classes, rngs=rngs, **options, **blocks)
    if kind in ("hs", "csla"):
        return search_network(model, model.blocks(), kind=kind, scales=scales, rngs=rngs)
    return model


def family_of(name: str) -> Family:
    """The family of a published name or of its own name.

    Raises:
      ValueError: an unknown name.

    >>> family_of("MobileOne-S0").network.__name__
    'MobileOne'
    """
    for family_name, family in FAMILIES.items():
        if name == family_name or name in family.sizes:
            return family
    names = sorted(name for family in FAMILIES.values() for name in family.sizes)
    own = [f"{n!r} with {' and '.join(f.needed)}" for n, f in FAMILIES.items()]
    raise ValueError(f"name must be one of {names}, or {' or '.join(own)}, got {name!r}")
