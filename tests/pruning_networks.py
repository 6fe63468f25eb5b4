"""Networks of the original pruning code's results (`../shared/golden_family`), and their names."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repopt_jax.models.layers import BatchNorm, conv, linear
from repopt_jax.pruning import ChannelGroup
from repopt_jax.tree_paths import by_path, path_str

FAMILY = pathlib.Path(__file__).parents[2] / "shared" / "golden_family"
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "compactor": "compactor.pwc.weight",
}
STATISTICS = {"mean": "running_mean", "var": "running_var"}


def load_golden(name):
    """The arrays of one file of the original code's results, by name; skips without them."""
    if not FAMILY.is_dir():
        pytest.skip("the original code's results (../shared/golden_family) are not on this machine")
    with np.load(FAMILY / f"{name}.npz") as file:
        return dict(file)


def section(golden, prefix):
    """The arrays whose names start with `prefix`, without it."""
    return {n.removeprefix(prefix): a for n, a in golden.items() if n.startswith(prefix)}


def torch_name(path):
    """The name in torch of the parameter at `path`."""
    *parents, leaf = path.replace("/layer/", "/").split("/")
    if leaf == "compactor":
        parents = parents[:-1]
    return ".".join([*parents, (LEAVES | STATISTICS)[leaf]])


def from_torch(array):
    """A kernel in this project's layout: OIHW to HWIO, OI to IO."""
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, range(array.ndim)))


def to_paths(arrays, params):
    """Torch's arrays as a tree like `params`."""

    def find(path, leaf):
        array = from_torch(arrays[torch_name(path_str(path))])
        return jnp.asarray(array.reshape(leaf.shape), array.dtype)

    return jax.tree_util.tree_map_with_path(find, params)


def load(model, arrays):
    """Set a network's parameters and statistics to torch's; the network."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, to_paths(arrays, state))


def assert_network(model, arrays, rtol):
    """Every parameter and statistic is that of torch's `arrays`, and there are no others."""
    found = {torch_name(path): leaf for path, leaf in by_path(nnx.state(model)).items()}
    assert found.keys() == {name for name in arrays if name != "deps"}
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, from_torch(arrays[name]), rtol=rtol, atol=1e-12)


def nhwc(images):
    return jnp.asarray(images.transpose(0, 2, 3, 1), images.dtype)


class Unit(nnx.Module):
    """Convolution and BatchNorm."""

    def __init__(self, inputs, outputs, size, stride):
        types = {"dtype": None, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.conv = conv(inputs, outputs, size, stride, **types)
        self.bn = BatchNorm(outputs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.bn(self.conv(x))


class Block(nnx.Module):
    def __init__(self, inputs, hidden, outputs, stride):
        self.conv1 = Unit(inputs, hidden, 3, stride)
        self.conv2 = Unit(hidden, outputs, 3, 1)

    def __call__(self, x, shortcut):
        return jax.nn.relu(shortcut + self.conv2(jax.nn.relu(self.conv1(x))))


class Stage(nnx.Module):
    """Three blocks; the first stage starts with a convolution, the others with a projection."""

    def __init__(self, inputs, width, stride):
        if stride == 1:
            self.conv1 = Unit(inputs, width, 3, 1)
            inputs = width
        else:
            self.projection = Unit(inputs, width, 1, stride)
        self.block0 = Block(inputs, width, width, stride)
        self.block1 = Block(width, width, width, 1)
        self.block2 = Block(width, width, width, 1)

    def __call__(self, x):
        if hasattr(self, "projection"):
            x = self.block0(x, self.projection(x))
        else:
            x = jax.nn.relu(self.conv1(x))
            x = self.block0(x, x)
        for block in (self.block1, self.block2):
            x = block(x, x)
        return x


class CifarResNet(nnx.Module):
    """The ResNet of the C-SGD and ResRep results."""

    def __init__(self, widths=(4, 6, 8), classes=10):
        types = {"dtype": None, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.stage1 = Stage(3, widths[0], 1)
        self.stage2 = Stage(widths[0], widths[1], 2)
        self.stage3 = Stage(widths[1], widths[2], 2)
        self.linear = linear(widths[2], classes, **types)

    def __call__(self, images):
        x = self.stage3(self.stage2(self.stage1(images)))
        return self.linear(x.mean((1, 2)))


def unit(path):
    return f"{path}/conv", f"{path}/bn"


def cifar_resnet_channels():
    """Every stage's shortcut, by the stage's name, and the inside of every block."""
    groups = {}
    entries = {1: "stage1/conv1", 2: "stage2/projection", 3: "stage3/projection"}
    for stage, entry in entries.items():
        blocks = [f"stage{stage}/block{i}" for i in range(3)]
        layers = dict([unit(entry), *(unit(f"{block}/conv2") for block in blocks)])
        readers = [f"{block}/conv1/conv" for block in blocks[0 if stage == 1 else 1 :]]
        following = stage + 1
        if following <= 3:
            readers += [f"stage{following}/projection/conv", f"stage{following}/block0/conv1/conv"]
        else:
            readers.append("linear")
        groups[f"stage{stage}"] = ChannelGroup(layers, tuple(readers))
        for block in blocks:
            groups[block] = ChannelGroup(dict([unit(f"{block}/conv1")]), (f"{block}/conv2/conv",))
    return groups


def conv_paths():
    """The convolutions in the order in which the results count them."""
    paths = ["stage1/conv1"]
    for stage in (1, 2, 3):
        if stage > 1:
            paths.append(f"stage{stage}/projection")
        paths += [f"stage{stage}/block{i}/conv{j}" for i in range(3) for j in (1, 2)]
    return [f"{path}/conv" for path in paths]


class Sequential(nnx.Module):
    """The network of the AOFP results."""

    def __init__(self):
        self.c0 = Unit(3, 6, 3, 1)
        self.c1 = Unit(6, 8, 3, 2)
        self.c2 = Unit(8, 5, 3, 1)
        self.linear = linear(5, 5, dtype=None, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def __call__(self, images):
        x = jax.nn.relu(self.c1(jax.nn.relu(self.c0(images))))
        return self.linear(self.c2(x).mean((1, 2)))
