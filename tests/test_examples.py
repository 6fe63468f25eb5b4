"""The examples run: shortened, because what they reach is not what is tested."""

import functools
import importlib.util

import pytest
from flax import nnx

from repopt_jax import create_model
from repopt_jax.data import load_dataset
from repopt_jax.files import variables
from repopt_jax.models.yolov6 import YOLOV6_SIZES


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


@pytest.mark.slow
def test_yolov6s_backbone_learns_cifar_images(tfds_dir, capsys, monkeypatch):
    """Its trained backbone then goes into a detector's network by name; here both are tiny."""
    blocks = (1, 1, 1, 1, 2, 1, 1, 1, 1)
    tiny = YOLOV6_SIZES["YOLOv6-N"] | {"num_blocks": blocks, "widths": (8,) * 11}
    monkeypatch.setitem(YOLOV6_SIZES, "YOLOv6-N", tiny)
    example = importlib.import_module("yolov6_backbone_cifar")
    few = functools.partial(load_dataset, train_split="train[:64]", eval_split="test[:64]")
    monkeypatch.setattr(example, "load_dataset", few)
    where = ["--data-dir", tfds_dir, "--dataset", "cifar10_jpeg"]
    trained = example.main([*where, "--steps", "2"])
    printed = capsys.readouterr().out
    assert "\nbackbone/ERBlock_5/1/block/0/conv " in printed
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["search", "plain", "plain"]
    network = create_model("YOLOv6-N", rngs=nnx.Rngs(0))
    weights = {k: v for k, v in variables(trained).items() if k.startswith("backbone/")}
    assert weights.keys() == {k for k in variables(network) if k.startswith("backbone/")}


@pytest.mark.parametrize(
    ("framework", "package"),
    [("equinox", "equinox"), ("haiku", "haiku"), ("linen", "flax"), ("keras", "keras")],
)
def test_example_of_another_framework_lowers_its_loss(framework, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the example needs {package}")
    losses = importlib.import_module(f"with_{framework}").main()
    assert losses[-1] < 0.6 * losses[0]
