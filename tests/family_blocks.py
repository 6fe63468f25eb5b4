"""Reads the blocks of sibling papers (`../shared/golden_family`), folds them and runs them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pruning_networks import load_golden, section

from repopt_jax import (
    Full,
    Identity,
    dbb_branches,
    replknet_branches,
    repmlp_branches,
    repvgg_branches,
)
from repopt_jax.deploy import fold_block, fold_pointwise

relu = jax.nn.relu

# Branch -> the authors' names of its layer and of its BatchNorm.
ACB = {
    "square": ("square_conv", "square_bn"),
    "vertical": ("ver_conv", "ver_bn"),
    "horizontal": ("hor_conv", "hor_bn"),
}
MOBILEONE = {f"conv{i}": (f"rbr_conv.{i}.conv", f"rbr_conv.{i}.bn") for i in range(4)}
MOBILEONE |= {"conv1x1": ("rbr_scale.conv", "rbr_scale.bn"), "identity": (None, "rbr_skip")}
REPVGG = {
    "conv3x3": ("rbr_dense.conv", "rbr_dense.bn"),
    "conv1x1": ("rbr_1x1.conv", "rbr_1x1.bn"),
    "identity": (None, "rbr_identity"),
}
REPCONV = {
    "conv3x3": ("rbr_dense.0", "rbr_dense.1"),
    "conv1x1": ("rbr_1x1.0", "rbr_1x1.1"),
    "identity": (None, "rbr_identity"),
}
REPLK = {
    "large": ("lkb_origin.conv", "lkb_origin.bn"),
    "small": ("small_conv.conv", "small_conv.bn"),
}
REPMLP = {f"conv{k}x{k}": (f"repconv{k}.conv", f"repconv{k}.bn") for k in (1, 3, 5)}
REPMLP |= {"fc": ("fc3", "fc3_bn")}
DBB = {
    "conv": ("dbb_origin.conv", "dbb_origin.bn"),
    "conv1x1": ("dbb_1x1.conv", "dbb_1x1.bn"),
    "pooled": (None, "dbb_avg.avgbn"),
    "frozen": (None, "dbb_1x1_kxk.bn2"),
}


class State(dict):
    """Arrays by the authors' names; `epsilon` is that of their BatchNorms."""

    def __init__(self, arrays, epsilon=1e-5):
        super().__init__(arrays)
        self.epsilon = epsilon

    def under(self, prefix):
        """The arrays under a name, without it."""
        return State(section(self, prefix), self.epsilon)

    def kernel(self, name):
        return self[f"{name}.weight"].transpose(2, 3, 1, 0)

    def layer(self, name):
        return self.kernel(name), self[f"{name}.bias"]

    def norm(self, name):
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        arrays = {ours: self[f"{name}.{theirs}"] for ours, theirs in names.items()}
        return types.SimpleNamespace(**arrays, epsilon=self.epsilon)


def read(file, case, epsilon=1e-5):
    """A case of a file of the authors' results; skips without them."""
    return State(section(load_golden(file), f"{case}/"), epsilon)


def layer_of(kernel, stride=1, groups=1):
    """The plain layer with this kernel, without numbers."""
    *window, inputs, outputs = kernel.shape
    size = (inputs * groups, outputs, window, stride)
    return nnx.eval_shape(lambda: nnx.Conv(*size, feature_group_count=groups, rngs=nnx.Rngs(0)))


def fold_at_once(*args, **kwargs):
    """`fold_block` as one program, where JAX would compile one for every operation."""
    return jax.jit(lambda: fold_block(*args, **kwargs))()


def folded(state, block, names, shape, *, weights=None, biases=None, norm=None):
    """Kernel and bias of `block`, its parts read by `names`."""
    layers = {b: state.kernel(names[b][0]) for b in block if names[b][0]}
    norms = {b: state.norm(names[b][1]) for b in block if names[b][1]}
    weights = {**layers, **(weights or {})}
    return fold_at_once(block, weights, norms, shape, biases=biases, norm=norm)


