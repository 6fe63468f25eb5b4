"""Quantization-aware training goes on with what another part has trained, as it was configured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from small_run import small_config

from repopt_jax.convert import convert_run
from repopt_jax.models.folding import fold
from repopt_jax.training import run
from repopt_jax.training.config import PARTS, part_section
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.interruption import RunStopped
from repopt_jax.training.networks import initial_scales
from repopt_jax.training.parts import prepare
from repopt_jax.training.report import read_metrics
from repopt_jax.training.trained import load_part
from repopt_jax.tree_paths import by_path


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """One device, also for `run`, whose programs then compile sooner."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", lambda *_: mesh)
        yield mesh


def part_of(name, **changes):
    config = small_config(**changes)
    return prepare(config, name, make_mesh(devices=jax.devices()[:1]), initial_scales(config))


SHORT = {
    "target__epochs": 0.1,  # one step
    "target__schedule__warmup_epochs": 0.0,
    "target__ema_decay": 0.0,
    "target__eval_batch_size": 360,
}


@pytest.fixture(scope="module")
def workdir(mesh, tmp_path_factory):
    """Of a plain training of one step."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    run.run(small_config(parts=("plain",), **SHORT), workdir)
    return workdir


def test_a_finished_run_goes_on_in_int8(workdir):
    """It moves little from the trained network; its length is free until it begins."""
    config = small_config(parts=("plain_qat",), qat__epochs=0.2, **SHORT)
    run.run(config, workdir)
    trained, _ = load_part(config, workdir, part="plain", checkpoint="latest")
    first = read_metrics(workdir / "plain_qat" / "metrics.jsonl")[0]
    before = read_metrics(workdir / "plain" / "metrics.jsonl")[-1]
    assert first["train/lr"] == pytest.approx(0.01 * before["train/lr"], rel=1e-3)
    part = dataclasses.replace(part_of("plain_qat"), trained=fold(trained))
    params = by_path(part.init().params)
    folded = by_path(nnx.state(fold(trained), nnx.Param))
    assert params.keys() == folded.keys()
    assert all((params[path] == folded[path]).all() for path in params)
    tuned, _ = load_part(config, workdir, part="plain_qat", checkpoint="latest")
    found = by_path(nnx.state(tuned, nnx.Param))
    start = by_path(nnx.state(fold(part_of("plain").build()), nnx.Param))
    for path in (p for p in params if p.endswith("kernel")):
        moved = abs(found[path] - folded[path]).max()
        assert 0 < moved < 0.1 * abs(start[path] - folded[path]).max()
    with pytest.raises(ValueError, match=r"--part must not be in INT8, .* got plain_qat"):
        options = {"checkpoint": "latest", "averaged": False, "to_torch": False}
        convert_run(workdir, workdir / "a.safetensors", part="plain_qat", **options)
    config.qat.epochs = 0.3
    with pytest.raises(RunStopped, match=r"another configuration.*qat\.epochs \(0\.2 there, 0\.3"):
        run.run(config, workdir)


def test_a_network_that_is_not_trained_is_named(workdir):
    config = small_config(parts=("repvgg_qat",), **SHORT)
    with pytest.raises(RunStopped, match="part 'repvgg_qat' needs a trained network: put 'repvgg'"):
        run.run(config, workdir)


def test_gradients_are_multiplied_as_the_targets_are():
    """The same updates with a hundredth of the rate, of every kernel that has branches."""

    def update(name):
        still = {"warmup_epochs": 0.0} | {"base_lr": 1.0}
        changes = {f"target__schedule__{key}": value for key, value in still.items()}
        part = part_of(name, target__optimizer__weight_decay=0.0, **changes)
        params = nnx.state(nnx.eval_shape(part.build), nnx.Param)
        params = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
        grads = jax.tree.map(jnp.ones_like, params)
        return by_path(part.tx.update(grads, part.tx.init(params), params)[0]), part

    target, part = update("target")
    tuned, _ = update("qat")
    plain, _ = update("plain_qat")
    paths = [f"{path}/kernel" for path in part.model.blocks()]
    for path in paths:
        np.testing.assert_allclose(tuned[path], 0.01 * target[path], rtol=1e-6)
        assert np.unique(plain[path]).size == 1 < np.unique(tuned[path]).size


def test_the_section_is_the_targets_without_what_is_for_long_trainings():
    changes = {"mix__mixup": 0.2, "mix__cutmix": 1.0, "random_erasing": 0.1, "ema_decay": 0.9}
    changes |= {"schedule__warmup_epochs": 1.0, "schedule__min_lr": 0.5, "schedule__base_lr": 2.0}
    config = small_config(**{f"target__{key}": value for key, value in changes.items()})
    before = config.to_json()
    found = part_section(config, PARTS["qat"])
    assert (found.mix.mixup, found.mix.cutmix, found.random_erasing, found.ema_decay) == (0,) * 4
    schedule = found.schedule
    assert (schedule.warmup_epochs, schedule.min_lr, schedule.base_lr) == (0.0, 0.005, 0.02)
    assert found.epochs == 5.0 and found.data == config.target.data
    assert config.to_json() == before
    assert part_section(config, PARTS["target"]) is config.target


@pytest.mark.parametrize("field", ["epochs", "rate"])
def test_a_length_or_rate_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"qat.{field} must be a number above 0, got 0.0"):
        part_of("plain_qat", **{f"qat__{field}": 0.0})
