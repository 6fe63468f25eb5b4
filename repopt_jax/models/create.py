"""`create_model`: every network of the project by its published name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from flax import nnx

from repopt_jax.models.repopt_vgg import RepOptVGG, RepVGGBlock
from repopt_jax.models.search import search_network
from repopt_jax.sizes import SIZES, stage_widths

if TYPE_CHECKING:
    from jaxtyping import Array

KINDS = ("target", "hs", "csla", "repvgg")


def create_model(
    name: str,
    kind: Literal["target", "hs", "csla", "repvgg"] = "target",
    *,
    num_classes: int = 1000,
    scales: Mapping[str, Mapping[str, Array]] | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> RepOptVGG:
    """Create a network.

    Args:
      name: a published size, such as ``RepOpt-VGG-B1``, or ``RepOpt-VGG`` for an own size given
        by `num_blocks` and `widths`.
      kind: "target", the plain network; "hs", its search network with trainable scales; "csla",
        the same with constant scales; "repvgg", the baseline with a BN in every branch.
      num_classes: outputs of the last layer.
      scales: what the scales of "hs" and "csla" start from, by path and branch. None: the
        search's initial values. Other kinds have no scales; see `init_target`.
      rngs: draws the parameters.
      **options: of `RepOptVGG`: num_blocks, widths, strides, se, bn_group, dtype, param_dtype.

    Raises:
      ValueError: unknown name or kind, or scales for a kind that has none.

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
    if name in SIZES:
        num_blocks, multipliers = SIZES[name]
        options = {"num_blocks": num_blocks, "widths": stage_widths(multipliers)} | options
    elif name != "RepOpt-VGG":
        raise ValueError(
            f"name must be one of {sorted(SIZES)}, or 'RepOpt-VGG' with num_blocks and widths, "
            f"got {name!r}"
        )
    elif missing := {"num_blocks", "widths"} - options.keys():
        raise ValueError(
            f"name 'RepOpt-VGG' needs num_blocks and widths, missing {sorted(missing)}"
        )
    if kind == "repvgg":
        options["block_type"] = RepVGGBlock
    model = RepOptVGG(num_classes=num_classes, rngs=rngs, **options)
    if kind in ("hs", "csla"):
        return search_network(model, model.blocks(), kind=kind, scales=scales, rngs=rngs)
    return model
