"""The studies of docs/results.md run from their commands to their files, with tiny networks."""

import json
import sys

import ablation
import accelerator
import input_pipeline
import input_scaling
import input_variants
import jax
import numpy as np
import pytest
import quantization
import quantization_width
import small_set
import step_time
import variants

from repopt_jax.data.workers import usable_cores
from repopt_jax.models.repopt_vgg import SIZES
from repopt_jax.training import run as training_run
from repopt_jax.training.devices import make_mesh

TINY = {"num_blocks": (1, 1, 1, 1), "widths": (8,) * 5}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny networks, which are not worth eight devices, and small batches of images."""
    one = make_mesh(devices=jax.devices()[:1])
    for module in (ablation, small_set, variants, training_run):
        monkeypatch.setattr(module, "make_mesh", lambda *_: one)
    monkeypatch.setitem(SIZES, "RepOpt-VGG-A0", TINY)
    for module in (input_pipeline, input_scaling, input_variants):
        monkeypatch.setattr(module, "BATCH", 4)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs a study; returns what it has written, and the names of its files."""
    (tmp_path / "results").mkdir()

    def run(study, *flags):
        output = tmp_path / "results" / "study.json"
        places = [f"--workdir={tmp_path / 'runs'}", f"--output={output}"]
        monkeypatch.setattr(sys, "argv", [study.__file__, *flags, *places])
        study.main()
        names = {path.name for path in output.parent.iterdir()}
        return json.loads(output.read_text()), names

    return run


@pytest.mark.slow
def test_the_ablation_trains_variants_of_every_kind_and_goes_on_where_it_stopped(
    command, monkeypatch, tfds_dir
):
    """With a tiny network, one seed and no sweep; images lie on the device, as on a GPU.

    Kinds: each part, each optimizer, scales of a search. What tells the other variants apart is
    tested in test_variants.py.
    """
    config_of = ablation.Study._config

    def on_device(*arguments):
        config = config_of(*arguments)
        config.search.data.on_device = config.target.data.on_device = "always"
        return config

    monkeypatch.setattr(ablation.Study, "_config", on_device)
    monkeypatch.setattr(ablation, "use_compilation_cache", lambda _: None)
    monkeypatch.setitem(ablation.QUICK, "images", 6000)  # two steps
    monkeypatch.setattr(ablation, "MOST_IMAGES", 49_800)  # so that few are held out
    flags = ("--quick", f"--data-dir={tfds_dir}")
    ((network, everything),) = variants.QUICK_ROWS
    titles = ["plain SGD", "RepVGG", "plain AdamW", "reparameterize(Muon)"]
    titles += ["a quarter of the search"]
    some = [variant for variant in everything if variant.title in titles]
    monkeypatch.setattr(ablation, "QUICK_ROWS", ((network, some[:1]),))
    first, _ = command(ablation, *flags)
    monkeypatch.setattr(ablation, "QUICK_ROWS", ((network, some),))
    found, files = command(ablation, *flags)
    assert files == {"study.json", "study.png"}
    assert found["rows"][:1] == first["rows"]
    assert [r["variant"] for r in found["rows"]] == titles
    assert all(0 <= r["top1"] <= 100 and r["device"] and r["seconds"] for r in found["rows"])
    monkeypatch.setattr(ablation, "train", None)
    assert command(ablation, *flags)[0] == found


@pytest.fixture
def two_networks(monkeypatch):
    """Studies of INT8 train two tiny networks without a search, and quantize them in three ways."""

    def shrink(study):
        configured = study.configuration

        def tiny_configuration(*arguments):
            config = configured(*arguments)
            config.model.update(TINY)
            config.parts = ("repvgg", "plain")
            return config

        monkeypatch.setattr(study, "configuration", tiny_configuration)
        networks = {name: study.NETWORKS[name] for name in ("repvgg", "plain")}
        monkeypatch.setattr(study, "NETWORKS", networks)
        settings = ((False, "minmax"), (False, "percentile"), (True, "minmax"))
        monkeypatch.setattr(quantization, "SETTINGS", settings)

    return shrink


def check_int8(found):
    assert [r["network"] for r in found["runs"]] == ["repvgg", "plain"]
    for run in found["runs"]:
        assert len(run["int8"]) == 3
        for numbers in run["int8"].values():
            np.testing.assert_allclose(numbers["drop"], run["float"]["top1"] - numbers["top1"])


@pytest.mark.slow
def test_the_study_of_widths_measures_every_network_and_setting(command, two_networks):
    two_networks(quantization_width)
    flags = ("--widths", "1", "--seeds", "0", "--epochs=1", "--images=32", "--rounds=1")
    found, files = command(quantization_width, *flags)
    assert files == {"study.json", "study.png"}
    check_int8(found)


