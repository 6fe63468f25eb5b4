"""Claim: ImageNet training batches cost a fraction of the official pipeline's CPU time.

    python benchmarks/input_pipeline.py                       # the images beside this checkout
    python benchmarks/input_pipeline.py --folder=DIR          # DIR/train/<class>/*.JPEG
    python benchmarks/input_pipeline.py --data_dir=DIR        # TFDS's imagenet2012 in DIR
    python benchmarks/input_pipeline.py --scaling --rounds 3 --output=scaling.json

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
import random
import statistics
import time

# Every variant gets one thread per core it is given; libraries must not add their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pillow_transforms
from environment import environment

from repopt_jax.data import Dataset, load_dataset, train_batches
from repopt_jax.data.augment import preset
from repopt_jax.data.sources import read_items
from repopt_jax.data.workers import usable_cores
from repopt_jax.imagenet import IMAGENET_MEAN, IMAGENET_STD

HERE = pathlib.Path(__file__).parent
PACKAGES = (
    "numpy", "pillow", "simplejpeg", "opencv-python-headless", "grain", "torch", "tensorflow"
)  # fmt: skip
SIZE, BATCH = 224, 32
MEAN = np.array(IMAGENET_MEAN, np.float32)[:, None, None]
STD = np.array(IMAGENET_STD, np.float32)[:, None, None]


def official(images, augment):
    """The recipe's pipeline in a DataLoader, or without torch in a loop."""
    rand_augment = augment == "raug15"
    if importlib.util.find_spec("torch") is None:

        def run(seed):
            batch = []
            random.seed(seed)
            for data in images:
                image = pillow_transforms.transform(data, SIZE, rand_augment)
                image = image.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
                batch.append((image - MEAN) / STD)
                if len(batch) == BATCH:
                    batch = [] if np.stack(batch).size else None

        return run

    import torch

    torch.set_num_threads(1)
    mean, std = torch.from_numpy(MEAN), torch.from_numpy(STD)

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            image = pillow_transforms.transform(images[index], SIZE, rand_augment)
            image = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
            return image.to(torch.float32).div(255).sub_(mean).div_(std)

    def run(seed):
        random.seed(seed)
        for _ in torch.utils.data.DataLoader(Images(), BATCH, shuffle=True):
            pass

    return run


def tf_data(images):
    """The usual tf.data pipeline of ResNet examples: decode only the crop, resize, flip."""
    import tensorflow as tf

    def load(data):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros([1, 0, 4]),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, [SIZE, SIZE])
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    dataset = tf.data.Dataset.from_tensor_slices(images).map(load).batch(BATCH)
    dataset = dataset.with_options(options)

    def run(seed):
        for _ in dataset:
            pass

    return run


def bare(images, augment, fast):
    """Our images one by one, without Grain."""
    augment = preset(augment)

    def run(seed):
        seeds = augment.draw(len(images), np.random.default_rng(seed))
        for data, row in zip(images, seeds, strict=True):
            augment.image(data, row, SIZE, fast)

    return run


def ours(images, augment, fast, threads, epochs=1, workers=0):
    """Our batches: a fixed number, so that no thread works ahead into the next measurement."""
    source = [{"image": data, "label": 0} for data in images]
    dataset = Dataset("memory", 1, source, source)

    def run(seed):
        for _ in train_batches(
            dataset,
            batch_size=BATCH,
            seed=seed,
            num_epochs=epochs,
            augment=augment,
            image_size=SIZE,
            fast=fast,
            threads=threads,
            workers=workers,
        ):
            pass

    return run


def measure(variants, rounds, count):
    """Runs all variants in every round; images per CPU second and per second, by name."""
    for run in variants.values():
        run(0)  # imports, caches, compilation
    rates = {name: {"cpu": [], "wall": []} for name in variants}
    for number in range(rounds):
        for name, run in variants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run(number)
            rates[name]["cpu"].append(count / (time.process_time() - cpu))
            rates[name]["wall"].append(count / (time.perf_counter() - wall))
    return rates


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
        variants[f"train_batches, {label}"] = ours(images, augment, fast, threads=1)
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


