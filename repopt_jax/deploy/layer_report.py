"""Quantization layer by layer: the spread of the weights, and the noise that 8 bits add.

One scale has to serve all weights that share it, so a few large ones (at the centre of a kernel
that was merged from branches with BatchNorm, say) leave few of the 255 steps to the others.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from repopt_jax.deploy.graph import check_weights
from repopt_jax.deploy.runtime import OnnxNetwork, with_outputs
from repopt_jax.extras import needs_extra
from repopt_jax.training.figures import COLOURS, save_figure, styled_figure

with needs_extra("deploy"):
    import onnx
    from onnx import numpy_helper

# Header and form of a table's numbers, in the order of `LayerReport`.
COLUMNS = {
    "std": ".4f",
    "centre std": ".4f",
    "surround std": ".4f",
    "min": ".3f",
    "max": ".3f",
    "error": ".5f",
    "SNR dB": ".1f",
    "per-channel SNR dB": ".1f",
    "output SNR dB": ".1f",
}


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One Conv or Gemm.

    Attributes:
      name: of the node.
      shape: of the kernel, outputs first.
      std: of all weights.
      centre_std: of the weights at the window's centre. None: the window has no surround.
      surround_std: of the other weights. None: likewise.
      low: smallest weight.
      high: largest weight.
      error: root mean square of the change of the weights under one int8 scale for the layer.
      snr: mean square of the weights divided by that of their error, in decibels.
      channel_snr: the same with a scale per output channel.
      output_snr: the same of the layer's output in an INT8 graph, after ReLU. None: not measured.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    centre_std: float | None
    surround_std: float | None
    low: float
    high: float
    error: float
    snr: float
    channel_snr: float
    output_snr: float | None = None


def layer_reports(
    graph: onnx.ModelProto,
    int8: onnx.ModelProto | None = None,
    images: np.ndarray | None = None,
) -> list[LayerReport]:
    """A report of every Conv and Gemm of a float graph.

    Args:
      graph: the float graph.
      int8: the graph that `quantize` made of it. None: no outputs are compared.
      images: uint8 NHWC images to compare them on, with `int8` only.

    Raises:
      ValueError: `graph` has no float weights or ones that are not finite, or only one of
        `int8` and `images` is given.

    >>> import repopt_jax
    >>> from flax import nnx
    >>> from repopt_jax.deploy.onnx_export import onnx_model
    >>> from repopt_jax.deploy.preprocessing import Preprocessing
    >>> size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3}
    >>> model = repopt_jax.create_model("RepOpt-VGG", **size, rngs=nnx.Rngs(0))
    >>> reports = layer_reports(onnx_model(model, Preprocessing(32, 32), name="tiny"))
    >>> [(report.name, report.shape) for report in reports][-2:]
    [('stage4/0/conv', (8, 8, 3, 3)), ('linear', (3, 8))]
    """
    if (int8 is None) != (images is None):
        given = "images" if int8 is None else "int8"
        raise ValueError(f"int8 and images must be given together, got only {given}")
    weights = {t.name: t for t in graph.graph.initializer}
    nodes = [n for n in graph.graph.node if n.op_type in ("Conv", "Gemm") and n.input[1] in weights]
    if not nodes:
        raise ValueError("graph must be a float one with Conv or Gemm nodes, got none")
    check_weights(graph)
    snrs = {} if int8 is None else _output_snrs(graph, int8, images)
    kernels = {node.name: numpy_helper.to_array(weights[node.input[1]]) for node in nodes}
    return [_report(name, kernel, snrs.get(name)) for name, kernel in kernels.items()]


def _report(name: str, kernel: np.ndarray, output_snr: float | None) -> LayerReport:
    wide = kernel.astype(np.float64)
    centre_std = surround_std = None
    if kernel.ndim == 4 and min(kernel.shape[2:]) > 1:
        inside = np.zeros(kernel.shape[2:], bool)
        inside[kernel.shape[2] // 2, kernel.shape[3] // 2] = True
        centre_std = float(wide[:, :, inside].std())
        surround_std = float(wide[:, :, ~inside].std())
    error, channel_error = (int8_error(wide, per_channel=each) for each in (False, True))
    return LayerReport(
        name,
        kernel.shape,
        float(wide.std()),
        centre_std,
        surround_std,
        low=float(wide.min()),
        high=float(wide.max()),
        error=math.sqrt(np.square(error).mean()),
        snr=decibel(wide, error),
        channel_snr=decibel(wide, channel_error),
        output_snr=output_snr,
    )


def int8_error(kernel: np.ndarray, *, per_channel: bool) -> np.ndarray:
    """The error that symmetric int8 rounding with scale ``max|w| / 127`` adds to the weights.

    The kernel has its outputs first; `per_channel` gives each of them a scale.

    >>> int8_error(np.array([[127.0, 0.4], [1.27, 0.4]]), per_channel=False).round(2).tolist()
    [[0.0, -0.4], [-0.27, -0.4]]
    """
    axes = tuple(range(1, kernel.ndim)) if per_channel else None
    largest = np.abs(kernel).max(axis=axes, keepdims=True)
    scale = np.where(largest > 0, largest, 1) / 127
    return np.round(kernel / scale) * scale - kernel


def decibel(signal: np.ndarray, error: np.ndarray) -> float:
    """``10 log10(mean signal^2 / mean error^2)``; infinite without error.

    >>> decibel(np.array([10.0]), np.array([1.0]))
    20.0
    """
    noise = float(np.square(error, dtype=np.float64).mean())
    power = float(np.square(signal, dtype=np.float64).mean())
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf


def _output_snrs(
    graph: onnx.ModelProto, int8: onnx.ModelProto, images: np.ndarray
) -> dict[str, float]:
    """Signal to noise of the layers' outputs, after ReLU, that both graphs have by one name."""
    there = {name for node in int8.graph.node for name in node.output}
    after = {node.input[0]: node.output[0] for node in graph.graph.node if node.op_type == "Relu"}
    tensors = {}
    for node in graph.graph.node:
        tensor = after.get(node.output[0], node.output[0])
        rounded = f"{tensor}_DequantizeLinear_Output"
        if node.op_type in ("Conv", "Gemm") and tensor in there:
            tensors[node.name] = (tensor, rounded if rounded in there else tensor)
    if not tensors:
        raise ValueError("int8 must be made of the float graph, got one without its layers")
    float_names, int8_names = zip(*tensors.values(), strict=True)
    exact = _outputs(graph, float_names, images)
    rounded = _outputs(int8, int8_names, images)
    return {
        name: decibel(exact[ours], rounded[theirs] - exact[ours])
        for name, (ours, theirs) in tensors.items()
    }


