"""What the examples of other frameworks share: a training loop of Optax."""

import jax
import optax


def train(tx, params, loss, steps):
    """The losses of `steps` updates of `params`."""

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    losses, state = [], tx.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses
