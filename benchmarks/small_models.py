"""Why small networks fall behind: search length, start of the identity, and variants of the scales.

    python benchmarks/small_models.py            (about half an hour on two idle CPU cores)

A narrow network of RepOpt-VGG-A0's depth, with the data and budget of `ablation.py`. One search
keeps its scales after every epoch; networks are trained with those of several epochs, with identity
branches that start at 1 or where the search ended, with scales of 1 and averaged per layer, and
against RepVGG and plain SGD. Prints means and standard deviations over the seeds, writes JSON, a
figure of accuracy against search length, and one of the scales by depth over the search.

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
    over_seeds,
    search,
    use_compilation_cache,
)

from repopt_jax.training.figures import (
    COLOURS,
    plot_scales_by_epoch,
    save_figure,
    styled_figure,
)
from repopt_jax.training.interruption import RunStopped
from repopt_jax.training.loop import scales_by_epoch
from repopt_jax.training.parts import initial_scales
from repopt_jax.training.report import format_table, write_json

FULL = Variant("search in full")
OTHERS = (
    Variant("identity starts at 1", identity="one"),
    Variant("scales all 1", scales="ones"),
    Variant("scales averaged per layer", scales="averaged"),
    Variant("RepVGG (BatchNorm in every branch)", part="repvgg"),
    Variant("plain SGD", part="plain"),
)
NUM_BLOCKS = (2, 4, 14, 1)  # of RepOpt-VGG-A0
WIDTHS = (12, 12, 24, 48, 160)


def draw(results: dict, path: pathlib.Path) -> None:
    """Draw accuracy against search length, beside RepVGG's and plain SGD's."""
    figure, (ax,) = styled_figure(6.5, 4)
    points = [r for r in results["variants"] if "search_epochs" in r]
    x, y, bars = zip(
        *((r["search_epochs"], r["top1"], r["top1_deviation"]) for r in points), strict=True
    )
    ax.errorbar(x, y, bars, color=COLOURS[1], marker="o", capsize=3, label="RepOptimizer")
    for title, colour in ((OTHERS[-2].title, COLOURS[2]), (OTHERS[-1].title, COLOURS[0])):
        found = next(r for r in results["variants"] if r["variant"] == title)
        low, high = (found["top1"] + sign * found["top1_deviation"] for sign in (-1, 1))
        ax.axhline(found["top1"], color=colour, linestyle="--", label=title)
        ax.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
    ax.set_xlabel("Epochs of the search whose scales are used")
    ax.set_ylabel("Top-1 accuracy on the test images of 5 classes (%)")
    ax.legend(frameon=False)
    count = len(results["arguments"]["seeds"])
    ax.set_title(f"Mean and standard deviation over {count} seeds", fontsize="medium")
    save_figure(figure, path)


def main() -> None:
    """Run what is missing, then print and write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "runs/small_models")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4], help="in epochs")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of a batch")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "small_models.json")
    arguments = parser.parse_args()
    workdir = pathlib.Path(arguments.workdir) / f"{arguments.images}, {arguments.epochs:g} epochs"
    use_compilation_cache(workdir)
    config = cifar_config(arguments)
    config.model.num_blocks, config.model.widths = NUM_BLOCKS, WIDTHS
    config.eval_every = 1.0
    along = scales_by_epoch(search(config, workdir / "search"))
    config.eval_every = 1e6
    initial = initial_scales(config)
    unknown = [n for n in arguments.lengths if n not in along]
    if unknown:
        parser.error(f"--lengths must be whole epochs below {arguments.epochs:g}, got {unknown}")
    longest = max(along)
    cases = [
        (Variant(f"search of {n} epochs"), scales, n)
        for n, scales in {0: initial, **{n: along[n] for n in arguments.lengths}}.items()
    ]
    cases.append((FULL, along[longest], longest))
    cases += [(v, changed(along[longest], v.scales, initial), None) for v in OTHERS]
    rows = []
    for variant, scales, length in cases:
        options = {"rate": arguments.rate, "seeds": arguments.seeds}
        found = over_seeds(variant, config, scales, workdir / variant.title, **options)
        rows.append(found if length is None else {**found, "search_epochs": length})
    keys = ("images", "epochs", "seeds", "lengths")
    given = {key: getattr(arguments, key) for key in keys}
    results = {"arguments": given, "variants": rows, "environment": environment(*PACKAGES)}
    write_json(arguments.output, results)
    draw(results, arguments.output.with_suffix(".png"))
    plot_scales_by_epoch(
        arguments.output.with_name("small_models_scales.png"), {0.0: initial, **along}
    )
    table = [
        (r["variant"], f"{r['top1']:.2f} ± {r['top1_deviation']:.2f}", f"{r['seconds']:.0f}")
        for r in rows
    ]
    print(format_table(table, ("variant", "top-1 %", "seconds")))
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except (RunStopped, OSError, ValueError) as error:
        sys.exit(f"small_models.py: {error}")
