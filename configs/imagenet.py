"""RepOpt-VGG on ImageNet with the official recipe: 120 epochs, batch 256, SGD.

Paper: RepOptimizers, arXiv 2205.15242, table 1. Published top-1 (ours has not been run):
RepOpt-VGG-B1 78.62, B2 79.68, L1 79.82, L2 80.47.
Command: python train.py --config=configs/imagenet.py:RepOpt-VGG-B1 --workdir=runs/b1 \
  --config.scales=RepOpt-VGG-B1-scales.pth
Data: TFDS imagenet2012, prepared once by `tfds build imagenet2012 --file_format=array_record
--manual_dir=DIR_OF_THE_TAR_FILES`.
Without --config.scales the scales are searched on CIFAR-100 first. BatchNorm sees groups of 32
images, as on the official 8 GPUs.
"""

from repopt_jax.training.config import default_config, search_on_cifar100


def get_config(name="RepOpt-VGG-B1"):
    config = default_config()
    config.model.name = name
    config.dtype = "bfloat16"
    config.log_every = 100
    config.checkpoint.minutes = 15.0  # where an epoch takes longer

    search_on_cifar100(config)

    target = config.target
    target.data.name = "imagenet2012"
    target.data.image_size = 224
    target.data.augment = "raug15"
    target.batch_size = 256
    target.bn_group = 32
    target.epochs = 120.0
    return config
