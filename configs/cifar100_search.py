"""The official hyper-search: CIFAR-100, 240 epochs; it yields the scales for ImageNet.

Paper: RepOptimizers, arXiv 2205.15242, section 4.1.
Command: python train.py --config=configs/cifar100_search.py:RepOpt-VGG-B1 --workdir=runs/b1-search
Data: TFDS cifar100, prepared once by `tfds build cifar100 --file_format=array_record`.
Hardware: one GPU or TPU core. Not run by us at full length.
"""

from repopt_jax.training.config import default_config, search_on_cifar100


def get_config(name="RepOpt-VGG-B1"):
    config = default_config()
    config.parts = ("search",)
    config.model.name = name
    config.dtype = "bfloat16"
    config.eval_every = 10.0
    config.checkpoint.every = 10.0

    search_on_cifar100(config)
    return config
