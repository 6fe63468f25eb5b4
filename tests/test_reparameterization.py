"""`reparameterize`: any optimizer trains the merged kernels as it would train their branches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from repopt_jax import (
    Centre,
    FrozenPointwise,
    Full,
    Identity,
    merge,
    reparameterize,
    search_network,
    weight_decay_mask,
)
from repopt_jax.check_equivalence.layers import METHODS
from repopt_jax.tree_paths import path_str

BLOCKS = {
    "conv": {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()},
    "dense": {"full": Full(), "frozen": FrozenPointwise(2)},
}
SHAPES = {"conv": (3, 3, 2, 2), "dense": (3, 4)}
RNG = np.random.default_rng(0)
SCALES = {
    path: {n: RNG.normal(size=SHAPES[path][-1]) for n, b in block.items() if b.scaled}
    for path, block in BLOCKS.items()
}
WEIGHTS = {
    path: {n: RNG.normal(size=b.weight_shape(SHAPES[path])) for n, b in block.items()}
    for path, block in BLOCKS.items()
}
OTHERS = {"conv": {"bias": RNG.normal(size=2)}, "head": {"kernel": RNG.normal(size=(2, 3))}}
# Adam follows from AdamW and inject_hyperparams below, clipping from the chain with clipping.
COVERED = ("Adam", "SGD, clipped norm", "multiplier: SGD", "multiplier: AdamW")
ANY_OPTIMIZER = {name: m.csla for name, m in METHODS.items() if name not in COVERED}
STEPS = 30


def as_type(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


@jax.jit
def merged(params):
    """The plain network's parameters from those of the network of branches."""
    kernels = {}
    for path, block in BLOCKS.items():
        weights = params[path]["branch_weights"]
        scales = as_type(SCALES[path], jax.tree.leaves(weights)[0].dtype)
        others = {n: x for n, x in params[path].items() if n != "branch_weights"}
        kernels[path] = {**others, "kernel": merge(block, weights, scales, SHAPES[path])}
    return {**params, **kernels}


def csla_params(dtype=jnp.float64):
    params = {path: {"branch_weights": w, **OTHERS.get(path, {})} for path, w in WEIGHTS.items()}
    return as_type({**params, "head": OTHERS["head"]}, dtype)


def plain_params(dtype=jnp.float64):
    return merged(csla_params(dtype))


def exact(optimizer, dtype=jnp.float64, weights=WEIGHTS):
    scales, weights = as_type(SCALES, dtype), as_type(weights, dtype)
    return reparameterize(optimizer, BLOCKS, scales, weights=weights)


def loss(params, step):
    entries = jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    wave = jnp.cos(step + jnp.arange(float(entries.size)))
    return jnp.square(jnp.tanh(entries) - wave).sum()


gradients = jax.jit(jax.grad(loss))


def step_of(tx, view=lambda p: p, asked=("value",)):
    """A step as a function of parameters, state and moment, with the arguments `asked` for."""

    def step(params, state, moment):
        function = lambda p: loss(view(p), moment)  # noqa: E731
        value, grad = jax.value_and_grad(function)(params)
        known = {"value": value, "grad": grad, "value_fn": function, "obj_fn": function}
        updates, state = tx.update(grad, state, params, **{name: known[name] for name in asked})
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, steps=STEPS, pace=1.0, **options):
    """Parameters and state after some steps; the loss moves by `pace` from step to step."""
    step, state = jax.jit(step_of(tx, **options)), jax.device_get(tx.init(params))
    for i in range(steps):
        params, state = step(params, state, pace * i)
    return params, state


def train_both(tx, optimizer, steps=STEPS, pace=1.0, **options):
    """The plain parameters as `tx` trains them, and as `optimizer` trains their branches."""
    csla = optax.with_extra_args_support(optimizer)
    own, branches = step_of(tx, **options), step_of(csla, merged, **options)
    step = jax.jit(lambda a, b, moment: (own(*a, moment), branches(*b, moment)))
    found, expected = plain_params(), csla_params()
    ends = jax.device_get(((found, tx.init(found)), (expected, csla.init(expected))))
    for i in range(steps):
        ends = step(*ends, pace * i)
    (found, _), (expected, _) = ends
    return jax.device_get((found, merged(expected)))


def assert_trains_as_branches(tx, optimizer, atol=1e-11):
    found, expected = train_both(tx, optimizer)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol * abs(b).max()),
        found,
        expected,
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_less(1e-4, abs(a - b).max()), found,
                 jax.device_get(plain_params()))  # fmt: skip


@pytest.mark.parametrize("optimizer", ANY_OPTIMIZER.values(), ids=ANY_OPTIMIZER.keys())
def test_any_optimizer_trains_the_kernels_as_their_branches(optimizer, x64):
    """30 steps in float64 to 1e-11, parameters without branches included."""
    assert_trains_as_branches(exact(optimizer()), optimizer())


