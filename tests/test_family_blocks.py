"""Blocks of sibling papers: folded kernels, biases and outputs are those of the authors' code.

The files hold float64 results of each paper's own conversion. Every block is stated by its preset
and folded by `fold_block`; the folded layers then run on the authors' inputs.
"""

import jax
import numpy as np
import pytest
from family_blocks import (
    ACB,
    MOBILEONE,
    REPCONV,
    State,
    assert_equal,
    assert_layer,
    config,
    dbb,
    folded,
    gated,
    images,
    layer_of,
    normalize,
    pair,
    read,
    relu,
    replk,
    repmlp,
    repvgg,
    run,
)
from pruning_networks import load_golden

from repopt_jax import Identity, acnet_branches, mobileone_branches
from repopt_jax.deploy import fold_block
from repopt_jax.models.layers import BatchNorm

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("case", range(7))
def test_acnet(case):
    state = read("acb", f"case{case}")
    _, _, _, stride, padding, groups = config(state)
    train = state.under("train/")
    kernel = train.kernel("square_conv")
    block = acnet_branches("", layer_of(kernel, stride, groups))
    layer = folded(train, block, ACB, kernel.shape)
    assert_layer(layer, state, "fused_conv")
    assert_equal(run(images(state), layer, stride, padding, groups), images(state, "output"))


@pytest.mark.parametrize("case", range(8))
def test_dbb(case):
    state = read("dbb", f"case{case}")
    _, _, _, stride, padding, groups, internal = config(state)
    layer = dbb(state.under("train/"), stride, groups, internal)
    assert_layer(layer, state, "dbb_reparam")
    assert_equal(run(images(state), layer, stride, padding, groups), images(state, "output"))


def test_dbb_border_in_training():
    """Around the normalized images is the folded bias, by statistics that have just moved."""
    state = State(load_golden("dbb_bn_pad_train"))
    norm = BatchNorm(4, param_dtype=float)
    for name, value in vars(state.under("before/").norm("bn")).items():
        setattr(norm, name, value) if name == "epsilon" else getattr(norm, name).set_value(value)
    inner = norm(images(state))
    for name, value in vars(state.under("after/").norm("bn")).items():
        assert_equal(np.asarray(getattr(norm, name)), value)
    _, border = fold_block({"identity": Identity()}, {}, {"identity": norm}, (1, 1, 4, 4))
    expected = images(state, "output_train")
    padded = np.broadcast_to(border, expected.shape).copy()
    padded[:, 1:-1, 1:-1] = inner
    assert_equal(padded, expected)


@pytest.mark.parametrize("case", range(6))
def test_mobileone(case):
    state = read("mobileone_blocks", f"case{case}")
    _, _, _, stride, padding, groups, copies, se = config(state)
    train = state.under("train/")
    kernel = train.kernel("rbr_conv.0.conv")
    block = mobileone_branches("", layer_of(kernel, stride, groups), copies=copies)
    layer = folded(train, block, MOBILEONE, kernel.shape)
    assert_layer(layer, state, "reparam_conv")
    y = run(images(state), layer, stride, padding, groups)
    y = gated(y, train, "se.reduce", "se.expand") if se else y
    assert_equal(relu(y), images(state, "output"))


@pytest.mark.parametrize("case", range(6))
def test_repvgg(case):
    state = read("repvgg_blocks", f"case{case}")
    *_, stride, padding, groups, se = config(state)
    train = state.under("train/")
    layer = repvgg(train, stride=stride, groups=groups)
    assert_layer(layer, state, "rbr_reparam")
    y = run(images(state), layer, stride, padding, groups)
    y = gated(y, train, "se.down", "se.up") if se else y
    assert_equal(relu(y), images(state, "output"))


def test_repvgg_plus():
    state = read("repvgg_blocks", "plus_post_se")
    train = state.under("train/")
    layer = repvgg(train)
    assert_layer(layer, state, "rbr_reparam")
    y = gated(relu(run(images(state), layer)), train, "post_se.down", "post_se.up")
    assert_equal(y, images(state, "output"))


