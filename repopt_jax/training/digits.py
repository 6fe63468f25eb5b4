"""The whole method on scikit-learn's digits: search, RepOptimizer, plain SGD.

This is the configuration that runs where none is given.

Data: 1,437 training and 360 evaluation images of 8x8 pixels, inside scikit-learn.
Network: the depth of RepOpt-VGG-B1 (28 layers), 16 to 64 channels wide.
"""

from ml_collections import ConfigDict

from repopt_jax.training.config import default_config


def get_config() -> ConfigDict:
    """The configuration."""
    config = default_config()
    config.parts = ("search", "target", "plain")
    config.model.num_blocks = (4, 6, 16, 1)
    config.model.widths = (16, 16, 32, 64, 64)
    config.model.strides = (1, 1, 2, 2, 1)
    config.log_every = 20
    config.eval_every = 2.0
    config.checkpoint.every = 5.0

    for part, epochs in ((config.search, 10.0), (config.target, 20.0)):
        part.data.name = "digits"
        part.data.augment = "crop"
        part.data.mean = (0.3,) * 3
        part.data.std = (0.35,) * 3
        part.batch_size = 64
        part.eval_batch_size = 360
        part.epochs = epochs
        part.optimizer.weight_decay = 5e-4
        part.schedule.base_lr = 0.4  # 0.1 for the batch of 64
        part.schedule.warmup_epochs = 1.0
    config.search.optimizer.clip_norm = 5.0
    return config