def test_multi_steps_inside_and_outside(x64):
    """As exact as MultiSteps itself, which counts and averages in float32."""
    adam = optax.adam(1e-2)
    every_two = optax.MultiSteps(adam, 2).gradient_transformation()
    outside = optax.MultiSteps(exact(adam), 2).gradient_transformation()
    assert_trains_as_branches(outside, every_two, 1e-5)
    assert_trains_as_branches(exact(every_two), every_two, 1e-5)


def test_inject_hyperparams_inside_and_outside(x64):
    """The learning rate lives in the state and can be changed between steps."""
    injected = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    inside = exact(injected)
    make = lambda learning_rate: exact(optax.adam(learning_rate))  # noqa: E731
    outside = optax.inject_hyperparams(make)(learning_rate=1e-2)
    assert_trains_as_branches(inside, injected)
    assert_trains_as_branches(outside, injected)
    params = plain_params()
    state = inside.init(params)
    state.inner.hyperparams["learning_rate"] = jnp.asarray(0.0)
    updates, _ = jax.jit(inside.update)(params, state, params)
    assert abs(updates["conv"]["kernel"]).max() < 1e-15


def test_masked_parameters_are_left_to_others(x64):
    """optax.partition: LAMB for one block, plain SGD for what is hidden from it."""
    labels = {"conv": "exact", "dense": "sgd", "head": "exact"}
    tx = optax.partition({"exact": exact(optax.lamb(1e-2)), "sgd": optax.sgd(1e-2)}, labels)
    csla = optax.partition({"exact": optax.lamb(1e-2), "sgd": optax.set_to_zero()}, labels)
    found, _ = train(tx, plain_params())
    expected, _ = train(csla, csla_params(), view=merged)
    np.testing.assert_allclose(
        found["conv"]["kernel"], merged(expected)["conv"]["kernel"], atol=1e-11
    )
    sgd, _ = train(optax.sgd(1e-2), plain_params())
    np.testing.assert_allclose(found["dense"]["kernel"], sgd["dense"]["kernel"], atol=1e-12)


