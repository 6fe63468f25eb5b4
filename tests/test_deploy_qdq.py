"""Files for TensorRT and OpenVINO keep the rules of those runtimes."""

import numpy as np
import pytest
from family_networks import begun
from test_deploy_quantization import DIGITS, LAYERS, float_graph, relative_error, values

from repopt_jax.deploy import fold
from repopt_jax.deploy.onnx_export import onnx_model
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.quantization import quantize
from repopt_jax.deploy.runtime import OnnxNetwork
from repopt_jax.torch_files.weights import unfilled_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calibration():
    return DIGITS.calibration(32)


@pytest.fixture(scope="module")
def graph():
    return float_graph()


def ghost_graph():
    """Its bottlenecks end in an Add, of a shortcut of convolutions or of their input."""
    model = begun(unfilled_model(name="RepOpt-GhostNet", width=0.1, num_classes=10))
    return onnx_model(fold(model), Preprocessing(32, 32), name="ghost")


def problems(model):
    """What in a graph breaks TensorRT's rules of explicit quantization, in sentences."""
    stored = values(model)
    made = {name: node for node in model.graph.node for name in node.output}
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []

    def is_quantized(name):
        return name in made and made[name].op_type == "DequantizeLinear"

    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _, scale, zero = node.input
            if stored[zero].dtype != np.int8 or stored[zero].any():
                found.append(f"{node.name}: zero point {stored[zero]} of {stored[zero].dtype}")
            if stored[scale].dtype != np.float32 or (stored[scale] <= 0).any():
                found.append(f"{node.name}: scale {stored[scale]}")
            axes = [a.i for a in node.attribute if a.name == "axis"]
            if stored[scale].shape != stored[zero].shape or axes != [0] * stored[scale].ndim:
                found.append(f"{node.name}: {stored[scale].shape} scales along {axes}")
        if node.op_type == "QuantizeLinear":
            after = [other.op_type for other in readers[node.output[0]]]
            if set(after) != {"DequantizeLinear"}:
                found.append(f"{node.name}: read by {after}")
            before = made.get(node.input[0])
            if before is not None and before.op_type in ("Conv", "Gemm"):
                following = {other.op_type for other in readers[node.input[0]]}
                if following & {"Relu", "Add"}:
                    found.append(f"{node.name}: between {before.name} and its {following}")
        if (
            node.op_type == "DequantizeLinear"
            and stored.get(node.input[0], np.int8(0)).dtype != np.int8
        ):
            found.append(f"{node.name}: {stored[node.input[0]].dtype} values")
        if node.op_type in ("Conv", "Gemm"):
            if not (is_quantized(node.input[0]) and is_quantized(node.input[1])):
                found.append(f"{node.name}: in float")
            if any(stored.get(bias, np.empty(0)).dtype != np.float32 for bias in node.input[2:]):
                found.append(f"{node.name}: a bias that is no stored float")
            if is_quantized(node.input[0]) and stored[made[node.input[0]].input[1]].ndim:
                found.append(f"{node.name}: an input with several scales")
            followed = [other.op_type for other in readers.get(node.output[0], [])]
            if "Relu" in followed and followed != ["Relu"]:
                found.append(f"{node.name}: {followed} after it")
        if node.op_type == "Add" and [is_quantized(name) for name in node.input].count(True) != 1:
            found.append(f"{node.name}: not one input quantized")
    return found


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("runtime", ["tensorrt", "openvino"])
@pytest.mark.parametrize("make", [float_graph, lambda: float_graph(se=True)], ids=["VGG", "SE"])
def test_files_keep_the_rules_of_tensorrt(calibration, make, runtime, per_channel):
    graph = make()
    int8 = quantize(graph, calibration, runtime=runtime, per_channel=per_channel)
    assert problems(int8) == []
    assert relative_error(graph, int8) < 0.25
    kernels = [name for name in values(int8) if name.endswith("/kernel")]
    assert bool(kernels) == (runtime == "tensorrt")  # else stored as int8
    assert int8.graph.node[-1].op_type == "Gemm"  # float logits


def test_sums_have_one_quantized_input():
    """The one that comes from no convolution; with two that do, the shortcut's."""
    graph = ghost_graph()
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    int8 = quantize(graph, [images], runtime="tensorrt")
    assert problems(int8) == []
    sums = [node for node in int8.graph.node if node.op_type == "Add"]
    assert len(sums) == 16
    assert all(node.input[0].endswith("ghost2/cheap_conv") for node in sums)


def test_the_rules_find_what_onnxruntimes_own_file_breaks(graph, calibration):
    found = " ".join(problems(quantize(graph, calibration)))
    assert "of uint8" in found and "int32 values" in found


def test_biases_are_whole_steps_of_the_sums(graph, calibration):
    """So that a runtime that adds integers and one that adds floats agree."""
    int8 = values(quantize(graph, calibration, runtime="openvino", per_channel=True))
    step = int8["flatten_scale"] * int8["linear/kernel_scale"]
    whole = int8["linear/bias"] / step
    np.testing.assert_allclose(whole, np.round(whole), rtol=1e-6)
    assert (np.abs(int8["linear/bias"] - values(graph)["linear/bias"]) < 0.51 * step).all()
    assert (int8["linear/bias"] != values(graph)["linear/bias"]).any()


def test_layers_stay_in_float_and_weights_keep_to_seven_bits(graph, calibration):
    options = {"runtime": "openvino", "reduce_range": True, "float_layers": ["linear"]}
    stored = values(quantize(graph, calibration, **options))
    np.testing.assert_array_equal(stored["linear/kernel"], values(graph)["linear/kernel"])
    largest = [
        np.abs(stored[f"{layer}/kernel_quantized"].astype(int)).max() for layer in LAYERS[:-1]
    ]
    assert largest == [63] * 5


def test_openvino_computes_the_logits_of_onnxruntime(graph, calibration):
    """With INT8 kernels, in every file that is said to be read by it."""
    openvino = pytest.importorskip(
        "openvino", reason="openvino is not installed (pip install openvino)"
    )
    images = DIGITS.dataset.eval.images
    for runtime in ("onnxruntime", "openvino", "tensorrt"):
        int8 = quantize(graph, calibration, runtime=runtime)
        core = openvino.Core()
        model = core.read_model(int8.SerializeToString())
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found, expected = compiled({"images": images})["logits"], OnnxNetwork(int8)(images)
        assert np.square(found - expected).mean() < 1e-3 * expected.var()
        nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
        kinds = {
            str(info["primitiveType"].value).lower()
            for info in nodes
            if info["layerType"].value in ("Convolution", "FullyConnected")
        }
        assert kinds and all(kind.endswith("i8") for kind in kinds)


def test_a_wrong_runtime_is_refused(graph, calibration):
    with pytest.raises(ValueError, match=r"runtime must be one of .* got 'tensorflow'"):
        quantize(graph, calibration, runtime="tensorflow")
