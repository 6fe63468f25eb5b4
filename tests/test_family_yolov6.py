"""Blocks of YOLOv6: folded kernels, biases and outputs are those of the authors' code."""

import re

import jax
import jax.numpy as jnp
import pytest
from family_blocks import (
    assert_equal,
    assert_layer,
    fold_at_once,
    images,
    layer_of,
    pair,
    read,
    relu,
    repvgg,
    run,
)

from repopt_jax import PooledPointwise, repvgg_branches

pytestmark = pytest.mark.usefixtures("x64")


def yolov6(state):
    """All layers of a YOLOv6 block, folded, by the authors' names in deployment."""
    train, layers = state.under("train/"), {}
    for name in train:
        if match := re.fullmatch(r"(.*)rbr_dense\.conv\.weight", name):
            block = train.under(match[1])
            stride = images(state).shape[1] // images(state, "output").shape[1]
            layers[f"{match[1]}rbr_reparam"] = repvgg(block, stride=stride)
        elif (match := re.fullmatch(r"(.*)conv\.weight", name)) and "rbr_" not in name:
            layers[f"{match[1]}conv"] = pair(train, f"{match[1]}conv", f"{match[1]}bn")
    for name, layer in layers.items():
        if f"deploy/{name}.weight" in state:
            assert_layer(layer, state, name)
    assert sum(n.startswith("deploy/") and "bias" in n for n in state) in (len(layers), 0)
    return train, layers


def pooled(x):
    """The largest of 5x5 pixels."""
    window, ones = (1, 5, 5, 1), (1, 1, 1, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, ones, "SAME")


def bottleneck(train, layers, prefix, x):
    """RepVGG blocks in a row and a shortcut with a learned factor."""
    y = x
    for name in sorted(n for n in layers if n.startswith(prefix)):
        y = relu(run(y, layers[name]))
    return y + train[f"{prefix}alpha"].item() * x


def forward(case, train, layers, x):
    """What the block `case` of YOLOv6 computes with folded layers."""

    def step(name, x):
        return relu(run(x, layers[name]))

    match case:
        case "repvgg_same" | "repvgg_stride2":
            return relu(run(x, layers["rbr_reparam"], 2 if case.endswith("2") else 1))
        case "bottlerep":
            return bottleneck(train, layers, "", x)
        case "repblock3":
            for name in ("conv1", "block.0", "block.1"):
                x = step(f"{name}.rbr_reparam", x)
            return x
        case "bepc3":
            y = step("cv1.block.conv", x)
            for prefix in ("m.conv1.", "m.block.0."):
                y = bottleneck(train, layers, prefix, y)
            return step("cv3.block.conv", jnp.concatenate([y, step("cv2.block.conv", x)], -1))
        case "mbla":
            first, *parts = jnp.split(step("cv1.conv", x), 3, -1)
            found = [first]
            for i, part in enumerate(parts):
                found.append(part)
                for j in range(i + 1):
                    found.append(bottleneck(train, layers, f"m.{i}.{j}.", found[-1]))
            return step("cv2.conv", jnp.concatenate(found, -1))
        case "simsppf":
            found = [step("sppf.cv1.block.conv", x)]
            for _ in range(3):
                found.append(pooled(found[-1]))
            return step("sppf.cv2.block.conv", jnp.concatenate(found, -1))
        case "simcspsppf":
            names = [f"cspsppf.cv{i}.block.conv" for i in range(8)]
            found = [step(names[4], step(names[3], step(names[1], x)))]
            for _ in range(3):
                found.append(pooled(found[-1]))
            y = step(names[6], step(names[5], jnp.concatenate(found, -1)))
            return step(names[7], jnp.concatenate([step(names[2], x), y], -1))


YOLOV6 = ("repvgg_same", "repvgg_stride2", "bottlerep", "repblock3", "bepc3", "mbla")


@pytest.mark.parametrize("case", [*YOLOV6, "simsppf", "simcspsppf"])
def test_yolov6(case):
    state = read("yolov6_blocks", case, 1e-3)
    found = forward(case, *yolov6(state), images(state))
    assert_equal(found, images(state, "output"))


@pytest.mark.parametrize("version", ["qarepvgg", "qarepvgg_v2"])
def test_qarepvgg(version):
    """BatchNorm on one branch and after the sum; the authors keep the second one."""
    state = read("yolov6_blocks", version, 1e-3)
    train = state.under("train/")
    kernel = train.kernel("rbr_dense.conv")
    block = repvgg_branches("", layer_of(kernel))
    weights = {"conv3x3": kernel, "conv1x1": train.kernel("rbr_1x1")}
    if version == "qarepvgg_v2":
        block["pooled"] = PooledPointwise()
        weights["pooled"] = jnp.eye(kernel.shape[-1])[None, None]
    norms = {"conv3x3": train.norm("rbr_dense.bn")}
    assert_layer(fold_at_once(block, weights, norms, kernel.shape), state, "rbr_reparam")
    layer = fold_at_once(block, weights, norms, kernel.shape, norm=train.norm("bn"))
    assert_equal(relu(run(images(state), layer)), images(state, "output"))


def upsampled(x, state, name):
    """A transposed 2x2 convolution with stride 2; there is nothing to fold."""
    y = jnp.einsum("nijc,coab->niajbo", x, state[f"{name}.weight"])
    n, i, a, j, b, out = y.shape
    return y.reshape(n, i * a, j * b, out) + state[f"{name}.bias"].reshape(1, 1, 1, -1)


def test_transpose():
    state = read("yolov6_blocks", "transpose", 1e-3)
    found = upsampled(images(state), state.under("deploy/"), "upsample_transpose")
    assert_equal(found, images(state, "output"))


def test_bifusion():
    state = read("yolov6_blocks", "bifusion", 1e-3)
    train = state.under("train/")
    small, middle, large = (images(state, f"input{i}") for i in range(3))

    def step(name, x, stride=1):
        return relu(run(x, pair(train, f"{name}.block.conv", f"{name}.block.bn"), stride))

    found = [
        upsampled(small, train, "upsample.upsample_transpose"),
        step("cv1", middle),
        step("downsample", step("cv2", large), 2),
    ]
    assert_equal(step("cv3", jnp.concatenate(found, -1)), images(state, "output"))
