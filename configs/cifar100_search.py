"""The official hyper-search: CIFAR-100, 240 epochs; it yields the scales for ImageNet.

Paper: RepOptimizers, arXiv 2205.15242, section 4.1.
Command: python train.py --config=configs/cifar100_search.py:RepOpt-VGG-B1 --workdir=runs/b1-search
Data: TFDS cifar100, prepared once by `tfds build cifar100 --file_format=array_record`.
Hardware: one GPU or TPU core. Not run by us at full length.
"""

from repopt_jax.training.config import default_config


def get_config(name="RepOpt-VGG-B1"):
    config = default_config()
    config.parts = ("search",)
    config.model.name = name
    config.dtype = "bfloat16"
    config.eval_every = 10.0
    config.checkpoint.every = 10.0

    search = config.search
    search.data.name = "cifar100"
    search.data.augment = "flip_crop"
    search.data.mean = (0.5071, 0.4865, 0.4409)
    search.data.std = (0.2673, 0.2564, 0.2762)
    search.batch_size = 128
    search.epochs = 240.0
    search.optimizer.clip_norm = 5.0
    search.schedule.warmup_epochs = 10.0
    return config
