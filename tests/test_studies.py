"""The studies of docs/results.md run from their commands to their files, with tiny networks."""

import json
import sys

import ablation
import accelerator
import input_pipeline
import jax
import numpy as np
import pytest
import quantization
import quantization_width
import small_models
import small_set
import step_time
import variants

from repopt_jax.data.workers import usable_cores
from repopt_jax.training import run as training_run
from repopt_jax.training.devices import make_mesh

TINY = {"num_blocks": (1, 1, 1, 1), "widths": (8,) * 5}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A tiny network is not worth eight."""
    one = make_mesh(devices=jax.devices()[:1])
    for module in (variants, training_run):
        monkeypatch.setattr(module, "make_mesh", lambda *_: one)


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


@pytest.fixture
def tiny(monkeypatch, tfds_dir):
    """Studies of CIFAR-10's images take few of them and a tiny network."""

    def shrink(study):
        config_of = study.cifar_config

        def tiny_config(arguments):
            config = config_of(arguments)
            config.model.update(TINY)
            config.search.data.eval_split = config.target.data.eval_split = "test[:256]"
            return config

        monkeypatch.setattr(study, "cifar_config", tiny_config)
        monkeypatch.setattr(study, "use_compilation_cache", lambda _: None)

    return shrink


CIFAR = ("--images=600", "--epochs=1", "--seeds", "0")


@pytest.mark.slow
def test_the_ablation_takes_the_best_rate_of_its_sweep(command, tiny, monkeypatch):
    tiny(ablation)
    monkeypatch.setattr(ablation, "MOST_HELD_OUT", 256)
    monkeypatch.setattr(ablation, "DEPTHS", {28: TINY["num_blocks"]})
    kept = [v for v in ablation.VARIANTS if v.title in ("plain SGD", "RepOptimizer (SGD)")]
    monkeypatch.setattr(ablation, "VARIANTS", kept)
    monkeypatch.setattr(ablation, "SWEEPS", {"plain SGD": (0.1, 0.2, 0.3), "RepOptimizer": (0.1,)})
    reached = {"plain SGD, 0.1": 10.0, "plain SGD, 0.2": 60.0, "plain SGD, 0.3": 20.0}

    def measure(variant, config, scales, workdir):
        assert config.target.data.eval_split == "train[-256:]"
        return {"top1": reached.get(workdir.name, 50.0)}

    monkeypatch.setattr(ablation, "measure", measure)
    found, files = command(ablation, *CIFAR)
    assert files == {"study.json", "study.png"}
    rates = {r["variant"]: r["learning_rate"] for r in found["variants"]}
    assert rates == {"plain SGD": 0.2, "RepOptimizer (SGD)": 0.1}
    assert [r["top1"] for r in found["depth"]] == [r["top1"] for r in found["variants"]]


@pytest.mark.slow
def test_the_study_of_small_networks_has_every_length_of_the_search(command, tiny, monkeypatch):
    tiny(small_models)
    for name, value in {"NUM_BLOCKS": TINY["num_blocks"], "WIDTHS": TINY["widths"]}.items():
        monkeypatch.setattr(small_models, name, value)
    monkeypatch.setattr(small_models, "OTHERS", small_models.OTHERS[-2:])
    found, files = command(small_models, *CIFAR, "--lengths", "1")
    assert files == {"study.json", "study.png", "small_models_scales.png"}
    lengths = [r["search_epochs"] for r in found["variants"] if "search_epochs" in r]
    assert lengths == [0, 1, 1]


@pytest.fixture
def two_networks(monkeypatch):
    """Studies of INT8 train two tiny networks without a search, and quantize them in three ways."""

    def shrink(study):
        configured = study.configuration

        def tiny_configuration(*arguments):
            config = configured(*arguments)
            config.model.num_blocks = TINY["num_blocks"]
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
    # Two vectors of float32 for each of the 22 blocks, of 4,496 channels together.
    assert row["optimizer_bytes"] - row["parameter_bytes"] == 2 * 4 * 4496
    assert update["extra_state_to_parameters"] == pytest.approx(35_968 / 33_255_520, abs=1e-6)


@pytest.mark.slow
def test_the_script_for_an_accelerator_has_a_row_of_each_kind(monkeypatch, tmp_path, tfds_dir):
    found = measured(monkeypatch, tmp_path, accelerator, "--quick", "--minutes=20")
    rows = {row.pop("section"): row for row in found["rows"]}
    assert {s for s, row in rows.items() if "left_out" not in row} >= {
        "randaugment", "steps", "batch_norm", "training", "input"
    }  # fmt: skip
    assert found["real_images"] and rows["training"]["share"] > 0


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
    flags = ("--scaling", "--images=32", "--rounds=1", "--seconds=0.1")
    found = measured(monkeypatch, tmp_path, input_pipeline, *flags)
    rows = {(row["augment"], row["kind"], row["count"]) for row in found["rows"]}
    assert {("raug15", "threads", 1), ("raug15", "workers", usable_cores())} <= rows
    weak, raug15 = found["locks"]
    assert 0 < weak["lock_ms"] < raug15["lock_ms"] < raug15["cpu_ms"]


@pytest.mark.slow
def test_the_benchmark_of_the_pipeline_has_every_variant(monkeypatch, tmp_path, tfds_dir):
    found = measured(monkeypatch, tmp_path, input_pipeline, "--images=32", "--rounds=1")
    variants = {(row["augment"], row["variant"]) for row in found["rows"]}
    for augment in ("weak", "raug15"):
        for how in ("antialiased", "fast"):
            assert {(augment, f"{a}, {how}") for a in ("bare loop", "train_batches")} <= variants


@pytest.mark.slow
def test_the_trainer_on_a_small_set_is_timed_in_all_ways(monkeypatch):
    monkeypatch.setattr(small_set, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    rates = small_set.small_set_rates(images=64, batch_size=16, epochs=2, rounds=2, **TINY)
    assert rates.keys() == small_set.WAYS.keys()
    assert all(len(found) == 2 and min(found) > 0 for found in rates.values())
