"""The fields of a configuration, with their defaults. Files in `configs/` change some of them."""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

PARTS = ("search", "target", "plain", "csla", "repvgg", "rep")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def default_config() -> ConfigDict:
    """Every field. `search` configures the part "search", `target` all other parts.

    >>> default_config().target.optimizer.momentum
    0.9
    """
    return ConfigDict(
        {
            # Parts to run, in this order:
            #   search  hyper-search network with trainable scales; yields scales.safetensors
            #   target  plain network with a RepOptimizer
            #   plain   the same network with the plain optimizer and torch's initial values
            #   csla    branches with constant scales and the plain optimizer: what target equals
            #   repvgg  BN in every branch and the plain optimizer: the structural baseline
            #   rep     the same for RepOpt-GhostNet
            "parts": ("search", "target"),
            "seed": 0,
            "scales": "",  # a .safetensors or .pth file; "search" is then left out
            "identity": "searched",  # where the target's identity branches start: searched, one
            "model": {
                "name": "RepOpt-VGG",
                # RepOpt-VGG
                "num_blocks": config_dict.placeholder(tuple),  # None: as the name says
                "widths": config_dict.placeholder(tuple),  # channels of stages 0 to 4
                "strides": config_dict.placeholder(tuple),  # of stages 0 to 4. None: all 2
                "se": config_dict.placeholder(bool),  # squeeze-excite. None: without
                # RepOpt-GhostNet
                "width": config_dict.placeholder(float),  # None: as the name says
                "dropout": config_dict.placeholder(float),  # None: 0
            },
            "dtype": "float32",  # of the computation: float32, bfloat16, float64
            "fsdp": 1,  # devices over which parameters and optimizer state are split
            "remat": False,  # keep only convolutions' results for the backward pass
            "search": _default_part(),
            "target": _default_part(),
            "log_every": 50,  # steps
            "eval_every": 1.0,  # epochs
            "checkpoint": {
                "every": 1.0,  # epochs
                "minutes": 0.0,  # also save after so much time; 0: by epochs only
                "keep": 2,  # newest ones; the best is kept besides
            },
            "profile_steps": 0,  # steps to record for the profiler, from the 11th on
        }
    )


def _default_part() -> ConfigDict:
    return ConfigDict(
        {
            "data": {
                "name": "",  # digits, or a TFDS image classification set
                "data_dir": config_dict.placeholder(str),  # None: TFDS's own default
                "train_split": config_dict.placeholder(str),  # None: train
                "eval_split": config_dict.placeholder(str),  # None: test or validation
                "classes": config_dict.placeholder(tuple),  # labels to keep. None: all
                "image_size": config_dict.placeholder(int),  # None: as it is
                "eval_resize": config_dict.placeholder(int),  # shorter side. None: image_size
                "augment": "none",
                "fast": False,  # random-resized-crop without antialiasing
                "skip_bad": False,  # leave out images that cannot be decoded, and count them
                "threads": config_dict.placeholder(int),  # None: one per core
                "mean": IMAGENET_MEAN,  # of pixels in 0..1
                "std": IMAGENET_STD,
            },
            # Augmentation on the device, inside the step.
            "mix": {"mixup": 0.0, "cutmix": 0.0},  # alpha of the Beta distribution; 0: off
            "random_erasing": 0.0,  # share of the images
            "batch_size": 256,  # over all devices
            # Images per BatchNorm group, which never spans devices. None: a device's share of at
            # least 8, which the working directory remembers when the number of devices changes.
            "bn_group": config_dict.placeholder(int),
            "eval_batch_size": 256,
            "epochs": 120.0,
            "accumulation": 1,  # parts of a batch, one after the other
            "label_smoothing": 0.1,
            "ema_decay": 0.0,  # of parameters and BN statistics; 0: no averages
            "optimizer": {
                "name": "sgd",  # sgd, adamw
                "momentum": 0.9,
                "nesterov": True,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 4e-5,
                "clip_norm": 0.0,  # global norm of the gradient; 0: no clipping
            },
            "schedule": {
                "name": "cosine",  # cosine, linear, step
                "base_lr": 0.1,  # per 256 images; so are the two below
                "warmup_lr": 0.0,
                "min_lr": 0.0,
                "warmup_epochs": 5.0,
                "linear_end": 0.01,  # fraction of base_lr
                "step_epochs": 30.0,
                "step_rate": 0.1,
            },
        }
    )
