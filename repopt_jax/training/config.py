"""The configuration: its fields with their defaults, and the table of the parts of a run.

Files in `configs/` change some of the fields.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from repopt_jax.imagenet import IMAGENET_MEAN, IMAGENET_STD


@dataclasses.dataclass(frozen=True)
class PartSpec:
    """What a part of a run trains, and how.

    Attributes:
      title: its name in tables and figures.
      network: the `kind` of network, see `create_model`.
      section: the section of the configuration that it reads.
      initialized: whether the kernels start by the Rule of Initialization.
      multiplied: whether the optimizer multiplies the gradients.
      tunes: the part whose trained network it starts from, folded and in simulated INT8. Empty:
        it starts from new weights.
    """

    title: str
    network: str
    section: str = "target"
    initialized: bool = False
    multiplied: bool = False
    tunes: str = ""

    @property
    def needs_scales(self) -> bool:
        """Whether the part can start only when the scales are known."""
        return self.initialized or self.multiplied or self.network == "csla"


INITIAL = "initial"  # the value of `scales` that asks for no search and no file

PARTS = {
    # Trains the scales; yields scales.safetensors.
    "search": PartSpec("hyper-search", "hs", section="search"),
    # The plain network with a RepOptimizer.
    "target": PartSpec("RepOptimizer", "target", initialized=True, multiplied=True),
    # The same network with the plain optimizer and torch's initial values.
    "plain": PartSpec("plain optimizer", "target"),
    # Branches with constant scales and the plain optimizer: what "target" equals.
    "csla": PartSpec("constant-scale branches", "csla"),
    # The structural baselines: BatchNorm in every branch, and the plain optimizer.
    "repvgg": PartSpec("RepVGG", "repvgg"),
    "rep": PartSpec("RepGhost", "rep"),
    "mobileone": PartSpec("MobileOne", "mobileone"),
    "replknet": PartSpec("RepLKNet", "replknet"),
    "repmlpnet": PartSpec("RepMLPNet", "repmlpnet"),
    # Quantization-aware training of what the parts above have trained.
    "qat": PartSpec("RepOptimizer, QAT", "target", multiplied=True, tunes="target"),
    "plain_qat": PartSpec("plain optimizer, QAT", "target", tunes="plain"),
    "repvgg_qat": PartSpec("RepVGG, QAT", "repvgg", tunes="repvgg"),
    "rep_qat": PartSpec("RepGhost, QAT", "rep", tunes="rep"),
    "mobileone_qat": PartSpec("MobileOne, QAT", "mobileone", tunes="mobileone"),
}


def default_config() -> ConfigDict:
    """Every field. `search` configures the part "search", `target` all other parts.

    Parts of quantization-aware training take `target` as `part_section` changes it.

    >>> default_config().target.optimizer.momentum
    0.9
    """
    return ConfigDict(
        {
            "parts": ("search", "target"),  # keys of PARTS, in the order to run them
            "seed": 0,
            # A .safetensors or .pth file, or "initial" for the values that a search starts with;
            # "search" is then left out.
            "scales": "",
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
            "search": _default_section(),  # of the part "search"
            "target": _default_section(),  # of all other parts, the baselines too
            "qat": {  # quantization-aware training, of the part "qat" and its like
                "epochs": 5.0,
                "rate": 0.01,  # learning rate by the target's
                "per_channel": False,  # a scale for each output of a kernel, not for each kernel
            },
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


def _default_section() -> ConfigDict:
    return ConfigDict(
        {
            "data": _default_data(),
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


def _default_data() -> dict[str, Any]:
    return {
        "name": "",  # digits, folder, or a TFDS image classification set
        "data_dir": config_dict.placeholder(str),  # None: TFDS's own default
        "train_split": config_dict.placeholder(str),  # None: train
        "eval_split": config_dict.placeholder(str),  # None: test or validation
        "classes": config_dict.placeholder(tuple),  # labels to keep. None: all
        "image_size": config_dict.placeholder(int),  # None: as it is
        "eval_resize": config_dict.placeholder(int),  # shorter side. None: image_size
        "augment": "none",
        # Where RandAugment and colour jitter happen: host, device, or auto for the device
        # unless it is the processor.
        "augment_on": "auto",
        "fast": False,  # random-resized-crop without antialiasing
        "skip_bad": False,  # leave out images that cannot be decoded, and count them
        "threads": config_dict.placeholder(int),  # None: one per core
        # Processes that make batches. None: one per core of at least 4 where images have
        # to be decoded, else threads do it.
        "workers": config_dict.placeholder(int),
        # Whether the images lie on the devices, where they fit: always, never, or auto for
        # GPUs and TPUs and sets of at most so many bytes.
        "on_device": "auto",
        "on_device_bytes": 2 * 2**30,
        "mean": IMAGENET_MEAN,  # of pixels in 0..1
        "std": IMAGENET_STD,
    }


def search_on_cifar100(config: ConfigDict) -> None:
    """Set the section `search` to the official search, which yields the scales for ImageNet.

    RepOptimizers, arXiv 2205.15242, section 4.1: 240 epochs of CIFAR-100.
    """
    search = config.search
    search.data.name = "cifar100"
    search.data.augment = "flip_crop"
    search.data.mean = (0.5071, 0.4865, 0.4409)
    search.data.std = (0.2673, 0.2564, 0.2762)
    search.batch_size = 128
    search.epochs = 240.0
    search.optimizer.clip_norm = 5.0
    search.schedule.warmup_epochs = 10.0


def part_section(config: ConfigDict, spec: PartSpec) -> ConfigDict:
    """The section that a part reads.

    Quantization-aware training goes on with the images and the optimizer of `target`, for
    ``qat.epochs`` with a learning rate that begins at ``qat.rate`` by the target's: without
    warm-up, mixing, erasing and averages.
    """
    section = config[spec.section]
    if not spec.tunes:
        return section
    section = section.copy_and_resolve_references()
    section.epochs = config.qat.epochs
    section.schedule.base_lr *= config.qat.rate
    section.schedule.min_lr *= config.qat.rate
    section.schedule.warmup_epochs = 0.0
    section.mix.mixup = section.mix.cutmix = section.random_erasing = section.ema_decay = 0.0
    return section


def check_config(config: ConfigDict) -> None:
    """Refuse values outside the two sections that no run can have.

    Raises:
      ValueError: names the field, its rule and its value.
    """
    some = f"one or more of {tuple(PARTS)}"
    _require(config, ["parts"], some, lambda names: names and set(names) <= set(PARTS))
    _require(config, ["identity"], "'searched' or 'one'", lambda x: x in ("searched", "one"))
    sizes = ["model.num_blocks", "model.widths", "model.strides"]
    _require(config, sizes, "whole numbers above 0", _are_sizes)
    above = [
        "qat.epochs",
        "qat.rate",
        "log_every",
        "eval_every",
        "checkpoint.every",
        "checkpoint.keep",
    ]
    _require(config, above, "a number above 0", lambda x: 0 < x < math.inf)
    rest = ["checkpoint.minutes", "profile_steps"]
    _require(config, rest, "a number of at least 0", lambda x: 0 <= x < math.inf)


def check_section(section: ConfigDict) -> None:
    """Refuse values of a part's section that are wrong by themselves, without data or devices.

    Raises:
      ValueError: names the field, its rule and its value.
    """
    shares = ["ema_decay", "label_smoothing", "optimizer.b1", "optimizer.b2"]
    _require(section, shares, "in [0, 1)", lambda x: 0 <= x < 1)
    _require(section, ["optimizer.clip_norm"], "at least 0", lambda x: x >= 0)
    alphas = ["mix.mixup", "mix.cutmix"]
    _require(section, alphas, "a number of at least 0", lambda x: 0 <= x < math.inf)
    _require(section, ["random_erasing"], "in [0, 1]", lambda x: 0 <= x <= 1)
    _require(section, ["eval_batch_size"], "at least 1", lambda x: x >= 1)
    choices = ("auto", "always", "never")
    _require(section, ["data.on_device"], f"one of {choices}", lambda x: x in choices)
    _require(section, ["data.on_device_bytes"], "at least 0", lambda x: x >= 0)
    places = ("auto", "host", "device")
    _require(section, ["data.augment_on"], f"one of {places}", lambda x: x in places)
    _require(section, ["data.mean"], "3 numbers, one per channel", _are_channels)
    positive = "3 numbers above 0, one per channel"
    _require(section, ["data.std"], positive, lambda x: _are_channels(x) and min(x) > 0)


def _require(config: ConfigDict, fields: list[str], rule: str, good: Callable[[Any], bool]) -> None:
    for field in fields:
        value = functools.reduce(lambda section, key: section[key], field.split("."), config)
        if not good(value):
            raise ValueError(f"{field} must be {rule}, got {value!r}")


def _are_sizes(value: tuple | None) -> bool:
    return value is None or all(isinstance(n, int) and n > 0 for n in value)


def _are_channels(value: tuple) -> bool:
    return len(value) == 3 and all(isinstance(x, float | int) for x in value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by their dotted names.

    >>> flat({"seed": 0, "search": {"epochs": 2.0}})
    {'seed': 0, 'search.epochs': 2.0}
    """
    found = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found
