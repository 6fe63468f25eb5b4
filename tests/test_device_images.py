"""Images that lie on the devices: the same bits as the host's, in chunks of steps.

test_processes.py has them in two processes.
"""

import dataclasses
import math
import os
import re
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config

from repopt_jax.data import load_dataset, train_batches
from repopt_jax.data.augment import PRESETS, FlipCrop
from repopt_jax.data.sources import ArraySource
from repopt_jax.training import device_images, devices, inputs, loop
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.device_images import belongs_on_device, crop_and_flip, take
from repopt_jax.training.devices import make_mesh, state_shardings
from repopt_jax.training.evaluation import evaluate_state
from repopt_jax.training.interruption import RunStopped
from repopt_jax.training.loop import train
from repopt_jax.training.parts import prepare
from repopt_jax.training.report import read_metrics
from repopt_jax.training.workdir import claimed

pytestmark = pytest.mark.slow

FLIP_CROPS = [name for name, augment in PRESETS.items() if isinstance(augment, FlipCrop)]


@pytest.mark.parametrize("augment", FLIP_CROPS)
def test_a_crop_on_the_device_is_the_hosts(augment):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 6, 10, 3), np.uint8)
    draws = PRESETS[augment].draw(64, rng)
    ours = crop_and_flip(jnp.asarray(images), jnp.asarray(draws), PRESETS[augment].padding)
    np.testing.assert_array_equal(ours, PRESETS[augment].batch(images, draws))


@pytest.mark.parametrize("augment", FLIP_CROPS)
@pytest.mark.parametrize("index", [0, 1])
def test_what_is_drawn_makes_the_batches_of_images(augment, index):
    """In each of two processes, over an epoch's end, and from a position of the other iterator."""
    digits = load_dataset("digits")
    arguments = {"batch_size": 600, "seed": 3, "augment": augment}
    arguments |= {"process_index": index, "process_count": 2}
    with_images = train_batches(digits, **arguments)
    drawn = train_batches(digits, images=False, **arguments)
    images = {"image": jnp.asarray(digits.train.images), "label": jnp.asarray(digits.train.labels)}
    next(with_images)
    drawn.set_state(with_images.get_state())
    for _ in range(4):
        batch, draws = next(with_images), next(drawn)
        found = take(images, draws["index"])
        image = crop_and_flip(found["image"], draws["draw"], PRESETS[augment].padding)
        np.testing.assert_array_equal(image, batch["image"])
        np.testing.assert_array_equal(found["label"], batch["label"])
    assert drawn.get_state() == with_images.get_state() == {"next_index": 5}


def config_of(**changes):
    """22 steps an epoch; what is due comes at odd intervals."""
    given = {
        "dtype": "float64",
        "parts": ("plain",),
        "target__batch_size": 64,
        "target__bn_group": 4,
        "target__accumulation": 2,
        "target__epochs": 0.6,  # 13 steps
        "target__mix__mixup": 0.2,
        "target__schedule__warmup_epochs": 0.0,
        "log_every": 5,
        "eval_every": 0.32,  # 7 steps
        "checkpoint__every": 9.0,
    }
    return small_config(**(given | changes))


def both_ways(config, mesh):
    """The part fed by the host, and the same with its images on the devices."""
    host = prepare(config, "plain", mesh)
    device = dataclasses.replace(host, on_device=True)
    device.__dict__["tx"] = host.tx  # programs are kept by it
    return {"host": host, "device": device}


def stopped_at(steps):
    """A `Progress` that ends the run after the step at which it is at or past `steps`."""

    class Interrupted(loop.Progress):
        def step(self, step):
            super().step(step)
            if step >= steps:
                os.kill(os.getpid(), signal.SIGTERM)

    return Interrupted


