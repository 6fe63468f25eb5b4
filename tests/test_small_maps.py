"""Convolutions of small maps are the same convolutions, computed otherwise on CPU alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import repopt_jax
from repopt_jax.models.layers import conv
from repopt_jax.models.small_maps import conv_general_dilated
from repopt_jax.training.devices import make_mesh

LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
# height, width, size of the window, strides, padding
SMALL = {
    "one pixel": (1, 1, 3, (1, 1), ((1, 1), (1, 1))),
    "one pixel of four": (2, 2, 3, (2, 2), ((1, 1), (1, 1))),
    "four pixels": (2, 2, 3, (1, 1), ((1, 1), (1, 1))),
    "even, halved": (4, 4, 3, (2, 2), ((1, 1), (1, 1))),
    "odd, halved": (3, 3, 3, (2, 2), ((1, 1), (1, 1))),
    "a row": (1, 7, 3, (1, 1), ((1, 1), (1, 1))),
    "not square": (3, 5, 3, (2, 1), ((1, 1), (0, 0))),
    "uneven padding": (2, 3, 3, (1, 2), ((2, 0), (0, 1))),
    "wide window": (5, 4, 5, (2, 1), ((2, 2), (2, 2))),
    "even window": (3, 3, 4, (1, 1), ((2, 1), (1, 2))),
    "no padding": (3, 4, 3, (1, 1), ((0, 0), (0, 0))),
    "third pixel": (4, 7, 3, (3, 3), ((1, 1), (1, 1))),
}


def arguments(height, width, size, dtype=jnp.float64, batch=3):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, height, width, 4)), dtype)
    return x, jnp.asarray(rng.normal(size=(size, size, 4, 6)), dtype)


def both(strides, padding):
    """The function under test and JAX's own."""
    options = {"window_strides": strides, "padding": padding, **LAYOUT}
    return [
        functools.partial(function, **options)
        for function in (conv_general_dilated, jax.lax.conv_general_dilated)
    ]


def with_gradients(function, x, kernel):
    """Output, and the pull-backs of its cosine, which no two taps share."""
    out, pull = jax.vjp(function, x, kernel)
    return out, *pull(jnp.cos(out))


def operations(function, *args, platform="cpu"):
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    names = ("convolution", "dot_general", "concatenate")
    return {n: len(re.findall(rf"stablehlo\.{n}\b", text)) for n in names}


def assert_close(found, wanted, bound=1e-12):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * abs(b).max())


@pytest.mark.parametrize("case", SMALL)
def test_output_and_both_gradients_equal_jax_own(case, x64):
    height, width, size, strides, padding = SMALL[case]
    args = arguments(height, width, size)
    ours, native = both(strides, padding)
    assert operations(ours, *args)["convolution"] == 0  # or the test would compare nothing
    found, wanted = (jax.jit(functools.partial(with_gradients, f))(*args) for f in (ours, native))
    assert_close(found, wanted)


def test_every_transformation_equals_jax_own(x64):
    """Forward mode, second order, batching and transposition, which a custom rule would lose."""
    x, kernel = arguments(2, 2, 3)
    ours, native = both((1, 1), ((1, 1), (1, 1)))

    def transformed(function, x, kernel):
        def loss(x, kernel):
            return jnp.sin(function(x, kernel)).sum()

        images, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel**2])
        out = function(x, kernel)
        return (
            jax.jvp(function, (x, kernel), (jnp.cos(x), jnp.cos(kernel))),
            jax.grad(lambda x: (jax.grad(loss)(x, kernel) ** 2).sum())(x),
            jax.jacfwd(jax.grad(loss, argnums=1), argnums=0)(x, kernel),
            jax.vmap(jax.grad(loss, argnums=(0, 1)))(images, kernels),
            jax.vmap(function, (None, 0), 3)(x, kernels),
            jax.linear_transpose(lambda x: function(x, kernel), x)(jnp.cos(out)),
            jax.linear_transpose(lambda kernel: function(x, kernel), kernel)(jnp.cos(out)),
            jax.grad(jax.checkpoint(loss))(x, kernel),
        )

    found, wanted = (jax.jit(transformed, static_argnums=0)(f, x, kernel) for f in (ours, native))
    assert_close(found, wanted)


@pytest.mark.parametrize(
    ("shape", "channels", "options"),
    [
        ((1, 3, 3, 4), 4, {}),  # as many pixels as the window has
        ((1, 2, 5, 4), 4, {}),
        ((1, 2, 2, 4), 2, {"feature_group_count": 2}),
        ((1, 2, 2, 4), 4, {"rhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))}),
        ((1, 2, 2, 4), 4, {"lhs_dilation": (2, 2), "padding": ((0, 0), (0, 0))}),
        ((1, 2, 2, 4), 4, {"padding": "SAME"}),
    ],
)
def test_what_is_not_slow_or_not_plain_is_left_to_jax(shape, channels, options, x64):
    options = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), **LAYOUT} | options
    x, kernel = jnp.ones(shape), jnp.ones((3, 3, channels, 4))
    ours = functools.partial(conv_general_dilated, **options)
    assert operations(ours, x, kernel) == {"convolution": 1, "dot_general": 0, "concatenate": 0}
    native = jax.lax.conv_general_dilated(x, kernel, **options)
    assert_close(ours(x, kernel), native)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_keep_their_three_convolutions(platform):
    args = arguments(2, 2, 3, jnp.float32)
    ours, native = (functools.partial(with_gradients, f) for f in both((1, 1), ((1, 1), (1, 1))))
    wanted = {"convolution": 3, "dot_general": 0, "concatenate": 0}
    assert operations(ours, *args, platform=platform) == wanted
    assert operations(native, *args, platform=platform) == wanted


