"""Explicit INT8: QuantizeLinear and DequantizeLinear nodes where TensorRT's rules want them.

* int8, symmetric, with zero points of 0, for weights and activations.
* Around the input and the kernel of every Conv and Gemm. Biases stay in float, because TensorRT
  has no DequantizeLinear of int32, but in whole steps of the sums, so that integer and float
  kernels agree.
* None between a Conv and its Relu or Add, which become one kernel. Of an Add's two inputs the one
  that comes from no Conv is quantized, so that this kernel's output can be INT8.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from repopt_jax.extras import needs_extra

with needs_extra("deploy"):
    import onnx
    from onnx import helper, numpy_helper

LAYERS = ("Conv", "Gemm")


def quantized_inputs(
    graph: onnx.ModelProto, float_layers: Collection[str] = ()
) -> Iterator[tuple[onnx.NodeProto, int]]:
    """The nodes that read a quantized activation, in order, and which of their inputs it is.

    Args:
      graph: a float graph.
      float_layers: names of Conv and Gemm nodes to pass over.
    """
    convolved = {node.output[0] for node in graph.graph.node if node.op_type == "Conv"}
    for node in graph.graph.node:
        if node.op_type in LAYERS and node.name not in float_layers:
            yield node, 0
        elif node.op_type == "Add" and not node.name.startswith("preprocess/"):
            others = [i for i, name in enumerate(node.input) if name not in convolved]
            yield node, others[0] if others else len(node.input) - 1


def kernel_scale(kernel: np.ndarray, *, per_channel: bool, steps: int = 127) -> np.ndarray:
    """The size of a step of a kernel whose largest number is `steps` steps, float32.

    Args:
      kernel: with its outputs first.
      per_channel: one size for every output. False: one for all.
      steps: on either side of zero.

    >>> kernel_scale(np.array([[254.0, 1.0], [-127.0, -12.7]]), per_channel=True).tolist()
    [2.0, 1.0]
    """
    largest = np.abs(kernel).max(tuple(range(1, kernel.ndim)) if per_channel else None)
    return np.float32(np.where(largest > 0, largest, 1)) / np.float32(steps)


def kernel_scales(
    graph: onnx.ModelProto,
    *,
    per_channel: bool,
    steps: int = 127,
    float_layers: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """`kernel_scale` of every kernel of a float graph that is to be quantized, by tensor."""
    values = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    names = [n.input[1] for n, _ in quantized_inputs(graph, float_layers) if n.op_type in LAYERS]
    return {n: kernel_scale(values[n], per_channel=per_channel, steps=steps) for n in names}


def in_steps(kernel: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The kernel, outputs first, in whole steps of `kernel_scale`.

    >>> in_steps(np.array([[254.0, 1.0], [-127.0, -12.7]]), np.array([2.0, 1.0])).tolist()
    [[127.0, 0.0], [-127.0, -13.0]]
    """
    return np.round(kernel / scale.reshape(-1, *[1] * (kernel.ndim - 1)))


def insert_qdq(
    graph: onnx.ModelProto,
    scales: Mapping[str, np.ndarray],
    *,
    float_kernels: bool = False,
    float_layers: Collection[str] = (),
) -> onnx.ModelProto:
    """The INT8 model of a float one whose activations and kernels have the given scales.

    Args:
      graph: the float model.
      scales: size of a step by tensor, one number, or for a kernel also one for each output. An
        Add's input without one stays in float.
      float_kernels: keep kernels as floats, behind nodes that quantize them, as every version of
        TensorRT reads them. False: as int8.
      float_layers: names of Conv and Gemm nodes to leave as they are.
    """
    model = copy.deepcopy(graph)
    weights = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    reads = {(node.name, i) for node, i in quantized_inputs(graph, float_layers)}
    nodes, rounded = [], {}

    def pair(name: str, scale: np.ndarray, stored: np.ndarray | None = None) -> str:
        """The name of a tensor after rounding; `stored` is a constant's, in steps."""
        if name in rounded:
            return rounded[name]
        weights[f"{name}_scale"] = np.asarray(scale, np.float32)
        weights[f"{name}_zero_point"] = np.zeros(np.shape(scale), np.int8)
        parameters = f"{name}_scale", f"{name}_zero_point"
        axis = {"axis": 0} if np.ndim(scale) else {}
        whole, rounded[name] = f"{name}_quantized", f"{name}_DequantizeLinear_Output"
        if stored is None:
            reading = [name, *parameters], [whole], f"{name}_QuantizeLinear"
            nodes.append(helper.make_node("QuantizeLinear", *reading, **axis))
        else:
            weights[whole] = stored
        reading = [whole, *parameters], [rounded[name]], f"{name}_DequantizeLinear"
        nodes.append(helper.make_node("DequantizeLinear", *reading, **axis))
        return rounded[name]

    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if (node.name, i) not in reads or (node.op_type == "Add" and name not in scales):
                continue
            node.input[i] = pair(name, scales[name])
            if node.op_type in LAYERS:
                scale, stored = np.float32(scales[node.input[1]]), None
                if not float_kernels:
                    stored = in_steps(weights.pop(node.input[1]), scale).astype(np.int8)
                node.input[1] = pair(node.input[1], scale, stored)
                for bias in node.input[2:]:
                    step = np.float32(scales[name]) * scale
                    weights[bias] = np.round(weights[bias] / step) * step
        nodes.append(copy.deepcopy(node))
    for field in (model.graph.node, model.graph.initializer, model.graph.value_info):
        del field[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(model)
    return model
