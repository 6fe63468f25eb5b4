"""Data sets, augmentation and batches; knows neither models nor jax."""

import sys

from repopt_jax.extras import needs_extra

# `python -m` imports this package before its module, which cannot tell what is missing.
_COMMAND = "repopt_jax.data.prepare"

with needs_extra("train", command=_COMMAND if _COMMAND in sys.orig_argv else None):
    from repopt_jax.data.batches import image_shape
    from repopt_jax.data.datasets import dataset_arguments, load_dataset
    from repopt_jax.data.pipeline import eval_batches, steps_per_epoch, train_batches
    from repopt_jax.data.sources import Dataset

__all__ = [
    "Dataset",
    "dataset_arguments",
    "eval_batches",
    "image_shape",
    "load_dataset",
    "steps_per_epoch",
    "train_batches",
]
