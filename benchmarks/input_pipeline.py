"""Claim: ImageNet training batches cost a fraction of the official pipeline's CPU time.

    python benchmarks/input_pipeline.py                       # the images beside this checkout
    python benchmarks/input_pipeline.py --folder=DIR          # DIR/train/<class>/*.JPEG
    python benchmarks/input_pipeline.py --data_dir=DIR        # TFDS's imagenet2012 in DIR
    python benchmarks/input_pipeline.py --scaling             # threads and processes, by number

Compares, per core and on the same encoded images in memory:

* official: Pillow decodes, crops, resizes and augments, floats are normalized, in a torch
  DataLoader if torch is installed, else in a bare loop;
* tf.data: `decode_and_crop_jpeg` and a resize without antialiasing, if TensorFlow is installed;
* ours: `ResizedCrop.image` in a bare loop, and `train_batches` on one thread.

Every round runs all variants in turn, with new random crops. Rates are medians over the rounds,
ratios are medians of the rounds' ratios. One-core rates count CPU seconds, so that other work on
the machine disturbs them little; the speed-up of `train_batches` by a second thread, measured
apart with --two_threads, is in wall time, best round by best round, and needs two idle cores.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics

# Every variant gets one thread per core it is given; libraries must not add their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from environment import REAL_IMAGES, RESULTS, environment
from input_scaling import measure_scaling
from input_variants import BATCH, PACKAGES, SIZE, bare, measure, official, ours, tf_data

from repopt_jax.data import load_dataset
from repopt_jax.data.sources import read_items


def ratio(rates, name, base):
    """Median over the rounds of one variant's rate per CPU second by another's."""
    pairs = zip(rates[name]["cpu"], rates[base]["cpu"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def compare(images, augment, rounds):
    """All variants of one preset."""
    count = len(images)
    variants = {"official": official(images, augment)}
    if augment == "weak" and importlib.util.find_spec("tensorflow") is not None:
        variants["tf.data"] = tf_data(images)
    for label, fast in (("antialiased", False), ("fast", True)):
        variants[f"bare loop, {label}"] = bare(images, augment, fast)
        variants[f"train_batches, {label}"] = ours(images, augment, fast=fast, threads=1)
    rates = measure(variants, rounds, count)
    rows = []
    for name in variants:
        row = {
            "augment": augment,
            "variant": name,
            "images_per_cpu_second": round(statistics.median(rates[name]["cpu"]), 1),
            "images_per_second": round(statistics.median(rates[name]["wall"]), 1),
            "times_official_per_cpu_second": round(ratio(rates, name, "official"), 3),
        }
        if name.startswith("train_batches"):
            loop = name.replace("train_batches", "bare loop")
            row["grain_overhead"] = round(ratio(rates, loop, name) - 1, 3)
        rows.append(row)
    return rows


def two_thread_rates(images, augment, rounds, epochs=4):
    """Speed-up by a second thread, over so many batches that the uneven end counts little."""
    rows = []
    for label, fast in (("antialiased", False), ("fast", True)):
        variants = {n: ours(images, augment, fast=fast, threads=n, epochs=epochs) for n in (1, 2)}
        rates = measure(variants, rounds, epochs * len(images))
        # Wall time suffers from other work on the machine: the best round had least of it.
        one, two = (max(rates[n]["wall"]) for n in (1, 2))
        rows.append(
            {
                "augment": augment,
                "variant": label,
                "images_per_second_one_thread": round(one, 1),
                "images_per_second_two_threads": round(two, 1),
                "speed_up": round(two / one, 3),
            }
        )
    return rows


def encoded_images(flags):
    """Some of the training images, as the bytes of their files."""
    if flags.folder:
        dataset = load_dataset("folder", data_dir=flags.folder)
    else:
        try:
            dataset = load_dataset("imagenet2012", data_dir=flags.data_dir)
        except FileNotFoundError:
            raise SystemExit(
                "no ImageNet images found: give --folder or --data_dir (see --help)"
            ) from None
    count = min(flags.images, len(dataset.train)) // BATCH * BATCH
    indices = np.random.default_rng(0).permutation(len(dataset.train))[:count].tolist()
    return [item["image"] for item in read_items(dataset.train, indices)]


def measure_pipelines(images, rounds, with_two_threads):
    """Print the table of all variants; the content of the JSON file."""
    rows = [row for augment in ("weak", "raug15") for row in compare(images, augment, rounds)]
    print(f"{'augment':8}{'variant':42}{'per CPU s':>10}{'per s':>8}{'x official':>12}  note")
    for row in rows:
        note = f"Grain costs {row['grain_overhead']:.1%}" if "grain_overhead" in row else ""
        print(
            f"{row['augment']:8}{row['variant']:42}{row['images_per_cpu_second']:10.0f}"
            f"{row['images_per_second']:8.0f}{row['times_official_per_cpu_second']:12.2f}  {note}"
        )
    two_threads = []
    if with_two_threads:
        for augment in ("weak", "raug15"):
            two_threads += two_thread_rates(images, augment, max(1, rounds // 2))
    for row in two_threads:
        print(f"{row['augment']:8}{row['variant']:42}two threads: {row['speed_up']:.2f}x one")
    return {
        "claim": __doc__.splitlines()[0],
        "images": len(images),
        "mean_bytes": round(sum(map(len, images)) / len(images)),
        "image_size": SIZE,
        "batch_size": BATCH,
        "rounds": rounds,
        "environment": environment(*PACKAGES),
        "rows": rows,
        "two_threads": two_threads,
    }


def main():
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data_dir", default=str(REAL_IMAGES))
    where.add_argument("--folder")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--two_threads", action="store_true", help="measure this too; needs two idle cores"
    )
    parser.add_argument("--scaling", action="store_true", help="measure how they scale, only")
    parser.add_argument("--seconds", type=float, default=3.0, help="per turn, with --scaling")
    parser.add_argument("--output", help="default: input_pipeline.json or input_scaling.json")
    flags = parser.parse_args()
    name = "input_scaling" if flags.scaling else "input_pipeline"
    output = pathlib.Path(flags.output or RESULTS / f"{name}.json")
    output.parent.mkdir(exist_ok=True)
    images = encoded_images(flags)
    if flags.scaling:
        result = measure_scaling(images, flags.rounds, flags.seconds)
    else:
        result = measure_pipelines(images, flags.rounds, flags.two_threads)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
