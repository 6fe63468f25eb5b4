"""RepOptimizer for an Equinox network: ``python examples/with_equinox.py``."""

import equinox as eqx
import jax
import jax.numpy as jnp
from optax_loop import train

import repopt_jax


def main(steps=10):
    """Train one convolution as its two branches would train; return the losses."""
    model = eqx.nn.Conv2d(3, 4, 3, padding=1, key=jax.random.key(0))
    params, static = eqx.partition({"conv": model}, eqx.is_array)
    blocks = {"conv": {"conv3x3": repopt_jax.Full(), "conv1x1": repopt_jax.Centre(1)}}
    scales = {"conv": {"conv3x3": jnp.full(4, 0.5), "conv1x1": jnp.ones(4)}}
    mults = repopt_jax.grad_mults(params, blocks, scales, kernel="weight", layout="OIHW")
    tx = repopt_jax.repopt_sgd(0.1, mults, mask=repopt_jax.weight_decay_mask)
    image = jax.random.normal(jax.random.key(1), (3, 8, 8))

    def loss(params):
        return jnp.square(eqx.combine(params, static)["conv"](image) - 1).mean()

    return train(tx, params, loss, steps)


if __name__ == "__main__":
    print(main())
