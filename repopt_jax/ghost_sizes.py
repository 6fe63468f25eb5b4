"""Published sizes of RepOpt-GhostNet, and what follows from them without building a network.

Sources: the bottlenecks of RepGhostNet, arXiv 2211.06088, table 2, and the widths of its table 3.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Bottleneck(NamedTuple):
    """One bottleneck: side of the big depthwise kernel, channels, squeeze-excite and stride."""

    kernel: int
    hidden: int
    out: int
    se: bool
    stride: int


# Stages of bottlenecks at width 1.
STAGES = (
    (Bottleneck(3, 8, 16, False, 1),),
    (Bottleneck(3, 24, 24, False, 2),),
    (Bottleneck(3, 36, 24, False, 1),),
    (Bottleneck(5, 36, 40, True, 2),),
    (Bottleneck(5, 60, 40, True, 1),),
    (Bottleneck(3, 120, 80, False, 2),),
    (
        Bottleneck(3, 100, 80, False, 1),
        Bottleneck(3, 120, 80, False, 1),
        Bottleneck(3, 120, 80, False, 1),
        Bottleneck(3, 240, 112, True, 1),
        Bottleneck(3, 336, 112, True, 1),
    ),
    (Bottleneck(5, 336, 160, True, 2),),
    (
        Bottleneck(5, 480, 160, False, 1),
        Bottleneck(5, 480, 160, True, 1),
        Bottleneck(5, 480, 160, False, 1),
        Bottleneck(5, 480, 160, True, 1),
    ),
)
STEM, LAST, HEAD = 16, 960, 1280  # the head has the same channels at every width

FAMILY = "RepOpt-GhostNet"
GHOST_WIDTHS = (0.5, 0.58, 0.8, 1.0, 1.11, 1.3, 1.5, 2.0)
GHOST_SIZES = {f"{FAMILY}-{width}x": width for width in GHOST_WIDTHS}


def ghost_channels(channels: float) -> int:
    """A number of channels as a network has it: a multiple of 4, at most a tenth too low.

    >>> [ghost_channels(c) for c in (1.6, 18, 5, 50)]
    [4, 20, 8, 52]
    """
    rounded = max(4, int(channels + 2) // 4 * 4)
    return rounded if rounded >= 0.9 * channels else rounded + 4


def ghost_modules(width: float) -> dict[str, int]:
    """The paths of all depthwise kernels that get branches, and their channels.

    >>> len(ghost_modules(0.5)), ghost_modules(0.5)["blocks/1/0/ghost1/cheap_conv"]
    (32, 12)
    """
    return {
        f"blocks/{s}/{b}/ghost{i}/cheap_conv": ghost_channels(channels * width)
        for s, stage in enumerate(STAGES)
        for b, spec in enumerate(stage)
        for i, channels in enumerate((spec.hidden, spec.out), 1)
    }


def ghost_width(found: Mapping[str, int], last: int | None = None) -> float | None:
    """The width of a network from the channels of its modules; None if it is none.

    Neighbouring widths have the same channels: a published one is taken first, then the one with
    the fewest decimals, up to three.

    Args:
      found: path -> channels, as of `ghost_modules`.
      last: channels before the average pooling. None: not known.

    >>> ghost_width(ghost_modules(0.5)), ghost_width(ghost_modules(0.1)), ghost_width({"conv": 4})
    (0.5, 0.1, None)
    """
    widest = max(found.values(), default=0) / max(spec.hidden for s in STAGES for spec in s)
    near = [k / d for d in (1, 10, 100, 1000) for k in range(1, 8 * d) if abs(k / d - widest) < 0.1]
    for width in (*GHOST_WIDTHS, *near):
        if last in (None, ghost_channels(LAST * width)) and ghost_modules(width) == dict(found):
            return width
    return None