@pytest.fixture(scope="module", params=[("data", 1), ("fsdp", 2)], ids=lambda case: case[0])
def trained(request, tmp_path_factory):
    """Undisturbed runs, fed in both ways, and one that was stopped twice and went on in the other.

    Its steps are of the host, the devices, and the host again.
    """
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "FSDP_MIN_SIZE", 8)  # a small network's arrays are small
        patch.setattr(inputs, "most_steps", lambda _: 4)
        parts = both_ways(config_of(fsdp=request.param[1]), make_mesh(request.param[1]))
        for name, part in parts.items():
            found[name] = *train(part, folder / name), read_metrics(folder / name / "metrics.jsonl")
        workdir = folder / "both"
        for name, steps in (("host", 3), ("device", 8)):
            with patch.context() as inner:
                inner.setattr(loop, "Progress", stopped_at(steps))
                with pytest.raises(RunStopped, match="SIGTERM received: plain is saved at step"):
                    train(parts[name], workdir)
            checkpoints = Checkpoints(workdir, read_only=True)
            assert steps <= checkpoints.steps()[-1] < steps + 5
            checkpoints.close()
        state, summary = train(parts["host"], workdir)
        found["both"] = state, summary, read_metrics(workdir / "metrics.jsonl")
        yield parts, found


@pytest.mark.parametrize("way", ["device", "both"])
def test_images_on_the_devices_train_to_the_same_bits(trained, way):
    """On eight devices in float64: mixup, accumulation, averages; stopped within an epoch too."""
    _, found = trained
    leaves = [jax.tree.leaves(found[name][0]) for name in ("host", way)]
    for host, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(host), np.asarray(other))


def test_images_on_the_devices_are_reported_and_evaluated_alike(trained):
    """The means of the steps between reports, and every evaluation."""
    _, found = trained
    untimed = [
        [{k: v for k, v in r.items() if not re.search("second|wait", k)} for r in found[way][2]]
        for way in ("host", "device")
    ]
    assert untimed[0] == untimed[1]
    assert [r["step"] for r in untimed[0]] == [5, 7, 10, 13]
    assert sum("eval_ema/top1" in r for r in untimed[0]) == 2


def test_a_chunk_leaves_the_state_where_it_was(trained, monkeypatch):
    monkeypatch.setattr(devices, "FSDP_MIN_SIZE", 8)
    parts, found = trained
    state = found["device"][0]
    wanted = state_shardings(parts["device"].mesh, state)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True)
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in pairs)


@pytest.fixture
def fake_chunks(monkeypatch):
    """The loop on device images without the compilation of a step; losses by step."""
    counts, losses = [], {}

    def chunk(graphdef, tx, options, padding, state, images, drawn, count):
        steps = int(state.step) + 1 + np.arange(len(drawn["index"]))
        found = [losses.get(step, step) if i < count else -1.0 for i, step in enumerate(steps)]
        counts.append(int(count))
        return state._replace(step=state.step + count), {"loss": jnp.asarray(found)}

    evaluated = {"eval/top1": 0.0, "eval/top5": 0.0, "eval/loss": 1.0}
    monkeypatch.setattr(inputs, "most_steps", lambda _: 4)
    monkeypatch.setattr(inputs, "jitted_train_chunk", chunk)
    monkeypatch.setattr(loop, "evaluate_state", lambda *_: evaluated)
    return types.SimpleNamespace(counts=counts, losses=losses)


def on_device_part(**changes):
    config = config_of(dtype="float32", target__data__on_device="always", **changes)
    return prepare(config, "plain", make_mesh())


def test_chunks_end_where_something_is_due(tmp_path, fake_chunks):
    """A report every 5th, an evaluation every 7th and a save every 11th step, the end at 13."""
    train(on_device_part(checkpoint__every=0.5), tmp_path)
    assert np.cumsum(fake_chunks.counts).tolist() == [4, 5, 7, 10, 11, 13]
    means = {r["step"]: r["train/loss"] for r in read_metrics(tmp_path / "metrics.jsonl")}
    assert means == {5: 3.0, 7: 6.5, 10: 9.0, 11: 11.0, 13: 12.5}


