"""RepOptimizer for a ResNet of your own: ``python examples/resnet_digits.py``.

A small residual network in plain Flax NNX, which knows nothing of branches, on scikit-learn's
handwritten digits. Its 3x3 layers get RepVGG's branches: first a search finds their scales, then
the plain network trains with multiplied gradients (SGD), and once more without for comparison.
"""

import argparse

import jax
import optax
from digits import load_digits, print_table, train
from flax import nnx

import repopt_jax

RATE = 0.05
DECAY = 1e-4


class Residual(nnx.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, width, rngs):
        self.conv1 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        """Run the block."""
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        return jax.nn.relu(x + self.bn2(self.conv2(y)))


class ResNet(nnx.Module):
    """Two stages at 8x8 and 4x4 pixels."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.stage1 = Residual(16, rngs)
        self.down = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.stage2 = Residual(32, rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        """Logits."""
        x = self.stage1(jax.nn.relu(self.stem(x)))
        x = self.stage2(jax.nn.relu(self.down(x)))
        return self.head(x.mean((1, 2)))


def main(arguments=None):
    """Search, RepOptimizer, plain SGD."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="of every training")
    steps = parser.parse_args(arguments).steps
    data = load_digits()
    schedule = optax.cosine_decay_schedule(RATE, steps)
    decay = {"weight_decay": DECAY, "mask": repopt_jax.weight_decay_mask}
    plain_sgd = optax.chain(
        optax.add_decayed_weights(DECAY, repopt_jax.weight_decay_mask),
        optax.sgd(schedule, 0.9, nesterov=True),
    )
    rows = []

    # 1. Search: the same network with branches whose scales are trained.
    model = ResNet(nnx.Rngs(0))
    blocks = repopt_jax.find_blocks(model, repopt_jax.repvgg_branches)
    search = repopt_jax.search_network(model, blocks, rngs=nnx.Rngs(1))
    clipped = optax.chain(optax.clip_by_global_norm(5.0), plain_sgd)
    rows.append(("search", "SGD, clipped", *train(search, clipped, data, steps)))
    scales = repopt_jax.searched_scales(search)

    # 2. Target: the plain network, started and trained as the scales say.
    target = repopt_jax.target_network(model, scales, blocks=blocks, rngs=nnx.Rngs(2))
    tx = repopt_jax.repopt_sgd(schedule, target.grad_mults(), **decay)
    rows.append(("plain", "RepOptimizer", *train(target.model, tx, data, steps)))

    # 3. What the plain optimizer makes of the plain network.
    rows.append(("plain", "SGD", *train(ResNet(nnx.Rngs(2)), plain_sgd, data, steps)))

    print(scales.describe())
    print_table(rows)


if __name__ == "__main__":
    main()
