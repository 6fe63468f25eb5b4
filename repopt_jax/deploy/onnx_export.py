"""ONNX files of trained networks: Conv with bias, Relu, GlobalAveragePool, Flatten, Gemm.

Written node by node, because tracing gives no clean graph: for a folded RepOpt-VGG of 7 blocks
with squeeze-excite jax2onnx 0.17.1 wrote 143 nodes, 28 of them Transpose, in 13 seconds. Here the
network has 59 nodes, none of them Transpose, and takes 0.04 seconds.

A network type is added by one function in `WRITERS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

import repopt_jax
from repopt_jax.atomic_write import atomic_write
from repopt_jax.deploy.graph import GraphWriter
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.qdq import insert_qdq
from repopt_jax.extras import needs_extra
from repopt_jax.models.checks import check_numbers
from repopt_jax.models.folding import FoldedBlock, FoldedGhost, fold
from repopt_jax.models.layers import SqueezeExcite
from repopt_jax.models.mobileone import MobileOne
from repopt_jax.models.repopt_ghost import GhostBottleneck, RepOptGhost
from repopt_jax.models.repopt_vgg import FiveStages, RepOptVGG
from repopt_jax.models.simulated_int8 import (
    SimulatedInt8,
    float_network,
    kernel_scale,
    simulated_layers,
)

with needs_extra("deploy"):
    import onnx

INPUT = "images"


def onnx_model(
    model: nnx.Module, preprocessing: Preprocessing, *, name: str, float_kernels: bool = False
) -> onnx.ModelProto:
    """The ONNX model of a network, with any batch size.

    It is in float32, or in INT8 where the network is: of `simulate_int8`, that is of a part "qat".

    Its input "images" is uint8 ``(batch, height, width, 3)`` where `preprocessing` is inside, and
    otherwise normalized float32 ``(batch, 3, height, width)``; its output is "logits". Metadata:
    the project's version, the model's name, the number of classes and the preprocessing.

    Args:
      model: a network of a type in `WRITERS`, of any kind; branches and BatchNorm are folded.
      preprocessing: of the network's images.
      name: of the model, for the metadata.
      float_kernels: of an INT8 model, see `insert_qdq`.

    Raises:
      ValueError: there is no writer for the network's type, or it has numbers that are not finite.

    >>> size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3}
    >>> model = repopt_jax.create_model("RepOpt-VGG", "repvgg", **size, rngs=nnx.Rngs(0))
    >>> exported = onnx_model(model, Preprocessing(32, 32, inside=False), name="tiny")
    >>> [node.op_type for node in exported.graph.node if node.op_type not in ("Conv", "Relu")]
    ['GlobalAveragePool', 'Flatten', 'Gemm']
    """
    writer = next((WRITERS[t] for t in type(model).__mro__ if t in WRITERS), None)
    if writer is None:
        raise ValueError(
            f"model must be one of {[t.__name__ for t in WRITERS]} for an ONNX file, got a "
            f"{type(model).__name__}; a StableHLO file takes any network"
        )
    check_numbers(model)
    int8 = simulated_layers(model)
    model = float_network(model) if int8 else model
    graph, x = GraphWriter(), INPUT
    element, shape = onnx.TensorProto.FLOAT, ["batch", 3, *preprocessing.size]
    if preprocessing.inside:
        element, shape = onnx.TensorProto.UINT8, ["batch", *preprocessing.size, 3]
        x = _preprocess(graph, preprocessing)
    logits, classes = writer(graph, x, model)
    metadata = {
        "repopt_jax_version": repopt_jax.__version__,
        "model": name,
        "num_classes": str(classes),
        **preprocessing.metadata(),
    }
    graph_input = onnx.helper.make_tensor_value_info(INPUT, element, shape)
    exported = graph.finish(graph_input, logits, classes, metadata)
    return _in_int8(exported, int8, float_kernels) if int8 else exported


def _in_int8(
    exported: onnx.ModelProto, layers: dict[str, SimulatedInt8], float_kernels: bool
) -> onnx.ModelProto:
    """The model with the scales that quantization-aware training has found."""
    nodes = [node for node in exported.graph.node if node.name in layers]
    scales = {}
    for node in nodes:
        layer = layers[node.name]
        per_channel = layer.per_channel
        scale = np.asarray(kernel_scale(layer.kernel[...], per_channel=per_channel))
        scales |= {node.input[0]: np.asarray(layer.input_scale), node.input[1]: scale.squeeze()}
    model = insert_qdq(exported, scales, float_kernels=float_kernels)
    setting = f"trained in INT8, per {'channel' if per_channel else 'tensor'}"
    onnx.helper.set_model_props(model, metadata_of(exported) | {"quantization": setting})
    return model


def export_onnx(
    path: str | os.PathLike, model: nnx.Module, preprocessing: Preprocessing, **options
) -> None:
    """Write `onnx_model` to a file, which appears when it is complete."""
    save_onnx(path, onnx_model(model, preprocessing, **options))


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """The metadata of an ONNX model, text by name."""
    return {entry.key: entry.value for entry in model.metadata_props}


def save_onnx(path: str | os.PathLike, model: onnx.ModelProto) -> None:
    """Write an ONNX model to a file, which appears when it is complete."""
    with atomic_write(path) as unfinished:
        onnx.save(model, unfinished)


def _preprocess(graph: GraphWriter, preprocessing: Preprocessing) -> str:
    # Transposed while a pixel is one byte.
    x = graph.node("Transpose", [INPUT], "preprocess/transpose", perm=[0, 3, 1, 2])
    x = graph.node("Cast", [x], "preprocess/cast", to=1)  # 1: float32
    shift = graph.weight("preprocess/shift", preprocessing.shift.reshape(3, 1, 1))
    factor = graph.weight("preprocess/factor", preprocessing.factor.reshape(3, 1, 1))
    x = graph.node("Sub", [x, shift], "preprocess/sub")
    return graph.mul(x, factor, "preprocess/mul")


def _five_stages(graph: GraphWriter, x: str, model: FiveStages) -> tuple[str, int]:
    if not isinstance(model.stage0, FoldedBlock):
        model = fold(model)
    for path, block in model.layers():
        x = _block(graph, x, block, path)
    layer = model.linear
    x = graph.flatten(graph.pool(x, "pool"), "flatten")
    return graph.linear(x, layer, "linear"), layer.kernel.shape[-1]


def _block(graph: GraphWriter, x: str, block: FoldedBlock, path: str) -> str:
    x = graph.conv(x, block.conv, f"{path}/conv")
    if block.pre_se is not None:
        x = _squeeze_excite(graph, x, block.pre_se, f"{path}/pre_se")
    x = graph.relu(x, f"{path}/relu")
    if block.post_se is not None:
        x = _squeeze_excite(graph, x, block.post_se, f"{path}/post_se")
    return x


def _repopt_ghost(graph: GraphWriter, x: str, model: RepOptGhost) -> tuple[str, int]:
    if not isinstance(model.stages[0][0].ghost1, FoldedGhost):
        model = fold(model)
    x = graph.relu(graph.conv(x, model.conv_stem, "conv_stem"), "relu_stem")
    *stages, (last,) = model.stages
    for s, stage in enumerate(stages):
        for b, bottleneck in enumerate(stage):
            x = _bottleneck(graph, x, bottleneck, f"stages/{s}/{b}")
    path = f"stages/{len(stages)}/0"
    x = graph.relu(graph.conv(x, last.conv, f"{path}/conv"), f"{path}/relu")
    x = graph.relu(graph.conv(graph.pool(x, "pool"), model.conv_head, "conv_head"), "relu_head")
    layer = model.classifier
    return graph.linear(graph.flatten(x, "flatten"), layer, "classifier"), layer.kernel.shape[-1]


def _bottleneck(graph: GraphWriter, x: str, block: GhostBottleneck, path: str) -> str:
    y = _ghost(graph, x, block.ghost1, f"{path}/ghost1")
    if block.conv_dw is not None:
        y = graph.conv(y, block.conv_dw, f"{path}/conv_dw")
    if block.se is not None:
        y = _squeeze_excite(graph, y, block.se, f"{path}/se")
    y = _ghost(graph, y, block.ghost2, f"{path}/ghost2")
    if block.shortcut is not None:
        x = graph.conv(x, block.shortcut.conv_dw, f"{path}/shortcut/conv_dw")
        x = graph.conv(x, block.shortcut.conv_pw, f"{path}/shortcut/conv_pw")
    return graph.add(y, x, f"{path}/add")


def _ghost(graph: GraphWriter, x: str, module: FoldedGhost, path: str) -> str:
    for name in ("primary_conv", "cheap_conv"):
        x = graph.conv(x, getattr(module, name), f"{path}/{name}")
        if module.relu:
            x = graph.relu(x, f"{path}/{name}/relu")
    return x


def _squeeze_excite(graph: GraphWriter, x: str, layer: SqueezeExcite, path: str) -> str:
    gate = graph.pool(x, f"{path}/pool")
    gate = graph.relu(graph.conv(gate, layer.down, f"{path}/down"), f"{path}/relu")
    gate = graph.conv(gate, layer.up, f"{path}/up")
    if layer.gate is jax.nn.sigmoid:
        gate = graph.node("Sigmoid", [gate], f"{path}/sigmoid")
    elif layer.gate is jax.nn.hard_sigmoid:
        gate = graph.node("HardSigmoid", [gate], f"{path}/sigmoid", alpha=1 / 6, beta=0.5)
    else:
        raise ValueError(f"gate of {path} must be sigmoid or hard_sigmoid, got {layer.gate}")
    return graph.mul(x, gate, f"{path}/mul")


# Network type -> function of (graph, name of the input, network) that writes the network and
# returns the name of the logits and the number of classes.
WRITERS: dict[type, Callable[[GraphWriter, str, nnx.Module], tuple[str, int]]] = {
    RepOptVGG: _five_stages,
    MobileOne: _five_stages,
    RepOptGhost: _repopt_ghost,
}
