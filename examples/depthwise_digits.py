"""Any optimizer for a depthwise network of your own: ``python examples/depthwise_digits.py``.

A small MobileNet-like network in plain Flax NNX on scikit-learn's handwritten digits. Its 5x5
depthwise layers get a 3x3, a dilated and an identity branch, named by a pattern of paths. The
optimizer is AdamW with clipped gradients, for which no multiplier is exact: `reparameterize` is.
"""

import argparse

import jax
import optax
from digits import load_digits, print_table, train
from flax import nnx

import repopt_jax

WIDTH = 24
RATE = 1e-2


class Separable(nnx.Module):
    """A depthwise 5x5, then a 1x1 convolution."""

    def __init__(self, rngs):
        self.depthwise = nnx.Conv(
            WIDTH, WIDTH, (5, 5), feature_group_count=WIDTH, use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.pointwise = nnx.Conv(WIDTH, WIDTH, (1, 1), rngs=rngs)

    def __call__(self, x):
        """Run the block."""
        return jax.nn.relu(self.pointwise(self.norm(self.depthwise(x))))


class DepthwiseNet(nnx.Module):
    """Two blocks at 4x4 pixels."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, WIDTH, (2, 2), strides=2, rngs=rngs)
        self.body = nnx.List([Separable(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        """Logits."""
        x = jax.nn.relu(self.stem(x))
        for block in self.body:
            x = block(x)
        return self.head(x.mean((1, 2)))


BRANCHES = {
    "conv5x5": repopt_jax.Full(),
    "conv3x3": repopt_jax.Centre(3),
    "dilated": repopt_jax.Dilated(3, 2),
    "identity": repopt_jax.Identity(groups=WIDTH),
}


def main(arguments=None):
    """Search, RepOptimizer, plain AdamW."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="of every training")
    steps = parser.parse_args(arguments).steps
    data = load_digits()
    adamw = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.cosine_decay_schedule(RATE, steps),
            weight_decay=1e-2,
            mask=repopt_jax.weight_decay_mask,
        ),
    )
    rows = []

    # 1. Search: the same network with branches whose scales are trained.
    model = DepthwiseNet(nnx.Rngs(0))
    blocks = repopt_jax.find_blocks(model, {"*/depthwise": BRANCHES})
    search = repopt_jax.search_network(model, blocks, rngs=nnx.Rngs(1))
    rows.append(("search", "AdamW", *train(search, adamw, data, steps)))
    scales = repopt_jax.searched_scales(search)

    # 2. Target: the plain network, whose kernels move as their branches would.
    target = repopt_jax.target_network(model, scales, blocks=blocks, rngs=nnx.Rngs(2))
    tx = target.reparameterize(adamw)
    rows.append(("plain", "RepOptimizer", *train(target.model, tx, data, steps)))

    # 3. What the plain optimizer makes of the plain network.
    rows.append(("plain", "AdamW", *train(DepthwiseNet(nnx.Rngs(2)), adamw, data, steps)))

    print(scales.describe())
    print_table(rows)


if __name__ == "__main__":
    main()
