"""What a block's statement implies: merge, initialization, multipliers, the general operator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repopt_jax import (
    BlockDiagonal,
    Branch,
    Centre,
    Diagonal,
    Dilated,
    FoldedConv,
    FoldedDepthwise,
    FrozenPointwise,
    Full,
    Identity,
    LowRank,
    PooledPointwise,
    Window,
    branch_mult,
    init_weights,
    initial_scales,
    merge,
    pull_back,
)

BRANCHES = {
    "full": (Full(), (3, 3, 4, 6), 1),
    "full, dense layer": (Full(), (4, 6), 1),
    "centre 1 of 3": (Centre(1), (3, 3, 4, 6), 1),
    "centre 5 of 9x7": (Centre(5), (9, 7, 2, 3), 1),
    "centre 1 of 3, one axis": (Centre(1), (3, 4, 6), 1),
    "identity": (Identity(), (3, 3, 4, 4), 1),
    "identity, dense layer": (Identity(), (4, 4), 1),
    "identity, grouped": (Identity(groups=2), (3, 3, 2, 4), 2),
    "identity, depthwise": (Identity(groups=4), (5, 5, 1, 4), 4),
    "window 1x3": (Window((1, 3)), (3, 3, 4, 6), 1),
    "window 3x1, grouped": (Window((3, 1)), (5, 3, 2, 6), 2),
    "dilated 3 in 7": (Dilated(3, 2), (7, 5, 2, 3), 1),
    "dilated 2 in 4": (Dilated(2, 3), (4, 2, 3), 1),
    "blocks": (BlockDiagonal(2), (4, 6), 1),
    "blocks in an ordinary kernel": (BlockDiagonal(2), (3, 3, 4, 6), 1),
    "diagonal": (Diagonal(), (4, 4), 1),
    "pooled": (PooledPointwise(), (3, 5, 4, 6), 1),
    "pooled, grouped": (PooledPointwise(), (3, 2, 4), 2),
    "frozen 1x1": (FrozenPointwise(5, seed=3), (3, 3, 4, 6), 1),
    "frozen 1x1, grouped": (FrozenPointwise(6, groups=2), (3, 3, 2, 4), 2),
    "frozen 1x1, depthwise": (FrozenPointwise(4, groups=4), (3, 1, 4), 4),
    "frozen first factor": (FrozenPointwise(3), (4, 6), 1),
    "frozen second factor": (LowRank(3), (4, 6), 1),
    "folded convolution": (FoldedConv((4, 3), (3, 5)), (24, 36), 1),
    "folded depthwise convolution": (FoldedDepthwise((4, 3), (3, 5)), (1, 1, 12, 24), 2),
    "folded convolution, grouped": (FoldedConv((3,), (3,), groups=2), (12, 18), 1),
}
every_branch = pytest.mark.parametrize(
    ("branch", "shape", "groups"), BRANCHES.values(), ids=BRANCHES.keys()
)
PLACEMENTS = {name: case for name, case in BRANCHES.items() if case[0].placement}
every_placement = pytest.mark.parametrize(
    ("branch", "shape", "groups"), PLACEMENTS.values(), ids=PLACEMENTS.keys()
)


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


@dataclasses.dataclass(frozen=True)
class Average(Branch):
    """A branch that is no placement: one weight per channel pair, averaged over the window."""

    def weight_shape(self, kernel_shape):
        return kernel_shape[-2:]

    def embed(self, weight, kernel_shape):
        taps = np.prod(kernel_shape[:-2])
        return jnp.broadcast_to(weight / float(taps), kernel_shape)


@every_branch
def test_embedding_is_linear(branch, shape, groups, x64, strict):
    a, b = (normal(seed, branch.weight_shape(shape)) for seed in (0, 1))

    @jax.jit
    def both(a, b):
        apart = 2.5 * branch.embed(a, shape) - branch.embed(b, shape)
        return branch.embed(2.5 * a - b, shape), apart

    left, right = both(a, b)
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-15)


@every_placement
def test_placement_puts_every_weight_in_a_place_of_its_own(branch, shape, groups, x64, strict):
    """What makes the multiplier element-wise: ``E E^T`` is a diagonal 0/1 operator."""
    weight = np.arange(1.0, 1 + np.prod(branch.weight_shape(shape)))
    embed = jax.jit(branch.embed, static_argnums=1)
    kernel = np.asarray(embed(weight.reshape(branch.weight_shape(shape)), shape))
    assert sorted(kernel[kernel != 0].tolist()) == weight.tolist()


@every_placement
def test_closed_form_multiplier_equals_the_general_operator(branch, shape, groups, x64, strict):
    block = {"first": branch, "full": Full()}
    scales = {name: normal(seed, shape[-1:]) for seed, name in enumerate(block)}

    @jax.jit
    def both(scales, gradient):
        operator = merge(block, pull_back(block, scales, gradient), scales, shape)
        return branch_mult(block, scales)(gradient), operator

    np.testing.assert_allclose(*both(scales, normal(5, shape)), rtol=1e-13)


def test_operator_of_a_branch_that_is_no_placement_is_exact(x64, strict):
    """One SGD step of the branches moves the kernel by the operator applied to its gradient."""
    shape, block = (3, 3, 2, 4), {"average": Average(), "full": Full()}
    scales = {name: normal(seed, (4,)) for seed, name in enumerate(block)}
    weights = {n: normal(3 + i, b.weight_shape(shape)) for i, (n, b) in enumerate(block.items())}

    @jax.jit
    def both(weights, scales, gradient):
        pulled = jax.grad(lambda w: (merge(block, w, scales, shape) * gradient).sum())(weights)
        moved = jax.tree.map(lambda w, g: w - 0.1 * g, weights, pulled)
        kernel = merge(block, weights, scales, shape)
        multiplied = kernel - 0.1 * branch_mult(block, scales)(gradient)
        return merge(block, moved, scales, shape), multiplied

    np.testing.assert_allclose(*both(weights, scales, normal(9, shape)), rtol=1e-12)


def test_pull_back_is_the_gradient_of_merge(x64, strict):
    shape, block = (3, 3, 4, 4), {"conv3x3": Full(), "conv1x1": Centre(1), "id": Identity()}
    scales = {name: normal(seed, (4,)) for seed, name in enumerate(block)}
    weights = {name: normal(7, branch.weight_shape(shape)) for name, branch in block.items()}
    gradient = normal(8, shape)

    @jax.jit
    def both(weights, scales):
        product = lambda w: (merge(block, w, scales, shape) * gradient).sum()  # noqa: E731
        return pull_back(block, scales, gradient), jax.grad(product)(weights)

    found, expected = both(weights, scales)
    for name in block:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-13)


def convolve(x, kernel, groups=1, dilation=1):
    window = kernel.shape[:-2]
    if not window:
        return x @ kernel
    layout = ("NWC", "WIO", "NWC") if len(window) == 1 else ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1,) * len(window), "SAME", dimension_numbers=layout,
        rhs_dilation=(dilation,) * len(window), feature_group_count=groups,
    )  # fmt: skip


def own_output(branch, x, weight, shape, groups):
    """What a network that runs the branch as layers of its own would compute."""
    match branch:
        case Identity() | Diagonal():
            return x * weight.reshape((1,) * (x.ndim - 1) + (-1,))
        case Dilated():
            return convolve(x, weight, groups, branch.dilation)
        case PooledPointwise():
            y, window = convolve(x, weight, groups), (1, *shape[:-2], 1)
            total = jax.lax.reduce_window(y, 0.0, jax.lax.add, window, (1,) * y.ndim, "SAME")
            return total / float(np.prod(window))
        case FrozenPointwise():
            factor = branch.factor(shape[-2], x.dtype)  # (groups, in, features)
            flat = factor.transpose(1, 0, 2).reshape(shape[-2], branch.features)
            if len(shape) == 2:
                return x @ flat @ weight
            return convolve(
                convolve(x, flat.reshape((1,) * len(shape[:-2]) + flat.shape), groups),
                weight, groups,
            )  # fmt: skip
        case LowRank():
            return x @ weight @ branch.factor(shape[-1], x.dtype)
        case FoldedConv():
            images = x.reshape(x.shape[0], *branch.image, -1)
            return convolve(images, weight, branch.groups).reshape(x.shape[0], -1)
        case FoldedDepthwise():
            images = jnp.moveaxis(x.reshape(-1, groups, *branch.image), 1, -1)
            return jnp.moveaxis(convolve(images, weight, groups), -1, 1).reshape(x.shape)
        case BlockDiagonal() if len(shape) == 2:
            pairs = zip(*(jnp.split(a, branch.groups, -1) for a in (x, weight)), strict=True)
            return jnp.concatenate([part @ block for part, block in pairs], -1)
        case BlockDiagonal():
            return convolve(x, weight, branch.groups)
        case _:
            return convolve(x, weight, groups)


@every_branch
def test_merged_kernel_equals_branch_by_branch_layer(branch, shape, groups, x64, strict):
    """Convolving with the merged kernel is the sum of the branches' own outputs."""
    block = {"first": branch, "full": Full()}
    scales = {name: normal(seed, shape[-1:]) for seed, name in enumerate(block)}
    weights = {name: normal(7, b.weight_shape(shape)) for name, b in block.items()}
    x = normal(11, (2, *[9] * len(shape[:-2]), shape[-2] * groups))

    @jax.jit
    def both(x, weights, scales):
        full, first = (
            scales[n].reshape((1,) * (x.ndim - 1) + (-1,)) for n in ("full", "first")
        )  # fmt: skip
        if not branch.scaled:
            first = jnp.ones_like(first)
        own = own_output(branch, x, weights["first"], shape, groups)
        apart = own * first + convolve(x, weights["full"], groups) * full
        return convolve(x, merge(block, weights, scales, shape), groups), apart

    np.testing.assert_allclose(*both(x, weights, scales), rtol=1e-12, atol=1e-12)


