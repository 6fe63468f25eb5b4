"""The figures show the given numbers, with axes, units and legends."""

import numpy as np
import pytest

from repopt_jax.training import figures
from repopt_jax.training.figures import plot_curves, plot_scales, plot_scales_by_epoch

RUN = [
    {"step": 10, "epoch": 1.0, "train/loss": 2.0, "train/lr": 0.1},
    {"step": 10, "epoch": 1.0, "eval/top1": 50.0},
    {"step": 20, "epoch": 2.0, "train/loss": 1.0, "train/lr": 0.05},
    {"step": 20, "epoch": 2.0, "eval/top1": 70.25},
    {"step": 30, "epoch": 3.0, "eval/top1": 60.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved."""
    seen, save = [], figures.save_figure

    def spy(figure, path):
        save(figure, path)
        seen.append(figure)

    monkeypatch.setattr(figures, "save_figure", spy)
    return seen


def lines(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}


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


def test_legends_of_curves_lie_outside_the_axes_and_leave_them_their_size(tmp_path, drawn):
    """Inside, where curves cross all of the axes, a marker of the legend looks like a point."""
    zigzag = [{"epoch": e, "train/loss": e % 2, "eval/top1": 100.0 * (e % 2)} for e in range(40)]
    for count in (1, 12):
        plot_curves(tmp_path / "curves.png", {f"run {i}": zigzag for i in range(count)})
    for figure in drawn:
        for ax in figure.axes[:2]:
            area = ax.get_window_extent()
            assert not area.overlaps(ax.get_legend().get_window_extent())
            assert area.height > 3 * area.width / 4


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
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "Absolute scale (logarithmic)"


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


@pytest.mark.parametrize("stages", [[1, 4, 6, 16, 1], [1, 30, 70]])
def test_every_stage_is_named_and_not_every_block_of_a_deep_network(tmp_path, drawn, stages):
    plot_scales(tmp_path / "scales.png", deep(stages))
    names = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert {f"stage{stage}/0" for stage in range(len(stages))} <= set(names)
    assert len(names) <= 32


def test_the_moments_of_a_search_are_one_line_each_by_branch(tmp_path, drawn):
    scales = {epoch: {"a": {"conv": [epoch, -epoch]}, "b": {"identity": [3.0]}} for epoch in (1, 2)}
    plot_scales_by_epoch(tmp_path / "scales.png", scales)
    conv, identity, bar = drawn[0].axes
    assert [line.get_ydata()[0] for line in conv.get_lines()] == [1, 2]
    assert [line.get_ydata()[1] for line in identity.get_lines()] == [3, 3]
    assert [conv.get_title(), identity.get_title()] == ["conv", "identity"]
    assert bar.get_ylabel() == "Epoch of the search"
    dark = [sum(line.get_color()[:3]) for line in conv.get_lines()]
    assert dark[1] < dark[0]


def test_a_figure_that_fails_to_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    plot_curves(tmp_path / "curves.png", {"run": RUN})
    before = (tmp_path / "curves.png").read_bytes()
    figure, _ = figures.styled_figure(2, 2)

    def half(file, format):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        figures.save_figure(figure, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("plot", "given", "named"),
    [
        (plot_curves, {}, "runs .* got none"),
        (plot_scales, {}, "scales .* got none"),
        (plot_scales_by_epoch, {}, "scales .* got none"),
        (plot_scales, {"a": {"conv": np.ones(0)}}, "scales .* size 0 for a/conv"),
    ],
)
def test_nothing_to_draw_is_refused(tmp_path, plot, given, named):
    with pytest.raises(ValueError, match=named):
        plot(tmp_path / "x.png", given)
