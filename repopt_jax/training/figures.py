"""The style of all figures, and the figures of a run: training curves and scales by depth."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from repopt_jax.atomic_write import atomic_write

# The Okabe-Ito palette, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BRANCH_STYLES = {  # fixed, so that figures of several networks can be compared
    "conv3x3": (COLOURS[0], "o"),
    "conv": (COLOURS[0], "o"),
    "conv1x1": (COLOURS[1], "s"),
    "identity": (COLOURS[2], "^"),
}
_NAMED_BLOCKS = 32  # with more blocks, only every fifth of a stage is named


def styled_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Any, np.ndarray]:
    """An empty matplotlib figure in the package's style; needs no display.

    Args:
      width: in inches.
      height: in inches.
      rows: of axes.
      columns: of axes.
      **options: of matplotlib's ``Figure.subplots``, such as ``sharex``.

    Returns:
      The figure and its axes, row by row in one vector.

    >>> figure, (left, right) = styled_figure(8, 3, columns=2)
    >>> lines = left.plot([1, 2], [3, 4], color=COLOURS[0])
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes:
        ax.grid(True, color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: epath.PathLike) -> None:
    """Write a figure, in process 0.

    Args:
      figure: of `styled_figure`.
      path: local or ``gs://``, with the ending of a format that matplotlib knows (``.png``,
        ``.pdf``); its directory is created where it is absent.
    """
    if jax.process_index() != 0:
        return
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        figure.savefig(file, format=path.suffix[1:] or "png")


