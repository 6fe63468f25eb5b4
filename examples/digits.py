"""What the examples share: scikit-learn's handwritten digits, a training loop, a table."""

import time

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

BATCH = 64


def load_digits():
    """1397 images for training and 400 for testing, 8x8 pixels from 0 to 1."""
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, :, :, None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    return (images[400:], labels[400:]), (images[:400], labels[:400])


@nnx.jit
def train_step(model, optimizer, images, labels):
    """One update of `model`, in place."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def predict(model, images):
    """The class of the largest logit of every image."""
    return jnp.argmax(model(images), -1)


def train(model, tx, data, steps):
    """Train `model` in place with any Optax optimizer; test accuracy and seconds."""
    (images, labels), (test_images, test_labels) = data
    start = time.perf_counter()
    model.train()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = rng.integers(0, len(labels), BATCH)
        train_step(model, optimizer, images[batch], labels[batch])
    model.eval()
    accuracy = float((np.asarray(predict(model, test_images)) == test_labels).mean())
    return accuracy, time.perf_counter() - start


def print_table(rows):
    """Print network, optimizer, accuracy and seconds of each training."""
    print(f"\n{'network':<10}{'optimizer':<15}{'test accuracy':>14}{'seconds':>9}")
    for network, optimizer, accuracy, seconds in rows:
        print(f"{network:<10}{optimizer:<15}{accuracy:>14.1%}{seconds:>9.1f}")
