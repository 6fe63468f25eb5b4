"""RepOptimizer for a Flax Linen network: ``python examples/with_linen.py``."""

import jax
import jax.numpy as jnp
from flax import linen
from optax_loop import train

import repopt_jax


def main(steps=10):
    """Train one convolution as its two branches would train; return the losses."""
    network = linen.Sequential([linen.Conv(4, (3, 3))])
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    params = network.init(jax.random.key(0), images)["params"]
    blocks = {"layers_0": {"conv3x3": repopt_jax.Full(), "conv1x1": repopt_jax.Centre(1)}}
    scales = {"layers_0": {"conv3x3": jnp.full(4, 0.5), "conv1x1": jnp.ones(4)}}
    mults = repopt_jax.grad_mults(params, blocks, scales)
    tx = repopt_jax.repopt_sgd(0.1, mults, mask=repopt_jax.weight_decay_mask)

    def loss(params):
        return jnp.square(network.apply({"params": params}, images) - 1).mean()

    return train(tx, params, loss, steps)


if __name__ == "__main__":
    print(main())
