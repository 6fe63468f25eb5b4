"""Deployment: folding, ONNX and StableHLO files, INT8, and reports by layer."""

from repopt_jax.models.folding import fold as fold
from repopt_jax.models.folding import fold_block as fold_block
from repopt_jax.models.folding import fold_pointwise as fold_pointwise
