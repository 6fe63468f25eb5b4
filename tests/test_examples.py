"""The examples run: shortened, because what they reach is not what is tested."""

import importlib.util
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet_digits", "stage2/conv1"), ("depthwise_digits", "body/1/depthwise")],
)
def test_example_runs_the_whole_loop_and_ends_with_its_table(name, blocks, capsys):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--steps", "1"])
    printed = capsys.readouterr().out
    assert f"\n{blocks} " in printed
    table = [line.split()[0] for line in printed.splitlines()[-4:]]
    assert table == ["network", "search", "plain", "plain"]