def pair(state, layer, norm):
    """A layer with the BatchNorm after it."""
    kernel = state.kernel(layer)
    norms = {"conv": state.norm(norm)}
    return fold_at_once({"conv": Full()}, {"conv": kernel}, norms, kernel.shape)


def repvgg(state, names=REPVGG, stride=1, groups=1):
    kernel = state.kernel(names["conv3x3"][0])
    block = repvgg_branches("", layer_of(kernel, stride, groups))
    return folded(state, block, names, kernel.shape)


def replk(state, stride=1):
    """A large kernel, with a small one where the file has it."""
    kernel = state.kernel(REPLK["large"][0])
    block = {"large": Full()}
    if "small_conv.conv.weight" in state:
        small = state.kernel(REPLK["small"][0]).shape[0]
        block = replknet_branches("", layer_of(kernel, stride, kernel.shape[-1]), small=small)
    return folded(state, block, REPLK, kernel.shape)


def repmlp(state, image, windows):
    kernel = state.kernel("fc3")
    layer = layer_of(kernel, groups=kernel.shape[-1] // kernel.shape[-2])
    block = repmlp_branches("", layer, image=image, windows=windows)
    return folded(state, block, REPMLP, kernel.shape)


def dbb(state, stride, groups, internal):
    """Two branches of the block are two layers, whose first has a BatchNorm of its own."""
    kernel = state.kernel("dbb_origin.conv")
    block = dict(dbb_branches("", layer_of(kernel, stride, groups), features=internal or None))
    weights, biases = {"pooled": jnp.ones(block["pooled"].weight_shape(kernel.shape))}, {}
    if "dbb_avg.conv.weight" in state:  # not in depthwise blocks
        weights["pooled"], biases["pooled"] = pair(state, "dbb_avg.conv", "dbb_avg.bn.bn")
    two = state.under("dbb_1x1_kxk.")
    assert two.kernel("conv2").shape == block["frozen"].weight_shape(kernel.shape)
    block["frozen"] = Full()  # the product of both layers, of which none has to be frozen
    added = "idconv1.weight" in two
    first = {"conv": Full(), **({"identity": Identity(groups=groups)} if added else {})}
    weight = two.kernel("idconv1" if added else "conv1")
    pointwise = fold_at_once(first, {"conv": weight}, {}, weight.shape, norm=two.norm("bn1.bn"))
    joined = fold_pointwise(two.kernel("conv2"), *pointwise, groups)
    weights["frozen"], biases["frozen"] = joined
    return folded(state, block, DBB, kernel.shape, weights=weights, biases=biases)


@functools.partial(jax.jit, static_argnames=("stride", "padding", "groups"))
def run(x, layer, stride=1, padding=None, groups=1):
    """A folded layer on images in NHWC."""
    kernel, bias = layer
    padding = kernel.shape[0] // 2 if padding is None else padding
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip
    return y + bias.reshape(1, 1, 1, -1)


def normalize(x, norm):
    """A BatchNorm that no layer comes before."""
    row = {k: v.reshape(1, 1, 1, -1) for k, v in vars(norm).items() if k != "epsilon"}
    return (x - row["mean"]) / jnp.sqrt(row["var"] + norm.epsilon) * row["scale"] + row["bias"]


def gated(x, state, first, second, pooled=None):
    """Squeeze-excite."""
    mean = (x if pooled is None else pooled).mean((1, 2), keepdims=True)
    hidden = relu(run(mean, state.layer(first)))
    return x * jax.nn.sigmoid(run(hidden, state.layer(second)))


def images(state, name="input"):
    return state[name].transpose(0, 2, 3, 1)


def assert_equal(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()


def assert_layer(layer, state, name):
    for found, expected in zip(layer, state.under("deploy/").layer(name), strict=True):
        assert_equal(found, expected)


def config(state):
    return [int(value) for value in state["config"]]
