"""The published method: networks of RepVGG blocks under SGD and AdamW."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax.branches import Block, Centre, Full, Identity
from repopt_jax.check_equivalence.layers import METHODS
from repopt_jax.check_equivalence.training import Method, differences, start
from repopt_jax.models import create_model
from repopt_jax.transforms import repopt_sgd

if TYPE_CHECKING:
    from jaxtyping import Array

STEPS = 50
BATCH = 8
CLASSES = 5


def _sgd(momentum: float, nesterov: bool) -> Method:
    options = {"momentum": momentum, "nesterov": nesterov}
    with_mults = functools.partial(repopt_sgd, 0.05, **options)
    return Method(lambda: optax.sgd(0.05, **options), "linear", with_mults, 1e-12)


OPTIMIZERS = {
    "SGD": _sgd(0.0, False),
    "SGD momentum": _sgd(0.9, False),
    "SGD Nesterov": _sgd(0.9, True),
    "SGD Nesterov, decay": METHODS["multiplier: SGD"],
    "AdamW": METHODS["multiplier: AdamW"],
}


def _single_block(channels: int, stride: int) -> tuple[nnx.Module, dict[str, Block]]:
    """One convolution, ReLU and global average pooling."""
    conv = nnx.Conv(channels, CLASSES, (3, 3), stride, padding=1, use_bias=False, **_drawn())
    block = {"conv3x3": Full(), "conv1x1": Centre(1)}
    if channels == CLASSES and stride == 1:
        block["identity"] = Identity()
    return nnx.Sequential(conv, jax.nn.relu, lambda x: x.mean((1, 2))), {"layers/0": block}


def _seven_layers() -> tuple[nnx.Module, dict[str, Block]]:
    size = {"num_blocks": (1, 2, 2, 1), "widths": (4, 4, 6, 8, 8), "strides": (1, 2, 2, 1, 1)}
    model = create_model("RepOpt-VGG", num_classes=CLASSES, **size, **_drawn())
    return model, model.blocks()


def _drawn() -> dict[str, Any]:
    return {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}


# Name -> (makes a network and its blocks, input channels).
NETWORKS = {
    "block, identity": (lambda: _single_block(CLASSES, 1), CLASSES),
    "block, no identity": (lambda: _single_block(3, 1), 3),
    "block, stride 2": (lambda: _single_block(3, 2), 3),
    "RepOpt-VGG, 7 layers": (_seven_layers, 3),
}


def cases() -> Iterator[tuple[str, str, bool]]:
    """Every network under every optimizer, with scales of one sign and of both."""
    return itertools.product(NETWORKS, OPTIMIZERS, (False, True))


def _cross_entropy(net: nnx.Module, batch: tuple[Array, Array]) -> Array:
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(net(images), labels).mean()


def difference(network: str, optimizer: str, mixed: bool, steps: int = STEPS) -> float:
    """Largest relative difference of a kernel after `steps` updates; needs float64.

    `network` and `optimizer` are keys of `NETWORKS` and `OPTIMIZERS`. `mixed` gives the scales both
    signs.
    """
    make, channels = NETWORKS[network]
    plain, blocks = make()
    started = start(plain, blocks, mixed=mixed, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.normal(size=(steps, BATCH, 8, 8, channels)))
    labels = jnp.asarray(rng.integers(0, CLASSES, (steps, BATCH)))
    found = differences(*started, OPTIMIZERS[optimizer], _cross_entropy, (images, labels))
    return float(np.max(list(found.values())))  # NaN if one is NaN, unlike max
