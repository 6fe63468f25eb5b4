"""What each half of the method, its scales and its rivals are worth, on two sets of 32 px.

    python benchmarks/ablation.py --batch=256 --minutes=9           (for a GPU; --epochs=90 as well)
    python benchmarks/ablation.py --data=cifar10 --images=20000 --epochs=4      (for two CPU cores)
    python benchmarks/ablation.py --quick        (every kind of row with a tiny network; minutes)

Scales are searched on the images of some classes; everything else is trained and tested on
others, with equal budgets: Tiny-ImageNet in two halves of 100 classes, or CIFAR-10 in two of 5.
The learning rate of every row has a sweep of its own: it is doubled and halved until the best lies
between two worse ones. Images of the training split that nothing trains on judge that, with the
first seed; the tables have the test images.

Each training is a row of the JSON, which is written after each. What it holds is not trained
again: several short sessions on a GPU add up, in the order of `ROWS` in variants.py. The working
directory has the searched scales, which a later session needs, and trainings that were interrupted.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import runpy
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import jax
from environment import REAL_IMAGES, REPOSITORY, RESULTS, environment
from markdown_table import machine
from ml_collections import ConfigDict
from result_tables import SETTING, ablation, ablation_rows
from variants import NETWORKS, QUICK_ROWS, ROWS, Variant, changed, part_of

from repopt_jax.data import dataset_arguments, load_dataset
from repopt_jax.scales import Scales
from repopt_jax.training.config import PARTS
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.evaluation import evaluate_state
from repopt_jax.training.figures import COLOURS, save_figure, styled_figure
from repopt_jax.training.interruption import RunStopped
from repopt_jax.training.loop import scales_by_epoch, train
from repopt_jax.training.networks import initial_scales
from repopt_jax.training.parts import Part, prepare
from repopt_jax.training.report import write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Set and classes of the search, of everything else, and their pixels' mean and deviation.
SETS = {
    "tinyimagenet": {
        "search": ("tinyimagenet_a", range(100)),
        "target": ("tinyimagenet_b", range(100)),
        "mean": (0.485, 0.451, 0.401),
        "std": (0.261, 0.253, 0.264),
    },
    "cifar10": {
        "search": ("cifar10", range(5)),
        "target": ("cifar10", range(5, 10)),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    },
}
MOST_IMAGES = 45_000  # of the 50,000 to train on; the last 5,000 judge the sweeps
QUICK = {
    "images": 10_000,
    "classes": 5,
    "epochs": 1.0,
    "seeds": [0],
    "sweep": False,
    "networks": ["tiny"],
}


class OutOfTime(Exception):
    """The next training would not end before the time is up."""


class Study:
    """The trainings of one command.

    Attributes:
      rows: all that the JSON holds, one for each training.
    """

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self._output = arguments.output
        self.rows = json.loads(self._output.read_text())["rows"] if self._output.exists() else []
        self._end = time.monotonic() + 60 * arguments.minutes
        self._longest = 0.0
        self._load = functools.cache(load_dataset)
        self._setting = {key: getattr(arguments, key) for key in SETTING}
        place = "{data}, {images} images, {classes} classes, {epochs:g} epochs, batch {batch_size}"
        self._workdir = pathlib.Path(arguments.workdir) / place.format(**self._setting)

    def run(self) -> None:
        """Train what is missing: of every group of rows first the sweeps, then seed after seed."""
        given = self._arguments
        for network, variants in QUICK_ROWS if given.quick else ROWS:
            if network not in given.networks:
                continue
            if given.variants:
                variants = [variant for variant in variants if variant.title in given.variants]
            rates = {}
            for variant in variants:
                judge = functools.partial(self._held_out_top1, network, variant)
                first = variant.rate * given.batch_size / 128
                rates[variant] = best_rate(first, judge) if given.sweep else first
            for seed in given.seeds:
                for variant in variants:
                    self._row(network, variant, rates[variant], seed)

    def own_rows(self) -> list[dict]:
        """The rows with the setting of this command."""
        return [row for row in self.rows if self._setting.items() <= row.items()]

    def _held_out_top1(self, network: str, variant: Variant, rate: float) -> float:
        return self._row(network, variant, rate, self._arguments.seeds[0])["held_out_top1"]

    def _row(self, network: str, variant: Variant, rate: float, seed: int) -> dict:
        """The row of a training, which is done if the JSON has none."""
        key = self._setting | {"network": network, "variant": variant.title}
        key |= {"learning_rate": rate, "seed": seed}
        for row in self.rows:
            if key.items() <= row.items():
                return row
        config = self._config(network)
        config.seed = seed
        scales = self._scales(network, variant, config)
        workdir = self._workdir / f"{network}, {variant.title}, {rate:g}, seed {seed}"
        with self._timed():
            part = part_of(variant, config, rate, scales, self._load)
            row = key | self._measured(part, workdir)
        facts = environment(*PACKAGES)
        changes = " with changes" if facts["uncommitted_changes"] else ""
        row |= {"device": machine(facts), "jax": facts["versions"]["jax"]}
        row["commit"] = f"{facts['commit']}{changes}"
        self.rows.append(row)
        write_json(self._output, {"rows": self.rows})
        shutil.rmtree(workdir)
        return row

    def _config(self, network: str) -> ConfigDict:
        given, sets = self._arguments, SETS[self._arguments.data]
        config = runpy.run_path(str(REPOSITORY / "configs" / "cifar10.py"))["get_config"]()
        config.model.update(NETWORKS[network])
        config.eval_every = config.checkpoint.every = 1e6
        config.log_every = 100
        for name in ("search", "target"):
            section, (dataset, classes) = config[name], sets[name]
            if pathlib.Path(given.data_dir, f"{dataset}_jpeg").exists():
                dataset += "_jpeg"  # the same images, stored as JPEG
            section.data.update({"name": dataset, "data_dir": given.data_dir})
            section.data.update({key: sets[key] for key in ("mean", "std")})
            section.data.train_split = f"train[:{given.images}]"
            section.data.classes = tuple(classes)[: given.classes]
            section.epochs, section.batch_size = given.epochs, given.batch_size
            section.schedule.warmup_epochs = min(1.0, given.epochs / 4)
        return config

    def _scales(self, network: str, variant: Variant, config: ConfigDict) -> Scales | None:
        """The scales of a variant; None: it needs none."""
        if not PARTS[variant.part].needs_scales:
            return None
        along = {} if variant.scales in ("initial", "ones") else self._searched(network)
        return changed(along, variant.scales, initial_scales(config))

    def _searched(self, network: str) -> dict[float, Scales]:
        """The scales of a network's search by epoch; it is searched if it was not."""
        workdir = self._workdir / f"search, {network}"
        if not (workdir / "scales").exists() or (workdir / "checkpoints").exists():
            config = self._config(network)
            config.eval_every = config.search.epochs / 4
            with self._timed():
                train(prepare(config, "search", make_mesh(), load=self._load), workdir)
            shutil.rmtree(workdir / "checkpoints")
        return scales_by_epoch(workdir)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Around a training: refuse it if half as long again as the longest would be too long."""
        start = time.monotonic()
        if start + 1.5 * self._longest > self._end:
            raise OutOfTime
        yield
        self._longest = max(self._longest, time.monotonic() - start)

    def _measured(self, part: Part, workdir: pathlib.Path) -> dict:
        """Train; top-1 of the test images and of those held out. Divergence counts as 0 %."""
        try:
            state, summary = train(part, workdir)
        except RunStopped as stopped:
            if stopped.exit_code != 1:  # 1: numbers that are not finite
                raise
            return {"top1": 0.0, "held_out_top1": 0.0, "diverged": True}
        held_out = dataset_arguments(part.section.data) | {"train_split": f"train[{MOST_IMAGES}:]"}
        dataset = dataclasses.replace(part.dataset, eval=self._load(**held_out).train)
        judged = evaluate_state(dataclasses.replace(part, dataset=dataset), state)
        return {
            "top1": summary["eval/top1"],
            "held_out_top1": judged["eval/top1"],
            "train_loss": summary["train/loss"],
            "seconds": summary["seconds"],
            "images_per_second": summary["train/images_per_second"],
        }


def best_rate(first: float, top1_at: Callable[[float], float]) -> float:
    """Double and halve a learning rate until the best one lies between two worse ones.

    >>> best_rate(0.1, lambda rate: -abs(rate - 0.8))
    0.8
    """
    best, tried = first, {}
    while missing := [rate for rate in (best, 2 * best, best / 2) if rate not in tried]:
        tried |= {rate: top1_at(rate) for rate in missing}
        best = max(tried, key=tried.get)
    return best


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Draw top-1 by variant, in a colour for each network, with standard deviations."""
    figure, (ax,) = styled_figure(8, 5)
    found = ablation_rows(rows)
    titles = list(dict.fromkeys(r["variant"] for r in found))[::-1]
    networks = list(dict.fromkeys(r["network"] for r in found))
    for network, colour in zip(networks, itertools.cycle(COLOURS), strict=False):
        own = [r for r in found if r["network"] == network]
        x = [statistics.mean(r["top1"]) for r in own]
        y = [titles.index(r["variant"]) for r in own]
        style = {"color": colour, "marker": "o", "linestyle": "", "capsize": 3, "label": network}
        bars = [statistics.stdev(r["top1"]) if len(r["top1"]) > 1 else 0 for r in own]
        ax.errorbar(x, y, xerr=bars, **style)
    ax.set_yticks(range(len(titles)), titles)
    ax.set_xlabel("Top-1 accuracy (%)")
    # Above the axes: a marker of the legend among the points would look like one of them.
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    save_figure(figure, path)


