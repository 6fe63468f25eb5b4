"""The paper's Table 4 on CIFAR-10 images: the worth of each half of the method and of the scales.

    python benchmarks/ablation.py --epochs=4 (an hour and a half on two CPU cores)
    python benchmarks/ablation.py --epochs=4 --quick (one seed, a quarter of the steps, half of
        the rates, judged by fewer images, two depths; ten minutes on two cores)

A narrow network of RepOpt-VGG-B1's depth; the scales are searched on the images of classes 0
to 4, everything else is trained on classes 5 to 9, with equal budgets. Learning rates come from
a sweep for each optimizer, with and without the method, on one seed and on images that are neither
trained on nor in the test set. Prints mean and standard deviation of the test accuracy,
writes JSON and a figure of the table and of the effect against depth.

The same command resumes where it stopped.
"""

import argparse
import pathlib
import sys

from environment import RESULTS, environment
from variants import (
    PACKAGES,
    Variant,
    add_arguments,
    changed,
    cifar_config,
    measure,
    over_seeds,
    search,
    use_compilation_cache,
    with_rate,
)

from repopt_jax.scales import Scales
from repopt_jax.training.figures import COLOURS, save_figure, styled_figure
from repopt_jax.training.interruption import RunStopped
from repopt_jax.training.loop import scales_by_epoch
from repopt_jax.training.parts import initial_scales
from repopt_jax.training.report import format_table, write_json

PLAIN = Variant("plain SGD", part="plain", rate="plain SGD")
FULL = Variant("RepOptimizer (SGD)")
VARIANTS = (
    PLAIN,
    Variant("plain AdamW", part="plain", optimizer="adamw", rate="plain AdamW"),
    FULL,
    Variant("RepOptimizer (AdamW)", optimizer="adamw", rate="RepOptimizer (AdamW)"),
    Variant("gradient rule only", initialized=False),
    Variant("initialization only", multiplied=False),
    Variant("scales all 1", scales="ones"),
    Variant("scales at the search's start", scales="initial"),
    Variant("scales averaged per layer", scales="averaged"),
    Variant("RepVGG (BatchNorm in every branch)", part="repvgg"),
)
SWEEPS = {  # learning rates of a batch
    "plain SGD": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    "RepOptimizer": (0.02, 0.05, 0.1, 0.2, 0.4, 0.8),
    "plain AdamW": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "RepOptimizer (AdamW)": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
}
MOST_HELD_OUT, LEAST_HELD_OUT = 30_000, 5000  # images by which the sweep judges; quick: least
DEPTH = 28  # of RepOpt-VGG-B1 and of configs/cifar10.py
DEPTHS = {12: (1, 2, 7, 1), 20: (2, 4, 12, 1), 28: (4, 6, 16, 1), 44: (6, 10, 26, 1)}
QUICK_DEPTHS = (12, DEPTH)


def searched_for(config, workdir) -> Scales:
    """The scales at the end of a search with the network of `config`."""
    return list(scales_by_epoch(search(config, workdir)).values())[-1]


def sweep(config, scales, workdir, arguments) -> tuple[dict[str, float], list[dict]]:
    """The best learning rate for every key of `SWEEPS`, and all results."""
    config = config.copy_and_resolve_references()
    most = LEAST_HELD_OUT if arguments.quick else MOST_HELD_OUT
    held_out = min(most, 50_000 - arguments.images)
    config.target.data.eval_split = f"train[-{held_out}:]"
    best, tried = {}, []
    for key, rates in SWEEPS.items():
        variant = next(v for v in VARIANTS if v.rate == key)
        for rate in rates[1::2] if arguments.quick else rates:
            run = with_rate(config, rate, seed=1000)
            found = measure(variant, run, scales, workdir / f"{key}, {rate:g}")
            tried.append({"optimizer": key, "learning_rate": rate, "top1": found["top1"]})
        best[key] = max((t for t in tried if t["optimizer"] == key), key=lambda t: t["top1"])[
            "learning_rate"
        ]
    return best, tried


