"""The ablation keeps every training, sweeps rates by held-out images, and stops in time."""

import json
import sys

import ablation
import pytest
from result_tables import ablation_rows
from variants import PLAIN, REPOPTIMIZER


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the command with `measured` in place of trainings; returns the rows of its JSON."""
    output = tmp_path / "study.json"
    monkeypatch.setattr(ablation, "use_compilation_cache", lambda _: None)
    monkeypatch.setattr(ablation, "ROWS", (("28 layers", (PLAIN, REPOPTIMIZER)),))
    monkeypatch.setattr(ablation.Study, "_scales", lambda *_: None)
    monkeypatch.setattr(ablation, "part_of", lambda *given: given[:3])

    def run(measured, *flags):
        def train(_, part, workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            variant, config, rate = part
            numbers = measured(variant.title, rate, config.seed)
            return {"images_per_second": 1.0} | dict(
                zip(("top1", "held_out_top1"), numbers, strict=True)
            )

        monkeypatch.setattr(ablation.Study, "_measured", train)
        places = [f"--workdir={tmp_path / 'runs'}", f"--output={output}"]
        monkeypatch.setattr(sys, "argv", ["ablation.py", *flags, *places])
        ablation.main()
        return json.loads(output.read_text())["rows"]

    return run


def peak_at(best):
    """Held-out accuracy with a peak; the test images would choose a lower rate."""
    return lambda title, rate, seed: (50 + seed - abs(rate - best / 4), 50 - abs(rate - best))


def test_every_seed_is_trained_at_the_rate_that_held_out_images_judge_best(study):
    rows = study(peak_at(0.2), "--seeds", "3", "4")
    tried = [(r["variant"], r["learning_rate"], r["seed"]) for r in rows]
    plain, ours = "plain SGD", "RepOptimizer"
    assert set(tried) == {
        *((plain, rate, 3) for rate in (0.05, 0.1, 0.2, 0.4)),
        *((ours, rate, 3) for rate in (0.1, 0.2, 0.4, 0.8)),
        *((title, 0.2, 4) for title in (plain, ours)),
    }
    assert len(tried) == 10
    found = {r["variant"]: (r["learning_rate"], r["top1"]) for r in ablation_rows(rows)}
    assert found == {title: (0.2, [52.85, 53.85]) for title in (plain, ours)}


def test_what_the_json_holds_is_not_trained_again(study, monkeypatch):
    """After an interruption, for other seeds; another length is another setting and figure."""
    done = []

    def measured(*training):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(training)
        return peak_at(0.2)(*training)

    with pytest.raises(KeyboardInterrupt):
        study(measured, "--seeds", "0")
    first = list(done)
    done.clear()
    rows = study(lambda *t: done.append(t) or peak_at(0.2)(*t), "--seeds", "0")
    assert len(first) + len(done) == len(rows) == 8
    assert not set(first) & set(done)
    done.clear()
    study(lambda *t: done.append(t) or peak_at(0.2)(*t), "--seeds", "0", "1")
    assert {seed for *_, seed in done} == {1} and len(done) == 2
    drawn = []
    monkeypatch.setattr(ablation, "draw", lambda rows, path: drawn.extend(rows))
    assert len(study(peak_at(0.2), "--seeds", "0", "--epochs=90")) == 8 + 2 + 8
    assert [r["epochs"] for r in drawn] == [90.0] * 8


def test_nothing_begins_that_would_end_too_late(study, monkeypatch, capsys):
    """Trainings of a minute, of which one and a half have to be left."""
    clock = [0.0]
    monkeypatch.setattr(ablation.time, "monotonic", lambda: clock[0])

    def measured(*training):
        clock[0] += 60
        return peak_at(0.2)(*training)

    assert len(study(measured, "--minutes=3.4")) == 2
    assert "time is up" in capsys.readouterr().out
    assert len(study(measured, "--minutes=3.6")) == 2 + 3


def test_without_a_sweep_every_variant_is_trained_at_its_first_rate(study):
    rows = study(peak_at(0.2), "--no-sweep", "--seeds", "0", "1")
    assert [r["learning_rate"] for r in rows] == [PLAIN.rate, REPOPTIMIZER.rate] * 2


def test_only_the_variants_that_are_named_are_trained_and_rates_grow_with_the_batch(study):
    flags = ("--no-sweep", "--seeds", "0", "--batch=256", "--variants", "RepOptimizer")
    (row,) = study(peak_at(0.2), *flags)
    assert (row["variant"], row["learning_rate"]) == ("RepOptimizer", 2 * REPOPTIMIZER.rate)
    assert row["batch_size"] == 256


def test_a_row_tells_where_it_was_measured(study):
    row, *_ = study(peak_at(0.1), "--seeds", "0")
    assert row["device"] and row["jax"] and "commit" in row
    assert {
        k: row[k] for k in ("data", "images", "classes", "epochs", "batch_size", "network")
    } == {
        "data": "tinyimagenet",
        "images": 45_000,
        "classes": 100,
        "epochs": 30.0,
        "batch_size": 128,
        "network": "28 layers",
    }


def test_a_row_of_the_table_has_all_seeds_of_one_rate():
    """That of most seeds; with as many, the one judged best. A sweep alone is no row."""
    row = {"network": "28 layers", "variant": "some", "device": "d"}

    def training(rate, seed, **measured):
        return row | {"learning_rate": rate, "seed": seed, "images_per_second": rate} | measured

    sweep = [
        training(0.1, 0, top1=90.0, held_out_top1=50.0),
        training(0.2, 0, top1=80.0, held_out_top1=60.0),
        training(0.4, 1000, held_out_top1=70.0),
    ]
    (found,) = ablation_rows(sweep)
    assert (found["learning_rate"], found["top1"]) == (0.2, [80.0])
    (found,) = ablation_rows([*sweep, training(0.1, 1, top1=70.0, held_out_top1=1.0)])
    assert (found["learning_rate"], found["top1"]) == (0.1, [90.0, 70.0])


def test_more_images_or_classes_than_there_are_are_refused(study, capsys):
    for flag, rule in (("--images=45001", "at most 45000"), ("--classes=101", "2 to 100")):
        with pytest.raises(SystemExit):
            study(peak_at(0.1), flag)
        assert rule in capsys.readouterr().err
