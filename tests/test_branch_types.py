"""Branch types as a whole: frozen factors, refusals, and training that follows the branches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    check_block,
    init_weights,
    merge,
    repopt_sgd,
)
from repopt_jax.check_equivalence.layers import LAYERS

STEPS = 30


def kernel_shape(kind):
    """Shape of the kernel of a layer of the equivalence check."""
    options = kind.options
    inputs = options["in_features"] // options.get("feature_group_count", 1)
    return (*options.get("kernel_size", ()), inputs, options["out_features"])


def loss(kernels, step):
    """A function of the kernels of a whole network that changes from step to step."""
    entries = jnp.concatenate([kernel.ravel() for kernel in kernels.values()])
    wave = jnp.cos(step + jnp.arange(float(entries.size)))
    return jnp.square(jnp.tanh(entries) - wave).sum()


def trained(tx, params, view=lambda p: p):
    """`params`, seen as kernels through `view`, after some steps of `tx`."""

    def step(carry, i):
        params, state = carry
        grads = jax.grad(lambda p: loss(view(p), i))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params):
        steps = jnp.arange(float(STEPS))
        return jax.lax.scan(step, (params, tx.init(params)), steps)[0][0]

    return jax.jit(run)(params)


def assert_follows_the_branches(blocks, shapes, atol=1e-12):
    """SGD on branches with constant scales == multiplied SGD on the merged kernels."""
    rng = np.random.default_rng(0)
    scales = {
        path: {name: rng.normal(size=shapes[path][-1]) for name in block}
        for path, block in blocks.items()
    }
    weights = {
        path: {name: rng.normal(size=b.weight_shape(shapes[path])) for name, b in block.items()}
        for path, block in blocks.items()
    }

    @jax.jit
    def merged(weights):
        return {p: merge(b, weights[p], scales[p], shapes[p]) for p, b in blocks.items()}

    csla = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.01, 0.9, nesterov=True))
    mults = {path: branch_mult(block, scales[path]) for path, block in blocks.items()}
    start = merged(weights)
    found = trained(repopt_sgd(0.01, mults, weight_decay=1e-2), start)
    expected = merged(trained(csla, weights, merged))
    start, found, expected = jax.device_get((start, found, expected))
    for path in blocks:
        size = abs(expected[path]).max()
        assert abs(found[path] - expected[path]).max() <= atol * size, path
        assert abs(expected[path] - start[path]).max() > 1e-2 * size, path


def test_multiplied_sgd_follows_the_branches_of_every_type(x64):
    """30 steps with Nesterov momentum and decay, to 1e-12."""
    blocks = {name: dict(kind.block) for name, kind in LAYERS.items()}
    assert_follows_the_branches(blocks, {n: kernel_shape(kind) for n, kind in LAYERS.items()})


def test_another_branch_type_costs_a_few_lines(x64):
    """Stated once, a type has its merge, its start and its multiplier."""

    @dataclasses.dataclass(frozen=True)
    class Symmetric(Branch):
        def weight_shape(self, kernel_shape):
            return kernel_shape

        def embed(self, weight, kernel_shape):
            return (weight + weight[::-1]) / 2.0

    block, shape = {"symmetric": Symmetric(), "full": Full()}, (3, 2, 4)
    check_block(block, shape)
    start = init_weights(block, jax.random.key(0), shape)
    assert start["symmetric"].shape == shape
    assert_follows_the_branches({"conv": block}, {"conv": shape})


@pytest.mark.parametrize("branch", [FrozenPointwise(6, groups=2, seed=9), LowRank(3, seed=9)])
def test_frozen_factor_follows_from_the_seed_alone(branch, x64):
    """Equal in both precisions and under jit, other for another seed: nothing has to be stored."""
    wide = branch.factor(4, jnp.float64)
    np.testing.assert_allclose(branch.factor(4, jnp.float32), wide, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda: branch.factor(4, jnp.float64))(), wide, rtol=1e-15)
    other = dataclasses.replace(branch, seed=10).factor(4, jnp.float64)
    assert abs(other - wide).min() > 1e-4


@pytest.mark.parametrize(
    ("branch", "size", "fan_in"), [(FrozenPointwise(64, groups=2), 16, 16), (LowRank(9), 64, 9)]
)
def test_frozen_factors_are_drawn_by_the_fan_in_of_their_layer(branch, size, fan_in):
    bound = fan_in**-0.5
    assert 0.95 * bound < abs(branch.factor(size, jnp.float32)).max() <= bound


def test_frozen_factor_is_the_same_in_every_version():
    """Pinned: scales found with a factor are worthless with another one."""
    factor = LowRank(1, seed=5).factor(3, jnp.float32)
    expected = [[0.044073105, 0.689256668, -0.383627892]]
    np.testing.assert_allclose(factor, expected, rtol=1e-6)


def test_frozen_values_are_uniform():
    values = np.asarray(LowRank(256).factor(256, jnp.float32)) * 16
    counts = np.histogram(values, 16, (-1, 1))[0]
    assert abs(counts / 4096 - 1).max() < 0.08
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.02


class Custom(Branch):
    """A branch of the kernel's shape; subclasses say what they do with the weight."""

    def weight_shape(self, kernel_shape):
        return kernel_shape