def against_depth(arguments, config, rates, workdir) -> list[dict]:
    """Train networks of several depths with plain SGD and RepOptimizer."""
    rows = []
    for depth in QUICK_DEPTHS if arguments.quick else DEPTHS:
        config = config.copy_and_resolve_references()
        config.model.num_blocks = DEPTHS[depth]
        scales = searched_for(config, workdir / f"search, {depth} layers")
        for variant in (PLAIN, FULL):
            rate = rates[variant.rate]
            place = workdir / f"{depth} layers, {variant.title}"
            options = {"rate": rate, "seeds": arguments.seeds}
            found = over_seeds(variant, config, scales, place, **options)
            rows.append({"layers": depth, **found})
    return rows


def draw(results: dict, path: pathlib.Path) -> None:
    """Draw accuracy by variant and against depth, with standard deviations."""
    figure, (points, lines) = styled_figure(11, 4, columns=2, width_ratios=(1.4, 1))
    plain, ours = COLOURS[:2]
    rows = results["variants"][::-1]
    for place, r in enumerate(rows):
        colour = ours if r["variant"].startswith("RepOpt") else plain
        style = {"color": colour, "marker": "o", "capsize": 3}
        points.errorbar(r["top1"], place, xerr=r["top1_deviation"], **style)
    points.set_yticks(range(len(rows)), [r["variant"] for r in rows])
    points.set_xlabel("Top-1 accuracy on the test images of 5 classes (%)")
    for variant, colour in ((PLAIN, plain), (FULL, ours)):
        found = [r for r in results["depth"] if r["variant"] == variant.title]
        x, y, bars = zip(
            *((r["layers"], r["top1"], r["top1_deviation"]) for r in found), strict=True
        )
        style = {"color": colour, "marker": "o", "capsize": 3, "label": variant.title}
        lines.errorbar(x, y, bars, **style)
    lines.set_xlabel("3x3 layers")
    lines.set_xticks(sorted({r["layers"] for r in results["depth"]}))
    lines.set_ylabel("Top-1 accuracy (%)")
    lines.legend(frameon=False)
    count = len(results["arguments"]["seeds"])
    figure.suptitle(f"Mean and standard deviation over {count} seeds", fontsize="medium")
    save_figure(figure, path)


def main() -> None:
    """Run what is missing, then print and write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "runs/ablation")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, a quarter of the steps, half of the rates, fewer images, two depths",
    )
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "ablation.json")
    arguments = parser.parse_args()
    most = 50_000 - LEAST_HELD_OUT
    if arguments.images > most:
        parser.error(f"--images must be at most {most}, got {arguments.images}")
    if arguments.quick:
        arguments.seeds, arguments.epochs = [0], arguments.epochs / 4
    workdir = pathlib.Path(arguments.workdir) / f"{arguments.images}, {arguments.epochs:g} epochs"
    use_compilation_cache(workdir)
    config = cifar_config(arguments)
    scales = searched_for(config, workdir / f"search, {DEPTH} layers")
    initial = initial_scales(config)
    rates, tried = sweep(config, scales, workdir / "sweep", arguments)
    rows = []
    for variant in VARIANTS:
        rate = rates[variant.rate]
        used = changed(scales, variant.scales, initial)
        place = workdir / f"{DEPTH} layers, {variant.title}"
        rows.append(over_seeds(variant, config, used, place, rate=rate, seeds=arguments.seeds))
    given = {k: v for k, v in vars(arguments).items() if k in ("images", "epochs", "seeds")}
    results = {
        "arguments": given,
        "variants": rows,
        "depth": against_depth(arguments, config, rates, workdir),
        "sweep": tried,
        "environment": environment(*PACKAGES),
    }
    write_json(arguments.output, results)
    draw(results, arguments.output.with_suffix(".png"))
    table = [
        (
            r["variant"],
            f"{r['top1']:.2f} ± {r['top1_deviation']:.2f}",
            f"{r['learning_rate']:g}",
            f"{r['seconds']:.0f}",
            f"{r['images_per_second']:,.0f}",
        )
        for r in rows
    ]
    print(format_table(table, ("variant", "top-1 %", "rate", "seconds", "images/s")))
    table = [
        (str(r["layers"]), r["variant"], f"{r['top1']:.2f} ± {r['top1_deviation']:.2f}")
        for r in results["depth"]
    ]
    print("\n" + format_table(table, ("layers", "variant", "top-1 %")))
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except (RunStopped, OSError, ValueError) as error:
        sys.exit(f"ablation.py: {error}")