@pytest.mark.parametrize("bad", [2, 5, 12])
def test_every_loss_of_a_chunk_has_to_be_finite(tmp_path, fake_chunks, bad):
    fake_chunks.losses[bad] = math.nan
    with pytest.raises(RunStopped, match=f"^the loss of plain is nan at step {bad}; "):
        train(on_device_part(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"augment": "weak", "image_size": 8}, "augment 'weak'"),
        ({"image_size": 16}, "images of one size"),
        ({"image_size": 8, "eval_resize": 9}, "eval_resize 9"),
    ],
)
def test_what_cannot_lie_on_a_device_is_refused(changes, named):
    given = {f"target__data__{name}": value for name, value in changes.items()}
    with pytest.raises(ValueError, match=r"target\.data: on_device must be .*got 'always'") as told:
        on_device_part(**given)
    assert named in str(told.value)
    assert not prepare(config_of(dtype="float32", **given), "plain", make_mesh()).on_device


@pytest.mark.parametrize("split", ["train", "eval"])
def test_both_splits_have_to_lie_on_a_device(split):
    digits = load_dataset("digits")
    larger = ArraySource(np.zeros((9, 12, 12, 3), np.uint8), np.zeros(9))
    mixed = dataclasses.replace(digits, **{split: larger})
    data = config_of(target__data__image_size=8).target.data
    assert device_images.why_not_on_device(data, digits) is None
    assert "images of one size" in device_images.why_not_on_device(data, mixed)


def test_places_in_large_sets_reach_the_devices():
    """CIFAR has 50,000 images; the rest of a chunk is filled up."""
    drawn = [{"index": np.arange(8) + 49_992, "draw": np.ones((8, 3), int)}]
    placed = device_images.put_draws(make_mesh(), drawn, 2)
    np.testing.assert_array_equal(placed["index"], [drawn[0]["index"], np.zeros(8, int)])
    np.testing.assert_array_equal(placed["draw"][0], drawn[0]["draw"])


def test_a_run_may_go_on_with_its_images_elsewhere(tmp_path):
    for choice in ("never", "always"):
        config = config_of(dtype="float32", target__data__on_device=choice)
        with claimed(tmp_path, config, [prepare(config, "plain", make_mesh())]):
            pass  # does not refuse


@pytest.mark.parametrize(
    ("platform", "choice", "limit", "expected"),
    [
        ("cpu", "auto", 10**9, False),
        ("gpu", "auto", 1797 * 8 * 8 * 3, True),
        ("gpu", "auto", 1797 * 8 * 8 * 3 - 1, False),  # both splits count
        ("cpu", "always", 0, True),
        ("gpu", "never", 10**9, False),
    ],
)
def test_where_images_belong(platform, choice, limit, expected):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    data = config_of().target.data
    data.on_device, data.on_device_bytes = choice, limit
    assert belongs_on_device(data, load_dataset("digits"), mesh) is expected


def test_evaluation_takes_its_images_from_the_devices(monkeypatch):
    """The numbers of the host's images, a partial last batch included."""
    config = config_of(dtype="float32", target__ema_decay=0.0)
    parts = both_ways(config, make_mesh(devices=jax.devices()[:1]))
    state = parts["host"].init()
    expected = evaluate_state(parts["host"], state)
    put = inputs.put_batch

    def without_images(mesh, batch):
        assert "image" not in batch
        return put(mesh, batch)

    monkeypatch.setattr(inputs, "put_batch", without_images)
    assert evaluate_state(parts["device"], state) == expected


def test_no_image_moves_between_devices(optimized):
    """Devices tell each other what a step's do: sums of gradients and statistics, in the loop."""
    part = on_device_part(target__accumulation=1, target__mix__mixup=0.0)
    images = device_images.put_images(part.mesh, part.dataset.train)
    drawn = next(part.train_batches(images=False))
    drawn = device_images.put_draws(part.mesh, [drawn], 4)
    static = part.graphdef, part.tx, part.options, 1
    lowered = device_images.jitted_train_chunk.lower(
        *static, part.init(), images, drawn, jnp.int32(3)
    )
    program = lowered.compile().as_text()
    pattern = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    found = re.findall(pattern, program)
    assert set(found) == {"all-reduce"}
    assert len(found) <= 3
    assert "u8[" not in "".join(line for line in program.splitlines() if "all-reduce" in line)
