"""From which width on INT8 costs RepVGG its accuracy: networks 1, 2 and 4 times as wide.

    python benchmarks/quantization_width.py
    python benchmarks/quantization_width.py --config cifar10 --widths 1 2 --epochs 4

The wider a layer, the smaller the weights around a merged kernel's centre, while those that
RepVGG's identity branches leave on its diagonal stay as they are; one step of INT8 for a whole
tensor has to cover both. For every width and seed trains RepVGG and the plain network with a
RepOptimizer and with SGD, on scikit-learn's digits or as configs/cifar10.py says, and measures the
last checkpoints as benchmarks/quantization.py does. Prints top-1 accuracy lost to INT8 and writes
JSON and a figure.

Resumable: the same command goes on where it stopped.
"""

import argparse
import pathlib
import runpy
import statistics
import sys

from environment import REPOSITORY, environment
from quantization import LINE_COLOURS, NETWORKS, PACKAGES, measured

from repopt_jax.training import run
from repopt_jax.training.figures import save_figure, styled_figure
from repopt_jax.training.interruption import RunStopped
from repopt_jax.training.report import format_table, write_json


def configuration(arguments, width: int, seed: int):
    """What train.py would be given."""
    path = REPOSITORY / "configs" / f"{arguments.config}.py"
    config = runpy.run_path(str(path))["get_config"]()
    config.parts = ("search", *NETWORKS)
    config.seed = seed
    config.model.widths = tuple(width * w for w in config.model.widths)
    for section in (config.search, config.target):
        section.epochs = arguments.epochs
        section.schedule.warmup_epochs = min(section.schedule.warmup_epochs, arguments.epochs / 5)
        if arguments.config == "cifar10":
            section.data.name, section.data.data_dir = arguments.data, arguments.data_dir
            section.data.train_split, section.data.eval_split = "train[:10000]", "test[:5000]"
    config.eval_every = config.checkpoint.every = arguments.epochs
    return config


def drops(runs: list[dict], width: int, network: str, setting: str) -> list[float]:
    """Points of top-1 lost to INT8, by seed."""
    own = [r for r in runs if (r["width"], r["network"]) == (width, network)]
    return [r["int8"][setting]["drop"] for r in own]


def deviation(values: list[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw(runs: list[dict], path: pathlib.Path) -> None:
    """Points lost against width, for one scale per tensor and for one per channel."""
    figure, both = styled_figure(9, 3.6, columns=2, sharey=True)
    widths = sorted({r["width"] for r in runs})
    for ax, setting in zip(both, ("tensor, minmax", "channel, minmax"), strict=True):
        for network, title in NETWORKS.items():
            found = [drops(runs, width, network, setting) for width in widths]
            means, bars = map(statistics.mean, found), map(deviation, found)
            style = {"color": LINE_COLOURS[network], "marker": "o", "capsize": 3, "label": title}
            ax.errorbar(widths, list(means), list(bars), **style)
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [f"{w}x" for w in widths])
        ax.set_xlabel("Width")
        ax.set_title(f"One scale per {setting.split(',')[0]}", fontsize="medium")
    both[0].set_ylabel("Top-1 lost to INT8 (points)")
    both[0].legend(frameon=False)
    save_figure(figure, path)


def table(runs: list[dict]) -> str:
    """Mean and standard deviation of the points lost, and how the kernels spread."""
    rows = []
    for width in sorted({r["width"] for r in runs}):
        for network, title in NETWORKS.items():
            own = [r for r in runs if (r["width"], r["network"]) == (width, network)]
            cells = [f"{statistics.mean(r['float']['top1'] for r in own):.1f}"]
            for setting in ("tensor, minmax", "tensor, percentile", "channel, minmax"):
                lost = drops(runs, width, network, setting)
                cells.append(f"{statistics.mean(lost):.1f} ± {deviation(lost):.1f}")
            cells.append(f"{statistics.mean(r['kernels']['largest over std'] for r in own):.0f}")
            rows.append((f"{width}x, {title}", *cells))
    header = ("width, network", "float top-1 %", "lost: per tensor, minmax")
    return format_table(rows, (*header, "tensor, percentile", "channel, minmax", "largest/std"))


def main() -> None:
    """Train, quantize, print and write what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--data", default="cifar10_jpeg", help="TFDS set, for cifar10")
    parser.add_argument("--data-dir", default=str(REPOSITORY.parent / "shared" / "tfds"))
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--epochs", type=float, default=10.0, help="of the search too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="to calibrate with")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed measurement")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/width"))
    results = REPOSITORY / "benchmarks/results/quantization_width.json"
    parser.add_argument("--output", type=pathlib.Path, default=results)
    arguments = parser.parse_args()
    budget = {"images": arguments.images, "rounds": arguments.rounds}  # else in the workdir
    runs = []
    for width in arguments.widths:
        for seed in arguments.seeds:
            place = f"{arguments.config}, {arguments.epochs:g} epochs, width {width}, seed {seed}"
            config, workdir = configuration(arguments, width, seed), arguments.workdir / place
            try:
                run.run(config, workdir)
            except RunStopped as stopped:
                sys.exit(f"{stopped}")
            for network in NETWORKS:
                found = measured(network, seed, config, workdir, arguments, budget)
                runs.append({"width": width, **found})
        given = {k: getattr(arguments, k) for k in ("config", "epochs", "widths", "images")}
        what = __doc__.splitlines()[0]
        found = {"what": what, "arguments": given}
        found |= {"environment": environment(*PACKAGES), "runs": runs}
        write_json(arguments.output, found)
        draw(runs, arguments.output.with_suffix(".png"))
    print(table(runs))
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
