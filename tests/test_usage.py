"""Speed, memory and profile that a run tells."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small_run import small_config

from repopt_jax import create_model
from repopt_jax.training import loop, run, usage
from repopt_jax.training.report import read_metrics
from repopt_jax.training.usage import forward_flops, peak_flops


def test_flops_of_a_convolution_and_a_dense_layer():
    """Two per multiplication: 8x8 places, 1x1 window, 3 by 5 channels; then 5 by 7."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 5, (1, 1), use_bias=False, rngs=rngs)
            self.linear = nnx.Linear(5, 7, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.linear(self.conv(x)[:, 0, 0])

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    assert forward_flops(graphdef, params, rest, (8, 8, 3)) == 2 * (64 * 15 + 35)


@pytest.mark.parametrize("kind", ["target", "hs"])
def test_flops_of_b1_are_the_published_ones_whatever_the_search_merges(kind):
    """11.9 G multiplications at 224 pixels."""
    model = nnx.eval_shape(lambda: create_model("RepOpt-VGG-B1", kind, rngs=nnx.Rngs(0)))
    model.eval()
    found = forward_flops(*nnx.split(model, nnx.Param, ...), (224, 224, 3))
    assert found / 2e9 == pytest.approx(11.9, abs=0.1)


def test_flops_of_grouped_convolutions_and_of_loops():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 8, (3, 3), feature_group_count=4, use_bias=False, rngs=rngs)

        def __call__(self, x):
            y, _ = jax.lax.scan(lambda x, _: (x @ jnp.ones((8, 8)), None), self.conv(x), length=5)
            return y

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    expected = 2 * (16 * 9 * 8 + 5 * 16 * 64)
    assert forward_flops(graphdef, params, rest, (4, 4, 4)) == expected


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("cpu", None),
    ],
)
def test_peaks_are_looked_up_by_the_longest_name(kind, peak):
    assert peak_flops(kind) == peak


def test_a_run_tells_speed_utilization_and_memory_and_records_a_profile(tmp_path, monkeypatch):
    """With a peak and a memory made up for the CPU, which tells neither."""
    monkeypatch.setitem(usage.PEAK_BFLOAT16, "cpu", 1e12)
    monkeypatch.setattr(loop, "peak_memory", lambda: 3 * 2**30)
    config = small_config(parts=("plain",), profile_steps=2, target__epochs=1.5)
    run.run(config, tmp_path)
    last = read_metrics(tmp_path / "plain" / "metrics.jsonl")[-1]
    assert last["device/peak_memory_gib"] == 3
    speed, devices = last["train/images_per_second"], len(jax.devices())
    part_flops = last["train/mfu"] * 1e12 * devices / (3 * speed)
    macs = 64 * 27 * 4 + 16 * 36 * 4 + 4 * 36 * 4 + 4 * 36 * 8 + 4 * 72 * 8 + 80
    assert part_flops == pytest.approx(2 * macs, rel=1e-6)
    (trace,) = (tmp_path / "plain" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_a_profile_that_is_not_wanted_records_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_: pytest.fail("recorded"))
    profile = usage.Profile(tmp_path, 0, 0)
    for step in range(1, 30):
        profile.step(step, ())
    profile.close()
    assert not list(tmp_path.iterdir())
