"""Running an ONNX graph of this project by onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from repopt_jax.deploy.onnx_export import INPUT
from repopt_jax.deploy.preprocessing import Preprocessing

if TYPE_CHECKING:
    import onnx


def read_onnx(path: str | os.PathLike) -> tuple[onnx.ModelProto, dict[str, str]]:
    """An ONNX model that this project exported, and its metadata.

    Raises:
      ValueError: it is none.
      FileNotFoundError: there is no such file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
    except DecodeError:
        raise ValueError(f"graph must be an ONNX file, got {os.fspath(path)!r}") from None
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        Preprocessing.from_metadata(metadata)
        missing = [name for name in ("model", "num_classes") if name not in metadata]
        if missing:
            raise ValueError(f"its metadata lack {missing}, which every exported graph has")
    except ValueError as error:
        raise ValueError(f"graph {os.fspath(path)!r} cannot be used: {error}") from None
    return model, metadata


class OnnxNetwork:
    """A graph with its preprocessing, from uint8 images to outputs.

    Attributes:
      metadata: text by name.
      preprocessing: what the graph expects.

    Args:
      graph: the file, or the model in memory.
      threads: that one call may use. None: onnxruntime's choice, one per core.
      outputs: tensors to return. None: the logits alone.
      saturating: leave onnxruntime its default kernels for INT8 graphs, for measuring speed. On x86
        without VNNI their sums of two products saturate at 16 bits, which can cost ten points of
        accuracy. False asks for exact sums there (its option ``session.x64quantprecision``), at
        about half the speed; on other processors nothing changes.

    Raises:
      ValueError: the graph is none of this project's, or onnxruntime cannot run it.
    """

    def __init__(
        self,
        graph: str | os.PathLike | onnx.ModelProto,
        *,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        saturating: bool = False,
    ):
        import onnxruntime

        if isinstance(graph, (str, os.PathLike)):
            graph, _ = read_onnx(graph)
        self.metadata = {entry.key: entry.value for entry in graph.metadata_props}
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
        providers = ["CPUExecutionProvider"]
        try:
            self._session = onnxruntime.InferenceSession(
                graph.SerializeToString(), options, providers
            )
        except Exception as error:  # its exceptions have no class of their own in common
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"graph must be one that onnxruntime can run: {reason}") from None
        self._outputs = list(outputs) if outputs is not None else ["logits"]

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """What the graph's input is for uint8 NHWC images."""
        expected = (self.preprocessing.height, self.preprocessing.width, 3)
        if images.shape[1:] != expected:
            raise ValueError(f"images must have the shape {expected} each, got {images.shape[1:]}")
        if self.preprocessing.inside:
            return images
        return np.ascontiguousarray(self.preprocessing(images).transpose(0, 3, 1, 2))

    def run(self, prepared: np.ndarray) -> list[np.ndarray]:
        """The outputs for what `prepare` returned."""
        return self._session.run(self._outputs, {INPUT: prepared})

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The first output, normally the logits, for uint8 NHWC images."""
        return self.run(self.prepare(images))[0]
