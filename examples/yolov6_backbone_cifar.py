"""RepOptimizer for YOLOv6's backbone: ``python examples/yolov6_backbone_cifar.py --data-dir=DIR``.

A classification head on EfficientRep, the backbone of a detector, on CIFAR-10 as TFDS prepares it;
without a folder on scikit-learn's handwritten digits, enlarged. All 3x3 layers get RepVGG's
branches: a search finds their scales, the plain backbone trains with multiplied gradients, and once
more without. Weights of the backbone then go into a detector's by name.
"""

import argparse

import numpy as np
import optax
from digits import load_digits, print_table, train
from flax import nnx

import repopt_jax
from repopt_jax.data import load_dataset

RATE = 0.05


class Classifier(nnx.Module):
    """The last map of the backbone, averaged, and a dense layer."""

    def __init__(self, name, rngs):
        network = repopt_jax.create_model(name, rngs=rngs)
        self.backbone = network.backbone
        self.head = nnx.Linear(network.neck.reduce_layer0.block.conv.in_features, 10, rngs=rngs)

    def __call__(self, images):
        """Logits."""
        return self.head(self.backbone(images)[-1].mean((1, 2)))


def load_images(folder, name):
    """Images and labels for training and for testing, 32x32 pixels from -1 to 1."""
    if folder is None:
        parts = load_digits()
        return [(2 * np.repeat(x, 4, 1).repeat(4, 2).repeat(3, 3) - 1, y) for x, y in parts]
    data = load_dataset(name, data_dir=folder, cache=True)
    return [
        ((part.images / 127.5 - 1).astype(np.float32), part.labels)
        for part in (data.train, data.eval)
    ]


def main(arguments=None):
    """Search, RepOptimizer, plain SGD."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", help="folder of prepared TFDS sets; none: digits")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--model", default="YOLOv6-N")
    parser.add_argument("--steps", type=int, default=400, help="of every training")
    options = parser.parse_args(arguments)
    data = load_images(options.data_dir, options.dataset)
    schedule = optax.cosine_decay_schedule(RATE, options.steps)
    sgd = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(schedule, 0.9, nesterov=True))

    model = Classifier(options.model, nnx.Rngs(0))
    blocks = repopt_jax.find_blocks(model.backbone, repopt_jax.repvgg_branches)
    blocks = {f"backbone/{path}": block for path, block in blocks.items()}  # as in a detector
    search = repopt_jax.search_network(model, blocks, rngs=nnx.Rngs(1))
    rows = [("search", "SGD, clipped", *train(search, sgd, data, options.steps))]
    scales = repopt_jax.searched_scales(search)

    target = repopt_jax.target_network(model, scales, blocks=blocks, rngs=nnx.Rngs(2))
    tx = repopt_jax.repopt_sgd(schedule, target.grad_mults())
    rows.append(("plain", "RepOptimizer", *train(target.model, tx, data, options.steps)))
    plain = Classifier(options.model, nnx.Rngs(2))
    rows.append(("plain", "SGD", *train(plain, sgd, data, options.steps)))

    print(scales.describe())
    print_table(rows)
    return target.model


if __name__ == "__main__":
    main()
