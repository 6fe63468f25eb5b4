"""The steps are the formulas that their docstrings state, for any NNX model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from repopt_jax.models.layers import BatchNorm
from repopt_jax.training.step import (
    EvalMetrics,
    StepOptions,
    cross_entropy,
    eval_step,
    init_state,
    loss_function,
    normalize,
    train_step,
)

pytestmark = pytest.mark.usefixtures("quick_draws")

MEAN, STD, DECAY = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 0.75


class Small(nnx.Module):
    """A convolution, BatchNorm, ReLU, average and a dense layer."""

    def __init__(self, *, group, dtype=jnp.float32, param_dtype=jnp.float32):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
        self.conv = nnx.Conv(3, 6, (3, 3), use_bias=False, **types)
        self.bn = BatchNorm(6, group=group, param_dtype=param_dtype)
        self.linear = nnx.Linear(6, 7, **types)

    def __call__(self, images):
        return self.linear(nnx.relu(self.bn(self.conv(images))).mean((1, 2)))


def batch_of(size, seed=0, classes=7):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 5, 5, 3)).astype(np.uint8),
        "label": rng.integers(0, classes, size).astype(np.int32),
    }


def training(model, tx, options, *, ema=False):
    """The first state, and the jitted step of it and a batch."""
    graphdef, state = init_state(model, tx, ema=ema)
    return state, jax.jit(functools.partial(train_step, graphdef, tx, options))


def host(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_images_are_normalized_by_channel_before_they_are_rounded():
    """``(x / 255 - mean) / std`` in float32, also where bfloat16 computes."""
    images = batch_of(4)["image"]
    expected = (images / 255 - np.array(MEAN)) / np.array(STD)
    single = normalize(images, StepOptions(MEAN, STD))
    np.testing.assert_allclose(single, expected, atol=2e-6)
    half = normalize(images, StepOptions(MEAN, STD, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, single.astype(jnp.bfloat16))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_loss_is_cross_entropy_with_smoothed_labels(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 5, (6, 10)), np.arange(6)
    targets = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
    expected = -(targets * log_softmax(logits)).sum(-1)
    loss = cross_entropy(jnp.asarray(logits, jnp.float32), labels, smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_loss_of_bfloat16_logits_is_computed_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 5, (4, 10)), jnp.bfloat16)
    loss = cross_entropy(logits, jnp.arange(4))
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, cross_entropy(logits.astype(jnp.float32), jnp.arange(4)))


def test_a_step_reports_the_smoothed_loss_and_top1_before_its_update():
    options, batch = StepOptions(MEAN, STD, label_smoothing=0.2), batch_of(12)
    state, step = training(Small(group=4), optax.sgd(0.5), options)
    logits = np.asarray(Small(group=4)(normalize(batch["image"], options)))
    after, metrics = step(state, batch)
    targets = 0.8 * np.eye(7)[batch["label"]] + 0.2 / 7
    loss = -(targets * log_softmax(logits)).sum(-1).mean()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    top1 = 100 * (logits.argmax(-1) == batch["label"]).mean()
    np.testing.assert_allclose(metrics["top1"], top1, rtol=1e-6)
    assert int(after.step) == 1


def test_averages_follow_their_recursion_for_parameters_and_statistics():
    """``e <- d e + (1 - d) x`` from the first state on, of all that evaluation needs."""
    options = StepOptions(MEAN, STD, ema_decay=DECAY)
    state, step = training(Small(group=4), optax.sgd(0.5, 0.9), options, ema=True)
    expected = host((state.params, state.stats))
    for number in range(3):
        state, _ = step(state, batch_of(12, number))
        now = host((state.params, state.stats))
        expected = [DECAY * e + (1 - DECAY) * x for e, x in zip(expected, now, strict=True)]
        for average, wanted in zip(host(state.ema), expected, strict=True):
            np.testing.assert_allclose(average, wanted, rtol=1e-5, atol=1e-7)
    assert len(expected) == 4 + 1 + 2
    assert not np.allclose(expected[0], host(state.params)[0], atol=1e-3)


def test_accumulated_gradients_are_those_of_the_whole_batch(x64):
    """Sample b belongs to part b % accumulation; the same groups then give the same update."""
    tx, ends, metrics = optax.sgd(0.3, 0.9, nesterov=True), {}, {}
    for accumulation in (1, 4):
        options = StepOptions(MEAN, STD, jnp.float64, 0.1, accumulation)
        model = Small(group=2, dtype=jnp.float64, param_dtype=jnp.float64)
        state, step = training(model, tx, options)
        start = host(state.params)
        for number in range(3):
            batch = batch_of(16, number)
            if accumulation == 1:  # groups are of consecutive samples, here as there
                order = np.arange(16).reshape(-1, 4).T.ravel()
                batch = {key: value[order] for key, value in batch.items()}
            state, found = step(state, batch)
        ends[accumulation] = host(state.params)
        metrics[accumulation] = {key: float(value) for key, value in found.items()}
    assert metrics[4] == pytest.approx(metrics[1], rel=1e-6)
    for before, one, other in zip(start, ends[1], ends[4], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)
        assert abs(other - before).max() > 1e-4


def test_accumulation_keeps_one_set_of_gradients():
    """Not one per part: it is for batches that do not fit."""
    model = Small(group=2)
    options = StepOptions(MEAN, STD, accumulation=4)
    state, step = training(model, optax.sgd(0.1), options)
    text = step.lower(state, batch_of(16)).compile().as_text()
    assert "f32[3,3,3,6]" in text
    assert "f32[4,3,3,3,6]" not in text


def test_the_statistics_see_the_parts_of_a_batch_one_after_the_other(x64):
    """As many small steps would: the running mean moves once a part."""
    options = StepOptions(MEAN, STD, jnp.float64, accumulation=2)
    model = Small(group=4, dtype=jnp.float64, param_dtype=jnp.float64)
    batch = batch_of(8)
    features = model.conv(normalize(batch["image"], options))
    halves = [np.asarray(features[part::2]).mean((0, 1, 2)) for part in (0, 1)]
    state, step = training(model, optax.sgd(0.1), options)
    after, _ = step(state, batch)
    expected = 0.9 * (0.1 * halves[0]) + 0.1 * halves[1]
    np.testing.assert_allclose(after.stats["bn"]["mean"][...], expected, rtol=1e-12)


def test_bfloat16_trains_with_float32_parameters_and_statistics():
    options, batch = StepOptions(MEAN, STD, jnp.bfloat16, ema_decay=DECAY), batch_of(32)
    model = Small(group=8, dtype=jnp.bfloat16)
    state, step = training(model, optax.adam(0.05), options, ema=True)
    first = step(state, batch)[1]["loss"]
    for _ in range(40):
        state, metrics = step(state, batch)
    assert metrics["loss"] < 0.6 * first
    assert metrics["loss"].dtype == jnp.float32
    kept = jax.tree.leaves((state.params, state.stats, state.ema))
    assert {x.dtype for x in kept} == {jnp.dtype(jnp.float32)}


def test_the_first_state_with_averages_can_be_donated():
    """No array is in it twice, which a donation refuses."""
    tx = optax.sgd(0.1, momentum=0.9)
    graphdef, state = init_state(Small(group=4), tx, ema=True)
    step = jax.jit(train_step, static_argnums=(0, 1, 2), donate_argnums=3)
    after, _ = step(graphdef, tx, StepOptions(MEAN, STD), state, batch_of(4))
    assert int(after.step) == 1


@pytest.mark.parametrize("classes", [7, 4])
def test_evaluation_sums_are_masked_and_merge_to_the_whole(classes):
    """Batches of 3 and 3 with 2 masked rows give the means of 4; top-5 of 4 classes is 100 %."""
    model = Small(group=4)
    model.linear = nnx.Linear(6, classes, rngs=nnx.Rngs(1))
    options, batch = StepOptions(MEAN, STD, label_smoothing=0.5), batch_of(6, classes=classes)
    model.eval()
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    total = EvalMetrics.empty()
    for rows, mask in ((slice(0, 3), [True] * 3), (slice(3, 6), [True, False, False])):
        part = {key: value[rows] for key, value in batch.items()} | {"mask": np.array(mask)}
        total = total.merge(eval_step(graphdef, options, params, stats, part))
    logits = np.asarray(model(normalize(batch["image"], options)))[:4]
    labels = batch["label"][:4]
    ranks = (logits > logits[np.arange(4), labels][:, None]).sum(-1)
    loss = -log_softmax(logits)[np.arange(4), labels].mean()
    found = {name: float(value) for name, value in total.compute().items()}
    expected = {"loss": loss, "top1": 100 * (ranks < 1).mean(), "top5": 100 * (ranks < 5).mean()}
    assert found == pytest.approx(expected | {"not_finite": 0}, rel=1e-5)


def test_mixed_images_share_the_loss_between_both_labels():
    """Against the formula, with the share found from the images that the model sees."""
    options = StepOptions(MEAN, STD, mixup=1.0, cutmix=0.0, group=4, seed=5)
    batch = batch_of(8)
    seen = {}

    class Spy(Small):
        def __call__(self, images):
            jax.debug.callback(lambda x: seen.update(images=np.asarray(x)), images)
            return super().__call__(images)

    model = Spy(group=4)
    state, step = training(model, optax.sgd(0.0), options)
    _, metrics = step(state, batch)
    jax.effects_barrier()
    own = np.asarray(normalize(jnp.asarray(batch["image"]), options))
    other = own.reshape(2, 4, *own.shape[1:])[:, ::-1].reshape(own.shape)
    difference = own - other
    share = ((seen["images"] - other) * difference).sum((1, 2, 3)) / (difference**2).sum((1, 2, 3))
    assert (share > 0).all() and (share < 1).all()
    model.train()
    log_p = log_softmax(np.asarray(Small.__call__(model, jnp.asarray(seen["images"]))))
    labels = batch["label"]
    others = labels.reshape(2, 4)[:, ::-1].reshape(8)
    rows = np.arange(8)
    expected = -(share * log_p[rows, labels] + (1 - share) * log_p[rows, others]).mean()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_augmentation_differs_by_step_and_repeats_by_seed():
    model, batch = Small(group=4), batch_of(8)

    def losses(seed):
        options = StepOptions(MEAN, STD, random_erasing=1.0, group=4, seed=seed)
        state, step = training(model, optax.sgd(0.0), options)
        found = []
        for _ in range(2):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
        return found

    first, again, other = map(losses, (0, 0, 1))
    assert first == again
    assert len({*first, *other}) == 4


def test_rematerialization_keeps_the_results_of_products_only():
    """Of BatchNorm, ReLU and normalization nothing is kept; no gradient changes."""
    model, batch = Small(group=4), batch_of(8)
    graphdef, state = init_state(model, optax.sgd(0.1), ema=False)

    def gradient(remat):
        loss = loss_function(graphdef, StepOptions(MEAN, STD, remat=remat))
        rest = (state.stats, batch["image"], batch["label"], jax.random.key(0))

        @jax.jit
        def forward(params):
            return jax.vjp(lambda params: loss(params, *rest), params, has_aux=True)[1]

        pull = forward(state.params)
        large = [x for x in jax.tree.leaves(pull) if x.size >= 8 * 5 * 5 * 6]
        return host(jax.jit(lambda pull: pull(jnp.ones(())))(pull)), [x.shape for x in large]

    plain, kept = gradient(False)
    again, kept_by_remat = gradient(True)
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert len(kept) >= 3
    assert kept_by_remat == [(8, 5, 5, 6)]


def test_logits_that_are_not_finite_are_no_hits_and_are_counted():
    """NaN of every logit would else be a hit of the class that comes first."""
    graphdef, params, stats = nnx.split(Small(group=1), nnx.Param, ...)
    params["linear"]["bias"][...] = params["linear"]["bias"][...].at[3].set(jnp.nan)
    batch = batch_of(6) | {"label": np.zeros(6, np.int32), "mask": np.arange(6) < 5}
    found = eval_step(graphdef, StepOptions(MEAN, STD), params, stats, batch)
    assert float(found.compute()["top1"]) == float(found.compute()["top5"]) == 0
    assert float(found.not_finite.total) == 5


def test_a_network_with_dropout_has_moving_averages():
    """Its random keys are no numbers to average."""

    class Dropping(Small):
        def __init__(self):
            super().__init__(group=1)
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, images):
            return super().__call__(self.drop(images))

    options = StepOptions(MEAN, STD, ema_decay=DECAY)
    state, step = training(Dropping(), optax.sgd(0.1), options, ema=True)
    before = state.params
    state, _ = step(state, batch_of(4))
    averages = jax.tree.leaves(state.ema[0])
    for old, new, average in zip(
        *map(jax.tree.leaves, (before, state.params)), averages, strict=True
    ):
        np.testing.assert_allclose(average, DECAY * old + (1 - DECAY) * new, rtol=1e-5, atol=1e-7)
    counts = [s["drop"]["rngs"]["count"][...] for s in (state.stats, state.ema[1])]
    assert counts == [1, 1]
