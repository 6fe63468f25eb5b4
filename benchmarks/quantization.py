"""Measures what INT8 costs RepVGG's folded network, a RepOptimizer's, and plain SGD's.

    python benchmarks/quantization.py --epochs=30 --search-epochs=10 --seeds 0 1 2

For every seed trains, with one budget, RepVGG (BatchNorm in every branch, folded afterwards) and
the plain network with a RepOptimizer and with SGD on CIFAR-10; see configs/cifar10.py. The last
checkpoint of each becomes an ONNX graph and INT8 graphs of every setting of
repopt_jax/deploy/quantization.py. Prints top-1 accuracy in float and INT8, the spread of the
kernels (of all weights of all convolutions, and the largest weight over that), and the speeds of
the float and of an INT8 graph, measured in turns. Draws the noise of INT8 by layer: of all three
networks beside the JSON file, and a full report of each in its working directory.

Resumable: the same command goes on where it stopped; a network that is done is not done again.
"""

import argparse
import functools
import itertools
import json
import pathlib
import runpy
import statistics
import sys

import numpy as np
import onnx
from environment import REPOSITORY, environment
from ml_collections import ConfigDict
from onnx import numpy_helper

from repopt_jax.deploy.image_set import configured_images
from repopt_jax.deploy.layer_report import LayerReport, layer_reports, plot
from repopt_jax.deploy.onnx_export import onnx_model, save_onnx
from repopt_jax.deploy.quantization import CALIBRATIONS, quantize
from repopt_jax.deploy.runtime import OnnxNetwork, evaluate, images_per_second, speedup
from repopt_jax.deploy.trained import data_section, load_run
from repopt_jax.training import run
from repopt_jax.training.figures import COLOURS, save_figure, styled_figure
from repopt_jax.training.interruption import RunStopped
from repopt_jax.training.report import format_table, write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "onnx", "onnxruntime")
LINE_COLOURS = {"repvgg": COLOURS[0], "target": COLOURS[1], "plain": "#666666"}
NETWORKS = {"repvgg": "RepVGG, folded", "target": "RepOptimizer", "plain": "plain SGD"}
SETTINGS = tuple(itertools.product((False, True), CALIBRATIONS))


def setting_name(per_channel: bool, calibration: str) -> str:
    """As tables and the JSON file name it."""
    return f"{'channel' if per_channel else 'tensor'}, {calibration}"