def test_multipliers_of_repopt_vgg_are_the_published_ones(x64, strict):
    shape, block = (3, 3, 4, 4), {"conv3x3": Full(), "conv1x1": Centre(1), "id": Identity()}
    s3, s1 = normal(0, (4,)), normal(1, (4,))
    scales = {"conv3x3": s3, "conv1x1": s1}
    linear = np.tile(np.square(s3), (3, 3, 4, 1))
    linear[1, 1] += np.square(s1)
    linear[1, 1] += np.eye(4)
    direction = np.tile(np.abs(s3), (3, 3, 4, 1))
    direction[1, 1] += np.abs(s1)
    direction[1, 1] += np.eye(4)
    for rule, expected in {"linear": linear, "direction": direction}.items():
        dense = jax.jit(lambda s, r=rule: branch_mult(block, s, r).dense(shape, jnp.float64))
        np.testing.assert_allclose(dense(scales), expected, rtol=1e-15)


def test_mean_multipliers_count_the_branches_that_reach_an_entry(x64, strict):
    """3x3 alone at the border; with the 1x1 in the centre; and the identity on its diagonal."""
    shape, block = (3, 3, 2, 2), {"conv3x3": Full(), "conv1x1": Centre(1), "id": Identity()}
    scales = {"conv3x3": normal(0, (2,)), "conv1x1": normal(1, (2,))}

    @jax.jit
    def both(scales):
        rules = ("mean", "direction")
        return [branch_mult(block, scales, rule).dense(shape, jnp.float64) for rule in rules]

    found, summed = both(scales)
    count = np.ones(shape)
    count[1, 1] = [[3, 2], [2, 3]]
    np.testing.assert_allclose(found, summed / count, rtol=1e-15)


