"""The schedules equal the official ones update for update, and their formulas."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repopt_jax.training.config import default_config
from repopt_jax.training.optimizer import SCHEDULES, make_schedule

RUN = dict(base_lr=0.1, batch_size=256, steps_per_epoch=10, epochs=40, warmup_epochs=5.0)


def schedule_of(name, **changes):
    """The default schedule and `RUN`, with changes of both."""
    config, fields = default_config().target.schedule, RUN | changes
    lengths = {key: fields.pop(key) for key in ("batch_size", "steps_per_epoch", "epochs")}
    config.update(fields, name=name)
    return make_schedule(config, **lengths)


def rates(name, counts=400, **changes):
    return np.asarray(schedule_of(name, **changes)(jnp.arange(counts)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_official_schedule_at_every_update(golden, x64, name):
    official = json.loads((golden / "summary.json").read_text())["lr"]
    setup = official["setup"]
    schedule = schedule_of(
        name,
        base_lr=setup["base_lr"],
        batch_size=256,
        steps_per_epoch=10,
        epochs=setup["total_steps"] / 10,
        warmup_epochs=setup["warmup_steps"] / 10,
        warmup_lr=setup["warmup_lr"],
        linear_end=setup["linear_min_rate"],
        step_epochs=setup["step_decay_steps"] / 10,
        step_rate=setup["step_decay_rate"],
    )
    ours = np.asarray(jax.jit(schedule)(jnp.arange(setup["total_steps"], dtype=jnp.int32)))
    assert ours.dtype == np.float64
    # atol: the official 1 + cos(x) itself loses digits where the cosine comes near -1.
    np.testing.assert_allclose(ours, official[name], rtol=1e-12, atol=2e-17)


@pytest.mark.parametrize("name", SCHEDULES)
def test_float32_keeps_five_digits_up_to_the_last_update(x64, name):
    count = jnp.arange(600_000, dtype=jnp.int32)
    long = dict(steps_per_epoch=5000, epochs=120, step_epochs=30)
    exact = schedule_of(name, **long)(count)
    with jax.enable_x64(False):
        single = jax.jit(schedule_of(name, **long))(count)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(single), np.asarray(exact), rtol=1e-5)


def test_first_two_updates_run_with_the_warmup_rate_which_then_rises_evenly():
    ours = rates("cosine", warmup_lr=0.02)
    assert ours[0] == ours[1] == np.float32(0.02)
    np.testing.assert_allclose(np.diff(ours[1:51]), 0.08 / 50, rtol=1e-4)


def test_cosine_spans_the_whole_run_and_the_warmup_cuts_off_its_beginning():
    ours = rates("cosine", min_lr=0.01)
    np.testing.assert_allclose(ours[51], 0.01 + 0.09 * (1 + math.cos(math.pi / 8)) / 2, rtol=1e-6)
    np.testing.assert_allclose(ours[201], 0.055, rtol=1e-6)


def test_linear_and_step_start_from_the_highest_rate_when_the_warmup_is_over():
    linear, step = rates("linear"), rates("step", step_epochs=10)
    np.testing.assert_allclose(linear[[51, 226]], [0.1, 0.0505], rtol=1e-6)
    np.testing.assert_allclose(
        step[[51, 150, 151, 250, 251]], [0.1, 0.1, 0.01, 0.01, 0.001], rtol=1e-5
    )


@pytest.mark.parametrize(("name", "last"), [("cosine", 0.002), ("linear", 0.001), ("step", 1e-4)])
def test_rate_stays_at_its_end_when_training_goes_on(name, last):
    min_lr = 0.002 if name == "cosine" else 0.0
    ours = rates(name, counts=1200, min_lr=min_lr, step_epochs=9)
    np.testing.assert_allclose(ours[401:], last, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rate_grows_in_proportion_to_the_batch(name):
    extra = dict(warmup_lr=0.01, min_lr=0.02 if name == "cosine" else 0.0)
    small, large = rates(name, **extra), rates(name, batch_size=1024, **extra)
    np.testing.assert_allclose(large, 4 * small, rtol=1e-6)


def test_warmup_may_last_a_fraction_of_an_epoch():
    ours = rates("linear", warmup_epochs=0.3)
    np.testing.assert_allclose(ours[:5], [0, 0, 0.1 / 3, 0.2 / 3, 0.1], rtol=1e-6)


def test_without_warmup_training_starts_at_the_highest_rate():
    assert [rates(name, warmup_epochs=0)[0] for name in SCHEDULES] == [np.float32(0.1)] * 3


def test_run_may_consist_of_the_warmup_alone():
    ours = rates("linear", counts=402, warmup_epochs=40)
    np.testing.assert_allclose(ours[[1, 201, 400, 401]], [0, 0.05, 0.1 * 399 / 400, 0.1], rtol=1e-6)


def test_optax_applies_it_inside_a_jitted_update():
    schedule = schedule_of("cosine", warmup_lr=0.03)
    tx = optax.sgd(schedule)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(()))
    steps = []
    for _ in range(4):
        step, state = update(jnp.ones(()), state)
        steps.append(-float(step))
    np.testing.assert_allclose(steps, rates("cosine", warmup_lr=0.03)[:4], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("cosin", {}, "name must be one of cosine, linear, step; got 'cosin'"),
        ("cosine", dict(warmup_epochs=41), r"warmup_epochs must be at most epochs \(40\); got 41"),
        ("cosine", dict(warmup_epochs=-1), "warmup_epochs must be .* at least 0; got -1"),
        ("cosine", dict(base_lr=-0.1), "base_lr must be .* at least 0; got -0.1"),
        ("cosine", dict(base_lr=math.nan), "base_lr must be .* at least 0; got nan"),
        ("cosine", dict(epochs=0), "epochs must be .* above 0; got 0"),
        ("cosine", dict(steps_per_epoch=0), "steps_per_epoch must be .* above 0; got 0"),
        ("step", dict(step_epochs=0), "step_epochs must be .* above 0; got 0"),
        ("linear", dict(min_lr=0.001), "min_lr is the end of the cosine, not of 'linear'"),
    ],
)
def test_wrong_arguments_are_named(name, changes, words):
    with pytest.raises(ValueError, match=words):
        schedule_of(name, **changes)
