"""INT8 by post-training static quantization of an exported graph, with onnxruntime.

The complete recipe:

* Before: BatchNorm and branches are folded (`repopt_jax.deploy.fold`), the graph has opset 17.
* Format: QDQ, that is QuantizeLinear and DequantizeLinear around float nodes, which onnxruntime,
  TensorRT and OpenVINO turn into integer kernels.
* Quantized: every Conv and Gemm, the first and the last layer included, with their inputs; the
  outputs of ReLU (which becomes the clipping at 0 of its QuantizeLinear), of the pooling and of
  squeeze-excite's product. `float_layers` names layers to leave in float.
* Not quantized: the preprocessing, squeeze-excite's sigmoid, and the logits.
* Weights: int8, symmetric (zero point 0, range -127..127, scale max|w| / 127); one scale per
  layer ("per tensor", the setting in which the paper compares RepVGG and RepOpt-VGG) or one per
  output channel. The largest weight decides the scale; nothing is clipped.
* Biases: int32 with the scale of the input times that of the weight.
* Activations: uint8, one scale and zero point per tensor, asymmetric (after ReLU the zero point
  is 0 and all 256 values are used), from the calibration.
* Calibration: 512 training images drawn with seed 0, prepared as for evaluation. Min-max: the
  extremes. Percentile: a histogram of 2048 bins of which ``(100 - p) / 2`` percent are cut off at
  either end, p = 99.99. Entropy: the range of least Kullback-Leibler divergence, with the 128 bins
  for 128 levels that onnxruntime has for it, which are few: measure before choosing it.
* No bias correction, no equalization, no fine-tuning.
* `reduce_range` takes weights of 7 bits, for x86 CPUs without VNNI, whose 16-bit sums saturate.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pathlib
import tempfile
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from repopt_jax.deploy.graph import check_weights
from repopt_jax.deploy.onnx_export import INPUT
from repopt_jax.deploy.runtime import OnnxNetwork, metadata_of, read_onnx
from repopt_jax.extras import needs_extra

with needs_extra("deploy"):
    import onnx
    from onnx import helper
    from onnxruntime import quantization as ort

_METHODS = {
    "minmax": ort.CalibrationMethod.MinMax,
    "percentile": ort.CalibrationMethod.Percentile,
    "entropy": ort.CalibrationMethod.Entropy,
}
CALIBRATIONS = tuple(_METHODS)
CALIBRATION_IMAGES = 512
PERCENTILE = 99.99

_QUANTIZED_OPS = ["Conv", "Gemm", "Relu", "GlobalAveragePool", "Flatten", "Mul", "Add", "Concat"]


def quantize(
    graph: str | os.PathLike | onnx.ModelProto,
    batches: Collection[np.ndarray],
    *,
    per_channel: bool = False,
    calibration: Literal["minmax", "percentile", "entropy"] = "minmax",
    percentile: float = PERCENTILE,
    reduce_range: bool = False,
    float_layers: Sequence[str] = (),
) -> onnx.ModelProto:
    """The INT8 model of a float one; the module's docstring has the recipe.

    Args:
      graph: a float graph of this project, the file or the model.
      batches: calibration images, uint8 NHWC, such as those of `ImageSet.calibration`.
      per_channel: one weight scale per output channel. False: one per layer.
      calibration: how the ranges of activations are found.
      percentile: percent of the values that are kept, with the calibration "percentile".
      reduce_range: weights of 7 bits.
      float_layers: names of Conv and Gemm nodes to leave as they are, such as "stage0/conv".

    Raises:
      ValueError: the graph is not this project's, quantized already or not finite, there are no
        images, or another argument is out of its range.

    >>> import repopt_jax
    >>> from flax import nnx
    >>> from repopt_jax.deploy.onnx_export import onnx_model
    >>> from repopt_jax.deploy.preprocessing import Preprocessing
    >>> size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3}
    >>> model = repopt_jax.create_model("RepOpt-VGG", **size, rngs=nnx.Rngs(0))
    >>> images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    >>> int8 = quantize(onnx_model(model, Preprocessing(32, 32), name="tiny"), [images])
    >>> OnnxNetwork(int8)(images).shape, OnnxNetwork(int8).metadata["quantization"]
    ((8, 3), 'per tensor, minmax, 8 images')
    """
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration must be one of {CALIBRATIONS}, got {calibration!r}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
    if len(batches) == 0:
        raise ValueError("batches must hold at least one image, got none")
    if isinstance(graph, (str, os.PathLike)):
        graph, _ = read_onnx(graph)
    _check_graph(graph, float_layers)
    check_weights(graph)
    network = OnnxNetwork(graph, threads=1)
    reader = _Reader(network, batches)
    unquantized = [n.name for n in graph.graph.node if n.name.startswith("preprocess/")]
    prepared = copy.deepcopy(graph)
    # Says that shapes are inferred and BatchNorm is folded; else onnxruntime asks for both.
    entry = prepared.metadata_props.add()
    entry.key, entry.value = "onnx.quant.pre_process", "onnxruntime.quant"
    # onnxruntime prints several lines for every batch.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, _finite_logits(network, batches):
        target = pathlib.Path(folder) / "int8.onnx"
        ort.quantize_static(
            prepared,
            target,
            reader,
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=_QUANTIZED_OPS,
            nodes_to_exclude=[*unquantized, *float_layers],
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=_METHODS[calibration],
            extra_options={
                "WeightSymmetric": True,
                "ActivationSymmetric": False,
                "OpTypesToExcludeOutputQuantization": ["Gemm"],
                "CalibStridedMinMax": 1,  # of any method: one batch at a time, not all in memory
                **({"CalibPercentile": percentile} if calibration == "percentile" else {}),
            },
        )
        model = onnx.load(target)
    setting = "per channel" if per_channel else "per tensor"
    setting += f", {calibration}" + (f" {percentile:g}" if calibration == "percentile" else "")
    setting += f", {reader.count} images" + (", 7-bit weights" if reduce_range else "")
    setting += f", float: {' '.join(float_layers)}" if float_layers else ""
    helper.set_model_props(model, metadata_of(graph) | {"quantization": setting})
    model.producer_name, model.producer_version = graph.producer_name, graph.producer_version
    onnx.checker.check_model(model)
    return model


@contextlib.contextmanager
def _finite_logits(
    network: OnnxNetwork, batches: Collection[np.ndarray]
) -> contextlib.AbstractContextManager[None]:
    """Explain an error inside by logits that are not finite, where calibration finds no range."""
    try:
        yield
    except Exception:  # of the kinds AssertionError and ValueError, by calibration
        if all(np.isfinite(network(images)).all() for images in batches):
            raise
        raise ValueError(
            "graph must have finite logits for the calibration images, got NaN or infinity"
        ) from None


def _check_graph(graph: onnx.ModelProto, float_layers: Sequence[str]) -> None:
    layers = [node.name for node in graph.graph.node if node.op_type in ("Conv", "Gemm")]
    unknown = [name for name in float_layers if name not in layers]
    if unknown:
        raise ValueError(f"float_layers must be among {layers}, got {unknown}")
    if any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        raise ValueError("graph must be a float one, got a graph that is quantized already")


class _Reader:
    """Hands calibration data to onnxruntime, batch by batch."""

    def __init__(self, network: OnnxNetwork, batches: Collection[np.ndarray]):
        self._prepare = network.prepare
        self._batches, self._length = iter(batches), len(batches)
        self._due = self.count = 0

    def __len__(self) -> int:
        return self._length

    def set_range(self, start_index: int, end_index: int) -> None:
        self._due = end_index - start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._due == 0:
            return None
        self._due -= 1
        images = next(self._batches)
        self.count += len(images)
        return {INPUT: self._prepare(images)}