def _series(records, name: str, axis: str) -> tuple[list[float], list[float]]:
    points = [(r[axis], r[name]) for r in records if axis in r and name in r]
    points = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def plot_curves(path: epath.PathLike, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw training loss, evaluation top-1 accuracy and learning rate of one or several runs.

    Args:
      path: file to write, see `save_figure`.
      runs: records of each run by its label, as :func:`repopt_jax.training.report.read_metrics`
        returns them, with ``train/loss``, ``train/lr`` and ``eval/top1`` (percent). The horizontal
        axis is ``epoch`` where every record has one, ``step`` elsewhere.

    Raises:
      ValueError: where there is no run.
    """
    if not runs:
        raise ValueError("runs must have at least one run, got none")
    in_epochs = all("epoch" in record for records in runs.values() for record in records)
    axis, unit = ("epoch", "Epoch") if in_epochs else ("step", "Update")
    height = 3.3 + 0.17 * len(runs)  # inches; the legends above the axes have a line per run
    figure, (loss, top1, lr) = styled_figure(11, height, columns=3, sharex=True)
    for place, (label, records) in enumerate(runs.items()):
        style = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": ("-", "--", ":")[place // len(COLOURS) % 3],
            "linewidth": 1.4,
            "markersize": 3,
        }
        x, y = _series(records, "train/loss", axis)
        loss.plot(x, y, label=label, marker="o" if len(x) == 1 else "", **style)
        x, y = _series(records, "eval/top1", axis)
        best = f": best {max(y):.2f} %" if y else ""
        top1.plot(x, y, label=label + best, marker="o" if len(x) <= 40 else "", **style)
        # Runs often share their learning rates; the earlier lines show behind the later ones.
        style["linewidth"] += 1.4 * (len(runs) - 1 - place)
        lr.plot(*_series(records, "train/lr", axis), **style)
    for ax, title in ((loss, "Training loss"), (top1, "Evaluation top-1 accuracy (%)")):
        ax.set_ylabel(title)
        # Above the axes: a marker of the legend among the points would look like one of them.
        ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))
    lr.set_ylabel("Learning rate")
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for ax in (loss, top1, lr):
        ax.set_xlabel(unit)
        ax.margins(x=0.02)
    save_figure(figure, path)


def plot_scales(path: epath.PathLike, scales: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the sizes of the scales by depth: mean over the channels, and the range they span.

    Args:
      path: file to write, see `save_figure`.
      scales: vectors by block path (``stage1/0``, in the network's order) and branch name
        (``conv3x3``). A block may lack a branch. Absolute values are drawn, without zeros; the
        axis ends at a twentieth of the smallest mean.

    Raises:
      ValueError: where there is no block, or a block's vector is empty.
    """
    if not scales:
        raise ValueError("scales must have at least one block, got none")
    branches = _branches(scales)
    width = min(max(6.5, 0.26 * len(scales) + 2.5), 13)  # inches
    figure, (ax,) = styled_figure(width, 4.2)
    spare = itertools.cycle(COLOURS[3:])
    means = []
    for branch in branches:
        colour, marker = _BRANCH_STYLES.get(branch) or (next(spare), "D")
        low, mean, high = np.array([_range(scales, block, branch) for block in scales]).T
        means.extend(mean[np.isfinite(mean)])
        ax.plot(mean, label=branch, color=colour, linewidth=1.5, marker=marker, markersize=4)
        ax.fill_between(range(len(mean)), low, high, color=colour, alpha=0.15, linewidth=0)
        alone = _without_neighbours(mean)
        ax.vlines(alone, low[alone], high[alone], color=colour, alpha=0.3, linewidth=3)
    _name_blocks(ax, list(scales), font_size=min(8.5, 0.75 * 72 * width / len(scales)))
    ax.set_yscale("log", subs=(2, 5))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_ylabel("Absolute scale (logarithmic)")
    if means:  # single channels near zero would squeeze all lines together at the top
        ax.set_ylim(bottom=max(ax.get_ylim()[0], min(means) / 20))
    ax.legend(
        title="Mean (line) and range (band) over channels",
        title_fontsize="small",
        ncols=len(branches),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )
    save_figure(figure, path)


def _name_blocks(ax, blocks: list[str], font_size: float) -> None:
    """Name the places of the horizontal axis, and draw a line where a stage begins."""
    named, in_stage = [], 0
    for place, block in enumerate(blocks):
        if place > 0 and block.split("/")[0] != blocks[place - 1].split("/")[0]:
            ax.axvline(place - 0.5, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
            in_stage = 0
        if len(blocks) <= _NAMED_BLOCKS or in_stage % 5 == 0:
            named.append(place)
        in_stage += 1
    style = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": font_size}
    ax.set_xticks(named, [blocks[place] for place in named], **style)
    ax.set_xlabel("Block, from the input to the output")
    ax.set_xlim(-0.6, len(blocks) - 0.4)


def plot_scales_by_epoch(
    path: epath.PathLike, scales: Mapping[float, Mapping[str, Mapping[str, Any]]]
) -> None:
    """Draw the mean absolute scales by depth, one line per moment of a search, the last darkest.

    Args:
      path: file to write, see `save_figure`.
      scales: what :func:`plot_scales` takes, by epoch.

    Raises:
      ValueError: where there is no moment.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if not scales:
        raise ValueError("scales must have at least one epoch, got none")
    branches = _branches(list(scales.values())[-1])
    figure, axes = styled_figure(4.2 * len(branches), 3.6, columns=len(branches), sharex=True)
    colours = ScalarMappable(Normalize(0, max(scales)), colormaps["viridis_r"])
    for ax, branch in zip(axes, branches, strict=True):
        for epoch, found in scales.items():
            mean = [_range(found, block, branch)[1] for block in found]
            ax.plot(mean, color=colours.to_rgba(epoch), linewidth=1.2, marker=".", markersize=3)
        ax.set_title(branch, fontsize="medium")
        ax.set_xlabel("Block, from the input to the output")
        ax.set_ylabel("Mean absolute scale")
    figure.colorbar(colours, ax=list(axes), label="Epoch of the search", pad=0.01)
    save_figure(figure, path)


def _branches(scales: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of all branches, those that have a style of their own first."""
    present = dict.fromkeys(branch for block in scales.values() for branch in block)
    known = [branch for branch in _BRANCH_STYLES if branch in present]
    return known + [branch for branch in present if branch not in _BRANCH_STYLES]


def _range(scales, block: str, branch: str) -> tuple[float, float, float]:
    """Smallest, mean and largest absolute value; NaN, which draws nothing, without a vector."""
    sizes = np.abs(np.asarray(scales[block].get(branch, 0.0), np.float64).ravel())
    if not sizes.size:
        raise ValueError(f"scales must not be empty, got a vector of size 0 for {block}/{branch}")
    sizes = sizes[sizes > 0]
    return (sizes.min(), sizes.mean(), sizes.max()) if sizes.size else (math.nan,) * 3


def _without_neighbours(values: np.ndarray) -> list[int]:
    """Places of the numbers between NaNs, where neither a line nor a band is to be seen."""
    there = np.pad(np.isfinite(values), 1)
    return np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:]).tolist()
