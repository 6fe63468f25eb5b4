"""Cross-layer equalization and bias correction: what helps uneven kernels in INT8.

One scale per tensor serves a kernel badly where some channels are much larger than others. ReLU
lets channels be rescaled: for any ``s > 0``, ``relu(x / s) * s = relu(x)``.

Paper: data-free quantization, arXiv 1906.04721, sections 4.1 and 4.2. Deviation: the errors that
biases correct are measured on images, not derived from BatchNorm, which is folded away.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import numpy as np

from repopt_jax.deploy.qdq import LAYERS, in_steps, kernel_scales
from repopt_jax.deploy.runtime import OnnxNetwork, with_outputs
from repopt_jax.extras import needs_extra

with needs_extra("deploy"):
    import onnx
    from onnx import helper, numpy_helper

# What may stand between two layers: f(s * x) = s * f(x) for every channel and s > 0.
HOMOGENEOUS = ("Relu", "GlobalAveragePool", "Flatten")
ROUNDS = 20


def equalized(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same function, with the ranges of channels evened out between layers.

    Of two layers with kernels ``K`` and ``L``, where nothing but ReLU and pooling stands between
    them and nothing else reads what does, every channel ``i`` is rescaled::

        s_i = sqrt(max|K[i]| / max|L[:, i]|)
        K[i] /= s_i        bias_i /= s_i        L[:, i] *= s_i

    Both then have the range ``sqrt(max|K[i]| * max|L[:, i]|)`` there. Most layers have two
    neighbours, so all pairs take turns, several times. Channels that are zero stay.

    Args:
      graph: a float graph of this project; kernels have their outputs first, then their inputs.
    """
    model = copy.deepcopy(graph)
    tensors = {t.name: t for t in model.graph.initializer}
    values = {name: numpy_helper.to_array(t).astype(np.float64) for name, t in tensors.items()}
    pairs = list(_neighbours(model, values))
    for _ in range(ROUNDS):
        for first, second in pairs:
            kernel, after = values[first.input[1]], values[second.input[1]]
            axis = 0 if _groups(second) > 1 else 1
            ranges = _range(kernel, 0), _range(after, axis)
            scale = np.sqrt(np.divide(*ranges, out=np.ones(len(kernel)), where=np.all(ranges, 0)))
            kernel /= _along(scale, kernel, 0)
            after *= _along(scale, after, axis)
            for bias in first.input[2:]:
                values[bias] /= scale
    for name in {name for pair in pairs for node in pair for name in node.input[1:]}:
        _replace(tensors[name], values[name])
    return model


def correct_biases(
    graph: onnx.ModelProto,
    batches: Collection[np.ndarray],
    *,
    per_channel: bool,
    steps: int = 127,
    float_layers: Collection[str] = (),
) -> onnx.ModelProto:
    """The model with biases less the mean error that rounding its kernels will add.

    With ``K'`` the rounded kernel, and the mean over images and positions::

        bias -= mean((K' - K) * x)

    Args:
      graph: a float graph of this project.
      batches: images to measure the means on, uint8 NHWC.
      per_channel: how kernels will be rounded: with a scale per output, or one in all.
      steps: the largest number of a rounded kernel.
      float_layers: names of layers that will not be rounded.
    """
    model, measuring = copy.deepcopy(graph), copy.deepcopy(graph)
    tensors = {t.name: t for t in model.graph.initializer}
    options = {"per_channel": per_channel, "steps": steps, "float_layers": float_layers}
    scales, biases = kernel_scales(graph, **options), {}
    for node in graph.graph.node:
        if node.op_type not in LAYERS or node.input[1] not in scales or len(node.input) < 3:
            continue
        kernel, scale = numpy_helper.to_array(tensors[node.input[1]]), scales[node.input[1]]
        error = in_steps(kernel, scale) * _along(scale, kernel, 0) - kernel
        name = f"{node.name}/error"
        measuring.graph.initializer.append(numpy_helper.from_array(error, f"{name}/kernel"))
        layer = copy.deepcopy(node)
        layer.name, layer.output[:] = name, [name]
        layer.input[:] = [node.input[0], f"{name}/kernel"]
        axes = [0, 2, 3] if node.op_type == "Conv" else [0]
        mean = helper.make_node("ReduceMean", [name], [f"{name}/mean"], axes=axes, keepdims=0)
        measuring.graph.node.extend([layer, mean])
        biases[f"{name}/mean"] = tensors[node.input[2]]
    network, total = OnnxNetwork(with_outputs(measuring, list(biases))), sum(map(len, batches))
    means = [0.0] * len(biases)
    for images in batches:
        found = network.run(network.prepare(images))[1:]
        means = [m + len(images) / total * f for m, f in zip(means, found, strict=True)]
    for bias, mean in zip(biases.values(), means, strict=True):
        _replace(bias, numpy_helper.to_array(bias) - mean)
    return model


def _neighbours(model: onnx.ModelProto, values: dict[str, np.ndarray]):
    """Pairs of layers whose channels can be rescaled between them."""
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for first in model.graph.node:
        if first.op_type not in LAYERS:
            continue
        found = readers.get(first.output[0], [])
        while len(found) == 1 and found[0].op_type in HOMOGENEOUS:
            found = readers.get(found[0].output[0], [])
        if len(found) == 1 and found[0].op_type in LAYERS:
            groups, kernel = _groups(found[0]), values[found[0].input[1]]
            if groups == 1 or (groups == len(kernel) and kernel.shape[1] == 1):  # or depthwise
                yield first, found[0]


def _groups(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)


def _range(kernel: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(kernel).max(tuple(i for i in range(kernel.ndim) if i != axis))


def _along(scale: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    """`scale` along one axis of a kernel; a single one stays."""
    shape = [-1 if i == axis else 1 for i in range(kernel.ndim)]
    return scale.reshape(shape) if scale.ndim else scale


def _replace(tensor: onnx.TensorProto, value: np.ndarray) -> None:
    dtype = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(value.astype(dtype), tensor.name))