def configuration(arguments: argparse.Namespace, seed: int) -> ConfigDict:
    """What train.py would be given."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "cifar10.py"))["get_config"]()
    config.parts = ("search", *NETWORKS)
    config.seed = seed
    for part, epochs in (("search", arguments.search_epochs), ("target", arguments.epochs)):
        section = config[part]
        section.epochs = epochs
        section.schedule.warmup_epochs = min(section.schedule.warmup_epochs, epochs / 5)
        section.data.name = arguments.data
        section.data.data_dir = arguments.data_dir
        section.data.train_split = arguments.train_split
        section.data.eval_split = arguments.eval_split
    config.eval_every = config.checkpoint.every = max(1.0, arguments.epochs / 5)
    return config


def spread(graph, reports: list[LayerReport]) -> dict[str, float]:
    """Of the weights of all convolutions together, and the noise that int8 adds to them."""
    layers = [report for report in reports if len(report.shape) == 4]
    weights = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    everything = np.concatenate([weights[f"{r.name}/kernel"].ravel() for r in layers])
    return {
        "std": float(everything.std()),
        "largest over std": statistics.median(max(-r.low, r.high) / r.std for r in layers),
        "centre std": statistics.median(r.centre_std for r in layers),
        "surround std": statistics.median(r.surround_std for r in layers),
        "least SNR dB": min(r.snr for r in layers),
    }


def measure(name: str, seed: int, config: ConfigDict, workdir, arguments) -> dict:
    """One network: its graphs, their accuracy, spread and speed."""
    trained = load_run(config, workdir, part=name, checkpoint="latest")
    data = configured_images(data_section(config, name))
    graph = onnx_model(trained.model, trained.preprocessing, name=trained.name)
    save_onnx(workdir / f"{name}.onnx", graph)

    def accuracy(model) -> dict[str, float]:
        return evaluate(OnnxNetwork(model), data.evaluation(100))

    found = {"seed": seed, "network": name, "float": accuracy(graph), "int8": {}}
    batches = data.calibration(arguments.images)
    for per_channel, calibration in SETTINGS:
        int8 = quantize(graph, batches, per_channel=per_channel, calibration=calibration)
        path = workdir / f"{name}-{'channel' if per_channel else 'tensor'}-{calibration}.onnx"
        save_onnx(path, int8)
        numbers = accuracy(int8) | {"megabytes": path.stat().st_size / 1e6}
        numbers["drop"] = found["float"]["top1"] - numbers["top1"]
        found["int8"][setting_name(per_channel, calibration)] = numbers
        print(f"seed {seed}, {name}, {setting_name(per_channel, calibration)}: {numbers}")
    found["float"]["megabytes"] = (workdir / f"{name}.onnx").stat().st_size / 1e6
    int8 = workdir / f"{name}-tensor-minmax.onnx"
    images = np.concatenate(batches)
    reports = layer_reports(graph, onnx.load(int8), images[:256])
    plot(workdir / f"{name}-layers.png", reports, NETWORKS[name])
    found["kernels"] = spread(graph, reports)
    found["layers"] = {"weights dB": [r.snr for r in reports]}
    found["layers"]["outputs dB"] = [r.output_snr for r in reports]
    graphs = {"float": OnnxNetwork(graph), "int8": OnnxNetwork(int8, saturating=True)}
    speeds = images_per_second(graphs, images[:32], rounds=arguments.rounds)
    found["images per second"] = {k: statistics.median(v) for k, v in speeds.items()}
    found["speed-up"] = speedup(speeds, "int8", "float")
    return found


def measured(name: str, seed: int, config: ConfigDict, workdir, arguments, budget: dict) -> dict:
    """What `measure` finds, or has found in `workdir` with the same budget."""
    done = workdir / f"{name}-int8.json"  # beside the run that it is made of
    if not done.exists() or json.loads(done.read_text())["budget"] != budget:
        write_json(done, {"budget": budget, **measure(name, seed, config, workdir, arguments)})
    return {k: v for k, v in json.loads(done.read_text()).items() if k != "budget"}


def table(runs: list[dict]) -> str:
    """Means over the seeds, and standard deviations where there are several."""
    own = {name: [r for r in runs if r["network"] == name] for name in NETWORKS}
    own = {name: found for name, found in own.items() if found}

    def row(title: str, form: str, *keys: str) -> list[str]:
        cells = [title]
        for found in own.values():
            values = [functools.reduce(dict.__getitem__, keys, one) for one in found]
            cells.append(format(statistics.mean(values), form))
            if len(values) > 1:
                cells[-1] += f" ± {statistics.stdev(values):{form}}"
        return cells

    rows = [row("float top-1 %", ".2f", "float", "top1")]
    for name in itertools.starmap(setting_name, SETTINGS):
        rows.append(row(f"INT8 top-1 %, {name}", ".2f", "int8", name, "top1"))
        rows.append(row(f"  drop, {name}", ".2f", "int8", name, "drop"))
    rows.append(row("kernel std", ".4f", "kernels", "std"))
    rows.append(row("median of largest weight over std", ".1f", "kernels", "largest over std"))
    rows.append(row("least SNR of a layer's weights, dB", ".1f", "kernels", "least SNR dB"))
    rows.append(row("INT8 speed-up", ".2f", "speed-up"))
    seeds = max(map(len, own.values()))
    return format_table(rows, [f"means of {seeds} seeds", *(NETWORKS[name] for name in own)])


def draw(runs: list[dict], path: pathlib.Path) -> None:
    """Signal to noise by layer: means over the seeds, from the least to the largest of them."""
    figure, both = styled_figure(9, 3.6, columns=2)
    titles = {"weights dB": "Weights, one scale per layer", "outputs dB": "Outputs, INT8 graph"}
    for ax, (key, title) in zip(both, titles.items(), strict=True):
        for name, network in NETWORKS.items():
            values = np.array([r["layers"][key] for r in runs if r["network"] == name], float)
            layers = range(1, values.shape[1] + 1)
            ax.plot(
                layers, values.mean(0), "o-", color=LINE_COLOURS[name], markersize=3, label=network
            )
            ax.fill_between(
                layers, values.min(0), values.max(0), color=LINE_COLOURS[name], alpha=0.2
            )
        ax.set_xlabel("Layer")
        ax.set_title(title, fontsize="medium")
    both[0].set_ylabel("Signal to noise (dB)")
    both[0].legend(frameon=False)
    save_figure(figure, path)


def main() -> None:
    """Train, quantize, print and write what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=float, default=30.0, help="of each of the networks")
    parser.add_argument("--search-epochs", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", default="cifar10_jpeg", help="a TFDS set of 32-pixel images")
    parser.add_argument("--data-dir", default=str(REPOSITORY.parent / "shared" / "tfds"))
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--eval-split", default="test")
    parser.add_argument("--images", type=int, default=512, help="to calibrate with")
    parser.add_argument("--rounds", type=int, default=20, help="of the speed measurement")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/quantization"))
    results = REPOSITORY / "benchmarks/results/quantization.json"
    parser.add_argument("--output", type=pathlib.Path, default=results)
    arguments = parser.parse_args()
    keys = ("epochs", "search_epochs", "data", "train_split", "eval_split", "images", "rounds")
    budget = {key: getattr(arguments, key) for key in keys}
    runs = []
    for seed in arguments.seeds:
        workdir = arguments.workdir / f"seed{seed}"
        config = configuration(arguments, seed)
        try:
            run.run(config, workdir)
        except RunStopped as stopped:
            sys.exit(f"{stopped}")
        runs += [measured(name, seed, config, workdir, arguments, budget) for name in NETWORKS]
        found = {"what": __doc__.splitlines()[0], "budget": budget}
        found |= {"environment": environment(*PACKAGES), "runs": runs}
        write_json(arguments.output, found)
        draw(runs, arguments.output.with_suffix(".png"))
    print(table(runs))
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
