"""The check itself: what it measures, and that it fails when it should."""

import math

import pytest

from repopt_jax.branches import presets
from repopt_jax.check_equivalence import layers, networks
from repopt_jax.check_equivalence.__main__ import main

FEW = {n: layers.LAYERS[n] for n in ("dense, identity", "DBB, depthwise")}
CASE = ("block, stride 2", "SGD Nesterov, decay", True)


@pytest.mark.parametrize("method", ["multiplier: SGD", "SGD, clip+mask+schedule"])
def test_layers_of_networks_train_as_their_branches(method, x64):
    found = layers.layer_differences(layers.METHODS[method], FEW)
    assert found.keys() == FEW.keys()
    assert max(found.values()) <= layers.METHODS[method].bound


def test_closed_form_of_adamw_leaves_out_what_is_no_placement(x64):
    found = layers.layer_differences(layers.METHODS["multiplier: AdamW"], FEW, steps=3)
    assert list(found) == ["dense, identity"]
    assert found["dense, identity"] <= 1e-5


def test_a_plain_network_without_multipliers_differs(x64):
    """The check would notice: the same SGD without multipliers."""
    plain = layers.METHODS["multiplier: SGD"]
    blind = layers.Method(plain.csla, "linear", lambda mults: plain.csla(), plain.bound)
    assert min(layers.layer_differences(blind, FEW, steps=3).values()) > 1e-6


def test_one_table_and_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(networks, "cases", lambda: iter([CASE]))
    monkeypatch.setattr(layers, "METHODS", {"LAMB": layers.METHODS["LAMB"]})
    monkeypatch.setattr(layers, "LAYERS", {"dense, diagonal": layers.LAYERS["dense, diagonal"]})
    assert main(["--all", "--steps", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4
    assert rows[1].startswith("block, stride 2")
    assert rows[2].startswith("dense, diagonal         LAMB")
    assert rows[3] == "0 of 2 cases failed in float64"


def test_exit_status_past_a_bound(monkeypatch, capsys):
    monkeypatch.setattr(networks, "cases", lambda: iter([CASE, CASE]))
    results = iter([1.0, float("nan")])
    monkeypatch.setattr(networks, "difference", lambda *case: next(results))
    assert main([]) == 1
    assert "2 of 2 cases failed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--steps", "0"])


def test_a_layer_that_is_nan_is_the_largest_difference(monkeypatch, x64):
    """Wherever it stands among the layers."""
    monkeypatch.setattr(networks, "differences", lambda *_: {"a": 1e-16, "b": float("nan")})
    assert math.isnan(networks.difference(*CASE, steps=1))


def test_all_presets_are_among_the_layers():
    names = {n.removesuffix("_branches") for n in vars(presets) if n.endswith("_branches")}
    assert len(names) == 7
    assert names <= {name.split(",")[0].lower() for name in layers.LAYERS}


def test_forty_cases_without_all():
    assert len(list(networks.cases())) == 40
