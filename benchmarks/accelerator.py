"""What an accelerator tells in eight minutes: steps, augmentation, input and training.

    python benchmarks/accelerator.py                      # at most 8 minutes on one GPU
    python benchmarks/accelerator.py --quick              # tiny sizes, about a minute on a CPU

Rows come in the order of their worth. Each is printed and written as soon as it is measured, and
none that the JSON holds is measured again: several short sessions add up. A row that fails, or for
which the time that is left does not suffice, is written with the reason, and the next one follows.
The images are those of --folder (DIR/train/<class>/*.JPEG) or of TFDS's imagenet2012 in --data_dir;
where there are none, images of noise take their place.
"""

import argparse
import functools
import gc
import io
import json
import pathlib
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import input_scaling
import jax
import numpy as np
import step_time  # sets the environment before a device is used
from environment import REAL_IMAGES, REPOSITORY, RESULTS, environment
from PIL import Image

from repopt_jax.data import load_dataset
from repopt_jax.data.randaugment import draw_rand_augment, packed
from repopt_jax.data.sources import read_items
from repopt_jax.data.workers import usable_cores
from repopt_jax.models import layers
from repopt_jax.training import randaugment
from repopt_jax.training.report import read_metrics, write_json
from repopt_jax.training.run import run, throughput

PACKAGES = (*step_time.PACKAGES, "jax-cuda13-plugin", "opencv-python-headless", "grain")
SECTIONS = ("randaugment", "steps", "batch_norm", "training", "input", "small_set", "search")
OTHERS = ("target, plain SGD", "hs", "torch, eager")


class Row(NamedTuple):
    """A measurement.

    Attributes:
      section: the table that it belongs to.
      name: what is measured.
      seconds: that it takes on an H100, compilation included.
      measure: returns the figures.
    """

    section: str
    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]


class Sizes(NamedTuple):
    """How large everything is."""

    model: str = "RepOpt-VGG-B1"
    small_model: str = "RepOpt-VGG-A0"
    size: int = 224
    batch: int = 256
    small_batch: int = 32
    dtype: str = "bfloat16"
    rounds: int = 5
    steps: int = 20  # in a round
    input_seconds: float = 3.0
    training_steps: int = 200  # many more than the batches that are made during compilation


QUICK = Sizes("RepOpt-VGG-A0", "RepOpt-VGG-A0", 32, 4, 2, "float32", 1, 1, 0.2, 4)


def all_rows(sizes: Sizes, images: pathlib.Path | None, small: bool) -> Iterator[Row]:
    """Every measurement, the most important ones first.

    Args:
      sizes: how large everything is.
      images: a folder of images or of TFDS's sets.
      small: only one row of each kind.
    """

    def step(name, batch, variant, seconds):
        label = f"{name.removeprefix('RepOpt-VGG-')}, batch {batch}: {variant}"
        measure = functools.partial(step_row, sizes, name, batch, variant)
        return Row("steps", label, seconds, measure)

    large = functools.partial(step, sizes.model, sizes.batch)
    yield Row("randaugment", f"{sizes.batch} images", 25, lambda: augmentation_row(sizes))
    yield large("target", 40)
    yield Row("training", "real files against one batch", 90, lambda: training_row(sizes, images))
    yield Row("small_set", "a small set on the device", 60, lambda: small_set_row(small))
    yield Row("batch_norm", "by autodiff", 20, lambda: batch_norm_row(sizes, by_autodiff))
    yield Row("batch_norm", "ReLU by autodiff", 20, lambda: batch_norm_row(sizes, relu_apart))
    if not small:
        yield large("torch, compiled", 50)
        yield large("repvgg", 30)
        yield Row("search", "CIFAR-100's size, batch 128", 25, lambda: search_row(sizes))
    yield Row("input", "threads and processes", 60, lambda: input_row(sizes, images))
    if small:
        return
    for variant in OTHERS:
        yield large(variant, 15)
    for name, batch in ((sizes.model, sizes.small_batch), (sizes.small_model, sizes.batch)):
        for variant in ("target", "repvgg"):
            yield step(name, batch, variant, 25)
        yield step(name, batch, "torch, compiled", 45)
        for variant in OTHERS:
            yield step(name, batch, variant, 12)


def step_row(
    sizes: Sizes, name: str, batch: int, variant: str, size: int | None = None
) -> dict[str, Any]:
    """One variant of the training step, by `step_time.py`. Without `size`, at that of `sizes`."""
    flags = SimpleNamespace(variants=[variant], rounds=sizes.rounds, steps=sizes.steps)
    found = step_time.compare_steps(flags, name, size or sizes.size, batch, sizes.dtype)
    if not found["rows"]:
        raise RuntimeError(found["left_out"].get(variant, "PyTorch cannot run here"))
    shares = {"op_shares": found["op_shares"]} if "op_shares" in found else {}
    return found["rows"][0] | shares


