"""The commands: each takes the parsed flags, writes its file and prints its results."""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
from collections.abc import Sequence

import numpy as np

from repopt_jax.deploy import arguments as flags
from repopt_jax.deploy import layer_report, onnx_export, quantization, runtime, stablehlo_export
from repopt_jax.deploy.folding import fold
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.training.report import format_table


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status, 2 for anything wrong with the flags or files."""
    parser = flags.make_parser()
    arguments, overrides = parser.parse_known_args(argv)
    unknown = [text for text in overrides if not text.startswith("--config.")]
    if unknown:
        parser.error(f"unknown arguments {unknown}")
    try:
        COMMANDS[arguments.command](arguments, overrides)
    except (ValueError, OSError, ImportError) as error:
        print(f"{flags.PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{flags.PROGRAM}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def export(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Write a trained network to an ONNX or StableHLO file."""
    writers = {
        ".onnx": onnx_export.export_onnx,
        ".stablehlo": stablehlo_export.export_stablehlo,
    }
    write = writers.get(pathlib.Path(arguments.output).suffix)
    if write is None:
        raise ValueError(f"output must end in one of {list(writers)}, got {arguments.output}")
    flags.check_output(arguments.output, force=arguments.force)
    trained = flags.trained(arguments, overrides)
    write(arguments.output, fold(trained.model), trained.preprocessing, name=trained.name)
    _print_written(arguments.output, trained.name)


def quantize(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Write the INT8 graph of a float one."""
    _require(arguments.output, ".onnx")
    flags.check_output(arguments.output, force=arguments.force)
    if arguments.calibration != "percentile":
        flags.refuse(arguments, "--calibration=percentile", "percentile")
    graph, metadata = runtime.read_onnx(arguments.graph)
    if os.path.exists(arguments.output) and os.path.samefile(arguments.output, arguments.graph):
        raise ValueError(f"output must be another file than the graph, got {arguments.output}")
    batches = _calibration(arguments, overrides, metadata)
    kept = quantization.PERCENTILE if arguments.percentile is None else arguments.percentile
    int8 = quantization.quantize(
        graph,
        flags.progress("calibration", batches),
        per_channel=arguments.per_channel,
        calibration=arguments.calibration,
        percentile=kept,
        reduce_range=arguments.reduce_range,
        float_layers=arguments.float_layers,
    )
    onnx_export.save_onnx(arguments.output, int8)
    setting = runtime.metadata_of(int8)["quantization"]
    _print_written(arguments.output, f"{metadata['model']}, INT8 {setting}")


def evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Print a table of accuracy and file size."""
    if arguments.batch_size < 1:
        raise ValueError(f"batch-size must be at least 1, got {arguments.batch_size}")
    networks = _networks(arguments.graphs)
    images = flags.images(arguments, overrides, _image_size(networks))
    classes = {int(network.metadata["num_classes"]) for network in networks.values()}
    if classes != {images.dataset.num_classes}:
        raise ValueError(
            f"images must have the graphs' number of classes {sorted(classes)}, "
            f"got {images.dataset.num_classes}"
        )
    count = -(-len(images.dataset.eval) // arguments.batch_size)
    found, rows = {}, []
    for path, network in networks.items():
        batches = flags.progress(path, images.evaluation(arguments.batch_size), count)
        found[path] = runtime.evaluate(network, batches)
        numbers = [found[path][k] for k in ("top1", "top5")]
        numbers += [found[arguments.graphs[0]][k] - found[path][k] for k in ("top1", "top5")]
        cells = [f"{number:.2f}" for number in numbers]
        setting = network.metadata.get("quantization", "float")
        rows.append((path, *cells, found[path]["images"], _megabytes(path), setting))
    header = ("graph", "top-1 %", "top-5 %", "top-1 drop", "top-5 drop", "images", "MB", "")
    print(format_table(rows, header))


def benchmark(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Print a table of speeds, measured in turns."""
    if overrides:
        raise ValueError(f"benchmark takes no configuration, got {list(overrides)}")
    if arguments.batch_size < 1:
        raise ValueError(f"batch-size must be at least 1, got {arguments.batch_size}")
    networks = _networks(arguments.graphs, threads=arguments.threads, saturating=True)
    shape = (arguments.batch_size, *_image_size(networks), 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    speeds = runtime.images_per_second(networks, images, rounds=arguments.rounds)
    rows = [
        (
            path,
            f"{statistics.median(speeds[path]):.1f}",
            f"{min(speeds[path]):.1f}",
            f"{max(speeds[path]):.1f}",
            f"{runtime.speedup(speeds, path, arguments.graphs[0]):.2f}",
            _megabytes(path),
        )
        for path in networks
    ]
    print(format_table(rows, ("graph", "images/s", "least", "most", "speed-up", "MB")))
    threads = arguments.threads or "all"
    print(f"medians of {arguments.rounds} rounds, batch {arguments.batch_size}, {threads} threads")


def report(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Print a table by layer and draw it."""
    _require(arguments.output, ".png", ".pdf")
    flags.check_output(arguments.output, force=arguments.force)
    graph, metadata = runtime.read_onnx(arguments.graph)
    int8 = images = None
    if arguments.int8 is not None:
        int8, facts = runtime.read_onnx(arguments.int8)
        if "quantization" not in facts:
            raise ValueError(f"int8 must be a graph that quantize wrote, got {arguments.int8}")
        images = np.concatenate(_calibration(arguments, overrides, metadata))
    else:
        names = ("workdir", "config", "part", "data", "data_dir", "train_split", "eval_split")
        flags.refuse(arguments, "--int8", *names, "resize", "skip_bad")
        if overrides:
            raise ValueError(f"images are used with --int8 only, got {list(overrides)}")
    reports = layer_report.layer_reports(graph, int8, images)
    print(format_table(*layer_report.table(reports)))
    layer_report.plot(arguments.output, reports, metadata["model"])
    _print_written(arguments.output, f"{len(reports)} layers of {metadata['model']}")


COMMANDS = {
    "export": export,
    "quantize": quantize,
    "eval": evaluate,
    "benchmark": benchmark,
    "report": report,
}


def _calibration(arguments, overrides, metadata) -> list[np.ndarray]:
    expected = Preprocessing.from_metadata(metadata)
    images = flags.images(arguments, overrides, (expected.height, expected.width))
    return images.calibration(arguments.images, arguments.seed)


def _networks(paths: Sequence[str], **options) -> dict:
    """The graphs by path, which take images of one size."""
    networks = {path: runtime.OnnxNetwork(path, **options) for path in paths}
    sizes = {(n.preprocessing.height, n.preprocessing.width) for n in networks.values()}
    if len(sizes) > 1:
        raise ValueError(f"graphs must take images of one size, got {sorted(sizes)}")
    return networks


def _image_size(networks: dict) -> tuple[int, int]:
    first = next(iter(networks.values())).preprocessing
    return first.height, first.width


def _require(path: str, *endings: str) -> None:
    if pathlib.Path(path).suffix not in endings:
        raise ValueError(f"output must end in {' or '.join(endings)}, got {path}")


def _megabytes(path: str) -> str:
    return f"{os.path.getsize(path) / 1e6:.2f}"


def _print_written(path: str, what: str) -> None:
    print(f"wrote {path}: {what}, {_megabytes(path)} MB")
