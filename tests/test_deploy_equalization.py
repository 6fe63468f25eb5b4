"""Equalization changes no output and evens kernels out; corrected biases make up for rounding."""

import numpy as np
import onnx
import pytest
from flax import nnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_deploy_quantization import DIGITS, float_graph, relative_error, values

from repopt_jax.deploy.equalization import correct_biases, equalized
from repopt_jax.deploy.graph import GraphWriter
from repopt_jax.deploy.layer_report import layer_reports
from repopt_jax.deploy.qdq import in_steps, kernel_scales
from repopt_jax.deploy.quantization import quantize
from repopt_jax.deploy.runtime import OnnxNetwork, with_outputs


@pytest.fixture(scope="module")
def calibration():
    return DIGITS.calibration(32)


def in_float64(graph):
    """The same graph with doubles for floats."""
    double = onnx.ModelProto()
    double.CopyFrom(graph)
    for tensor in double.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float64), tensor.name))
    for tensor in (*double.graph.input, *double.graph.output):
        tensor.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    del double.graph.value_info[:]
    return double


def uneven(graph):
    """`graph` with kernels whose channels differ by factors of up to 100, in float64."""
    graph, rng = in_float64(graph), np.random.default_rng(0)
    for tensor in graph.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim > 1:
            factors = 10 ** rng.uniform(-1, 1, (len(value), *[1] * (value.ndim - 1)))
            tensor.CopyFrom(numpy_helper.from_array(value * factors, tensor.name))
        elif tensor.name.endswith("/bias"):
            tensor.CopyFrom(numpy_helper.from_array(rng.normal(size=len(value)), tensor.name))
    return graph


def chain():
    """Plain, grouped, depthwise and dense layers, with and without ReLU, one with two readers."""
    writer = GraphWriter()

    def conv(x, channels, path, groups=1):
        options = {"padding": ((1, 1), (1, 1)), "feature_group_count": groups}
        layer = nnx.Conv(6 if x != "images" else 3, channels, (3, 3), rngs=nnx.Rngs(0), **options)
        return writer.conv(x, layer, path)

    x = writer.relu(conv("images", 6, "a"), "a/relu")
    x = conv(x, 6, "b", groups=6)
    x = writer.relu(conv(x, 6, "c"), "c/relu")
    x = writer.relu(conv(x, 6, "d", groups=2), "d/relu")
    x = writer.add(writer.relu(conv(x, 6, "e"), "e/relu"), x, "sum")
    x = writer.relu(conv(x, 6, "f"), "f/relu")
    x = writer.linear(
        writer.flatten(writer.pool(x, "pool"), "flatten"),
        nnx.Linear(6, 4, rngs=nnx.Rngs(0)),
        "linear",
    )
    shape = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, 5, 5])
    return writer.finish(shape, x, 4, {"repopt_jax_version": "0"})


def ranges(graph, name, axis):
    kernel = values(graph)[f"{name}/kernel"]
    return np.abs(kernel).max(tuple(i for i in range(kernel.ndim) if i != axis))


def test_equalization_changes_no_output():
    """To 1e-10 in float64, where kernels change by factors of tens."""
    graph = uneven(chain())
    even = equalized(graph)
    images = np.random.default_rng(1).normal(size=(2, 3, 5, 5))
    (expected,), (found,) = (
        ReferenceEvaluator(g).run(None, {"images": images}) for g in (graph, even)
    )
    assert expected.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    before, after = values(graph), values(even)
    changed = {n for n in before if before[n].ndim > 1 and not np.allclose(before[n], after[n])}
    assert changed == {f"{layer}/kernel" for layer in ("a", "b", "c", "f", "linear")}


def test_equalization_evens_the_ranges_of_both_kernels_out():
    graph = uneven(chain())
    even = equalized(graph)
    for first, second, axis in (("a", "b", 0), ("b", "c", 1), ("f", "linear", 1)):
        ours, theirs = ranges(even, first, 0), ranges(even, second, axis)
        np.testing.assert_allclose(ours, theirs, rtol=1e-2)
        assert not np.allclose(ranges(graph, first, 0), ranges(graph, second, axis), rtol=0.5)


def test_channels_that_are_zero_stay():
    graph = uneven(chain())
    for name in ("a/kernel", "c/kernel"):
        tensor = next(t for t in graph.graph.initializer if t.name == name)
        value = numpy_helper.to_array(tensor).copy()
        value[2] = 0
        tensor.CopyFrom(numpy_helper.from_array(value, name))
    assert all(np.isfinite(value).all() for value in values(equalized(graph)).values())


def test_bias_correction_takes_the_mean_error_of_rounding_away(calibration):
    """Of every channel of a layer that reads the float network's tensors, borders included."""
    network = float_graph(inside=False)
    corrected = correct_biases(network, calibration, per_channel=False)
    scales = kernel_scales(network, per_channel=False)

    def means(rounded, biases):
        """Of layers that have rounded kernels and read what the float network computes."""
        model, names = onnx.ModelProto(), []
        model.CopyFrom(network)
        for node in network.graph.node:
            if node.op_type not in ("Conv", "Gemm"):
                continue
            kernel = values(network)[node.input[1]]
            if rounded:
                scale = scales[node.input[1]]
                kernel = (in_steps(kernel, scale) * scale).astype(np.float32)
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            name = copy.name = copy.output[0] = f"{node.name}/copy"
            tensors = {f"{name}/kernel": kernel, f"{name}/bias": values(biases)[node.input[2]]}
            copy.input[1], copy.input[2] = tensors
            model.graph.initializer.extend(
                numpy_helper.from_array(v, k) for k, v in tensors.items()
            )
            model.graph.node.append(copy)
            names.append(name)
        run = OnnxNetwork(with_outputs(model, names))
        found = run.run(run.prepare(np.concatenate(calibration)))[1:]
        return [x.mean((0, 2, 3) if x.ndim == 4 else 0) for x in found]

    exact, plain, better = means(False, network), means(True, network), means(True, corrected)
    for a, b, c in zip(exact, plain, better, strict=True):
        assert np.abs(c - a).max() < 0.01 * np.abs(b - a).max()


def test_equalized_files_lose_less_and_say_so(calibration):
    """A channel that is large in one kernel and small in the next is what it is for."""

    def edit(model):
        first, second = model.stage1[0].conv.kernel, model.stage2[0].conv.kernel
        first[...] = first[...].at[..., 0].multiply(30.0)
        second[...] = second[...].at[:, :, 0].divide(30.0)

    graph = float_graph(edit=edit)
    for runtime in ("onnxruntime", "tensorrt"):
        plain = quantize(graph, calibration, runtime=runtime)
        even = quantize(graph, calibration, runtime=runtime, equalize=True)
        assert relative_error(graph, even) < 0.5 * relative_error(graph, plain)
        assert ", equalized, minmax" in OnnxNetwork(even).metadata["quantization"]
    reports = layer_reports(equalized(graph), even, DIGITS.dataset.eval.images[:16])
    assert all(report.output_snr > 15 for report in reports)
