"""A small writer of ONNX graphs: one method per type of layer.

Activations are NCHW, ONNX's own layout. Every method takes the name of the tensor that it reads
and the path of the layer, which names its node, its output and its weights. It returns the name of
its output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

from repopt_jax.extras import needs_extra

with needs_extra("deploy"):
    import onnx
    from onnx import helper, numpy_helper

# Opset 17 with IR 8 is read by every onnxruntime since 1.12 and by TensorRT since 8.6; newer
# opsets have nothing that these networks need.
OPSET = 17
IR_VERSION = 8


class GraphWriter:
    """Collects nodes and weights; `finish` makes the graph.

    >>> writer = GraphWriter()
    >>> writer.conv("x", nnx.Conv(3, 4, (3, 3), padding=1, rngs=nnx.Rngs(0)), "stage0/conv")
    'stage0/conv'
    >>> writer.relu("stage0/conv", "stage0/relu")
    'stage0/relu'
    >>> [node.op_type for node in writer.nodes], sorted(writer.weights)
    (['Conv', 'Relu'], ['stage0/conv/bias', 'stage0/conv/kernel'])
    """

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def node(self, op: str, inputs: list[str], path: str, **attributes: Any) -> str:
        """Any node with one output."""
        self.nodes.append(helper.make_node(op, inputs, [path], name=path, **attributes))
        return path

    def weight(self, path: str, value: Any) -> str:
        """A constant; floating-point ones become float32."""
        value = np.asarray(value)
        wide = value.dtype.kind not in "iub"
        self.weights[path] = np.ascontiguousarray(value.astype(np.float32) if wide else value)
        return path

    def conv(self, x: str, layer: nnx.Conv, path: str) -> str:
        """A two-dimensional convolution, grouped and depthwise ones included.

        Raises:
          ValueError: its padding is not given by numbers.
        """
        if isinstance(layer.padding, str):
            raise ValueError(f"padding of {path} must be given by numbers, got {layer.padding!r}")
        oihw = np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1)
        return self.node(
            "Conv",
            [x, *self._kernel_and_bias(layer, oihw, path)],
            path,
            kernel_shape=list(layer.kernel_size),
            strides=_pair(layer.strides),
            dilations=_pair(layer.kernel_dilation),
            # ONNX lists the starts of all axes before their ends.
            pads=np.transpose([_pair(p) for p in _pair(layer.padding)]).ravel().tolist(),
            group=layer.feature_group_count,
        )

    def linear(self, x: str, layer: nnx.Linear, path: str) -> str:
        """A dense layer on ``(batch, features)``; its kernel is stored as ``(out, in)``."""
        kernel = np.asarray(layer.kernel[...]).T
        return self.node("Gemm", [x, *self._kernel_and_bias(layer, kernel, path)], path, transB=1)

    def _kernel_and_bias(self, layer: nnx.Module, kernel: np.ndarray, path: str) -> list[str]:
        names = [self.weight(f"{path}/kernel", kernel)]
        if layer.bias is not None:
            names.append(self.weight(f"{path}/bias", layer.bias[...]))
        return names

    def relu(self, x: str, path: str) -> str:
        """``max(x, 0)``."""
        return self.node("Relu", [x], path)

    def mul(self, x: str, y: str, path: str) -> str:
        """The product, with broadcasting."""
        return self.node("Mul", [x, y], path)

    def add(self, x: str, y: str, path: str) -> str:
        """The sum."""
        return self.node("Add", [x, y], path)

    def concat(self, tensors: list[str], path: str) -> str:
        """Join tensors along their channels."""
        return self.node("Concat", tensors, path, axis=1)

    def pool(self, x: str, path: str) -> str:
        """The average over height and width, which become 1."""
        return self.node("GlobalAveragePool", [x], path)

    def flatten(self, x: str, path: str) -> str:
        """All axes but the first joined."""
        return self.node("Flatten", [x], path)

    def finish(
        self, graph_input: onnx.ValueInfoProto, logits: str, classes: int, metadata: dict[str, str]
    ) -> onnx.ModelProto:
        """The checked model, with the shapes of all tensors.

        The tensor `logits`, with `classes` columns, becomes the output "logits".
        """
        for node in self.nodes:
            node.output[:] = ["logits" if name == logits else name for name in node.output]
        output = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", classes])
        weights = [numpy_helper.from_array(value, name) for name, value in self.weights.items()]
        graph = helper.make_graph(self.nodes, "repopt_jax", [graph_input], [output], weights)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="repopt_jax",
            producer_version=metadata["repopt_jax_version"],
        )
        helper.set_model_props(model, metadata)
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(model)
        return model


def check_weights(model: onnx.ModelProto) -> None:
    """Raise ValueError for weights that are not finite, which no table or INT8 graph can state."""
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(
                f"graph must have finite weights, got NaN or infinity in {tensor.name}"
            )


def _pair(value: Any) -> list[Any]:
    """A setting by axis; Flax takes one number for both axes, and None for 1."""
    if value is None:
        return [1, 1]
    return [value, value] if isinstance(value, int) else list(value)