def test_weights_start_within_the_bounds_of_their_own_fan_in():
    """Rule of Initialization: a 1x1 branch starts with the wide range of a 1x1 convolution."""
    block = {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}
    weights = jax.device_get(init_weights(block, jax.random.key(0), (3, 3, 16, 16)))
    for name, bound in (("conv3x3", 1 / 12), ("conv1x1", 1 / 4)):
        assert -bound <= weights[name].min() < -0.9 * bound
        assert 0.9 * bound < weights[name].max() <= bound
    assert weights["identity"].tolist() == [1.0] * 16


def test_branches_of_one_block_are_drawn_apart():
    block = {"first": Full(), "second": Full()}
    weights = jax.device_get(init_weights(block, jax.random.key(0), (3, 3, 16, 16)))
    correlation = np.corrcoef(weights["first"].ravel(), weights["second"].ravel())[0, 1]
    assert abs(correlation) < 0.1


def test_identity_starts_where_the_search_left_it():
    scales = {"full": jnp.ones(2), "identity": jnp.array([0.5, 2.0])}
    block = {"full": Full(), "identity": Identity()}
    weights = init_weights(block, jax.random.key(0), (2, 2), scales=scales)
    assert weights["identity"].tolist() == [0.5, 2.0]


def test_identity_starts_a_search_at_its_own_scale():
    weights = init_weights({"identity": Identity(scale=0.5)}, jax.random.key(0), (2, 2))
    assert weights["identity"].tolist() == [0.5, 0.5]


