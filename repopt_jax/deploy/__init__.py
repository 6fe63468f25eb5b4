"""From trained networks to what is deployed."""

from repopt_jax.deploy.folding import fold as fold
