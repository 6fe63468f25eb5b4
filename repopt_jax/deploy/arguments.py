"""The flags of the command line, and the networks, images and configurations that they name."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from repopt_jax.data import load_dataset
from repopt_jax.deploy.image_set import ImageSet, configured_images
from repopt_jax.deploy.quantization import CALIBRATION_IMAGES, CALIBRATIONS, PERCENTILE
from repopt_jax.deploy.trained import (
    Trained,
    data_section,
    load_run,
    load_weights_file,
    run_config,
)
from repopt_jax.imagenet import IMAGENET_MEAN, IMAGENET_STD

PROGRAM = "repopt-deploy"


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
    export.add_argument("output", help="file to write, .onnx or .stablehlo")
    _add_run(export)
    export.add_argument("--checkpoint", choices=("best", "latest"), help="of a run, default best")
    export.add_argument(
        "--averaged", action="store_true", default=None, help="moving averages of a run's weights"
    )
    _add_weights(export)
    export.add_argument(
        "--no-preprocess",
        action="store_true",
        help="take normalized float images (NCHW in ONNX files) instead of uint8 NHWC ones",
    )
    _add_force(export)

    quantize = commands.add_parser("quantize", help="make an INT8 graph of a float one")
    quantize.add_argument("graph", help="the float .onnx file")
    quantize.add_argument("output", help="the .onnx file to write")
    _add_images(quantize)
    quantize.add_argument("--per-channel", action="store_true", help="a scale per output channel")
    quantize.add_argument("--calibration", choices=CALIBRATIONS, default=CALIBRATIONS[0])
    quantize.add_argument("--percentile", type=float, help=f"default {PERCENTILE}")
    quantize.add_argument("--images", type=int, default=CALIBRATION_IMAGES, metavar="N")
    quantize.add_argument("--seed", type=int, default=0, help="of the choice of images")
    quantize.add_argument("--reduce-range", action="store_true", help="for x86 without VNNI")
    quantize.add_argument("--float-layers", nargs="+", default=(), metavar="NODE")
    _add_force(quantize)

    evaluate = commands.add_parser("eval", help="accuracy of graphs on an evaluation set")
    evaluate.add_argument("graphs", nargs="+", help=".onnx files; drops are against the first")
    _add_images(evaluate)
    evaluate.add_argument("--batch-size", type=int, default=64)

    benchmark = commands.add_parser("benchmark", help="images a second of graphs, in turns")
    benchmark.add_argument("graphs", nargs="+", help=".onnx files; ratios are to the first")
    benchmark.add_argument("--batch-size", type=int, default=1)
    benchmark.add_argument("--rounds", type=int, default=20)
    benchmark.add_argument("--threads", type=int, help="default: one per core")

    report = commands.add_parser("report", help="weights and quantization noise by layer")
    report.add_argument("graph", help="the float .onnx file")
    report.add_argument("output", help="figure to write, .png or .pdf")
    report.add_argument("--int8", metavar="FILE", help="INT8 graph whose outputs to compare")
    _add_images(report)
    report.add_argument("--images", type=int, default=32, metavar="N", help="to compare on")
    report.add_argument("--seed", type=int, default=0, help="of the choice of images")
    _add_force(report)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a run", "what train.py was given; --config.FIELD=VALUE changes a field, such as a data_dir"
    )
    group.add_argument("--workdir", metavar="DIR")
    group.add_argument("--config", metavar="FILE", help="default: what the run has left in DIR")
    group.add_argument("--part", help="default: target")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a weights file", "in place of a run")
    group.add_argument("--weights", metavar="FILE", help="a .pth or .safetensors file")
    group.add_argument("--model", metavar="NAME", help="that the file must hold")
    group.add_argument("--kind", help="that the file must hold")
    group.add_argument("--strides", type=int, nargs=5, help="of the stages, default 2")
    group.add_argument("--image-size", type=int, help="default 224")
    group.add_argument("--mean", type=float, nargs=3, help="default ImageNet's")
    group.add_argument("--std", type=float, nargs=3, help="default ImageNet's")


def _add_images(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--skip-bad", action="store_true", default=None, help="leave out undecodable images"
    )
    group = parser.add_argument_group("images", "in place of a run's")
    group.add_argument("--data", metavar="NAME", help="digits, folder, or a TFDS set")
    for flag in ("--data-dir", "--train-split", "--eval-split"):
        group.add_argument(flag)
    group.add_argument("--resize", type=int, help="shorter side before the crop")


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace an existing output")


def check_output(path: str | os.PathLike, *, force: bool) -> None:
    """Refuse, before any work, a path that cannot be written or is taken.

    Raises:
      ValueError: `path` exists and `force` is not set, is a folder, or its folder is not there or
        cannot be written.

    >>> check_output("nowhere/a.onnx", force=False)
    Traceback (most recent call last):
    ValueError: output must lie in an existing folder, got nowhere/a.onnx
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"output must be a file, got the folder {path}")
    if path.exists() and not force:
        raise ValueError(f"output must not exist unless --force is given, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"output must lie in an existing folder, got {path}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"output must lie in a folder that can be written, got {path} ({error.strerror})"
        ) from None


