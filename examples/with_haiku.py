"""RepOptimizer for a Haiku network: ``python examples/with_haiku.py``."""

import haiku as hk
import jax
import jax.numpy as jnp
from optax_loop import train

import repopt_jax


def main(steps=10):
    """Train one convolution as its two branches would train; return the losses."""
    network = hk.without_apply_rng(hk.transform(lambda x: hk.Conv2D(4, 3, name="conv")(x)))
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    params = network.init(jax.random.key(0), images)
    blocks = {"conv": {"conv3x3": repopt_jax.Full(), "conv1x1": repopt_jax.Centre(1)}}
    scales = {"conv": {"conv3x3": jnp.full(4, 0.5), "conv1x1": jnp.ones(4)}}
    mults = repopt_jax.grad_mults(params, blocks, scales, kernel="w")
    tx = repopt_jax.repopt_sgd(0.1, mults, mask=repopt_jax.weight_decay_mask)

    def loss(params):
        return jnp.square(network.apply(params, images) - 1).mean()

    return train(tx, params, loss, steps)


if __name__ == "__main__":
    print(main())
