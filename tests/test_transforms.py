"""scale_by_grad_mult as a citizen of Optax, and the assembled optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import repopt_jax
from repopt_jax import Centre, Full, Identity, grad_mults, repopt_adamw, repopt_sgd
from repopt_jax import scale_by_grad_mult as by_mult

BLOCK = {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}
BLOCKS = {"conv": BLOCK}
SCALES = {"conv": {"conv3x3": np.array([0.5, -2.0]), "conv1x1": np.array([1.0, 3.0])}}


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 2)), dtype)},
        "bn": {"scale": jnp.ones(2, dtype), "bias": jnp.zeros(2, dtype)},
    }


def mults_of(params, rule="linear"):
    return grad_mults(params, BLOCKS, SCALES, rule)


def dense_of(params):
    return repopt_jax.branch_mult(BLOCK, SCALES["conv"]).dense(params["conv"]["kernel"].shape)


def one_update(tx, params, grads=None):
    grads = params if grads is None else grads
    return tx.update(grads, tx.init(params), params)[0]


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_kernels_are_multiplied_and_the_rest_left_alone():
    params = make_params()
    updates = one_update(by_mult(mults_of(params)), params)
    expected = params["conv"]["kernel"] * dense_of(params)
    np.testing.assert_allclose(updates["conv"]["kernel"], expected, rtol=1e-6)
    assert_trees_equal(updates["bn"], params["bn"])


def test_dense_and_broadcasting_arrays_act_as_they_are():
    params = make_params()
    vector = jnp.array([2.0, 3.0])
    mults = {"conv": {"kernel": dense_of(params)}, "bn": {"scale": vector, "bias": 5.0}}
    updates = one_update(by_mult(mults), params)
    assert updates["bn"]["scale"].tolist() == [2.0, 3.0]
    compact = one_update(by_mult(mults_of(params)), params)
    np.testing.assert_allclose(updates["conv"]["kernel"], compact["conv"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("container", ["nnx.State", "tuple", "flat"])
def test_any_pytree_of_parameters(container):
    kernel, bias = jnp.ones((3, 3, 2, 2)), jnp.ones(2)
    if container == "nnx.State":
        conv = nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0))
        params = nnx.state(nnx.Dict(conv=conv), nnx.Param)
        mults = {"conv": {"kernel": jnp.full((1, 1, 1, 2), 3.0), "bias": None}}
    elif container == "tuple":
        params, mults = (kernel, (bias,)), (jnp.full((1, 1, 1, 2), 3.0), (None,))
    else:
        params = {"conv/~/kernel": kernel, "conv/~/bias": bias}  # Haiku's style of names
        mults = {"conv/~/kernel": jnp.full((1, 1, 1, 2), 3.0), "conv/~/bias": None}
    updates = one_update(by_mult(mults), params)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(update, param * (3.0 if param.ndim == 4 else 1.0), rtol=1e-6)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_attribute_trees_as_of_equinox():
    class Linear:
        def __init__(self, weight, bias):
            self.weight, self.bias = weight, bias

    jax.tree_util.register_pytree_with_keys(
        Linear,
        lambda m: (
            [(jax.tree_util.GetAttrKey(k), getattr(m, k)) for k in ("weight", "bias")],
            None,
        ),
        lambda _, children: Linear(*children),
    )
    updates = one_update(
        by_mult(Linear(jnp.full((1, 2), 4.0), None)), Linear(jnp.ones((3, 2)), jnp.ones(2))
    )
    assert (updates.weight == 4).all()
    assert (updates.bias == 1).all()


def test_state_holds_the_constants_and_no_update_changes_them():
    params = make_params()
    tx = by_mult(mults_of(params))
    state = tx.init(params)
    assert list(state.grad_mults) == ["conv/kernel"]
    assert len(jax.tree.leaves(state)) == 2  # a vector per scaled branch, nothing dense
    _, after = jax.jit(tx.update)(params, state)
    assert_trees_equal(state, after)


@pytest.mark.usefixtures("room_for_programs")
def test_constants_reach_the_step_as_arguments():
    """Another state gives another result without another compilation."""
    params = make_params()
    tx = by_mult(mults_of(params))
    update = jax.jit(tx.update)
    state = tx.init(params)
    first, _ = update(params, state)
    second, _ = update(params, jax.tree.map(lambda s: 2 * s, state))
    identity = np.zeros((3, 3, 2, 2), np.float32)
    identity[1, 1] = np.eye(2)
    kernel = params["conv"]["kernel"]
    np.testing.assert_allclose(
        second["conv"]["kernel"] - kernel * identity,
        4 * (first["conv"]["kernel"] - kernel * identity),
        rtol=1e-5,
    )
    assert update._cache_size() == 1


def test_a_step_that_takes_the_state_leaves_the_constants_to_the_next_init():
    params, mults = make_params(), mults_of(make_params())
    tx = by_mult(mults)
    step = jax.jit(lambda state, grads: tx.update(grads, state), donate_argnums=0)
    state = tx.init(params)
    step(state, params)
    assert all(array.is_deleted() for array in jax.tree.leaves(state))
    assert_trees_equal(tx.init(params), by_mult(mults).init(params))


@pytest.mark.usefixtures("room_for_programs")
@pytest.mark.parametrize("make", [repopt_sgd, repopt_adamw])
def test_no_recompilation_on_the_second_step(make):
    params = make_params()
    tx = make(1e-3, mults_of(params, "linear" if make is repopt_sgd else "direction"))
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(3):
        _, state = update(params, state, params)
    assert update._cache_size() == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("make", [repopt_sgd, repopt_adamw])
def test_types_of_updates_are_those_of_parameters(make, dtype):
    params = make_params(dtype)
    tx = make(1e-3, mults_of(params, "linear" if make is repopt_sgd else "direction"))
    updates = one_update(tx, params)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)


def test_epsilon_acts_as_in_the_branches():
    """Scaling a branch's scale by 1e-6 must not shrink its weight's step by more than Adam does."""
    scale, gradient, eps = jnp.array([1e-6]), jnp.ones((1, 1, 1, 1)), 1e-6
    block = {"full": Full()}
    mults = {"kernel": repopt_jax.branch_mult(block, {"full": scale}, "direction")}
    tx = repopt_adamw(1.0, mults, eps=eps, weight_decay=0.0)
    branch = optax.adam(1.0, eps=eps)
    expected = 1e-6 * one_update(branch, 1e-6 * gradient)
    updates = one_update(tx, {"kernel": gradient})
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)
    assert abs(float(expected[0, 0, 0, 0])) == pytest.approx(0.5e-6, rel=1e-3)


def test_extra_arguments_are_accepted():
    params = make_params()
    tx = repopt_sgd(1e-3, mults_of(params))
    tx.update(params, tx.init(params), params, value=1.0, grad_fn=None)


def steps_on_a_quadratic(tx, params, steps):
    """The distance to the minimum of ``sum((w - target)^2)``, 0.5 in every entry at the start."""
    target = jax.tree.map(lambda x: x + 0.5, params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda a, b: 2 * (a - b), params, target)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return jax.tree.map(jnp.subtract, target, params)


@pytest.mark.parametrize("make", [repopt_sgd, repopt_adamw])
def test_convergence_on_a_quadratic(make):
    """Both optimizers reach the minimum in spite of multipliers from 0.25 to 14."""
    params = make_params()
    rule = "linear" if make is repopt_sgd else "direction"
    tx = make(2e-2, mults_of(params, rule), weight_decay=0.0)
    distances = steps_on_a_quadratic(tx, params, 300)
    assert optax.tree.norm(distances, squared=True) < 1e-6


def test_every_entry_goes_to_the_minimum_at_the_rate_of_its_multiplier(x64):
    """SGD multiplies the distance by ``1 - 2 η M`` a step; Adam's first step is ``η M`` long."""
    params = make_params(jnp.float64)
    sgd = repopt_sgd(2e-2, mults_of(params), momentum=0.0)
    found = steps_on_a_quadratic(sgd, params, 3)["conv"]["kernel"]
    np.testing.assert_allclose(found, 0.5 * (1 - 4e-2 * dense_of(params)) ** 3, rtol=1e-6)
    assert np.ptp(found) > 0.4
    mults = mults_of(params, "direction")
    adamw = repopt_adamw(2e-2, mults, weight_decay=0.0)
    found = steps_on_a_quadratic(adamw, params, 1)["conv"]["kernel"]
    dense = mults["conv"]["kernel"].dense(found.shape, jnp.float64)
    np.testing.assert_allclose(found, 0.5 - 2e-2 * dense, rtol=1e-6)