def test_inner_names_are_those_of_a_search_network(x64):
    """Masks and labels by path work as they do there."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 2, (3, 3), rngs=rngs)
            self.dense = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
            self.head = nnx.Linear(2, 3, use_bias=False, rngs=rngs)

    seen = []
    spy = optax.GradientTransformation(lambda p: seen.append(p) or (), lambda u, s, p: (u, s))
    exact(spy).init(plain_params())
    search = nnx.eval_shape(
        lambda: search_network(Net(nnx.Rngs(0)), BLOCKS, kind="csla", rngs=nnx.Rngs(0))
    )

    def names(tree):
        return sorted(path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))

    assert names(seen[0]) == names(nnx.state(search, nnx.Param))
    decayed = jax.tree_util.tree_leaves_with_path(weight_decay_mask(seen[0]))
    assert [path_str(path) for path, yes in decayed if not yes] == ["conv/bias"]


def test_kernel_stays_the_merged_kernel_over_many_steps():
    """In float32, 300 steps: roundings of the steps do not add up."""
    params, state = train(
        exact(optax.adam(1e-2), jnp.float32), plain_params(jnp.float32), steps=300
    )
    for path, block in BLOCKS.items():
        kernel = merge(block, state.weights[path], state.scales[path], SHAPES[path])
        np.testing.assert_allclose(params[path]["kernel"], kernel, rtol=0, atol=5e-7)


def test_state_resumes_from_its_leaves_alone(x64):
    """A checkpoint is the state: three steps, saved and restored as arrays, three more."""
    tx, params = exact(optax.lamb(1e-2)), plain_params()
    traced = []
    update = jax.jit(lambda *arguments: traced.append(0) or tx.update(*arguments))

    def steps(params, state, first, last):
        for i in range(first, last):
            updates, state = update(gradients(params, float(i)), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    straight, _ = steps(params, tx.init(params), 0, 6)
    assert len(traced) == 1  # one compilation for all steps
    params, state = steps(params, tx.init(params), 0, 3)
    arrays = [np.asarray(x) for x in jax.tree.leaves((params, state))]
    # What restores a checkpoint knows only shapes, and another start.
    blank = jax.eval_shape(lambda: (plain_params(), tx.init(plain_params())))
    resumed, _ = steps(*jax.tree.unflatten(jax.tree.structure(blank), arrays), 3, 6)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_sharding_of_updates_is_that_of_parameters():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    tx, params = exact(optax.adam(1e-2), jnp.float32), plain_params(jnp.float32)
    update = jax.jit(tx.update)
    expected, _ = update(params, tx.init(params), params)
    params["dense"]["kernel"] = jax.device_put(params["dense"]["kernel"], split)
    state = tx.init(params)
    state.weights["dense"]["full"] = jax.device_put(state.weights["dense"]["full"], split)
    updates, state = update(params, state, params)
    assert updates["dense"]["kernel"].sharding.is_equivalent_to(split, 2)
    assert state.weights["dense"]["full"].sharding.is_equivalent_to(split, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


def test_donating_the_state_leaves_the_start_intact():
    """A second run from the same transform finds its weights where they were."""
    tx, params = exact(optax.sgd(0.1), jnp.float32), plain_params(jnp.float32)
    donating = jax.jit(tx.update, donate_argnums=1)
    first, _ = donating(params, tx.init(params), params)
    second, _ = donating(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_types_of_updates_are_those_of_parameters(dtype):
    tx, params = exact(optax.adam(1e-2), dtype), plain_params(dtype)
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    types = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
    assert types(updates) == types(params)
    assert types(after) == types(state)


def test_nnx_states_are_parameters_too():
    params = nnx.State(jax.tree.map(nnx.Param, plain_params(jnp.float32)))
    tx = exact(optax.sgd(0.1), jnp.float32)
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_weights_of_another_kernel_are_refused_by_name(x64):
    """The mistake that would train another network without a word."""
    other = {**WEIGHTS, "dense": jax.tree.map(lambda w: w + 1e-6, WEIGHTS["dense"])}
    with pytest.raises(ValueError, match=r"'dense'.*weights"):
        exact(optax.sgd(0.1), weights=other).init(plain_params())
    nan = {**WEIGHTS, "conv": jax.tree.map(lambda w: w * np.nan, WEIGHTS["conv"])}
    with pytest.raises(ValueError, match=r"'conv'.*weights"):
        exact(optax.sgd(0.1), weights=nan).init(plain_params())


def test_init_under_jit_gives_the_same_state(x64):
    tx, params = exact(optax.adam(1e-2)), plain_params()
    jax.tree.map(np.testing.assert_array_equal, jax.jit(tx.init)(params), tx.init(params))


@pytest.mark.parametrize("what", ["scales", "weights"])
def test_missing_branches_are_refused_by_name(what):
    given = {"scales": SCALES, "weights": WEIGHTS}
    given[what] = {"conv": {"conv3x3": given[what]["conv"]["conv3x3"]}}
    missing = ["conv/conv1x1", *["conv/identity"] * (what == "weights"), "dense"]
    with pytest.raises(ValueError, match=f"{what}.*{re.escape(str(missing))}"):
        reparameterize(optax.sgd(0.1), BLOCKS, given["scales"], weights=given["weights"])


def test_missing_kernel_and_parameters_are_refused():
    tx = exact(optax.sgd(0.1), jnp.float32)
    params = plain_params(jnp.float32)
    with pytest.raises(ValueError, match=r"params.*\['dense'\]"):
        tx.init({name: p for name, p in params.items() if name != "dense"})
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))


def test_kernel_of_another_shape_is_refused_by_name():
    params = plain_params(jnp.float32)
    params["dense"]["kernel"] = jnp.ones((3, 5))
    with pytest.raises(ValueError, match="block 'dense': "):
        exact(optax.sgd(0.1), jnp.float32).init(params)


def test_weights_of_another_shape_are_refused_by_name():
    other = {**WEIGHTS, "dense": {**WEIGHTS["dense"], "full": np.ones((5, 4))}}
    with pytest.raises(ValueError, match=r"block 'dense'.*'full'.*\(3, 4\).*\(5, 4\)"):
        exact(optax.sgd(0.1), jnp.float32, other).init(plain_params(jnp.float32))


def test_a_kernel_of_other_branches_is_refused_by_the_first_update_under_jit(x64):
    """Where `init` could not see the values."""
    tx, params = exact(optax.sgd(0.1)), plain_params()
    params["dense"]["kernel"] += 1e-6
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    assert np.isnan(updates["dense"]["kernel"]).all()
    assert np.isfinite(updates["conv"]["kernel"]).all()
    assert np.isfinite(updates["head"]["kernel"]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_roundings_move_no_kernel_too_far(dtype):
    """100 steps in each type, with branches of opposite sign that leave a small kernel."""
    block = {"full": Full(), "second": Full()}
    scales = {"dense": {"full": jnp.full(4, 30.0, dtype), "second": jnp.full(4, -30.0, dtype)}}
    rng = np.random.default_rng(0)
    full = jnp.asarray(rng.normal(size=(3, 4)), dtype)
    weights = {"dense": {"full": full, "second": full + jnp.asarray(0.01, dtype)}}
    kernel = jax.jit(lambda w: merge(block, w, scales["dense"], (3, 4)))(weights["dense"])
    tx = reparameterize(optax.adam(1e-2), {"dense": block}, scales, weights=weights)
    params = {"dense": {"kernel": kernel}}
    params, _ = train(tx, params, steps=100)
    assert np.isfinite(params["dense"]["kernel"].astype(jnp.float32)).all()


def test_a_kernel_that_is_none_is_passed_over(x64):
    """As `equinox.partition` leaves it."""
    tx, params = exact(optax.sgd(0.1)), plain_params()
    params["dense"] = {"kernel": None}
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["dense"]["kernel"] is None
    assert list(state.weights) == ["conv"]
