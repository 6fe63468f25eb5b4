"""Published sizes of RepOpt-VGG, and what follows from them without building a network.

Sources: RepOptimizers, arXiv 2205.15242, table 1; sizes A0 to B0 from RepVGG, arXiv 2101.03697.
"""

from collections.abc import Sequence

# name -> blocks of stages 1 to 4, width multipliers of stages 1 to 4
SIZES = {
    "RepOpt-VGG-A0": ((2, 4, 14, 1), (0.75, 0.75, 0.75, 2.5)),
    "RepOpt-VGG-A1": ((2, 4, 14, 1), (1, 1, 1, 2.5)),
    "RepOpt-VGG-A2": ((2, 4, 14, 1), (1.5, 1.5, 1.5, 2.75)),
    "RepOpt-VGG-B0": ((4, 6, 16, 1), (1, 1, 1, 2.5)),
    "RepOpt-VGG-B1": ((4, 6, 16, 1), (2, 2, 2, 4)),
    "RepOpt-VGG-B2": ((4, 6, 16, 1), (2.5, 2.5, 2.5, 5)),
    "RepOpt-VGG-L1": ((8, 14, 24, 1), (2, 2, 2, 4)),
    "RepOpt-VGG-L2": ((8, 14, 24, 1), (2.5, 2.5, 2.5, 5)),
}


def stage_widths(multipliers: Sequence[float]) -> tuple[int, ...]:
    """Channels of stages 0 to 4 from the four width multipliers.

    >>> stage_widths((2, 2, 2, 4))
    (64, 128, 256, 512, 2048)
    """
    stages = [int(base * m) for base, m in zip((64, 128, 256, 512), multipliers, strict=True)]
    return (min(64, stages[0]), *stages)


def size_name(num_blocks: Sequence[int], widths: Sequence[int]) -> str | None:
    """The published name of a size; None if it has none.

    >>> size_name((4, 6, 16, 1), (64, 128, 256, 512, 2048))
    'RepOpt-VGG-B1'
    """
    for name, (blocks, multipliers) in SIZES.items():
        if (tuple(num_blocks), tuple(widths)) == (blocks, stage_widths(multipliers)):
            return name
    return None


def scale_widths(num_blocks: Sequence[int], widths: Sequence[int]) -> dict[str, int]:
    """The keys of a scales file and the lengths of its vectors, for strides of 2 per stage.

    >>> scale_widths((1, 0, 0, 0), (8, 16, 16, 16, 16))
    {'stage0/conv/conv3x3': 8, 'stage0/conv/conv1x1': 8, 'stage1/0/conv/conv3x3': 16, \
'stage1/0/conv/conv1x1': 16}
    """
    found = {}
    layers = [("stage0", widths[0], False)]
    for stage, count in enumerate(num_blocks, 1):
        layers += [(f"stage{stage}/{i}", widths[stage], i > 0) for i in range(count)]
    for block, width, has_identity in layers:
        names = ("conv3x3", "conv1x1", "identity") if has_identity else ("conv3x3", "conv1x1")
        found.update({f"{block}/conv/{name}": width for name in names})
    return found
