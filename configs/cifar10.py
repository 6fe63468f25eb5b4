"""Search, RepOptimizer and plain SGD on CIFAR-10 with a narrow network of B1's depth.

Command: python train.py --config=configs/cifar10.py --workdir=runs/cifar10
Data: TFDS cifar10, prepared once by `tfds build cifar10 --file_format=array_record`; another set
of such images by --config.search.data.name, --config.search.data.data_dir and the same of target.
Network: 28 layers, 16 to 128 channels. Hardware: two CPU cores are enough, see the README.
"""

from repopt_jax.training.config import default_config


def get_config():
    config = default_config()
    config.parts = ("search", "target", "plain")
    config.model.num_blocks = (4, 6, 16, 1)
    config.model.widths = (16, 16, 32, 64, 128)
    config.model.strides = (1, 2, 2, 2, 2)

    for part, epochs in ((config.search, 10.0), (config.target, 30.0)):
        part.data.name = "cifar10"
        part.data.augment = "flip_crop"
        part.data.mean = (0.4914, 0.4822, 0.4465)
        part.data.std = (0.2470, 0.2435, 0.2616)
        part.batch_size = 128
        part.epochs = epochs
        part.optimizer.weight_decay = 5e-4
        part.schedule.base_lr = 0.2  # 0.1 for the batch of 128
        part.schedule.warmup_epochs = 1.0
    config.search.optimizer.clip_norm = 5.0
    return config
