"""The presets: which layers of a network get which paper's branches, and what those compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repopt_jax import (
    Centre,
    FoldedConv,
    FoldedDepthwise,
    FrozenPointwise,
    Full,
    Identity,
    PooledPointwise,
    Window,
    acnet_branches,
    dbb_branches,
    find_blocks,
    init_weights,
    merge,
    mobileone_branches,
    repghost_branches,
    replknet_branches,
    repmlp_branches,
    repvgg_branches,
    search_network,
    searched_scales,
)


def conv(window=(3, 3), inputs=4, outputs=4, groups=1, **options):
    """A convolution without numbers."""
    options |= {"feature_group_count": groups}
    return nnx.eval_shape(
        lambda: nnx.Conv(inputs, outputs, window, **options, rngs=nnx.Rngs(0)),
    )


def dense(inputs, outputs):
    return nnx.eval_shape(lambda: nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0)))


def depthwise(**options):
    return conv(groups=4, **options)


VGG = {"conv3x3": Full(), "conv1x1": Centre(1)}
PLAIN, GROUPED, DEPTHWISE = ({"identity": Identity(groups=g)} for g in (1, 2, 4))
four = {f"conv{i}": Full() for i in range(4)}
CASES = {
    "RepVGG": (repvgg_branches, conv(), VGG | PLAIN),
    "RepVGG, grouped": (repvgg_branches, conv(groups=2), VGG | GROUPED),
    "RepVGG, depthwise": (repvgg_branches, depthwise(), VGG | DEPTHWISE),
    "RepVGG, dilated": (repvgg_branches, conv(kernel_dilation=2), VGG | PLAIN),
    "RepVGG, strided": (repvgg_branches, conv(strides=(1, 2)), VGG),
    "RepVGG, no strides": (repvgg_branches, conv(strides=None), VGG | PLAIN),
    "RepVGG, wider": (repvgg_branches, conv(outputs=8), VGG),
    "RepVGG, 1x1": (repvgg_branches, conv((1, 1)), None),
    "RepVGG, dense": (repvgg_branches, dense(4, 4), None),
    "ACNet": (
        acnet_branches,
        conv(strides=2, groups=2),
        {"square": Full(), "vertical": Window((3, 1)), "horizontal": Window((1, 3))},
    ),
    "ACNet, not square": (
        acnet_branches,
        depthwise(window=(5, 3)),
        {"square": Full(), "vertical": Window((5, 1)), "horizontal": Window((1, 3))},
    ),
    "ACNet, 1x1": (acnet_branches, conv((1, 1)), None),
    "ACNet, one row": (acnet_branches, conv((1, 3)), None),
    "ACNet, one axis": (acnet_branches, conv((3,)), None),
    "ACNet, dense": (acnet_branches, dense(4, 4), None),
    "DBB, grouped": (
        dbb_branches,
        conv((3, 5), outputs=8, strides=2, groups=2),
        {
            "conv": Full(),
            "conv1x1": Centre(1),
            "pooled": PooledPointwise(),
            "frozen": FrozenPointwise(4, groups=2),
        },
    ),
    "DBB, depthwise": (
        dbb_branches,
        depthwise(),
        {"conv": Full(), "pooled": PooledPointwise(), "frozen": FrozenPointwise(8, groups=4)},
    ),
    "DBB, two outputs per channel": (
        dbb_branches,
        depthwise(outputs=8),
        {
            "conv": Full(),
            "conv1x1": Centre(1),
            "pooled": PooledPointwise(),
            "frozen": FrozenPointwise(4, groups=4),
        },
    ),
    "DBB, features": (
        functools.partial(dbb_branches, features=12),
        depthwise(),
        {"conv": Full(), "pooled": PooledPointwise(), "frozen": FrozenPointwise(12, groups=4)},
    ),
    "DBB, 1x1": (dbb_branches, conv((1, 1)), None),
    "MobileOne": (
        mobileone_branches,
        depthwise(window=(5, 3), kernel_dilation=(1, 2)),
        four | {"conv1x1": Centre(1)} | DEPTHWISE,
    ),
    "MobileOne, strided": (
        functools.partial(mobileone_branches, copies=1),
        conv(strides=2),
        {"conv0": Full(), "conv1x1": Centre(1)},
    ),
    "MobileOne, 1x1": (mobileone_branches, conv((1, 1)), four | PLAIN),
    "MobileOne, 1x1, wider": (mobileone_branches, conv((1, 1), outputs=8), four),
    "MobileOne, dense": (mobileone_branches, dense(4, 4), None),
    "RepLKNet": (
        replknet_branches,
        depthwise(window=(13, 7)),
        {"large": Full(), "small": Centre(5)},
    ),
    "RepLKNet, small": (
        functools.partial(replknet_branches, small=3),
        conv(),
        {"large": Full(), "small": Centre(3)},
    ),
    "RepLKNet, too small": (replknet_branches, conv((7, 3)), None),
    "RepGhost": (repghost_branches, depthwise(window=(5, 5)), {"conv": Full()} | DEPTHWISE),
    "RepGhost, strided": (repghost_branches, depthwise(strides=2), None),
    "RepGhost, grouped": (repghost_branches, conv(groups=2), None),
    "RepGhost, wider": (repghost_branches, depthwise(outputs=8), None),
    "RepGhost, even": (repghost_branches, depthwise(window=(4, 4)), None),
    "RepMLP": (
        functools.partial(repmlp_branches, image=(2, 3)),
        conv((1, 1), 12, 12, groups=2),
        {
            "fc": Full(),
            "conv1x1": FoldedDepthwise((2, 3), (1, 1)),
            "conv3x3": FoldedDepthwise((2, 3), (3, 3)),
        },
    ),
    "RepMLP, dense": (
        functools.partial(repmlp_branches, image=[2, 3], windows=[5]),
        dense(12, 18),
        {"fc": Full(), "conv5x5": FoldedConv((2, 3), (5, 5))},
    ),
    "RepMLP, other groups": (
        functools.partial(repmlp_branches, image=(2, 3)),
        conv((1, 1), 12, 12),
        None,
    ),
    "RepMLP, other width": (functools.partial(repmlp_branches, image=(2, 3)), dense(12, 10), None),
    "RepMLP, 3x3": (functools.partial(repmlp_branches, image=(2, 2)), conv(), None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_gets_the_branches_of_the_paper(case):
    rule, layer, expected = CASES[case]
    found = rule("path", layer)
    assert found == expected
    for branch in (found or {}).values():
        branch.weight_shape(layer.kernel.shape)  # which refuses what does not fit


REFUSED = {
    "ACNet, 7x7": (acnet_branches, conv((7, 7)), r"1 < K < 7.*'a/b'.*7, 7"),
    "ACNet, even": (acnet_branches, conv((3, 4)), r"odd.*'a/b'.*3, 4"),
    "ACNet, dilated": (acnet_branches, conv(kernel_dilation=2), r"dilation.*'a/b'.*=2"),
    "DBB, even": (dbb_branches, conv((2, 3)), r"odd.*'a/b'.*2, 3"),
    "DBB, dilated": (dbb_branches, conv(kernel_dilation=(1, 2)), r"dilation.*'a/b'.*1, 2"),
    "DBB, features": (
        functools.partial(dbb_branches, features=3),
        conv(groups=2),
        r"features.*groups=2.*3.*'a/b'",
    ),
    "MobileOne, even": (mobileone_branches, conv((4, 3)), r"odd.*'a/b'.*4, 3"),
    "MobileOne, copies": (
        functools.partial(mobileone_branches, copies=0),
        conv(),
        r"copies.*1.*0",
    ),
    "RepLKNet, parity": (replknet_branches, conv((7, 8)), r"small=5.*even.*'a/b'.*7, 8"),
    "RepLKNet, small": (functools.partial(replknet_branches, small=0), conv(), r"small.*1.*0"),
    "RepMLP, image": (
        functools.partial(repmlp_branches, image=(0, 2)),
        dense(8, 8),
        r"image.*0, 2",
    ),
    "RepMLP, no image": (functools.partial(repmlp_branches, image=()), dense(8, 8), r"image.*\(\)"),
    "RepMLP, even": (
        functools.partial(repmlp_branches, image=(2, 2), windows=[2]),
        dense(8, 8),
        r"window.*odd.*2, 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_the_paper_cannot_treat_is_refused(case):
    rule, layer, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        rule("a/b", layer)


OWN = {
    "RepVGG, dilated": (repvgg_branches, (3, 3), {"kernel_dilation": 2}),
    "ACNet, not square, strided": (acnet_branches, (5, 3), {"strides": 2}),
    "DBB, not square, strided": (dbb_branches, (3, 5), {"strides": 2}),
    "MobileOne, not square, dilated": (mobileone_branches, (5, 3), {"kernel_dilation": 2}),
    "RepLKNet, not square, strided": (replknet_branches, (7, 9), {"strides": (1, 2)}),
}


def convolve(x, kernel, stride=(1, 1), dilation=(1, 1)):
    """A convolution padded as torch does for an odd window."""
    padding = [(d * (k // 2),) * 2 for k, d in zip(kernel.shape, dilation, strict=False)]
    return jax.lax.conv_general_dilated(
        x, kernel, stride, padding,
        rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def own_output(branch, x, weight, window, stride, dilation):
    """What the paper's own layers compute."""
    if isinstance(branch, Identity):
        return x * weight.reshape(1, 1, 1, -1)
    if isinstance(branch, PooledPointwise):
        each = jnp.ones((*window, 1, 1)) / np.prod(window)
        channels = jnp.split(convolve(x, weight), weight.shape[-1], -1)
        return jnp.concatenate([convolve(c, each, stride) for c in channels], -1)
    if isinstance(branch, FrozenPointwise):
        x = convolve(x, branch.factor(x.shape[-1], x.dtype)[None])
    return convolve(x, weight, stride, dilation)


