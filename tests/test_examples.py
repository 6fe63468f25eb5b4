"""The examples run: shortened, because what they reach is not what is tested."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet_digits", "stage2/conv1"), ("depthwise_digits", "body/1/depthwise")],
)
def test_example_runs_the_whole_loop_and_ends_with_its_table(name, blocks, capsys):
    importlib.import_module(name).main(["--steps", "1"])
    printed = capsys.readouterr().out
    assert f"\n{blocks} " in printed
    table = [line.split()[0] for line in printed.splitlines()[-4:]]
    assert table == ["network", "search", "plain", "plain"]
