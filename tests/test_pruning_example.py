"""The example trains, prunes in three ways and exports: shortened, for its way and not its end."""

import prune_digits
import pytest


@pytest.mark.slow
def test_example_prints_a_row_for_every_way_to_prune(capsys, monkeypatch):
    """With layers of one shape, so that they share the programs of single operations."""
    alike = prune_digits.SIZE | {"num_blocks": (1, 1, 1, 1), "widths": (16,) * 5}
    monkeypatch.setattr(prune_digits, "SIZE", alike)
    rows = {name: (weights, cost) for name, _, weights, cost, _ in prune_digits.main(["--steps=2"])}
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-5:]] == ["network", *rows]
    weights, cost = rows["RepOpt-VGG"]
    assert rows["GSM"][0] < 0.32 * weights and rows["GSM"][1] == cost
    assert rows["C-SGD"][0] < 0.35 * weights and rows["C-SGD"][1] < 0.35 * cost
    assert rows["ResRep"] == (weights, cost)  # two steps forget nothing
