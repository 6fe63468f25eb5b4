"""RepOpt-GhostNet on ImageNet with the official recipe: 300 epochs, batch 1024, SGD.

Papers: RepGhost, arXiv 2211.06088; RepOptimizers, arXiv 2205.15242. Published top-1 by the
authors of RepOptimizers (ours has not been run): RepOpt-GhostNet-0.5x 66.50, RepGhostNet-0.5x 66.51
(here the part "rep").
Command: python train.py --config=configs/ghostnet.py --workdir=runs/ghost \
  --config.scales=RepOptGhostNet_0_5x_scales.pth
Data: TFDS imagenet2012, prepared once by `tfds build imagenet2012 --file_format=array_record
--manual_dir=DIR_OF_THE_TAR_FILES`.
Other widths: --config=configs/ghostnet.py:RepOpt-GhostNet-1.0x, or --config.model.width=0.75 beside
--config=configs/ghostnet.py:RepOpt-GhostNet. Without --config.scales the scales are searched on
CIFAR-100 first. BatchNorm sees groups of 128 images, as on the official 8 GPUs.
"""

from repopt_jax.training.config import default_config, search_on_cifar100


def get_config(name="RepOpt-GhostNet-0.5x"):
    config = default_config()
    config.model.name = name
    config.model.dropout = 0.2
    config.dtype = "bfloat16"
    config.log_every = 100
    config.checkpoint.minutes = 15.0  # where an epoch takes longer

    search_on_cifar100(config)
    config.search.epochs = 600.0

    target = config.target
    target.data.name = "imagenet2012"
    target.data.image_size = 224
    target.data.augment = "jitter"
    target.random_erasing = 0.2  # rectangles of noise, a value of its own for every pixel
    target.epochs = 300.0
    target.schedule.warmup_lr = 1e-4

    for part in (config.search, target):
        part.batch_size = 1024
        part.bn_group = 128
        part.optimizer.weight_decay = 1e-5
        # Per 256 images, as the official flag is: the highest rate is 2.4.
        part.schedule.base_lr = 0.6
    return config