def test_sharding_of_updates_is_that_of_parameters():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(None, None, None, "fsdp"))
    params = make_params()
    tx = repopt_sgd(1e-3, mults_of(params))
    expected = one_update(tx, params)
    params["conv"]["kernel"] = jax.device_put(params["conv"]["kernel"], split)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["conv"]["kernel"].sharding.is_equivalent_to(split, 4)
    np.testing.assert_allclose(updates["conv"]["kernel"], expected["conv"]["kernel"], rtol=1e-6)


def test_map_params_leaves_the_constants_out():
    """optax.tree.map_params, used to shard optimizer states, sees no parameters in the state."""
    params = make_params()
    tx = repopt_sgd(1e-3, mults_of(params))
    state = tx.init(params)
    zeroed = optax.tree.map_params(tx, jnp.zeros_like, state)
    assert_trees_equal(zeroed[0], state[0])


def test_a_parameter_that_is_none_needs_no_multiplier_and_gets_none():
    """As the bias of a layer without one in Equinox; `grad_mults` returns a tree that fits."""
    params = make_params() | {"linear": {"weight": jnp.ones(3), "bias": None}}
    for mults in (mults_of(params), {**mults_of(make_params()), "linear": {"weight": None}}):
        updates = one_update(by_mult(mults), params)
        assert updates["linear"]["bias"] is None
        assert not np.array_equal(updates["conv"]["kernel"], params["conv"]["kernel"])
    with pytest.raises(ValueError, match=r"missing: \['linear/weight'\], surplus: none"):
        one_update(by_mult(mults_of(make_params())), params)
    with pytest.raises(ValueError, match=r"surplus: \['linear/nope'\]"):
        one_update(by_mult(mults | {"linear": {"weight": None, "nope": None}}), params)


