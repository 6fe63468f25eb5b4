"""ONNX graphs of this project run by onnxruntime: their outputs, accuracy and speed."""

from __future__ import annotations

import collections
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from repopt_jax.deploy.onnx_export import INPUT, metadata_of
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.extras import needs_extra

with needs_extra("deploy"):
    import onnx
    import onnxruntime
    from google.protobuf.message import DecodeError


def read_onnx(path: str | os.PathLike) -> tuple[onnx.ModelProto, dict[str, str]]:
    """An ONNX model that this project exported, and its metadata.

    Raises:
      ValueError: the file is no such model.
      FileNotFoundError: there is no file.
    """
    try:
        model = onnx.load(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"graph must be an existing file, got {os.fspath(path)!r}"
        ) from None
    except DecodeError:
        raise ValueError(f"graph must be an ONNX file, got {os.fspath(path)!r}") from None
    metadata = metadata_of(model)
    try:
        Preprocessing.from_metadata(metadata)
        missing = {"model", "num_classes"} - metadata.keys()
        if missing:
            raise ValueError(f"its metadata lack {sorted(missing)}")
    except ValueError as error:
        raise ValueError(f"graph {os.fspath(path)!r} cannot be used: {error}") from None
    return model, metadata


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of a model that also puts out the tensors `names`, in this order after the logits."""
    extended = copy.deepcopy(model)
    extended.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    return extended


class OnnxNetwork:
    """A graph with its preprocessing, from uint8 images to logits.

    Attributes:
      metadata: text by name.
      preprocessing: of the graph's images.

    Args:
      graph: the file, or the model in memory.
      threads: how many one call may use. None: one per core.
      saturating: keep onnxruntime's default kernels for INT8 graphs, for measuring speed. On x86
        without VNNI their sums saturate at 16 bits, which can cost ten points of accuracy. False:
        exact sums there (``session.x64quantprecision``), at about half the speed.

    Raises:
      ValueError: the graph is not this project's, or onnxruntime cannot run it.
    """

    def __init__(
        self,
        graph: str | os.PathLike | onnx.ModelProto,
        *,
        threads: int | None = None,
        saturating: bool = False,
    ):
        if isinstance(graph, (str, os.PathLike)):
            graph, _ = read_onnx(graph)
        self.metadata = metadata_of(graph)
        self.preprocessing = Preprocessing.from_metadata(self.metadata)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        if not saturating:
            options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads must be None or at least 1, got {threads}")
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(
                graph.SerializeToString(), options, ["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no class of their own in common
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"graph must be one that onnxruntime can run: {reason}") from None

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """The graph's input for uint8 NHWC images."""
        expected = (*self.preprocessing.size, 3)
        if images.shape[1:] != expected:
            raise ValueError(f"images must have the shape {expected} each, got {images.shape[1:]}")
        if self.preprocessing.inside:
            return images
        return np.ascontiguousarray(self.preprocessing(images).transpose(0, 3, 1, 2))

    def run(self, prepared: np.ndarray) -> list[np.ndarray]:
        """All outputs of the graph, the logits first, for an input of `prepare`."""
        return self._session.run(None, {INPUT: prepared})

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The logits for uint8 NHWC images."""
        return self.run(self.prepare(images))[0]


def evaluate(
    network: Callable[[np.ndarray], np.ndarray], batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, and the number of images.

    Of equal logits, which INT8 graphs often give, the first counts as the largest. Images whose
    logits are not finite are no hits; where there are any, "not_finite" says how many.

    Args:
      network: from uint8 images to logits.
      batches: uint8 NHWC images and their labels, such as those of `ImageSet.evaluation`.

    Raises:
      ValueError: there are no images.

    >>> evaluate(lambda images: np.eye(6)[[0, 1]], [(np.zeros((2, 1, 1, 3)), np.array([0, 2]))])
    {'top1': 50.0, 'top5': 100.0, 'images': 2}
    """
    hits, count, not_finite = np.zeros(5), 0, 0
    for images, labels in batches:
        logits = network(images)
        finite = np.isfinite(logits).all(-1)
        best = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
        found = (best == labels[:, None]) & finite[:, None]
        hits[: found.shape[1]] += found.sum(0)
        count += len(labels)
        not_finite += int((~finite).sum())
    if count == 0:
        raise ValueError("batches must hold at least one image, got none")
    top1, top5 = (100 * float(hits[:k].sum()) / count for k in (1, 5))
    numbers = {"top1": top1, "top5": top5, "images": count}
    return numbers | ({"not_finite": not_finite} if not_finite else {})


def images_per_second(
    networks: Mapping[str, OnnxNetwork], images: np.ndarray, *, rounds: int = 20
) -> dict[str, list[float]]:
    """Images per second of several graphs by label, one value per round.

    The graphs take turns, in an order that changes with every round, so that other work on the
    machine disturbs all of them alike. Compare the medians, or the ratios within a round.

    Args:
      networks: graph by label.
      images: one batch of uint8 NHWC images.
      rounds: measurements of each graph, after two runs that do not count.

    Raises:
      ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    inputs = {label: network.prepare(images) for label, network in networks.items()}
    found = {label: [] for label in networks}
    for label, network in networks.items():
        network.run(inputs[label])
        network.run(inputs[label])
    labels = collections.deque(networks)
    for _ in range(rounds):
        for label in labels:
            start = time.perf_counter()
            networks[label].run(inputs[label])
            found[label].append(len(images) / (time.perf_counter() - start))
        labels.rotate(-1)
    return found


def speedup(speeds: Mapping[str, list[float]], label: str, against: str) -> float:
    """The median over the rounds of the ratio of two graphs' speeds.

    >>> speedup({"int8": [30.0, 9.0, 20.0], "float": [10.0, 10.0, 10.0]}, "int8", "float")
    2.0
    """
    pairs = zip(speeds[label], speeds[against], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)
