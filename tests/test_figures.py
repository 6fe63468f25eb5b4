"""The figures draw the given numbers, with axes, units and legends that do not overlap."""

import numpy as np
import pytest

from repopt_jax.training import figures
from repopt_jax.training.figures import plot_curves, plot_scales

RUN = [
    {"step": 10, "epoch": 1.0, "train/loss": 2.0, "train/lr": 0.1},
    {"step": 10, "epoch": 1.0, "eval/top1": 50.0},
    {"step": 20, "epoch": 2.0, "train/loss": 1.0, "train/lr": 0.05},
    {"step": 20, "epoch": 2.0, "eval/top1": 70.25},
    {"step": 30, "epoch": 3.0, "eval/top1": 60.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved, drawn."""
    seen, save = [], figures._save

    def spy(figure, path):
        save(figure, path)
        seen.append(figure)

    monkeypatch.setattr(figures, "_save", spy)
    return seen


def lines(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}


def assert_labels_do_not_overlap(ax):
    """Between the baselines of neighbouring tick labels there is room for a line of text."""
    ticks = [label for label in ax.get_xticklabels() if label.get_text()]
    x = [ax.transData.transform((label.get_position()[0], 1))[0] for label in ticks]
    angle = np.deg2rad(ticks[0].get_rotation())
    height = ticks[0].get_fontsize() * ax.figure.dpi / 72
    assert np.diff(x).min() * np.sin(angle) > height


def test_curves_are_drawn_over_epochs_with_their_best_accuracy(tmp_path, drawn):
    plot_curves(tmp_path / "new" / "curves.png", {"RepOptimizer": RUN, "SGD": RUN[:1]})
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    loss, top1, lr = drawn[0].axes
    assert lines(loss) == {"RepOptimizer": [[1, 2], [2, 1]], "SGD": [[1, 2]]}
    assert lines(top1) == {"RepOptimizer: best 70.25 %": [[1, 50], [2, 70.25], [3, 60]], "SGD": []}
    assert [line.get_xydata().tolist() for line in lr.get_lines()] == [
        [[1, 0.1], [2, 0.05]],
        [[1, 0.1]],
    ]
    assert [ax.get_xlabel() for ax in drawn[0].axes] == ["Epoch"] * 3
    assert [ax.get_ylabel() for ax in drawn[0].axes] == [
        "Training loss",
        "Evaluation top-1 accuracy (%)",
        "Learning rate",
    ]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["RepOptimizer", "SGD"]


def test_curves_without_epochs_are_drawn_over_updates_and_skip_nan(tmp_path, drawn):
    run = [{"step": s, "train/loss": loss} for s, loss in [(1, 3.0), (2, float("nan")), (3, 1.0)]]
    plot_curves(tmp_path / "curves.pdf", {"run": run, "another": RUN})
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    assert lines(drawn[0].axes[0]) == {"run": [[1, 3], [3, 1]], "another": [[10, 2], [20, 1]]}
    assert drawn[0].axes[0].get_xlabel() == "Update"


def deep(stages, channels=8):
    draw = np.random.default_rng(0).normal
    scales = {}
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            scales[f"stage{stage}/{block}"] = {
                "identity": draw(size=channels),
                "conv1x1": draw(size=channels),
                "conv3x3": draw(size=channels),
            }
    return scales


def test_scales_are_drawn_as_mean_and_range_of_their_absolute_values(tmp_path, drawn):
    scales = {
        "stage0": {"conv3x3": np.array([1.0, -3.0])},
        "stage1/0": {"conv3x3": np.array([0.5, 0.5]), "identity": np.array([2.0, 0.0])},
    }
    plot_scales(tmp_path / "scales.png", scales)
    (ax,) = drawn[0].axes
    drawn_lines = lines(ax)
    assert drawn_lines["conv3x3"] == [[0, 2], [1, 0.5]]
    np.testing.assert_equal(drawn_lines["identity"], [[0, np.nan], [1, 2]])
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(0, 1), (0, 3), (1, 0.5)}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["stage0", "stage1/0"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["conv3x3", "identity"]
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "Absolute scale"


def test_range_of_a_vector_without_neighbours_is_drawn_too(tmp_path, drawn):
    blocks = [{"conv": np.ones(2)}, {"conv": np.ones(2), "identity": np.array([0.5, 2.0])}]
    plot_scales(tmp_path / "scales.png", {f"a/{i}": block for i, block in enumerate(blocks)})
    segments = [s for c in drawn[0].axes[0].collections for s in getattr(c, "get_segments", list)()]
    assert [segment.tolist() for segment in segments] == [[[1, 0.5], [1, 2]]]


def test_channels_near_zero_do_not_squeeze_the_lines(tmp_path, drawn):
    plot_scales(tmp_path / "scales.png", {f"a/{i}": {"conv": [1e-9, 1.0]} for i in range(2)})
    assert drawn[0].axes[0].get_ylim()[0] == pytest.approx(0.5 / 20)


def test_stages_are_separated_where_the_first_part_of_the_path_changes(tmp_path, drawn):
    plot_scales(tmp_path / "scales.png", deep([1, 2, 3]))
    verticals = [
        line.get_xdata()[0] for line in drawn[0].axes[0].get_lines() if len(line.get_xdata()) == 2
    ]
    assert verticals == [0.5, 2.5]


@pytest.mark.parametrize("stages", [[1, 1], [1, 4, 6, 16, 1], [1, 8, 14, 24, 1], [1, 30, 70]])
def test_names_of_the_blocks_do_not_overlap_and_every_stage_is_named(tmp_path, drawn, stages):
    plot_scales(tmp_path / "scales.png", deep(stages))
    (ax,) = drawn[0].axes
    assert_labels_do_not_overlap(ax)
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert {f"stage{stage}/0" for stage in range(len(stages))} <= set(names)
    assert len(names) <= 32


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="runs must have at least one run"):
        plot_curves(tmp_path / "x.png", {})
    with pytest.raises(ValueError, match="scales must have at least one block"):
        plot_scales(tmp_path / "x.png", {})
    with pytest.raises(ValueError, match="must not be empty; got a vector of size 0 for a/conv"):
        plot_scales(tmp_path / "x.png", {"a": {"conv": np.ones(0)}})