@pytest.mark.parametrize("case", range(3))
def test_repconv(case):
    state = read("yolov7_repconv", f"case{case}", 1e-3)
    _, _, stride, groups = config(state)
    layer = repvgg(state.under("train/"), REPCONV, stride, groups)
    assert_layer(layer, state, "rbr_reparam")
    y = jax.nn.silu(run(images(state), layer, stride, 1, groups))
    assert_equal(y, images(state, "output"))


@pytest.mark.parametrize("case", range(5))
def test_replknet(case):
    state = read("replk_blocks", f"conv{case}")
    channels, _, _, stride = config(state)
    layer = replk(state.under("train/"), stride)
    assert_layer(layer, state, "lkb_reparam")
    assert_equal(run(images(state), layer, stride, groups=channels), images(state, "output"))


def test_replknet_block_and_feed_forward():
    state = read("replk_blocks", "replkblock")
    train, x = state.under("train/"), images(state)
    y = normalize(x, train.norm("prelkb_bn"))
    y = relu(run(y, pair(train, "pw1.conv", "pw1.bn")))
    large = replk(train.under("large_kernel."))
    y = relu(run(y, large, groups=large[0].shape[-1]))
    y = run(y, pair(train, "pw2.conv", "pw2.bn"))
    assert_equal(x + y, images(state, "output"))
    state = read("replk_blocks", "convffn")
    train = state.under("train/")
    y = run(normalize(x, train.norm("preffn_bn")), pair(train, "pw1.conv", "pw1.bn"))
    y = run(jax.nn.gelu(y, approximate=False), pair(train, "pw2.conv", "pw2.bn"))
    assert_equal(x + y, images(state, "output"))


def patchwise(x, layer, image):
    """A dense layer over the pixels of every patch; channel ``c`` has set ``c mod sets``.

    The authors read what comes out in another order of patches and channels than what goes in:
    the channels of a set before the patches.
    """
    kernel, bias = layer
    pixels = int(np.prod(image))
    sets = kernel.shape[-1] // pixels
    (n, height, width, channels), (h, w) = x.shape, image
    parts = x.reshape(n, height // h, h, width // w, w, channels).transpose(0, 1, 3, 5, 2, 4)
    y = run(parts.reshape(-1, 1, 1, sets * pixels), (kernel, bias), groups=sets)
    y = y.reshape(n, channels // sets, height // h, width // w, sets, h, w)
    return y.transpose(0, 2, 5, 3, 6, 1, 4).reshape(x.shape)


@pytest.mark.parametrize("case", range(4))
def test_repmlp(case):
    state = read("repmlp_blocks", f"block{case}")
    _, *image, _ = config(state)
    train, x = state.under("train/"), images(state)
    layer = repmlp(train, image, [int(k) for k in state["conv_kernels"]])
    assert_layer(layer, state, "fc3")
    y = gated(patchwise(x, layer, image), train, "gp.fc1", "gp.fc2", pooled=x)
    assert_equal(y, images(state, "output"))


def test_repmlp_unit():
    state = read("repmlp_blocks", "unit")
    train, x = state.under("train/"), images(state)
    inner, ffn = train.under("repmlp_block."), train.under("ffn_block.")
    y = normalize(x, train.norm("prebn1"))
    mixed = patchwise(y, repmlp(inner, (4, 4), (1, 3)), (4, 4))
    x = x + gated(mixed, inner, "gp.fc1", "gp.fc2", pooled=y)
    y = run(normalize(x, train.norm("prebn2")), pair(ffn, "ffn_fc1.conv", "ffn_fc1.bn"))
    y = run(jax.nn.gelu(y, approximate=False), pair(ffn, "ffn_fc2.conv", "ffn_fc2.bn"))
    assert_equal(x + y, images(state, "output"))
