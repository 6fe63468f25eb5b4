"""`create_model`: every network of the project by its published name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from flax import nnx

from repopt_jax.models.checks import check_rngs
from repopt_jax.models.mobileone import MOBILEONE_SIZES, MobileOne, MobileOneBlock
from repopt_jax.models.replknet import REPLKNET_SIZES, LargeKernelBlock, RepLKNet
from repopt_jax.models.repmlpnet import REPMLPNET_SIZES, BranchedPatchDense, RepMLPNet
from repopt_jax.models.repopt_ghost import GHOST_SIZES, RepGhost, RepOptGhost
from repopt_jax.models.repopt_vgg import REPVGG_SIZES, SIZES, RepOptVGG, RepVGGBlock
from repopt_jax.models.search import search_network
from repopt_jax.models.yolov6 import YOLOV6_SIZES, YOLOv6

if TYPE_CHECKING:
    from jaxtyping import Array

Network = RepOptVGG | RepOptGhost | MobileOne | RepLKNet | RepMLPNet | YOLOv6
COMMON_OPTIONS = ("bn_group", "dtype", "param_dtype")


class Family(NamedTuple):
    """Networks of one class, whose signature says what options they take.

    Attributes:
      network: the class.
      sizes: published name -> options.
      baseline: kind of the structural baseline, under the name that its authors gave it.
      blocks: the option that makes the baseline.
    """

    network: type[nnx.Module]
    sizes: Mapping[str, Mapping[str, Any]]
    baseline: str
    blocks: Mapping[str, type]

    @property
    def _signature(self) -> inspect.FullArgSpec:
        return inspect.getfullargspec(self.network.__init__)

    @property
    def needed(self) -> tuple[str, ...]:
        """The options without which there is no size."""
        return tuple(self._signature.args[1:])

    @property
    def options(self) -> tuple[str, ...]:
        """The other options, but for those of every family."""
        known = (*self.blocks, *COMMON_OPTIONS)
        return tuple(name for name in self._signature.kwonlydefaults if name not in known)

    def name_of(self, options: Mapping[str, Any]) -> str | None:
        """The published name of a network; options that are not given may have any value.

        >>> FAMILIES["RepLKNet"].name_of({"widths": (128, 256, 512, 1024)})
        'RepLKNet-31B'
        """
        for name, size in self.sizes.items():
            if all(options.get(key, value) == value for key, value in size.items()):
                return name
        return None

    @property
    def classifies(self) -> bool:
        """Whether the networks give logits, so that they have `num_classes`."""
        return "num_classes" in self._signature.kwonlyargs


VGG, REPVGG, GHOST, MOBILEONE = "RepOpt-VGG", "RepVGG", "RepOpt-GhostNet", "MobileOne"
REPLKNET, REPMLPNET, YOLOV6 = "RepLKNet", "RepMLPNet", "YOLOv6"
FAMILIES = {
    VGG: Family(RepOptVGG, SIZES, "repvgg", {"block_type": RepVGGBlock}),
    REPVGG: Family(RepOptVGG, REPVGG_SIZES, "repvgg", {"block_type": RepVGGBlock}),
    GHOST: Family(RepOptGhost, GHOST_SIZES, "rep", {"module_type": RepGhost}),
    MOBILEONE: Family(MobileOne, MOBILEONE_SIZES, "mobileone", {"block_type": MobileOneBlock}),
    REPLKNET: Family(RepLKNet, REPLKNET_SIZES, "replknet", {"block_type": LargeKernelBlock}),
    REPMLPNET: Family(RepMLPNet, REPMLPNET_SIZES, "repmlpnet", {"block_type": BranchedPatchDense}),
    YOLOV6: Family(YOLOv6, YOLOV6_SIZES, "repvgg", {"block_type": RepVGGBlock}),
}
KINDS = ("target", "hs", "csla", *dict.fromkeys(f.baseline for f in FAMILIES.values()))


def create_model(
    name: str,
    kind: str = "target",
    *,
    num_classes: int = 1000,
    scales: Mapping[str, Mapping[str, Array]] | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> Network:
    """Create a network.

    Args:
      name: a published size, such as ``RepOpt-VGG-B1``, ``RepVGG-B1g4``, ``MobileOne-S0``,
        ``RepOpt-GhostNet-0.5x``, ``RepLKNet-31B``, ``RepMLPNet-T224`` or ``YOLOv6-N``; or a size
        of your own: the name of a family, such as ``RepOpt-VGG``, with the options that it needs.
      kind: "target", the plain network; "hs", its search network with trainable scales; "csla",
        the same with constant scales; "repvgg" (VGG, YOLOv6), "rep" (GhostNet), "mobileone",
        "replknet" or "repmlpnet", the baseline with a BN in every branch.
      num_classes: outputs of the last layer; YOLOv6, which gives feature maps, has none.
      scales: what the scales of "hs" and "csla" start from, by path and branch. None: the
        search's initial values. Other kinds have no scales; see `init_target`.
      rngs: draws the parameters.
      **options: of the family's class (`RepOptVGG`, `RepOptGhost`, `MobileOne`, `RepLKNet`,
        `RepMLPNet` or `YOLOv6`), such as num_blocks and widths; of all: bn_group, dtype and
        param_dtype.

    Raises:
      ValueError: unknown name or kind, an option of another family, scales for a kind that has
        none, or a search of a network without branches.

    >>> import repopt_jax
    >>> from flax import nnx
    >>> model = repopt_jax.create_model("RepOpt-VGG-A0", num_classes=10, rngs=nnx.Rngs(0))
    >>> len(model.blocks())
    22
    """
    check_rngs(rngs)
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
    classes = {"num_classes": num_classes} if family.classifies else {}
    model = family.network(rngs=rngs, **classes, **options, **blocks)
    if kind in ("hs", "csla"):
        if not model.blocks():
            raise ValueError(f"kind {kind!r} needs branches, of which {name!r} has none")
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
    # The sizes of the family that is meant, or of none: those of all would be a page.
    known = {n: (*f.sizes, f"{n} with {' and '.join(f.needed)}") for n, f in FAMILIES.items()}
    meant = [n for n in known if name.lower().startswith(n.lower())]
    choices = known[max(meant, key=len)] if meant else tuple(FAMILIES)
    what = "" if meant else "the sizes of "
    raise ValueError(f"name must be one of {what}{choices}, got {name!r}")
