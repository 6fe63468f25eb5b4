"""The speed of train.py on small images, against the bare step on images that lie on the device.

    python benchmarks/small_set.py                              # for a GPU
    python benchmarks/small_set.py --images 2048 --batch 128 --epochs 3 --rounds 4   # for two cores

Random images of CIFAR's size train a network of B1's depth in three ways: the loop of train.py with
images sent by the host, the same with images on the device, both with reports, evaluations and
checkpoints; and the bare step on images on the device, an epoch in one `lax.scan` (on CPU, where
convolutions are slow inside loops, step by step). A round runs each once; every second round goes
from the last to the first. A rate is that of the epochs after the first.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from environment import RESULTS, environment

from repopt_jax.data import Dataset
from repopt_jax.data.augment import preset
from repopt_jax.data.sources import ArraySource
from repopt_jax.training.config import default_config
from repopt_jax.training.device_images import crop_and_flip, put_draws, put_images, take
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.loop import train
from repopt_jax.training.parts import prepare
from repopt_jax.training.report import format_table, read_metrics
from repopt_jax.training.step import train_step

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "jax-cuda12-plugin")
WAYS = {
    "host": "train.py, images from the host",
    "device": "train.py, images on the device",
    "bare": "bare step, images on the device",
}


def small_set_part(images, batch_size, epochs, num_blocks, widths, dtype):
    """The training of a plain network on random images of 32 pixels; its images are on the host."""
    config = default_config()
    config.parts = ("plain",)
    config.dtype = dtype
    config.model.update({"num_blocks": num_blocks, "widths": widths, "strides": (1, 2, 2, 2, 2)})
    target = config.target
    target.update({"batch_size": batch_size, "epochs": float(epochs)})
    target.data.update({"name": "random", "augment": "flip_crop", "on_device": "never"})
    target.schedule.warmup_epochs = 1.0
    rng = np.random.default_rng(0)

    def source(count):
        pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        return ArraySource(pixels, rng.integers(0, 10, count))

    dataset = Dataset("random", 10, source(images), source(images // 5), (32, 32, 3))
    return prepare(config, "plain", make_mesh(), load=lambda **_: dataset)


def loop_rate(part):
    """Images/s of train.py's loop from the end of the first epoch to the end of the training."""
    with tempfile.TemporaryDirectory() as workdir:
        train(part, workdir)
        records = read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
    # An evaluation's own line comes last, so the seconds contain it.
    ends = [r for r in records if "eval/top1" in r]
    steps, seconds = (ends[-1][key] - ends[0][key] for key in ("step", "seconds"))
    return steps * part.section.batch_size / seconds


class BareSteps:
    """An epoch of the step alone: images and all draws of the epoch lie on the device."""

    def __init__(self, part):
        padding = preset(part.section.data.augment).padding
        self._part, self._images = part, put_images(part.mesh, part.dataset.train)

        def step(state, images, drawn):
            batch = take(images, drawn["index"])
            batch["image"] = crop_and_flip(batch["image"], drawn["draw"], padding)
            return train_step(part.graphdef, part.tx, part.options, state, batch)

        def epoch(state, images, drawn):
            return jax.lax.scan(lambda s, d: step(s, images, d), state, drawn)

        self._in_loop = jax.default_backend() != "cpu"
        self._program = jax.jit(epoch if self._in_loop else step, donate_argnums=0)
        self._run(part.init())  # compiles

    def _run(self, state):
        part = self._part
        batches = part.train_batches(images=False)
        drawn = [next(batches) for _ in range(part.steps_per_epoch)]
        drawn = put_draws(part.mesh, drawn, len(drawn))
        rows = [drawn] if self._in_loop else [
            {k: x[row] for k, x in drawn.items()} for row in range(part.steps_per_epoch)
        ]  # fmt: skip
        jax.block_until_ready((state, rows))
        start = time.perf_counter()
        for row in rows:
            state, _ = self._program(state, self._images, row)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    def rate(self):
        """Images/s of an epoch."""
        part = self._part
        return part.steps_per_epoch * part.section.batch_size / self._run(part.init())


def small_set_rates(
    images=25_000,
    batch_size=256,
    epochs=6,
    rounds=1,
    num_blocks=(4, 6, 16, 1),
    widths=(16, 16, 32, 64, 128),
    dtype="float32",
):
    """Images/s of every round, by the keys of `WAYS`."""
    host = small_set_part(images, batch_size, epochs, num_blocks, widths, dtype)
    device = dataclasses.replace(host, on_device=True)
    bare = BareSteps(device)
    runs = {"host": lambda: loop_rate(host), "device": lambda: loop_rate(device), "bare": bare.rate}
    found = {way: [] for way in runs}
    for number in range(rounds):
        for way, run in list(runs.items())[:: -1 if number % 2 else 1]:
            found[way].append(round(run(), 1))
    return found


def share(rates, way, base):
    """Median over the rounds of one way's rate divided by another's."""
    pairs = zip(rates[way], rates[base], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 4)


def main():
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_blocks", type=int, nargs=4, default=(4, 6, 16, 1))
    parser.add_argument("--widths", type=int, nargs=5, default=(16, 16, 32, 64, 128))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "small_set.json")
    flags = parser.parse_args()
    shape = {"num_blocks": tuple(flags.num_blocks), "widths": tuple(flags.widths)}
    sizes = {"images": flags.images, "batch_size": flags.batch, "epochs": flags.epochs}
    rates = small_set_rates(**sizes, **shape, rounds=flags.rounds, dtype=flags.dtype)
    rows = [
        {
            "way": WAYS[way],
            "images_per_second": round(statistics.median(found), 1),
            "share_of_bare": share(rates, way, "bare"),
        }
        for way, found in rates.items()
    ]
    cells = [
        (r["way"], f"{r['images_per_second']:,.0f}", f"{r['share_of_bare']:.2f}") for r in rows
    ]
    print(format_table(cells, ("way", "images/s", "of the bare step")))
    result = {
        "claim": __doc__.splitlines()[0],
        **sizes,
        **shape,
        "rounds": flags.rounds,
        "dtype": flags.dtype,
        "rows": rows,
        "device_to_host": share(rates, "device", "host"),
        "environment": environment(*PACKAGES),
    }
    flags.output.parent.mkdir(exist_ok=True)
    flags.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
