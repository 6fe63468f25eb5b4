"""The flags of the command line, and the networks, images and configurations that they name."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from repopt_jax.data import load_dataset
from repopt_jax.deploy.image_set import ImageSet, configured_images
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.quantization import CALIBRATION_IMAGES, CALIBRATIONS, PERCENTILE, RUNTIMES
from repopt_jax.deploy.trained import (
    Trained,
    data_section,
    load_run,
    load_stablehlo_weights,
    load_weights_file,
    run_config,
)
from repopt_jax.imagenet import IMAGENET_MEAN, IMAGENET_STD

PROGRAM = "repopt-deploy"

# Flags by group: name -> options of `add_argument`.
HOME = {"type": os.path.expanduser}  # no shell expands a ~ after an equals sign
RUN = {
    "workdir": {"metavar": "DIR", **HOME},
    "config": {"metavar": "FILE", "help": "default: what the run has left in DIR", **HOME},
    "part": {"help": "default: target"},
}
WEIGHTS = {
    "weights": {"metavar": "FILE", "help": "a .pth, .safetensors or .stablehlo file", **HOME},
    "model": {"metavar": "NAME", "help": "that the file must hold"},
    "kind": {"help": "that the file must hold"},
    "strides": {"type": int, "nargs": 5, "help": "of the stages, default 2"},
    "image_size": {"type": int, "help": "default 224"},
    "mean": {"type": float, "nargs": 3, "help": "default ImageNet's"},
    "std": {"type": float, "nargs": 3, "help": "default ImageNet's"},
}
IMAGES = {
    "data": {"metavar": "NAME", "help": "digits, folder, or a TFDS set"},
    **{name: {} for name in ("data_dir", "train_split", "eval_split")},
    "resize": {"type": int, "help": "shorter side before the crop"},
}


class Parser(argparse.ArgumentParser):
    """Answers wrong flags with one sentence instead of the usage."""

    def error(self, message: str) -> NoReturn:
        """End the process."""
        print(f"{PROGRAM}: {message}", file=sys.stderr)
        sys.exit(2)


def make_parser() -> Parser:
    """All commands and their flags."""
    parser = Parser(
        prog=PROGRAM,
        description="From a training run or a weights file to ONNX, INT8 and StableHLO files.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="write a trained network to a file")
    quantize = commands.add_parser("quantize", help="make an INT8 graph of a float one")
    evaluate = commands.add_parser("eval", help="accuracy of graphs on an evaluation set")
    benchmark = commands.add_parser("benchmark", help="images a second of graphs, in turns")
    report = commands.add_parser("report", help="weights and quantization noise by layer")

    for command, batch_size in ((evaluate, 64), (benchmark, 1)):
        command.add_argument("graphs", nargs="+", help=".onnx files, compared with the first")
        command.add_argument("--batch-size", type=int, default=batch_size)
    for command, images in ((quantize, CALIBRATION_IMAGES), (report, 32)):
        command.add_argument("graph", help="the float .onnx file")
        command.add_argument("--images", type=int, default=images, metavar="N", help="how many")
        command.add_argument("--seed", type=int, default=0, help="of the choice of images")
    endings = {export: ".onnx or .stablehlo", quantize: ".onnx", report: ".png or .pdf"}
    for command, ending in endings.items():
        command.add_argument("output", help=f"file to write, {ending}")
        command.add_argument("--force", action="store_true", help="replace an existing output")
    for command in (export, quantize, evaluate, report):
        given = "what train.py was given; --config.FIELD=VALUE changes a field, such as a data_dir"
        _add_group(command, "a run", RUN, given)
    for command in (quantize, evaluate, report):
        _add_group(command, "images", IMAGES, "in place of a run's")
        command.add_argument(
            "--skip-bad", action="store_true", default=None, help="leave out undecodable images"
        )
    _add_group(export, "a weights file", WEIGHTS, "in place of a run")

    export.add_argument("--checkpoint", choices=("best", "latest"), help="of a run, default best")
    export.add_argument(
        "--averaged", action="store_true", default=None, help="moving averages of a run's weights"
    )
    export.add_argument(
        "--no-preprocess",
        action="store_true",
        help="take normalized float images (NCHW in ONNX files) instead of uint8 NHWC ones",
    )
    for command in (export, quantize):
        whom = "what is to run the INT8 file, default onnxruntime"
        command.add_argument("--for", dest="runtime", choices=RUNTIMES, help=whom)
    quantize.add_argument("--equalize", action="store_true", help="even out channels, mend biases")
    quantize.add_argument("--per-channel", action="store_true", help="a scale per output channel")
    quantize.add_argument("--calibration", choices=CALIBRATIONS, default=CALIBRATIONS[0])
    quantize.add_argument("--percentile", type=float, help=f"default {PERCENTILE}")
    quantize.add_argument("--reduce-range", action="store_true", help="for x86 without VNNI")
    quantize.add_argument("--float-layers", nargs="+", default=(), metavar="NODE")
    benchmark.add_argument("--rounds", type=int, default=20)
    benchmark.add_argument("--threads", type=int, help="default: one per core")
    compared = "INT8 graph whose outputs to compare"
    report.add_argument("--int8", metavar="FILE", help=compared, **HOME)
    return parser


def _add_group(command: Parser, title: str, group: dict[str, dict], description: str) -> None:
    added = command.add_argument_group(title, description)
    for name, options in group.items():
        added.add_argument(f"--{name.replace('_', '-')}", **options)


def check_output(arguments: argparse.Namespace, *endings: str) -> None:
    """Raise ValueError, before any work, for an output that cannot be written or is taken."""
    path = pathlib.Path(arguments.output)
    if path.suffix not in endings:
        raise ValueError(f"output must end in {' or '.join(endings)}, got {path}")
    if path.is_dir():
        raise ValueError(f"output must be a file, got the folder {path}")
    if path.exists() and not arguments.force:
        raise ValueError(f"output must not exist unless --force is given, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"output must lie in an existing folder, got {path}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"output must lie in a folder that can be written, got {path} ({error.strerror})"
        ) from None


def configuration(arguments: argparse.Namespace) -> ConfigDict:
    """The configuration that --config, --workdir and --config.FIELD=VALUE name, or ValueError."""
    values, argv = flags.FlagValues(), [PROGRAM, *(arguments.overrides or ())]
    left = run_config(arguments.workdir) if arguments.config is None else arguments.config
    by_file = isinstance(left, str)
    define = config_flags.DEFINE_config_file if by_file else config_flags.DEFINE_config_dict
    try:
        define("config", left, flag_values=values, sys_argv=argv)
        values(argv)
        return values.config
    except (flags.Error, OSError) as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    except Exception as error:  # a configuration file is a program, which may fail in any way
        raise ValueError(
            f"the configuration cannot be read with {argv[1:]}: {type(error).__name__}: {error}"
        ) from None


def trained(arguments: argparse.Namespace) -> Trained:
    """The network that --workdir or --weights names, or ValueError."""
    if (arguments.workdir is None) == (arguments.weights is None):
        raise ValueError("one of --workdir and --weights must be given")
    if arguments.weights is None:
        refuse(arguments, "--weights", *WEIGHTS)
        found = load_run(
            configuration(arguments),
            arguments.workdir,
            part=arguments.part or "target",
            checkpoint=arguments.checkpoint or "best",
            averaged=bool(arguments.averaged),
        )
    elif arguments.weights.endswith(".stablehlo"):
        others = [name for name in (*WEIGHTS, *RUN) if name != "weights"]
        refuse(arguments, "another file", "overrides", *others, "checkpoint", "averaged")
        found = load_stablehlo_weights(arguments.weights)
    else:
        refuse(arguments, "--workdir", "overrides", *RUN, "checkpoint", "averaged")
        side = arguments.image_size or 224
        mean, std = arguments.mean or IMAGENET_MEAN, arguments.std or IMAGENET_STD
        found = load_weights_file(
            arguments.weights,
            Preprocessing(side, side, tuple(mean), tuple(std)),
            name=arguments.model,
            kind=arguments.kind,
            strides=arguments.strides,
        )
    inside = found.preprocessing.inside and not arguments.no_preprocess
    preprocessing = dataclasses.replace(found.preprocessing, inside=inside)
    return dataclasses.replace(found, preprocessing=preprocessing)


def images(arguments: argparse.Namespace, size: tuple[int, int]) -> ImageSet:
    """The images that --workdir, --config or --data names, brought to `size`, or ValueError."""
    by_run = arguments.workdir is not None or arguments.config is not None
    if by_run == (arguments.data is not None):
        raise ValueError("images must be named by either --data or --workdir")
    if by_run:
        refuse(arguments, "--data", *IMAGES)
        section = data_section(configuration(arguments), arguments.part or "target")
        found = configured_images(section)
    else:
        refuse(arguments, "--workdir", "overrides", *RUN)
        splits = {"train_split": arguments.train_split, "eval_split": arguments.eval_split}
        dataset = load_dataset(arguments.data, data_dir=arguments.data_dir, **splits)
        square = size[0] if (dataset.image_shape or ())[:2] != size else None
        found = ImageSet(dataset, square, arguments.resize)
    if arguments.skip_bad:
        found = dataclasses.replace(found, skip_bad=True)
    if found.size != size:
        raise ValueError(f"images must have the graph's size {size}, got {found.size}")
    return found


def refuse(arguments: argparse.Namespace, needed: str, *names: str) -> None:
    """Raise ValueError for flags that mean nothing without another one."""
    given = [name for name in names if getattr(arguments, name) is not None]
    if given:
        told = [f"--{n.replace('_', '-')}" if n != "overrides" else "--config.FIELD" for n in given]
        raise ValueError(f"{' and '.join(told)} must be given with {needed} only")


def progress(label: str, batches: Iterable[Any], total: int | None = None) -> Any:
    """`batches`, with a bar on standard error where that is a terminal."""
    return tqdm(batches, label, total, leave=False, file=sys.stderr, disable=None)
