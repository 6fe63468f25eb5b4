"""The command `repopt-deploy`: each subcommand writes its file and prints its results."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence

import numpy as np

from repopt_jax.extras import needs_extra

with needs_extra("deploy", command="repopt-deploy"):
    from repopt_jax.deploy import arguments as flags
    from repopt_jax.deploy import layer_report, onnx_export, quantization, runtime
    from repopt_jax.deploy.equalization import equalized
    from repopt_jax.deploy.preprocessing import Preprocessing
    from repopt_jax.deploy.stablehlo_export import export_stablehlo
    from repopt_jax.files import weights_bytes
    from repopt_jax.models.folding import fold
    from repopt_jax.models.simulated_int8 import simulated_layers
    from repopt_jax.training.report import format_table


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status, 2 for anything wrong with the flags or files."""
    parser = flags.make_parser()
    arguments, overrides = parser.parse_known_args(argv)
    known = () if arguments.command == "benchmark" else "--config."
    unknown = [text for text in overrides if not text.startswith(known)]
    if unknown:
        parser.error(f"unknown arguments {unknown}")
    arguments.overrides = overrides or None
    try:
        COMMANDS[arguments.command](arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"{flags.PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{flags.PROGRAM}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def export(arguments: argparse.Namespace) -> None:
    """Write a trained network to an ONNX or StableHLO file."""
    flags.check_output(arguments, ".onnx", ".stablehlo")
    trained = flags.trained(arguments)
    int8, to_onnx = bool(simulated_layers(trained.model)), arguments.output.endswith(".onnx")
    if arguments.runtime is not None and not (int8 and to_onnx):
        raise ValueError("--for must be given with a part trained in INT8 and an .onnx output only")
    model = trained.model if int8 else fold(trained.model)
    options = {"float_kernels": arguments.runtime == "tensorrt"}
    if not to_onnx:
        kept = trained.arguments and weights_bytes(trained.model, trained.arguments)
        options = {"weights": kept}
    write = onnx_export.export_onnx if to_onnx else export_stablehlo
    write(arguments.output, model, trained.preprocessing, name=trained.name, **options)
    _print_written(arguments.output, f"{trained.name}{', INT8' if int8 else ''}")


def quantize(arguments: argparse.Namespace) -> None:
    """Write the INT8 graph of a float one."""
    flags.check_output(arguments, ".onnx")
    if arguments.calibration != "percentile":
        flags.refuse(arguments, "--calibration=percentile", "percentile")
    graph, metadata = runtime.read_onnx(arguments.graph)
    if os.path.exists(arguments.output) and os.path.samefile(arguments.output, arguments.graph):
        raise ValueError(f"output must be another file than the graph, got {arguments.output}")
    batches = _calibration(arguments, metadata)
    kept = quantization.PERCENTILE if arguments.percentile is None else arguments.percentile
    int8 = quantization.quantize(
        graph,
        flags.progress("calibration", batches),
        runtime=arguments.runtime or quantization.RUNTIMES[0],
        equalize=arguments.equalize,
        per_channel=arguments.per_channel,
        calibration=arguments.calibration,
        percentile=kept,
        reduce_range=arguments.reduce_range,
        float_layers=arguments.float_layers,
    )
    onnx_export.save_onnx(arguments.output, int8)
    setting = onnx_export.metadata_of(int8)["quantization"]
    _print_written(arguments.output, f"{metadata['model']}, INT8 {setting}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Print a table of accuracy and file size."""
    networks, size = _networks(arguments)
    images = flags.images(arguments, size)
    classes = {int(network.metadata["num_classes"]) for network in networks.values()}
    if classes != {images.dataset.num_classes}:
        raise ValueError(
            f"images must have the graphs' number of classes {sorted(classes)}, "
            f"got {images.dataset.num_classes}"
        )
    count = -(-len(images.dataset.eval) // arguments.batch_size)
    rows, warnings, first = [], [], None
    for path, network in networks.items():
        batches = flags.progress(path, images.evaluation(arguments.batch_size), count)
        found = runtime.evaluate(network, batches)
        first = first or found
        accuracies = [found[k] for k in ("top1", "top5")]
        drops = [first[k] - found[k] for k in ("top1", "top5")]
        cells = [f"{number:.2f}" for number in accuracies + drops]
        if "not_finite" in found:
            warnings.append(f"{path}: {found['not_finite']} images had logits that are not finite")
        setting = network.metadata.get("quantization", "float")
        rows.append((path, *cells, found["images"], _megabytes(path), setting))
    header = ("graph", "top-1 %", "top-5 %", "top-1 drop", "top-5 drop", "images", "MB", "setting")
    print("\n".join([format_table(rows, header), *warnings]))


def benchmark(arguments: argparse.Namespace) -> None:
    """Print a table of speeds, measured in turns."""
    networks, size = _networks(arguments, threads=arguments.threads, saturating=True)
    shape = (arguments.batch_size, *size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    speeds = runtime.images_per_second(networks, images, rounds=arguments.rounds)
    rows = []
    for path, found in speeds.items():
        cells = [f"{number:.1f}" for number in (statistics.median(found), min(found), max(found))]
        ratio = runtime.speedup(speeds, path, arguments.graphs[0])
        rows.append((path, *cells, f"{ratio:.2f}", _megabytes(path)))
    print(format_table(rows, ("graph", "images/s", "least", "most", "speed-up", "MB")))
    threads = arguments.threads or "all"
    print(f"medians of {arguments.rounds} rounds, batch {arguments.batch_size}, {threads} threads")


def report(arguments: argparse.Namespace) -> None:
    """Print a table by layer and draw it."""
    flags.check_output(arguments, ".png", ".pdf")
    graph, metadata = runtime.read_onnx(arguments.graph)
    int8 = images = None
    if arguments.int8 is not None:
        int8, facts = runtime.read_onnx(arguments.int8)
        if "quantization" not in facts:
            raise ValueError(f"int8 must be a graph that quantize wrote, got {arguments.int8}")
        images = np.concatenate(_calibration(arguments, metadata))
        if "equalized" in facts["quantization"]:  # so were the tensors that are compared
            graph = equalized(graph)
    else:
        names = (*flags.RUN, *flags.IMAGES, "skip_bad", "overrides")
        flags.refuse(arguments, "--int8", *names)
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


def _calibration(arguments, metadata) -> list[np.ndarray]:
    images = flags.images(arguments, Preprocessing.from_metadata(metadata).size)
    return images.calibration(arguments.images, arguments.seed)


def _networks(
    arguments: argparse.Namespace, **options
) -> tuple[dict[str, runtime.OnnxNetwork], tuple[int, int]]:
    """The graphs by path, and the size of images that they share."""
    if arguments.batch_size < 1:
        raise ValueError(f"batch-size must be at least 1, got {arguments.batch_size}")
    networks = {path: runtime.OnnxNetwork(path, **options) for path in arguments.graphs}
    sizes = {network.preprocessing.size for network in networks.values()}
    if len(sizes) > 1:
        raise ValueError(f"graphs must take images of one size, got {sorted(sizes)}")
    return networks, sizes.pop()


def _megabytes(path: str) -> str:
    return f"{os.path.getsize(path) / 1e6:.2f}"


def _print_written(path: str, what: str) -> None:
    print(f"wrote {path}: {what}, {_megabytes(path)} MB")