@pytest.mark.parametrize("case", OWN)
def test_one_layer_computes_the_sum_of_the_papers_layers(case, x64):
    """Where windows are not square, or taps are dilated; strides and groups are in the goldens."""
    rule, window, options = OWN[case]
    layer = conv(window, **options)
    both = {k: (v, v) if isinstance(v, int) else v for k, v in options.items()}
    stride, dilation = (both.get(k, (1, 1)) for k in ("strides", "kernel_dilation"))
    block, shape = rule("", layer), layer.kernel.shape
    weights = init_weights(block, jax.random.key(0), shape, jnp.float64)
    rng = np.random.default_rng(0)
    scales = {name: rng.normal(size=shape[-1]) for name in block}

    @jax.jit
    def both(x, weights, scales):
        apart = sum(
            own_output(branch, x, weights[name], window, stride, dilation)
            * (scales[name].reshape(1, 1, 1, -1) if branch.scaled else 1)
            for name, branch in block.items()
        )
        return convolve(x, merge(block, weights, scales, shape), stride, dilation), apart

    found, expected = both(rng.normal(size=(2, 11, 9, 4)), weights, scales)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_rule_with_options_serves_a_whole_network():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
            self.body = nnx.List([nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)])
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.body[0](self.stem(x)).mean((1, 2)))

    model = Net(nnx.Rngs(0))
    blocks = find_blocks(model, functools.partial(mobileone_branches, copies=2))
    assert list(blocks) == ["body/0", "stem"]
    search = search_network(model, blocks, rngs=nnx.Rngs(1))
    outputs = nnx.eval_shape(lambda network, x: network(x), search, jnp.ones((1, 8, 8, 3)))
    assert outputs.shape == (1, 2)
    found = searched_scales(search)
    assert list(found["stem"]) == ["conv0", "conv1", "conv1x1"]
    assert list(found["body/0"]) == ["conv0", "conv1", "conv1x1", "identity"]
