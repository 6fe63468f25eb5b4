"""The examples run: shortened, because what they reach is not what is tested."""

import importlib.util

import pytest


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("framework", "package"),
    [("equinox", "equinox"), ("haiku", "haiku"), ("linen", "flax"), ("keras", "keras")],
)
def test_example_of_another_framework_lowers_its_loss(framework, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the example needs {package}")
    losses = importlib.import_module(f"with_{framework}").main()
    assert losses[-1] < 0.6 * losses[0]