@pytest.mark.parametrize("kind", ["target", "hs", "csla", "repvgg"])
def test_every_kind_of_network_uses_it(kind):
    """Stages 1 to 4 at 8 px: maps of 2, 1, 1 and 1 pixels a side."""
    size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 4, 4), "num_classes": 3}
    create = functools.partial(repopt_jax.create_model, "RepOpt-VGG", kind, **size)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))))

    def run(state, images):
        return nnx.merge(graphdef, state)(images)

    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    found = operations(run, state, images)["convolution"]
    # Stage 0, whose map has 16 pixels; RepVGG has a 1x1 convolution in each of five blocks too.
    assert found == {"repvgg": 6}.get(kind, 1)


def test_a_layer_has_a_bias_and_a_type_as_before(x64):
    layer = conv(
        4, 6, 3, use_bias=True, dtype=jnp.float32, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    x = arguments(2, 2, 3)[0]
    found = layer(x)
    layer.conv_general_dilated = jax.lax.conv_general_dilated
    assert_close(found, layer(x), 1e-6)


@pytest.mark.parametrize(
    ("case", "taps"), [("one pixel", 1), ("one pixel of four", 4), ("a row", 3), ("four pixels", 9)]
)
def test_taps_that_meet_padding_alone_are_left_out(case, taps):
    height, width, size, strides, padding = SMALL[case]
    x, kernel = arguments(height, width, size, jnp.float32)
    ours, _ = both(strides, padding)
    compiled = jax.jit(ours).lower(x, kernel).compile()
    assert (
        compiled.cost_analysis()["flops"]
        == 2 * taps * kernel[0, 0].size * ours(x, kernel)[..., 0].size
    )


def test_the_backward_pass_keeps_images_and_kernel_alone():
    """Not the product's operand, nine times the images."""
    x, kernel = arguments(2, 2, 3, jnp.float32)
    ours, _ = both((1, 1), ((1, 1), (1, 1)))
    kept = jax.tree.leaves(jax.vjp(ours, x, kernel)[1])
    assert sum(array.size for array in kept) <= x.size + kernel.size + 1  # the platform's number


def test_strides_longer_than_the_map_are_left_to_jax(x64):
    """Between the taps that meet the image there may be others that meet nothing but padding."""
    args = arguments(1, 1, 3)
    ours, native = both((2, 2), ((2, 2), (2, 2)))
    assert operations(ours, *args)["convolution"] == 1
    np.testing.assert_array_equal(ours(*args), native(*args))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_narrow_types_are_rounded_no_more_than_by_jax(dtype, x64):
    x, kernel = arguments(2, 2, 3, dtype, batch=32)
    ours, native = both((1, 1), ((1, 1), (1, 1)))
    cotangent = jnp.cos(native(x, kernel))
    wide = [a.astype(jnp.float64) for a in (x, kernel, cotangent)]

    def pulled(function, x, kernel, cotangent):
        return jax.device_get(jax.vjp(function, x, kernel)[1](cotangent))

    exact = pulled(native, *wide)
    errors = [
        [
            float(np.square(a.astype(np.float64) - b).mean() ** 0.5)
            for a, b in zip(pulled(function, x, kernel, cotangent), exact, strict=True)
        ]
        for function in (ours, native)
    ]
    assert all(a <= 1.1 * b for a, b in zip(*errors, strict=True)), errors


@pytest.mark.usefixtures("optimized")
def test_eight_devices_compute_it_apart(x64):
    """Images over devices, kernel over output channels: the kernel's gradient alone is a sum."""
    mesh = make_mesh(2)
    x, kernel = arguments(4, 4, 3, batch=16)
    ours, native = both((2, 2), ((1, 1), (1, 1)))
    wanted = with_gradients(native, x, kernel)
    place = functools.partial(NamedSharding, mesh)
    x = jax.device_put(x, place(PartitionSpec(("data", "fsdp"))))
    kernel = jax.device_put(kernel, place(PartitionSpec()))
    step = jax.jit(functools.partial(with_gradients, ours)).lower(x, kernel).compile()
    assert_close(step(x, kernel), wanted)
    pattern = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    assert re.findall(pattern, step.as_text()) == ["all-reduce"]
    kernel = jax.device_put(kernel, place(PartitionSpec(None, None, None, "fsdp")))
    assert_close(jax.jit(functools.partial(with_gradients, ours))(x, kernel), wanted)
