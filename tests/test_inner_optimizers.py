"""Every optimizer of Optax with a learning rate, under `reparameterize`."""

import inspect

import numpy as np
import optax
import optax.contrib
import pytest
from test_reparameterization import exact, plain_params, train_both

# Options that have no default, a deprecated one, or one under which nothing would be seen.
OPTIONS = {
    "optax.noisy_sgd": {"learning_rate": 0.01, "key": 0},
    "optax.lbfgs": {"learning_rate": 0.01, "linesearch": None},
    "optax.contrib.schedule_free": {"base_optimizer": optax.sgd(0.01)},
    # Or its bounds would hide the curvature, which it finds through `obj_fn`.
    "optax.contrib.sophia": {"b2": 0.0, "gamma": 1.0, "eps": 0.1, "update_interval": 1},
}
LEFT_OUT = {
    "optax.contrib.dpsgd",  # needs a gradient per sample, which is refused by name
    "optax.optimistic_adam",  # deprecated, and refuses to run where warnings are errors
}


def optimizers():
    """All public functions with a learning rate that return an optimizer, by name."""
    found = {}
    for module in (optax, optax.contrib):
        for name, function in vars(module).items():
            if name.startswith(("_", "scale_by", "inject")) or not inspect.isfunction(function):
                continue
            parameters = inspect.signature(function).parameters
            if "learning_rate" not in parameters:
                continue
            needed = parameters["learning_rate"].default is inspect.Parameter.empty
            options = {"learning_rate": 0.01} if needed else {}
            path = f"{module.__name__}.{name}"
            found[path] = function, {**options, **OPTIONS.get(path, {})}
    return {path: entry for path, entry in found.items() if path not in LEFT_OUT}


OPTIMIZERS = optimizers()


def test_the_list_is_long():
    assert len(OPTIMIZERS) >= 40


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "contrib" in name else ())
        for name in OPTIMIZERS
    ],
)
def test_every_optimizer_trains_the_kernels_as_their_branches(name, x64):
    make, options = OPTIMIZERS[name]
    asked = ("value", "obj_fn")
    found, expected = train_both(exact(make(**options)), make(**options), steps=4, asked=asked)
    start = plain_params()
    for path in ("conv", "dense", "head"):
        kernel = expected[path]["kernel"]
        np.testing.assert_allclose(found[path]["kernel"], kernel, rtol=0, atol=4e-14)
        assert abs(kernel - start[path]["kernel"]).max() > 1e-8
