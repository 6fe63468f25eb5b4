"""The published method: networks of RepVGG blocks under SGD and AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from repopt_jax.branches import Block, Centre, Full, Identity, grad_mults
from repopt_jax.check_equivalence.training import differences, random_scales, train
from repopt_jax.models import create_model, search_layers, search_network
from repopt_jax.transforms import repopt_adamw, repopt_sgd, weight_decay_mask
from repopt_jax.tree_paths import layer_at

if TYPE_CHECKING:
    from jaxtyping import Array, Float

STEPS = 50
BATCH = 8
CLASSES = 5

# Name -> (RepOptimizer, rule of its multipliers, options, the largest difference that passes).
OPTIMIZERS = {
    "SGD": (repopt_sgd, "linear", {"momentum": 0.0, "nesterov": False}, 1e-12),
    "SGD momentum": (repopt_sgd, "linear", {"nesterov": False}, 1e-12),
    "SGD Nesterov": (repopt_sgd, "linear", {}, 1e-12),
    "SGD Nesterov, decay": (repopt_sgd, "linear", {"weight_decay": 1e-2}, 1e-12),
    # AdamW adds a constant epsilon to the root of the second moment, which is not scale-free.
    "AdamW": (repopt_adamw, "direction", {"weight_decay": 1e-2}, 1e-5),
}
LEARNING_RATES = {"linear": 0.05, "direction": 1e-3}


class SingleBlock(nnx.Module):
    """One convolution, ReLU and global average pooling."""

    def __init__(self, in_features: int, stride: int):
        self.conv = nnx.Conv(
            in_features,
            CLASSES,
            (3, 3),
            stride,
            padding=((1, 1), (1, 1)),
            use_bias=False,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        self.has_identity = in_features == CLASSES and stride == 1

    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch out"]:
        """Logits."""
        return jax.nn.relu(self.conv(x)).mean((1, 2))

    def blocks(self) -> dict[str, Block]:
        """The branches of the convolution."""
        block = {"conv3x3": Full(), "conv1x1": Centre(1)}
        return {"conv": {**block, "identity": Identity()} if self.has_identity else block}


def _small_network() -> nnx.Module:
    return create_model(
        "RepOpt-VGG",
        num_classes=CLASSES,
        num_blocks=(1, 2, 2, 1),
        widths=(4, 4, 6, 8, 8),
        strides=(1, 2, 2, 1, 1),
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )


# Name -> (network, input channels).
NETWORKS: dict[str, tuple[Callable[[], nnx.Module], int]] = {
    "block, identity": (lambda: SingleBlock(CLASSES, 1), CLASSES),
    "block, no identity": (lambda: SingleBlock(3, 1), 3),
    "block, stride 2": (lambda: SingleBlock(3, 2), 3),
    "RepOpt-VGG, 7 layers": (_small_network, 3),
}


def cases() -> Iterator[tuple[str, str, bool]]:
    """Every network under every optimizer, with scales of one sign and of both."""
    return itertools.product(NETWORKS, OPTIMIZERS, (False, True))


def cross_entropy(net: nnx.Module, batch: tuple[Array, Array]) -> Array:
    """Mean loss of a batch of images and labels."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(net(images), labels).mean()


def difference(network: str, optimizer: str, mixed: bool, steps: int = STEPS) -> float:
    """Largest ``max|W_target - W_csla| / max|W_csla|`` over the kernels; needs float64.

    Args:
      network: key of `NETWORKS`.
      optimizer: key of `OPTIMIZERS`.
      mixed: whether the scales have both signs.
      steps: updates of both networks.
    """
    make, channels = NETWORKS[network]
    factory, rule, options, _ = OPTIMIZERS[optimizer]
    plain = make()
    blocks = plain.blocks()
    scales = random_scales(plain, blocks, mixed=mixed)
    csla = search_network(plain, blocks, kind="csla", scales=scales, rngs=nnx.Rngs(1))
    for path, layer in search_layers(csla).items():
        layer_at(plain, path).kernel[...] = layer.kernel
    mults = grad_mults(nnx.state(plain, nnx.Param), blocks, scales, rule)
    no_mults = jax.tree.map(lambda _: None, nnx.state(csla, nnx.Param))

    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.normal(size=(steps, BATCH, 8, 8, channels)))
    labels = jnp.asarray(rng.integers(0, CLASSES, (steps, BATCH)))
    trained = [
        train(
            model,
            factory(LEARNING_RATES[rule], its_mults, mask=weight_decay_mask, **options),
            cross_entropy,
            (images, labels),
        )
        for model, its_mults in ((plain, mults), (csla, no_mults))
    ]
    return max(differences(*trained).values())
