"""Deployment: folding, ONNX and StableHLO files, INT8, and reports by layer."""

from repopt_jax.models.folding import fold as fold
