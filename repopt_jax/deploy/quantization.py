"""INT8 by post-training static quantization of an exported graph.

The complete recipe:

* Before: BatchNorm and branches are folded (`repopt_jax.deploy.fold`), the graph has opset 17.
* Format: QDQ, that is QuantizeLinear and DequantizeLinear around float nodes, which runtimes turn
  into integer kernels.
* Quantized: every Conv and Gemm, the first and the last layer included. `float_layers` names layers
  to leave in float. Not quantized: the preprocessing, squeeze-excite's sigmoid, and the logits.
* Weights: int8, symmetric (zero point 0, range -127..127, scale max|w| / 127); one scale per
  layer ("per tensor", the setting in which the paper compares RepVGG and RepOpt-VGG) or one per
  output channel. The largest weight decides the scale; nothing is clipped.
* Activations and biases go by the runtime:

  ============  ======================================================================
  onnxruntime   uint8 with one scale and zero point per tensor (after ReLU the zero point
                is 0 and all 256 values are used), for the outputs of ReLU, of the pooling
                and of squeeze-excite's product too; ReLU becomes the clipping of its
                QuantizeLinear. Biases: int32 with the scale of the input times the
                weight's. OpenVINO reads this file, TensorRT does not.
  tensorrt      int8 with one scale per tensor and zero points of 0, for the inputs of
                Conv, Gemm and Add; float biases. Weights are floats behind their own
                nodes. See `repopt_jax.deploy.qdq`.
  openvino      the same, with the weights stored as int8.
  ============  ======================================================================

* Calibration: 512 training images drawn with seed 0, prepared as for evaluation. Min-max: the
  extremes. Percentile: a histogram of 2048 bins of which ``(100 - p) / 2`` percent are cut off at
  either end, p = 99.99. Entropy: the range of least Kullback-Leibler divergence, with the 128 bins
  for 128 levels that onnxruntime has for it, which are few: measure before choosing it. Symmetric
  scales take the larger end.
* `equalize`: see `repopt_jax.deploy.equalization`. No fine-tuning: that is the part "qat" of a run.
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

from repopt_jax.deploy.equalization import correct_biases, equalized
from repopt_jax.deploy.graph import check_weights
from repopt_jax.deploy.onnx_export import INPUT, metadata_of
from repopt_jax.deploy.qdq import insert_qdq, kernel_scales, quantized_inputs
from repopt_jax.deploy.runtime import OnnxNetwork, read_onnx
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
RUNTIMES = ("onnxruntime", "tensorrt", "openvino")
CALIBRATION_IMAGES = 512
PERCENTILE = 99.99

_QUANTIZED_OPS = ["Conv", "Gemm", "Relu", "GlobalAveragePool", "Flatten", "Mul", "Add", "Concat"]


def quantize(
    graph: str | os.PathLike | onnx.ModelProto,
    batches: Collection[np.ndarray],
    *,
    runtime: Literal["onnxruntime", "tensorrt", "openvino"] = "onnxruntime",
    equalize: bool = False,
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
      runtime: what is to run the model.
      equalize: even the channels' ranges out, and correct biases, before quantizing.
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
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {RUNTIMES}, got {runtime!r}")
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
    weights = {"per_channel": per_channel, "steps": 63 if reduce_range else 127}
    with _finite_logits(graph, batches):
        if equalize:
            graph = correct_biases(equalized(graph), batches, float_layers=float_layers, **weights)
        method = calibration, percentile
        if runtime == "onnxruntime":
            own = per_channel, reduce_range, float_layers
            model = _by_onnxruntime(graph, batches, *method, *own)
        else:
            scales = _symmetric_scales(graph, batches, *method, float_layers)
            options = {"float_kernels": runtime == "tensorrt", "float_layers": float_layers}
            scales |= kernel_scales(graph, float_layers=float_layers, **weights)
            model = insert_qdq(graph, scales, **options)
    setting = "" if runtime == "onnxruntime" else f"{runtime}, "
    setting += "per channel" if per_channel else "per tensor"
    setting += ", equalized" if equalize else ""
    setting += f", {calibration}" + (f" {percentile:g}" if calibration == "percentile" else "")
    setting += f", {sum(map(len, batches))} images" + (", 7-bit weights" if reduce_range else "")
    setting += f", float: {' '.join(float_layers)}" if float_layers else ""
    helper.set_model_props(model, metadata_of(graph) | {"quantization": setting})
    model.producer_name, model.producer_version = graph.producer_name, graph.producer_version
    onnx.checker.check_model(model)
    return model


def _by_onnxruntime(
    graph: onnx.ModelProto,
    batches: Collection[np.ndarray],
    calibration: str,
    percentile: float,
    per_channel: bool,
    reduce_range: bool,
    float_layers: Sequence[str],
) -> onnx.ModelProto:
    """The model as onnxruntime's own tool quantizes it."""
    unquantized = [n.name for n in graph.graph.node if n.name.startswith("preprocess/")]
    prepared = copy.deepcopy(graph)
    # Says that shapes are inferred and BatchNorm is folded; else onnxruntime asks for both.
    entry = prepared.metadata_props.add()
    entry.key, entry.value = "onnx.quant.pre_process", "onnxruntime.quant"
    # onnxruntime prints several lines for every batch.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet:
        target = pathlib.Path(folder) / "int8.onnx"
        ort.quantize_static(
            prepared,
            target,
            _Reader(graph, batches),
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
        return onnx.load(target)


def _symmetric_scales(
    graph: onnx.ModelProto,
    batches: Collection[np.ndarray],
    calibration: str,
    percentile: float,
    float_layers: Sequence[str],
) -> dict[str, float]:
    """The size of a step of every tensor that is to be quantized, by onnxruntime's calibration."""
    tensors = {node.input[i] for node, i in quantized_inputs(graph, float_layers)}
    reader = _Reader(graph, batches)
    options = {"percentile": percentile} if calibration == "percentile" else {}
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet:
        plain, extended = (os.path.join(folder, f"{name}.onnx") for name in ("plain", "extended"))
        onnx.save(graph, plain)
        calibrator = ort.calibrate.create_calibrator(
            plain, ["Conv", "Gemm", "Add"], extended, _METHODS[calibration], extra_options=options
        )
        for batch in range(len(reader)):  # one at a time, not all in memory
            reader.set_range(batch, batch + 1)
            calibrator.collect_data(reader)
        ranges = calibrator.compute_data()
    largest = {t: float(np.max(np.abs(ranges[t].range_value))) for t in tensors}
    return {tensor: (value or 1.0) / 127 for tensor, value in largest.items()}


@contextlib.contextmanager
def _finite_logits(
    graph: onnx.ModelProto, batches: Collection[np.ndarray]
) -> contextlib.AbstractContextManager[None]:
    """Explain an error inside by logits that are not finite, where calibration finds no range."""
    try:
        yield
    except Exception:  # of the kinds AssertionError and ValueError, by calibration
        network = OnnxNetwork(graph)
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

    def __init__(self, graph: onnx.ModelProto, batches: Collection[np.ndarray]):
        self._prepare = OnnxNetwork(graph, threads=1).prepare
        self._batches, self._length = iter(batches), len(batches)
        self._due = 0

    def __len__(self) -> int:
        return self._length

    def set_range(self, start_index: int, end_index: int) -> None:
        self._due = end_index - start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._due == 0:
            return None
        self._due -= 1
        return {INPUT: self._prepare(next(self._batches))}