@pytest.mark.parametrize("make", [repopt_sgd, repopt_adamw])
def test_a_bare_multiplier_under_inject_hyperparams_must_be_static(make):
    """Optax calls whatever can be called with a step count, as a schedule."""
    kernel = make_params()["conv"]["kernel"]
    rule = "linear" if make is repopt_sgd else "direction"
    mult = repopt_jax.branch_mult(BLOCK, SCALES["conv"], rule)
    with pytest.raises(ValueError, match=r"inject_hyperparams .*static_args .*grad_mults"):
        optax.inject_hyperparams(make)(0.1, mult).init(kernel)
    injected = optax.inject_hyperparams(make, static_args=("grad_mults",))(0.1, mult)
    found, expected = one_update(injected, kernel), one_update(make(0.1, mult), kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_half_precision_under_inject_hyperparams_takes_float32_hyperparameters():
    """In bfloat16 the second moment's decay of 0.999 is 1, and its correction divides by 0."""
    params = make_params(jnp.bfloat16)
    arguments = (0.1, mults_of(params, "direction"))
    make = optax.inject_hyperparams(repopt_adamw, hyperparam_dtype=jnp.float32)
    found, expected = (
        one_update(make(*arguments), params),
        one_update(repopt_adamw(*arguments), params),
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_arrays_multiply_in_at_least_float32(dtype):
    """1e5 is infinite in float16, and 1 + 2^-8 is 1 in bfloat16."""
    update = {"w": jnp.array([1e-3, 1.5], dtype)}
    multipliers = jnp.array([1e5, 1 + 2**-8], jnp.float32)
    found = one_update(by_mult({"w": multipliers}), update)["w"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(
        found, (update["w"].astype(jnp.float32) * multipliers).astype(dtype)
    )
    assert np.isfinite(found.astype(jnp.float32)).all()


def test_a_branch_of_zero_scale_does_not_count_for_epsilon(x64):
    """Exact where one branch reaches an entry, and one whose scale is 0 does not."""
    block = {"conv3x3": Full(), "conv1x1": Centre(1)}
    scales = {"conv3x3": jnp.array([0.5, 2.0]), "conv1x1": jnp.array([0.0, 0.0])}
    mults = {"kernel": repopt_jax.branch_mult(block, scales, "direction")}
    kernel = make_params(jnp.float64)["conv"]["kernel"]
    tx = repopt_adamw(1e-2, mults, eps=1e-2, weight_decay=0.0)
    branch = optax.adam(1e-2, eps=1e-2)
    scale = scales["conv3x3"][None, None, None]
    expected = scale * one_update(branch, scale * kernel)
    found = one_update(tx, {"kernel": kernel})["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_parameters_that_are_none_need_no_kernel_for_their_multiplier():
    """As `equinox.partition` leaves them: the multipliers of the whole network fit either half."""
    params = make_params()
    half = {"conv": {"kernel": None}, "bn": params["bn"]}
    for mult in (mults_of(params)["conv"]["kernel"], dense_of(params)):
        mults = {"conv": {"kernel": mult}, "bn": {"scale": jnp.full(2, 3.0), "bias": None}}
        updates = one_update(by_mult(mults), half)
        assert updates["conv"]["kernel"] is None
        assert updates["bn"]["scale"].tolist() == [3.0, 3.0]