def search_row(sizes: Sizes) -> dict[str, Any]:
    """The step of the official search, and the minutes of its 240 epochs of 50,000 images."""
    found = step_row(sizes, sizes.model, 128, "hs", 32)
    return found | {"minutes": round(240 * 50_000 / found["images_per_second"] / 60, 1)}


def batch_norm_row(sizes: Sizes, normalize: Callable[..., Any]) -> dict[str, Any]:
    """The target's step with `normalize` in place of `batch_normalize`."""
    with mock.patch.object(layers, "batch_normalize", normalize):
        return step_row(sizes, sizes.model, sizes.batch, "target")


def by_autodiff(*arguments) -> tuple[jax.Array, ...]:
    """BatchNorm and ReLU by autodiff instead of their own derivative."""
    return layers._normalize_forward(*arguments)[0]


def relu_apart(x, scale, bias, epsilon, relu, normalize=layers.batch_normalize):
    """BatchNorm with its own derivative, ReLU by autodiff."""
    y, *statistics = normalize(x, scale, bias, epsilon)
    return jax.nn.relu(y) if relu else y, *statistics


def augmentation_row(sizes: Sizes) -> dict[str, Any]:
    """Milliseconds of RandAugment on a batch, in all and of each family of operations alone."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sizes.batch, sizes.size, sizes.size, 3), np.uint8)
    drawn = [packed(draw_rand_augment(rng), sizes.size) for _ in range(sizes.batch)]
    images, operations = jax.device_put((images, np.stack(drawn)))

    def milliseconds(function, *arguments):
        function = jax.jit(function)
        jax.block_until_ready(function(*arguments))
        times = []
        for _ in range(sizes.rounds):
            start = time.perf_counter()
            for _ in range(sizes.steps):
                found = function(*arguments)
            jax.block_until_ready(found)
            times.append((time.perf_counter() - start) / sizes.steps)
        return round(1e3 * statistics.median(times), 3)

    result = {"milliseconds": milliseconds(randaugment.apply_operations, images, operations)}
    each = jax.jit(randaugment.Operation.of)(operations[:, 0])
    for name in ("look_up", "blend", "cut_out", "move"):
        family = getattr(randaugment, name)
        result[f"{name}_milliseconds"] = milliseconds(family, images, each)
    return result


def input_row(sizes: Sizes, images: pathlib.Path | None) -> dict[str, Any]:
    """Images per second of one thread, and of threads and processes on all cores."""
    dataset = dataset_of(images)
    count = min(256, len(dataset.train))
    encoded = [item["image"] for item in read_items(dataset.train, list(range(count)))]
    counts = sorted({1, usable_cores()})
    options = {k: v for k, v in input_scaling.AUGMENTATIONS.items() if k != "weak"}
    rows = input_scaling.scale_out(encoded, counts, 1, sizes.input_seconds, options)
    input_scaling.print_rows(rows)
    return {"rows": rows, "raug15": input_scaling.lock_held(encoded, "raug15")}


def training_row(sizes: Sizes, images: pathlib.Path | None) -> dict[str, Any]:
    """`train.py`'s rate on image files with raug15, and that of its step on one batch."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "imagenet.py"))["get_config"](sizes.model)
    config.parts = ("plain",)
    config.dtype = sizes.dtype
    # A report waits for the device: with one every few steps, they would be what is measured.
    config.log_every = max(1, sizes.training_steps // 4)
    section = config.target
    section.data.update({"name": "folder", "image_size": sizes.size, "fast": True})
    section.batch_size, section.eval_batch_size = sizes.batch, sizes.batch
    section.bn_group = min(section.bn_group, sizes.batch)
    epochs = sizes.training_steps / 4
    section.epochs = config.eval_every = config.checkpoint.every = float(epochs)
    section.schedule.warmup_epochs = 0.0
    with tempfile.TemporaryDirectory() as folder:
        section.data.data_dir = write_files(images, pathlib.Path(folder), 4 * sizes.batch)
        (bare,) = throughput(config).values()
        run(config, pathlib.Path(folder) / "run")
        records = read_metrics(pathlib.Path(folder) / "run" / "plain" / "metrics.jsonl")
    rates = [r["train/images_per_second"] for r in records if "train/images_per_second" in r]
    rate = statistics.median(rates[len(rates) // 2 :])
    waits = [r["train/input_wait"] for r in records if "train/input_wait" in r]
    result = {
        "images_per_second": round(rate, 1),
        "without_input": round(bare, 1),
        "share": round(rate / bare, 3),
    }
    return result | ({"input_wait": round(statistics.median(waits), 3)} if waits else {})


def small_set_row(small: bool) -> dict[str, Any]:
    """The trainer on a set that lies on the device, by `small_set.py`."""
    from small_set import small_set_rates

    tiny = {"images": 64, "batch_size": 16, "epochs": 2}
    tiny |= {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8)}
    rates = small_set_rates(**(tiny if small else {}))
    return {f"{way}_images_per_second": statistics.median(found) for way, found in rates.items()}


def data_options(images: pathlib.Path | None) -> dict[str, str]:
    """The fields of the configuration for a folder of images, or for TFDS's."""
    is_tfds = (images / "imagenet2012").exists()
    return {"name": "imagenet2012" if is_tfds else "folder", "data_dir": str(images)}


@functools.cache
def dataset_of(images: pathlib.Path):
    """The images, opened."""
    options = data_options(images)
    return load_dataset(options.pop("name"), **options)


def write_files(images: pathlib.Path, folder: pathlib.Path, count: int) -> str:
    """Write `count` images to train on, repeating those there are, and eight to evaluate on."""
    dataset = dataset_of(images)
    for split, source, number in (("train", dataset.train, count), ("val", dataset.eval, 8)):
        for i in range(8):
            (folder / split / f"class{i}").mkdir(parents=True)
        items = read_items(source, [i % len(source) for i in range(number)])
        for i, item in enumerate(items):
            (folder / split / f"class{i % 8}" / f"{i}.jpg").write_bytes(item["image"])
    return str(folder)


def write_noise(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Image files about as large as ImageNet's, of coarse noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split / "noise").mkdir(parents=True)
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (94, 125, 3), np.uint8))
            buffer = io.BytesIO()
            coarse.resize((500, 375)).save(buffer, "JPEG", quality=95)
            (folder / split / "noise" / f"{number}.jpg").write_bytes(buffer.getvalue())
    return folder


def measured(row: Row, left: float) -> dict[str, Any]:
    """What a row has found, or why it has found nothing."""
    if left < row.seconds:
        return {"left_out": f"takes about {row.seconds:.0f} s, and {max(0, left):.0f} were left"}
    start = time.perf_counter()
    try:
        found = row.measure()
    except Exception as error:  # whatever it is, the next row may not have it
        found = {"left_out": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    gc.collect()  # what the row has put on the device
    return found | {"row_seconds": round(time.perf_counter() - start, 1)}


def known_rows(output: pathlib.Path, devices: list[str], sizes: Sizes) -> dict[tuple, dict]:
    """The rows that an earlier session has measured, by section and name."""
    if not output.exists():
        return {}
    known = json.loads(output.read_text())
    there = known["environment"]["devices"], known["sizes"]["model"], known["sizes"]["batch"]
    if there != (devices, sizes.model, sizes.batch):
        raise SystemExit(
            f"--output must be a new file or one with rows of {devices}, {sizes.model} and batch "
            f"{sizes.batch}; {output} has those of {there[0]}, {there[1]} and batch {there[2]}"
        )
    return {(r["section"], r["name"]): r for r in known["rows"] if "left_out" not in r}


def main():
    """Measure row by row, print and write each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="that all rows may take")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one row of each kind")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data_dir", type=pathlib.Path, default=REAL_IMAGES)
    where.add_argument("--folder", type=pathlib.Path)
    kind = jax.devices()[0].device_kind.lower().replace(" ", "_")
    parser.add_argument("--output", default=str(RESULTS / f"accelerator_{kind}.json"))
    flags = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        images = flags.folder or flags.data_dir
        if not (real := images.exists()):
            images = write_noise(pathlib.Path(folder), 8 if flags.quick else 256)
        sizes = QUICK if flags.quick else Sizes()
        output = pathlib.Path(flags.output)
        facts = environment(*PACKAGES)
        rows = known_rows(output, facts["devices"], sizes)
        result = {
            "what": __doc__.splitlines()[0],
            "environment": facts,
            "sizes": sizes._asdict(),
            "real_images": real,
        }
        for row in all_rows(sizes, images, small=flags.quick):
            key = row.section, row.name
            if key in rows or row.section not in flags.sections:
                continue
            left = 60 * flags.minutes - (time.perf_counter() - begun)
            seconds = 0 if flags.quick else row.seconds
            found = measured(row._replace(seconds=seconds), left)
            changes = " with changes" if facts["uncommitted_changes"] else ""
            found["commit"] = f"{facts['commit']}{changes}"
            rows[key] = {"section": row.section, "name": row.name} | found
            print(f"{row.section}, {row.name}: {json.dumps(found)}", flush=True)
            write_json(output, result | {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
