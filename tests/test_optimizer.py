"""`make_optimizer` builds what the configuration says, in the order that the method needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repopt_jax.training.config import check_section, default_config
from repopt_jax.training.optimizer import make_optimizer, update_rule

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.array([0.5, 1.5])}
NOTHING = {"kernel": None, "bias": None}


def section(**changes):
    config = default_config().target.optimizer
    config.update(changes)
    return config


def kernels(config, mults, steps=4, lr=0.1):
    """The parameters after some steps with drawn gradients, and the gradients."""
    tx = make_optimizer(config, lambda _: lr, mults)
    params, state, rng = PARAMS, tx.init(PARAMS), np.random.default_rng(0)
    gradients = []
    for _ in range(steps):
        drawn = {k: rng.normal(size=v.shape) for k, v in PARAMS.items()}
        gradients.append(drawn)
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, gradients


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mult", [None, 3.0])
def test_sgd_multiplies_then_decays_kernels_then_takes_momentum(nesterov, mult):
    """``d = M g + λ w``, ``m <- μ m + d``, ``w <- w - η (d + μ m or m)``; no decay of biases."""
    config = section(momentum=0.8, nesterov=nesterov, weight_decay=0.05)
    mults = {"kernel": None if mult is None else jnp.array(mult), "bias": None}
    found, gradients = kernels(config, mults)
    for name, decay, factor in (("kernel", 0.05, mult or 1.0), ("bias", 0.0, 1.0)):
        w, m = np.asarray(PARAMS[name], float), 0.0
        for gradient in gradients:
            d = factor * gradient[name] + decay * w
            m = 0.8 * m + d
            w = w - 0.1 * (d + 0.8 * m if nesterov else m)
        np.testing.assert_allclose(found[name], w, rtol=1e-5)


@pytest.mark.parametrize("mult", [None, 3.0])
def test_adamw_multiplies_the_direction_and_decays_after_it(mult):
    config = section(name="adamw", b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.05)
    mults = {"kernel": None if mult is None else jnp.array(mult), "bias": None}
    found, gradients = kernels(config, mults)
    for name, decay, factor in (("kernel", 0.05, mult or 1.0), ("bias", 0.0, 1.0)):
        w, m, v = np.asarray(PARAMS[name], float), 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            m = 0.8 * m + 0.2 * gradient[name]
            v = 0.95 * v + 0.05 * gradient[name] ** 2
            direction = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
            w = w - 0.1 * (factor * direction + decay * w)
        np.testing.assert_allclose(found[name], w, rtol=1e-5)


def test_the_learning_rate_follows_the_schedule_by_update():
    rates = jnp.array([0.0, 0.1, 0.4])
    config = section(momentum=0.0, nesterov=False, weight_decay=0.0)
    tx = make_optimizer(config, lambda count: rates[count], NOTHING)
    state, seen = tx.init(PARAMS), []
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
        seen.append(-float(updates["bias"][0]))
    np.testing.assert_allclose(seen, rates)


def test_clipping_bounds_the_gradient_before_decay_and_learning_rate():
    """The global norm of the whole gradient; a smaller one is left alone."""
    config = section(momentum=0.0, nesterov=False, weight_decay=0.1, clip_norm=2.0)
    tx = make_optimizer(config, lambda _: 0.5, NOTHING)
    gradient = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 4.0)}
    norm = np.sqrt(4 * 9 + 2 * 16)
    for factor, clipped in ((1.0, 2 / norm), (0.1, 0.1)):
        scaled = jax.tree.map(lambda x, f=factor: x * f, gradient)
        updates, _ = tx.update(scaled, tx.init(PARAMS), PARAMS)
        kernel = -0.5 * (clipped * gradient["kernel"] + 0.1 * PARAMS["kernel"])
        np.testing.assert_allclose(updates["kernel"], kernel, rtol=1e-6)
        np.testing.assert_allclose(updates["bias"], -0.5 * clipped * gradient["bias"], rtol=1e-6)


def test_clipping_with_multipliers_is_refused():
    with pytest.raises(ValueError, match=r"clip_norm must be 0 for the part 'target'.* got 1\.0"):
        make_optimizer(section(clip_norm=1.0), lambda _: 0.1, NOTHING | {"kernel": jnp.array(2.0)})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "lion"),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
    ],
)
def test_a_field_out_of_its_range_is_named(field, value):
    with pytest.raises(ValueError, match=rf"{field} must .*{value}"):
        make_optimizer(section(**{field: value}), lambda _: 0.1, NOTHING)


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip_norm", -1.0), ("clip_norm", float("nan")), ("b1", 1.0), ("b2", -0.1)],
)
def test_a_field_is_refused_even_where_the_optimizer_does_not_use_it(field, value):
    changed = default_config().target
    changed.optimizer[field] = value
    with pytest.raises(ValueError, match=rf"^optimizer\.{field} must .*{value}$"):
        check_section(changed)


def test_the_rule_of_the_multipliers_is_that_of_the_optimizer():
    assert (update_rule("sgd"), update_rule("adamw")) == ("linear", "direction")
    with pytest.raises(ValueError, match=r"^optimizer\.name must be one of .*, got 'lars'$"):
        update_rule("lars")