class TwoLayers(Custom):
    def embed(self, weight, kernel_shape):
        return jnp.einsum("hwim,hwmo->hwio", weight, weight)


class BatchNormInside(Custom):
    def embed(self, weight, kernel_shape):
        return weight / jnp.std(weight)


class Rectified(Custom):
    def embed(self, weight, kernel_shape):
        return jnp.maximum(weight, 0)


class Offset(Custom):
    def embed(self, weight, kernel_shape):
        return weight + 1


class WrongShape(Custom):
    def embed(self, weight, kernel_shape):
        return weight[..., :1]


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (TwoLayers(), "linear.*product"),
        (BatchNormInside(), "linear.*BatchNorm"),
        (Rectified(), "linear"),
        (Offset(), "constant"),
        (WrongShape(), r"\(1, 1, 4, 4\).*\(1, 1, 4, 1\)"),
        (
            "conv-bn",
            "Branch.*conv-bn",
        ),
        (Centre(3), r"Centre\(size=3\).*\(1, 1, 4, 4\)"),
    ],
)
def test_what_has_no_equivalence_is_refused_with_the_reason(branch, reason):
    with pytest.raises(ValueError, match=f"'odd'.*{reason}"):
        check_block({"full": Full(), "odd": branch}, (1, 1, 4, 4))


@pytest.mark.parametrize(
    ("branch", "shape"),
    [
        (Centre(5), (3, 3, 4, 4)),
        (Centre(2), (3, 3, 4, 4)),
        (Centre(1), (4, 4)),
        (Identity(), (3, 3, 4, 8)),
        (Identity(), (2, 2, 4, 4)),
        (Identity(groups=2), (3, 3, 4, 4)),
        (Window((1, 2)), (3, 3, 4, 4)),
        (Window((1,)), (3, 3, 4, 4)),
        (Dilated(3, 2), (3, 3, 4, 4)),
        (Dilated(2, 2), (4, 4, 4, 4)),
        (PooledPointwise(), (4, 4)),
        (FrozenPointwise(4, groups=2), (3, 3, 2, 3)),
        (BlockDiagonal(2), (4, 5)),
        (Diagonal(), (4, 5)),
        (Diagonal(), (1, 4, 4)),
        (FoldedConv((2, 2), (3, 3)), (8, 6)),
        (FoldedConv((2,), (3,), groups=3), (4, 12)),
        (FoldedDepthwise((2, 2), (3, 3)), (1, 1, 4, 6)),
        (FoldedDepthwise((2, 2), (3, 3)), (1, 1, 8, 8)),
        (FoldedDepthwise((2, 2), (3, 3)), (3, 3, 4, 8)),
        (LowRank(5), (4, 8)),
    ],
)
def test_branch_that_does_not_fit_names_the_kernel(branch, shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        branch.weight_shape(shape)


def test_empty_block_is_refused():
    with pytest.raises(ValueError, match=r"block.*none"):
        check_block({}, (3, 3, 4, 4))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_mask_of_a_placement_is_what_embed_makes_of_ones(kind):
    """Compared indices, the fast way, and padded ones, the way that states the branch."""
    shape = kernel_shape(LAYERS[kind])
    for branch in LAYERS[kind].block.values():
        if branch.placement:
            ones = np.ones(branch.weight_shape(shape), np.float32)
            both = lambda w, b=branch: (b.mask(shape, jnp.float32), b.embed(w, shape))  # noqa: E731
            mask, embedded = jax.jit(both)(ones)
            assert mask.dtype == jnp.float32
            np.testing.assert_array_equal(mask, embedded)


@pytest.mark.usefixtures("optimized")
def test_no_update_stores_a_mask():
    """Padded masks are stored once for all kernels of a shape, and read by each of them."""
    block = {"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}
    gradients = [jnp.full((3, 3, 64, 64), float(i)) for i in range(3)]
    scales = [{"conv3x3": g[0, 0, 0], "conv1x1": g[0, 0, 0] + 1} for g in gradients]
    mults = [branch_mult(block, s) for s in scales]

    def multiply(mults, gradients):
        return [mult(g) for mult, g in zip(mults, gradients, strict=True)]

    memory = jax.jit(multiply).lower(mults, gradients).compile().memory_analysis()
    assert memory.temp_size_in_bytes < gradients[0].nbytes / 2
