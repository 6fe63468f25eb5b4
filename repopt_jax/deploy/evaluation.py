"""How well and how fast an ONNX graph is: accuracy over an evaluation set, images a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping

import numpy as np

from repopt_jax.deploy.runtime import OnnxNetwork


def evaluate(
    network: OnnxNetwork, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, and the number of images.

    Of equal logits the first counts as larger, as `jax.lax.top_k` has it: the logits of an INT8
    graph may be equal, and a tie must not count as a hit.

    Args:
      network: from uint8 images to logits.
      batches: uint8 NHWC images and their labels; see `unmasked`.

    Raises:
      ValueError: there are no images.

    >>> evaluate(lambda images: np.eye(6)[[0, 1]], [(np.zeros((2, 1, 1, 3)), np.array([0, 2]))])
    {'top1': 50.0, 'top5': 100.0, 'images': 2}
    """
    hits, count = np.zeros(5), 0
    for images, labels in batches:
        best = np.argsort(-network(images), axis=-1, kind="stable")[:, :5]
        found = best == labels[:, None]
        hits[: found.shape[1]] += found.sum(0)
        count += len(labels)
    if count == 0:
        raise ValueError("batches must hold at least one image, got none")
    top1, top5 = (100 * float(hits[:k].sum()) / count for k in (1, 5))
    return {"top1": top1, "top5": top5, "images": count}


def images_per_second(
    networks: Mapping[str, OnnxNetwork], images: np.ndarray, *, rounds: int = 20
) -> dict[str, list[float]]:
    """Images a second of several graphs, in turns on the same cores.

    In turns, so that whatever else the machine does meets all of them; the order changes with
    every round. Compare the medians, or the ratios within a round.

    Args:
      networks: graph by label.
      images: one batch of uint8 NHWC images.
      rounds: measurements of each, after two runs that do not count.

    Returns:
      Label -> images a second, one value per round.

    Raises:
      ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    inputs = {label: network.prepare(images) for label, network in networks.items()}
    for label, network in networks.items():
        for _ in range(2):
            network.run(inputs[label])
    found = {label: [] for label in networks}
    labels = list(networks)
    for turn in range(rounds):
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
            start = time.perf_counter()
            networks[label].run(inputs[label])
            found[label].append(len(images) / (time.perf_counter() - start))
    return found


def speedup(speeds: Mapping[str, list[float]], label: str, against: str) -> float:
    """The median over the rounds of the ratio of two graphs' speeds.

    >>> speedup({"int8": [30.0, 9.0, 20.0], "float": [10.0, 10.0, 10.0]}, "int8", "float")
    2.0
    """
    pairs = zip(speeds[label], speeds[against], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)