def scaling(images, augment, rounds, epochs=4):
    """Speed-up by a second thread, over so many batches that the uneven end counts little."""
    rows = []
    for label, fast in (("antialiased", False), ("fast", True)):
        variants = {n: ours(images, augment, fast, threads=n, epochs=epochs) for n in (1, 2)}
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


def scale_out(images, augment, rounds, epochs):
    """Rates of threads and of processes, from one up to a core each, in turn in every round.

    In wall time, of so many epochs that the start of the processes counts little.
    """
    cores = usable_cores()
    counts = sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    variants = {}
    for count in counts:
        kinds = {"threads": {"threads": count}, "workers": {"threads": None, "workers": count}}
        for kind, options in kinds.items():
            variants[kind, count] = ours(images, augment, True, epochs=epochs, **options)
    rates = measure(variants, rounds, epochs * len(images))
    one = max(rates["threads", 1]["wall"])
    rows = []
    for (kind, count), found in rates.items():
        rate = max(found["wall"])  # the round with least of other work on the machine
        row = {"augment": augment, "kind": kind, "count": count}
        rows.append(row | {"images_per_second": round(rate, 1), "speed_up": round(rate / one, 3)})
    return rows


def measure_scaling(images, flags):
    """Prints the table of `scale_out`, writes the JSON."""
    rows = []
    print(f"{'augment':8}{'kind':10}{'count':>6}{'per s':>8}{'x one thread':>14}")
    for augment in ("weak", "raug15"):
        rows += scale_out(images, augment, flags.rounds, flags.epochs)
    for row in rows:
        rate, times = row["images_per_second"], row["speed_up"]
        print(f"{row['augment']:8}{row['kind']:10}{row['count']:6}{rate:8.0f}{times:14.2f}")
    result = {"what": scale_out.__doc__.splitlines()[0], "images": len(images), "rows": rows}
    result |= {"epochs": flags.epochs, "rounds": flags.rounds}
    result["environment"] = environment(*PACKAGES)
    pathlib.Path(flags.output).write_text(json.dumps(result, indent=2) + "\n")


def main():
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data_dir", default=str(HERE.parents[1] / "shared" / "tfds"))
    where.add_argument("--folder")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--two_threads", action="store_true", help="measure this too; needs two idle cores"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="measure threads and processes up to all cores only"
    )
    parser.add_argument("--epochs", type=int, default=8, help="of a measurement with --scaling")
    parser.add_argument("--output", default=str(HERE / "results" / "input_pipeline.json"))
    flags = parser.parse_args()
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
    images = [item["image"] for item in read_items(dataset.train, indices)]

    if flags.scaling:
        measure_scaling(images, flags)
        return
    rows = [row for augment in ("weak", "raug15") for row in compare(images, augment, flags.rounds)]
    print(f"{'augment':8}{'variant':42}{'per CPU s':>10}{'per s':>8}{'x official':>12}  note")
    for row in rows:
        note = f"Grain costs {row['grain_overhead']:.1%}" if "grain_overhead" in row else ""
        print(
            f"{row['augment']:8}{row['variant']:42}{row['images_per_cpu_second']:10.0f}"
            f"{row['images_per_second']:8.0f}{row['times_official_per_cpu_second']:12.2f}  {note}"
        )
    two_threads = []
    if flags.two_threads:
        for augment in ("weak", "raug15"):
            two_threads += scaling(images, augment, max(1, flags.rounds // 2))
    for row in two_threads:
        print(f"{row['augment']:8}{row['variant']:42}two threads: {row['speed_up']:.2f}x one")
    result = {
        "claim": __doc__.splitlines()[0],
        "images": count,
        "mean_bytes": round(sum(map(len, images)) / count),
        "image_size": SIZE,
        "batch_size": BATCH,
        "rounds": flags.rounds,
        "environment": environment(*PACKAGES),
        "rows": rows,
        "two_threads": two_threads,
    }
    pathlib.Path(flags.output).parent.mkdir(exist_ok=True)
    pathlib.Path(flags.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