def use_compilation_cache(workdir: pathlib.Path) -> None:
    """Let trainings share compiled programs: most differ in the state's values alone."""
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def parsed() -> argparse.Namespace:
    """The flags, with what follows from them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=SETS, default="tinyimagenet")
    parser.add_argument("--data-dir", default=str(REAL_IMAGES), help="folder of the TFDS sets")
    parser.add_argument("--images", type=int, default=MOST_IMAGES, help="of all classes")
    parser.add_argument("--classes", type=int, help="how many of either half; all by default")
    parser.add_argument("--epochs", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=128, dest="batch_size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--sweep", action=argparse.BooleanOptionalAction, default=True, help="the learning rates"
    )
    networks = list(dict.fromkeys(network for network, _ in ROWS))
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks)
    titles = list(dict.fromkeys(variant.title for _, group in ROWS for variant in group))
    parser.add_argument("--variants", nargs="+", choices=titles, help="all by default")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin nothing that ends later"
    )
    parser.add_argument("--quick", action="store_true", help="every variant of a tiny network once")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/ablation"))
    parser.add_argument("--output", type=pathlib.Path, help="the JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    if arguments.images > MOST_IMAGES:
        parser.error(f"--images must be at most {MOST_IMAGES}, got {arguments.images}")
    most = len(SETS[arguments.data]["search"][1])
    arguments.classes = most if arguments.classes is None else arguments.classes
    if not 1 < arguments.classes <= most:
        parser.error(f"--classes must be 2 to {most}, got {arguments.classes}")
    if arguments.output is None:
        name = f"ablation_{arguments.data}.json"
        arguments.output = (arguments.workdir if arguments.quick else RESULTS) / name
    return arguments


def main() -> None:
    """Train what is missing; print the tables and draw the figure."""
    arguments = parsed()
    use_compilation_cache(arguments.workdir)
    study = Study(arguments)
    try:
        study.run()
    except OutOfTime:
        print("The time is up; the same command goes on from here.")
    if own := study.own_rows():
        draw(own, arguments.output.with_suffix(".png"))
        print(ablation({"rows": own}, ""))
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except (RunStopped, OSError, ValueError) as error:
        sys.exit(f"ablation.py: {error}")