@pytest.mark.slow
def test_the_study_of_int8_goes_on_where_it_stopped(command, two_networks, monkeypatch, tfds_dir):
    two_networks(quantization)
    flags = ("--train-split=train[:256]", "--eval-split=test[:64]", "--images=32", "--rounds=1")
    flags += ("--epochs=1", "--seeds", "0")
    found, files = command(quantization, *flags)
    check_int8(found)
    assert files == {"study.json", "study.png"}
    layers = found["runs"][0]["layers"]
    assert len(layers["weights dB"]) == len(layers["outputs dB"]) == sum(TINY["num_blocks"]) + 2
    monkeypatch.setattr(quantization, "measure", None)
    monkeypatch.setattr(training_run, "train", None)
    assert command(quantization, *flags)[0] == found


def measured(monkeypatch, tmp_path, benchmark, *flags):
    """What a benchmark that has no working directory writes."""
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *flags, f"--output={output}"])
    benchmark.main()
    return json.loads(output.read_text())


@pytest.mark.slow
def test_the_benchmark_of_the_step_tells_what_multipliers_cost(monkeypatch, tmp_path):
    flags = ("--models", "RepOpt-VGG-A0", "--sizes", "32", "--batches", "2", "--rounds", "1")
    found = measured(monkeypatch, tmp_path, step_time, *flags, "--variants", "target")
    (setting,), (update,) = found["steps"], found["updates"]
    (row,) = setting["rows"]
    vectors = 2 * 4 * 5 * 8  # two of float32 for each of 5 blocks of 8 channels
    assert row["optimizer_bytes"] - row["parameter_bytes"] == vectors
    expected = vectors / row["parameter_bytes"]
    assert update["extra_state_to_parameters"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_the_script_for_an_accelerator_has_a_row_of_each_kind(monkeypatch, tmp_path):
    """And times the trainer on a small set in all ways, here in two rounds."""
    rates_of, timed = small_set.small_set_rates, []

    def in_two_rounds(**sizes):
        timed.append(rates_of(**sizes, rounds=2))
        return timed[-1]

    monkeypatch.setattr(small_set, "small_set_rates", in_two_rounds)
    folder = accelerator.write_noise(tmp_path / "images", 8)
    flags = ("--quick", "--minutes=20", f"--folder={folder}")
    found = measured(monkeypatch, tmp_path, accelerator, *flags)
    rows = {row.pop("section"): row for row in found["rows"]}
    assert {s for s, row in rows.items() if "left_out" not in row} >= {
        "randaugment", "steps", "batch_norm", "training", "input", "small_set"
    }  # fmt: skip
    assert found["real_images"] and rows["training"]["share"] > 0
    (rates,) = timed
    assert rates.keys() == small_set.WAYS.keys()
    assert all(len(found) == 2 and min(found) > 0 for found in rates.values())


def test_rows_that_the_file_holds_are_not_measured_again(monkeypatch, tmp_path):
    """Those that failed are; and rows of other sizes do not come among them."""

    def one():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError
        return {"a": len(calls)}

    calls, rows = [], lambda *_, **__: [accelerator.Row("steps", "one", 30, one)]
    monkeypatch.setattr(accelerator, "all_rows", rows)
    flags = ("--quick", f"--folder={tmp_path}")
    assert "left_out" in measured(monkeypatch, tmp_path, accelerator, *flags)["rows"][0]
    for _ in range(2):
        (row,) = measured(monkeypatch, tmp_path, accelerator, *flags)["rows"]
        assert row["a"] == len(calls) == 2
    with pytest.raises(SystemExit, match=r"output.*batch 256.*batch \d\b"):
        measured(monkeypatch, tmp_path, accelerator, *flags[1:])


def test_a_row_that_fails_or_comes_too_late_says_why():
    """And the next ones are measured."""

    def fail():
        raise RuntimeError("out of memory\nat address 7")

    row = accelerator.Row("steps", "one", 30, fail)
    assert accelerator.measured(row, 60)["left_out"] == "RuntimeError: out of memory"
    assert accelerator.measured(row, 29)["left_out"] == "takes about 30 s, and 29 were left"
    assert accelerator.measured(row._replace(measure=lambda: {"a": 1}), 30)["a"] == 1


@pytest.mark.slow
def test_the_benchmark_of_scaling_counts_threads_and_processes(monkeypatch, tmp_path, tfds_dir):
    flags = ("--scaling", "--images=8", "--rounds=1", "--seconds=0.1")
    found = measured(monkeypatch, tmp_path, input_pipeline, *flags)
    rows = {(row["augment"], row["kind"], row["count"]) for row in found["rows"]}
    assert {("raug15", "threads", 1), ("raug15", "workers", usable_cores())} <= rows
    weak, raug15 = found["locks"]
    assert 0 < weak["lock_ms"] < raug15["lock_ms"] < raug15["cpu_ms"]


@pytest.mark.slow
def test_the_benchmark_of_the_pipeline_has_every_variant(monkeypatch, tmp_path, tfds_dir):
    found = measured(monkeypatch, tmp_path, input_pipeline, "--images=8", "--rounds=1")
    variants = {(row["augment"], row["variant"]) for row in found["rows"]}
    for augment in ("weak", "raug15"):
        for how in ("antialiased", "fast"):
            assert {(augment, f"{a}, {how}") for a in ("bare loop", "train_batches")} <= variants