def configuration(arguments: argparse.Namespace, overrides: Sequence[str]) -> ConfigDict:
    """The configuration that --config, --workdir and --config.FIELD=VALUE name.

    Raises:
      ValueError: there is no configuration, or an override does not fit.
    """
    values = flags.FlagValues()
    argv = [PROGRAM, *overrides]
    options = {"flag_values": values, "sys_argv": argv}
    left = run_config(arguments.workdir) if arguments.config is None else None
    try:
        if left is not None:
            config_flags.DEFINE_config_dict("config", left, **options)
        else:
            argv.append(f"--config={arguments.config}")
            config_flags.DEFINE_config_file("config", None, **options)
        values(argv)
        return values.config
    except (flags.Error, OSError) as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    except Exception as error:  # a configuration file is a program, which may fail in any way
        raise ValueError(
            f"the configuration cannot be read with {list(overrides)}: "
            f"{type(error).__name__}: {error}"
        ) from None


def trained(arguments: argparse.Namespace, overrides: Sequence[str]) -> Trained:
    """The network that --workdir or --weights names.

    Raises:
      ValueError: neither or both are given, or there is no such network.
    """
    if (arguments.workdir is None) == (arguments.weights is None):
        raise ValueError("one of --workdir and --weights must be given")
    preprocess = not arguments.no_preprocess
    if arguments.weights is not None:
        _refuse_overrides(overrides)
        refuse(arguments, "--workdir", "config", "part", "checkpoint", "averaged")
        return load_weights_file(
            arguments.weights,
            name=arguments.model,
            kind=arguments.kind,
            strides=arguments.strides,
            image_size=arguments.image_size or 224,
            mean=arguments.mean or IMAGENET_MEAN,
            std=arguments.std or IMAGENET_STD,
            preprocess=preprocess,
        )
    refuse(arguments, "--weights", "model", "kind", "strides", "image_size", "mean", "std")
    return load_run(
        configuration(arguments, overrides),
        arguments.workdir,
        part=arguments.part or "target",
        checkpoint=arguments.checkpoint or "best",
        averaged=bool(arguments.averaged),
        preprocess=preprocess,
    )


def images(
    arguments: argparse.Namespace, overrides: Sequence[str], size: tuple[int, int]
) -> ImageSet:
    """The data set that --workdir, --config or --data names, its images brought to `size`.

    Raises:
      ValueError: none or several are given, or it does not have such images.
    """
    by_run = arguments.workdir is not None or arguments.config is not None
    if by_run == (arguments.data is not None):
        raise ValueError("images must be named by either --data or --workdir")
    if by_run:
        refuse(arguments, "--data", "data_dir", "train_split", "eval_split", "resize")
        section = data_section(configuration(arguments, overrides), arguments.part or "target")
        found = configured_images(section)
    else:
        _refuse_overrides(overrides)
        refuse(arguments, "--workdir", "part")
        keys = ("data_dir", "train_split", "eval_split")
        dataset = load_dataset(arguments.data, **{key: getattr(arguments, key) for key in keys})
        square = size[0] if dataset.image_shape is None or dataset.image_shape[:2] != size else None
        found = ImageSet(dataset, square, arguments.resize)
    if arguments.skip_bad:
        found = dataclasses.replace(found, skip_bad=True)
    if found.size != size:
        raise ValueError(f"images must have the graph's size {size}, got {found.size}")
    return found


def _refuse_overrides(overrides: Sequence[str]) -> None:
    if overrides:
        raise ValueError(f"--config.FIELD needs --workdir or --config, got {list(overrides)}")


def refuse(arguments: argparse.Namespace, needed: str, *names: str) -> None:
    """Raise ValueError for flags that mean nothing without another one."""
    given = [f"--{n.replace('_', '-')}" for n in names if getattr(arguments, n) is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} must be given with {needed} only")


def progress(label: str, batches: Iterable[Any], total: int | None = None) -> Any:
    """`batches`, with a bar on standard error where that is a terminal."""
    return tqdm(batches, label, total, leave=False, file=sys.stderr, disable=None)
