"""Variants of one training, for the ablation and the study of small networks.

Each variant trains in a working directory under ``--workdir``, by the loop of `train.py`. It
resumes where it stopped, and is not trained again once it has finished.
"""

import dataclasses
import json
import pathlib
import runpy
import statistics

import jax
from environment import REPOSITORY
from ml_collections import ConfigDict

from repopt_jax.scales import Scales
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.loop import train
from repopt_jax.training.parts import Part, prepare
from repopt_jax.training.report import write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
SEARCH_CLASSES, TARGET_CLASSES = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


@dataclasses.dataclass(frozen=True)
class Variant:
    """How one row of a table is trained.

    Attributes:
      title: as the table names it.
      part: target, plain or repvgg, see `repopt_jax.training.parts`.
      optimizer: sgd or adamw.
      rate: key of the sweep whose learning rate it takes.
      scales: searched, ones, initial or averaged.
      identity: where the identity branches start: searched or one.
      initialized: whether the kernels start by the Rule of Initialization.
      multiplied: whether the gradients are multiplied.
    """

    title: str
    part: str = "target"
    optimizer: str = "sgd"
    rate: str = "RepOptimizer"
    scales: str = "searched"
    identity: str = "searched"
    initialized: bool = True
    multiplied: bool = True


def cifar_config(arguments) -> ConfigDict:
    """A configuration that searches on half of CIFAR-10's classes and trains on the other half."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "cifar10.py"))["get_config"]()
    config.eval_every = config.checkpoint.every = 1e6
    config.log_every = 100
    for section, classes in ((config.search, SEARCH_CLASSES), (config.target, TARGET_CLASSES)):
        section.data.name = arguments.data
        section.data.data_dir = arguments.data_dir
        section.data.train_split = f"train[:{arguments.images}]"
        section.data.classes = classes
        section.epochs = arguments.epochs
        section.schedule.warmup_epochs = min(1.0, arguments.epochs / 4)
    return config


def add_arguments(parser, workdir: str) -> None:
    """Add the flags that both studies take."""
    parser.add_argument("--workdir", default=workdir)
    parser.add_argument("--data", default="cifar10_jpeg", help="TFDS set of CIFAR-10's images")
    parser.add_argument("--data-dir", default=str(REPOSITORY.parent / "shared" / "tfds"))
    parser.add_argument("--images", type=int, default=20_000, help="of all ten classes")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def use_compilation_cache(workdir: pathlib.Path) -> None:
    """Let variants share compiled programs: most differ in the state's values alone."""
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def search(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Search, if it is not done; the working directory, with the scales of each evaluation."""
    done = workdir / "summary.json"
    if not done.exists():
        _, summary = train(prepare(config, "search", make_mesh()), workdir)
        write_json(done, summary)
    return workdir


def changed(scales: Scales, how: str, initial: Scales) -> Scales:
    """The scales of a variant."""
    return {
        "searched": lambda: scales,
        "ones": scales.ones,
        "initial": lambda: initial,
        "averaged": scales.averaged,
    }[how]()


def part_of(variant: Variant, config: ConfigDict, scales: Scales) -> Part:
    """The part that a variant trains, with the learning rate and seed of `config`."""
    config = config.copy_and_resolve_references()
    config.target.optimizer.name = variant.optimizer
    config.identity = variant.identity
    if variant.optimizer == "adamw":
        config.target.optimizer.weight_decay = 0.05
    part = prepare(config, variant.part, make_mesh(), scales)
    spec = dataclasses.replace(
        part.spec,
        initialized=part.spec.initialized and variant.initialized,
        multiplied=part.spec.multiplied and variant.multiplied,
    )
    return dataclasses.replace(part, spec=spec)


def measure(variant: Variant, config: ConfigDict, scales: Scales, workdir: pathlib.Path) -> dict:
    """Train one variant, or read the result of its finished training.

    Returns:
      Top-1 (percent) over all evaluation images after the last step, seconds and images/s.

    Raises:
      ValueError: `workdir` holds a training with other settings.
    """
    done, stated = workdir / "summary.json", workdir / "variant.json"
    statement = json.loads(config.to_json_best_effort()) | dataclasses.asdict(variant)
    statement = json.loads(json.dumps(statement))
    present = json.loads(stated.read_text()) if stated.exists() else None
    if present != statement and (stated.exists() or done.exists()):
        raise ValueError(f"{workdir} holds a training with other settings; use another --workdir")
    write_json(stated, statement)
    if not done.exists():
        _, summary = train(part_of(variant, config, scales), workdir)
        write_json(done, summary)
    summary = json.loads(done.read_text())
    return {
        "top1": summary["eval/top1"],
        "train_loss": summary["train/loss"],
        "seconds": summary["seconds"],
        "images_per_second": summary["train/images_per_second"],
    }


def with_rate(config: ConfigDict, rate: float, seed: int) -> ConfigDict:
    """`config` with the learning rate of a batch, and a seed."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    config.target.schedule.base_lr = rate * 256 / config.target.batch_size
    return config


def over_seeds(
    variant: Variant,
    config: ConfigDict,
    scales: Scales,
    workdir: pathlib.Path,
    *,
    rate: float,
    seeds: list[int],
) -> dict:
    """Train a variant once for every seed, or read the results; its row."""
    runs = [
        measure(variant, with_rate(config, rate, seed), scales, workdir / f"seed {seed}")
        for seed in seeds
    ]
    return row(variant, runs, rate)


def row(variant: Variant, runs: list[dict], rate: float) -> dict:
    """A row of the results: mean and standard deviation over the seeds."""
    top1 = [run["top1"] for run in runs]
    return {
        "variant": variant.title,
        "learning_rate": rate,
        "top1": statistics.mean(top1),
        "top1_deviation": statistics.stdev(top1) if len(top1) > 1 else 0.0,
        "top1_by_seed": top1,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "images_per_second": statistics.median(run["images_per_second"] for run in runs),
    }
