"""RepOptimizer for a Keras network on JAX: ``python examples/with_keras.py``."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import jax
import jax.numpy as jnp
import keras
from optax_loop import train

import repopt_jax


def main(steps=10):
    """Train one convolution as its two branches would train; return the losses."""
    keras.utils.set_random_seed(0)
    conv = keras.layers.Conv2D(4, 3, padding="same", name="conv")
    model = keras.Sequential([keras.layers.Input((8, 8, 3)), conv], name="net")
    paths = [variable.path for variable in model.trainable_variables]
    params = {variable.path: variable.value for variable in model.trainable_variables}
    blocks = {"net/conv": {"conv3x3": repopt_jax.Full(), "conv1x1": repopt_jax.Centre(1)}}
    scales = {"net/conv": {"conv3x3": jnp.full(4, 0.5), "conv1x1": jnp.ones(4)}}
    mults = repopt_jax.grad_mults(params, blocks, scales)
    tx = repopt_jax.repopt_sgd(0.1, mults, mask=repopt_jax.weight_decay_mask)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))

    def loss(params):
        outputs, _ = model.stateless_call([params[path] for path in paths], [], images)
        return jnp.square(outputs - 1).mean()

    return train(tx, params, loss, steps)


if __name__ == "__main__":
    print(main())