def _outputs(
    model: onnx.ModelProto, names: Sequence[str], images: np.ndarray
) -> dict[str, np.ndarray]:
    """Values of the logits and of other tensors by name."""
    others = [name for name in names if name != "logits"]
    network = OnnxNetwork(with_outputs(model, others))
    found = network.run(network.prepare(images))
    return dict(zip(["logits", *others], found, strict=True))


def table(reports: Sequence[LayerReport]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Rows and header for `repopt_jax.training.report.format_table`.

    >>> report = LayerReport("linear", (3, 8), 0.2, None, None, -0.4, 0.5, 0.001, 45.0, 47.0)
    >>> table([report])[0]
    [('linear', '3x8', '0.2000', '', '', '-0.400', '0.500', '0.00100', '45.0', '47.0')]
    """
    measured = any(report.output_snr is not None for report in reports)
    columns = list(COLUMNS.items())[: None if measured else -1]
    rows = []
    for report in reports:
        name, shape, *numbers = dataclasses.astuple(report)
        pairs = zip(numbers, columns, strict=False)
        cells = ["" if number is None else format(number, form) for number, (_, form) in pairs]
        rows.append((name, "x".join(map(str, shape)), *cells))
    return rows, ("layer", "kernel", *(title for title, _ in columns))


def plot(path: str | os.PathLike, reports: Sequence[LayerReport], title: str) -> None:
    """Draw the spread of the weights, their range and the signal-to-noise ratios by layer.

    `path` has the ending of a format that matplotlib knows, such as ``.png`` or ``.pdf``.
    """
    names = [report.name.removesuffix("/conv") for report in reports]
    places = np.arange(len(names))
    width = max(7, 0.32 * len(names) + 2)  # inches
    figure, (spread, extent, noise) = styled_figure(width, 8, rows=3, sharex=True)
    figure.suptitle(title)

    def draw(ax, label: str, colour: int, marker: str, values: list[float | None]) -> None:
        y = [math.nan if v is None or math.isinf(v) else v for v in values]
        ax.plot(places, y, marker, color=COLOURS[colour], label=label, markersize=4)

    draw(spread, "all", 0, "o-", [r.std for r in reports])
    draw(spread, "centre", 1, "s-", [r.centre_std for r in reports])
    draw(spread, "surround", 2, "^-", [r.surround_std for r in reports])
    spread.set_ylabel("Standard deviation of weights")
    low, high = [r.low for r in reports], [r.high for r in reports]
    extent.vlines(places, low, high, color=COLOURS[0], linewidth=3)
    extent.set_ylabel("Weights, least to largest")
    draw(noise, "weights, a scale per layer", 0, "o-", [r.snr for r in reports])
    draw(noise, "weights, a scale per channel", 1, "s-", [r.channel_snr for r in reports])
    if any(r.output_snr is not None for r in reports):
        draw(noise, "output of the INT8 graph", 2, "^-", [r.output_snr for r in reports])
    noise.set_ylabel("Signal-to-noise ratio (dB)")
    noise.set_xticks(places, names, rotation=90, fontsize=7)
    for ax in (spread, noise):
        ax.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