def test_initial_scales_are_those_of_the_branches():
    scales = initial_scales({"a": Full(scale=0.5), "b": Identity()}, (3, 3, 2, 2))
    assert scales["a"].tolist() == [0.5, 0.5]
    assert scales["b"].tolist() == [1.0, 1.0]


def test_direction_rule_refuses_branches_without_a_closed_form():
    with pytest.raises(ValueError, match=r"direction.*average"):
        branch_mult({"average": Average()}, {"average": jnp.ones(2)}, "direction")


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"rule.*adam"):
        branch_mult({"full": Full()}, {"full": jnp.ones(2)}, "adam")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_multiplier_keeps_the_type_of_the_gradient(dtype):
    mult = branch_mult({"full": Full()}, {"full": jnp.array([3.0, 1.0])})
    product = mult(jnp.ones((2, 2), dtype))
    assert product.dtype == dtype
    assert product[0].tolist() == [9.0, 1.0]


@pytest.mark.parametrize("block", [{"full": Full()}, {"average": Average()}], ids=["full", "op"])
def test_half_precision_is_multiplied_in_float32(block):
    """300^2 is infinite in float16; the product of the small gradient is not."""
    mult = branch_mult(block, dict.fromkeys(block, jnp.array([300.0, 1.0])))
    product = mult(jnp.full((2, 2, 2), 1e-3, jnp.float16))
    assert product.dtype == jnp.float16
    assert 40 < product[..., 0].max() < 100


@pytest.mark.parametrize(
    ("branch", "shape"), [(b, s) for b, s, _ in BRANCHES.values() if b.by_channel], ids=str
)
def test_a_branch_by_channel_lets_the_scale_through_to_the_bit(branch, shape):
    """What merge and pull_back make of the claim ``by_channel``."""
    weight = np.float32(normal(0, branch.weight_shape(shape)))
    scale = np.float32(normal(1, shape[-1:]))
    product = lambda w, s: merge({"b": branch}, {"b": w}, {"b": s}, shape)  # noqa: E731

    @jax.jit
    def both(weight, scale):
        return product(weight, scale), jnp.broadcast_to(scale, shape) * branch.embed(weight, shape)

    np.testing.assert_array_equal(*both(weight, scale))
    product = jax.make_jaxpr(product)
    sizes = [e.outvars[0].aval.size for e in product(weight, scale).eqns if "mul" in str(e)]
    assert sizes == [weight.size]


def test_what_has_no_element_wise_multiplier_is_not_given_one():
    mult = branch_mult({"average": Average()}, {"average": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"dense.*average"):
        mult.dense((3, 3, 2, 2))
