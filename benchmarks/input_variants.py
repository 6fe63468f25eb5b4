"""The input pipelines that `input_pipeline.py` compares, and their rates.

Each is a function of encoded images that returns `run(seed)`, which makes batches of all of them
and drops them.
"""

import importlib.util
import random
import time

import numpy as np
import pillow_transforms

from repopt_jax.data import Dataset, train_batches
from repopt_jax.data.augment import preset
from repopt_jax.imagenet import IMAGENET_MEAN, IMAGENET_STD

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


def ours(images, augment, **options):
    """Our batches: a fixed number, so that no thread works ahead into the next measurement."""
    options = {"num_epochs": 1} | options

    def run(seed):
        for _ in our_batches(images, augment, seed=seed, **options):
            pass

    return run


def our_batches(images, augment, **options):
    """The iterator of `train_batches` over encoded images in memory."""
    source = [{"image": data, "label": 0} for data in images]
    dataset = Dataset("memory", 1, source, source)
    options = {"batch_size": BATCH, "augment": augment, "image_size": SIZE} | options
    return train_batches(dataset, **options)


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
