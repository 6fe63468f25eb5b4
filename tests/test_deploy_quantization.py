"""INT8 graphs are what the recipe says, and their accuracy, speed and noise are measured."""

import collections
import copy
import math

import numpy as np
import onnx
import pytest
from family_networks import begun
from onnx import numpy_helper

from repopt_jax.data import load_dataset
from repopt_jax.deploy.image_set import ImageSet
from repopt_jax.deploy.layer_report import layer_reports, plot, table
from repopt_jax.deploy.onnx_export import onnx_model, save_onnx
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.quantization import CALIBRATIONS, quantize
from repopt_jax.deploy.runtime import OnnxNetwork, evaluate, images_per_second, speedup
from repopt_jax.torch_files.weights import unfilled_model

DIGITS = ImageSet(load_dataset("digits"))
SIZE = {"num_blocks": (1, 1, 1, 1), "widths": (8, 8, 8, 8, 16), "strides": (1, 1, 2, 2, 1)}
LAYERS = [f"stage{i}/conv" for i in (0, "1/0", "2/0", "3/0", "4/0")] + ["linear"]


def float_graph(*, se=False, inside=True, edit=lambda model: None):
    model = begun(unfilled_model(name="RepOpt-VGG", num_classes=10, se=se, **SIZE))
    edit(model)
    preprocessing = Preprocessing(8, 8, (0.3,) * 3, (0.35,) * 3, inside=inside)
    return onnx_model(model, preprocessing, name="tiny")


@pytest.fixture(scope="module")
def graph():
    return float_graph()


@pytest.fixture(scope="module")
def calibration():
    return DIGITS.calibration(32)


@pytest.fixture(scope="module")
def int8(graph, calibration):
    return quantize(graph, calibration)


def values(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def relative_error(graph, other):
    images = DIGITS.dataset.eval.images[:64]
    exact, found = OnnxNetwork(graph)(images), OnnxNetwork(other)(images)
    return np.sqrt(np.square(found - exact).mean() / exact.var(0).mean())


@pytest.mark.parametrize("calibration_method", CALIBRATIONS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_int8_logits_are_near_the_float_ones(graph, calibration, per_channel, calibration_method):
    options = {"per_channel": per_channel, "calibration": calibration_method}
    assert 0 < relative_error(graph, quantize(graph, calibration, **options)) < 0.25


def test_every_layer_is_quantized_as_the_recipe_says(int8):
    """Weights int8 and symmetric with one scale, activations uint8 and 0 at 0, float logits."""
    stored = values(int8)
    for layer in LAYERS:
        kernel = stored[f"{layer}/kernel_quantized"]
        assert kernel.dtype == np.int8 and np.abs(kernel.astype(int)).max() == 127
        assert stored[f"{layer}/kernel_scale"].shape == ()
        assert stored[f"{layer}/kernel_zero_point"] == 0
        assert stored[f"{layer}/bias_quantized"].dtype == np.int32
    for i in (0, "1/0", "2/0", "3/0", "4/0"):
        zero_point = stored[f"stage{i}/relu_zero_point"]
        assert zero_point.dtype == np.uint8 and zero_point == 0
    count = collections.Counter(node.op_type for node in int8.graph.node)
    assert "Relu" not in count
    assert (count["Conv"], count["Gemm"], count["Mul"], count["Sub"]) == (5, 1, 1, 1)
    assert "preprocess/sub_scale" not in stored
    assert int8.graph.node[-1].op_type == "Gemm"


def test_per_channel_gives_every_output_its_scale(graph, calibration):
    stored = values(quantize(graph, calibration, per_channel=True))
    assert stored["stage4/0/conv/kernel_scale"].shape == (16,)
    assert stored["linear/kernel_scale"].shape == (10,)
    largest = np.abs(stored["stage4/0/conv/kernel_quantized"].astype(int)).max((1, 2, 3))
    assert (largest == 127).all()


def test_layers_can_stay_in_float(graph, calibration):
    int8 = quantize(graph, calibration, float_layers=["stage0/conv", "linear"])
    stored = values(int8)
    np.testing.assert_array_equal(stored["linear/kernel"], values(graph)["linear/kernel"])
    assert "stage0/conv/kernel_quantized" not in stored
    assert "stage1/0/conv/kernel_quantized" in stored


def test_a_reduced_range_takes_seven_bits(graph, calibration):
    stored = values(quantize(graph, calibration, reduce_range=True))
    assert np.abs(stored["stage1/0/conv/kernel_quantized"].astype(int)).max() in (63, 64)


@pytest.mark.parametrize("inside", [True, False], ids=["uint8", "float"])
def test_squeeze_excite_is_quantized_too(calibration, inside):
    graph = float_graph(se=True, inside=inside)
    int8 = quantize(graph, calibration)
    assert values(int8)["stage1/0/post_se/down/kernel_quantized"].dtype == np.int8
    assert relative_error(graph, int8) < 0.25


def test_metadata_tells_the_setting_and_keeps_the_rest(graph, calibration):
    def metadata(**options):
        return OnnxNetwork(quantize(graph, calibration, **options)).metadata

    found = metadata(calibration="percentile", per_channel=True, float_layers=["linear"])
    assert found.pop("quantization") == "per channel, percentile 99.99, 32 images, float: linear"
    assert found == OnnxNetwork(graph).metadata


def test_a_percentile_cuts_the_largest_values_off(graph, calibration):
    def scale(**options):
        return values(quantize(graph, calibration, **options))["stage1/0/relu_scale"]

    cut = scale(calibration="percentile", percentile=90.0)
    kept = scale(calibration="percentile", percentile=100.0)
    assert cut < 0.8 * kept
    np.testing.assert_allclose(kept, scale(), rtol=1e-2)


def test_calibration_images_are_those_of_training_as_for_evaluation():
    """No image twice, the same for a seed, and not those of evaluation."""
    images = np.concatenate(DIGITS.calibration(100, seed=1))
    train = {image.tobytes() for image in DIGITS.dataset.train.images}
    assert all(image.tobytes() in train for image in images)
    np.testing.assert_array_equal(images, np.concatenate(DIGITS.calibration(100, seed=1)))
    assert (images != np.concatenate(DIGITS.calibration(100, seed=2))).any()
    all_of_them = np.concatenate(DIGITS.calibration(1437))
    np.testing.assert_array_equal(all_of_them, DIGITS.dataset.train.images)


def test_evaluation_counts_every_image_once_and_no_tie_as_a_hit():
    """Against plain numpy; logits that are all equal are right for the first class alone."""
    graph = float_graph()
    network = OnnxNetwork(graph)
    batches = list(DIGITS.evaluation(100))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    found = evaluate(network, batches)
    images, labels = DIGITS.dataset.eval.images, DIGITS.dataset.eval.labels
    logits = network(images)
    own = logits[np.arange(360), labels][:, None]
    expected = {f"top{k}": 100 * ((logits > own).sum(1) < k).mean() for k in (1, 5)}
    assert found == pytest.approx(expected | {"images": 360})

    def flat(label):
        found = evaluate(
            lambda images: np.zeros((len(images), 10)), [(images, np.full(360, label))]
        )
        return found["top1"], found["top5"]

    assert [flat(label) for label in (0, 4, 5, 9)] == [(100, 100), (0, 100), (0, 0), (0, 0)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_hits_and_are_counted(bad):
    """NaN would else be a hit of a class that comes first, and infinity one of its own."""
    logits = np.eye(10)
    logits[3, 3] = logits[5, 0] = bad
    found = evaluate(lambda images: logits, [(np.zeros((10, 1, 1, 3)), np.arange(10))])
    assert found == {"top1": 80.0, "top5": 80.0, "images": 10, "not_finite": 2}


def test_speeds_are_measured_in_turns(graph, int8):
    order = []

    class Watched(OnnxNetwork):
        def run(self, prepared):
            order.append(self)
            return super().run(prepared)

    networks = {"float": Watched(graph, threads=1), "int8": Watched(int8, threads=1)}
    a, b = networks.values()
    speeds = images_per_second(networks, DIGITS.dataset.eval.images[:4], rounds=2)
    assert order == [a, a, b, b, a, b, b, a]
    assert all(len(found) == 2 and min(found) > 0 for found in speeds.values())
    assert speedup(speeds, "float", "float") == 1.0


def test_layer_reports_tell_spread_range_and_noise():
    """An outlier at one kernel's centre shows in its centre, its range and its noise."""

    def edit(model):
        kernel = model.stage1[0].conv.kernel
        kernel[...] = kernel[...].at[1, 1, 0, 0].set(40.0)

    before = {r.name: r for r in layer_reports(float_graph())}
    after = {r.name: r for r in layer_reports(float_graph(edit=edit))}
    assert list(after) == LAYERS
    changed = after.pop("stage1/0/conv")
    assert after == {name: before[name] for name in after}
    old = before["stage1/0/conv"]
    assert changed.high == pytest.approx(40.0, rel=1e-4)
    assert changed.surround_std == old.surround_std and changed.centre_std > 4
    assert changed.error == pytest.approx(old.std, rel=0.1)  # all but one weight round to 0
    kernel = values(float_graph())["stage1/0/conv/kernel"]
    scale = np.abs(kernel).max() / 127
    assert old.error == pytest.approx(scale / math.sqrt(12), rel=0.1)
    assert old.snr == pytest.approx(10 * math.log10((kernel**2).mean() / old.error**2))
    assert old.channel_snr > old.snr
    assert before["linear"].centre_std is None


def test_layer_reports_compare_the_outputs_of_two_graphs(graph, int8):
    images = DIGITS.dataset.eval.images[:16]
    reports = layer_reports(graph, int8, images)
    assert all(20 < report.output_snr < 60 for report in reports[:-1])
    assert reports[-1].output_snr > 20  # its bias is large and exact
    assert all(r.output_snr > 100 for r in layer_reports(graph, graph, images))


def test_a_report_becomes_a_table_and_a_figure(graph, int8, tmp_path):
    reports = layer_reports(graph, int8, DIGITS.dataset.eval.images[:16])
    rows, header = table(reports)
    assert header[-1] == "output SNR dB" and all(len(row) == len(header) for row in rows)
    rows, header = table(layer_reports(graph))
    assert header[-1] == "per-channel SNR dB" and all(len(row) == len(header) for row in rows)
    plot(tmp_path / "layers.png", reports, "tiny")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "median"}, "calibration must be one of .* got 'median'"),
        ({"percentile": 20.0}, "percentile must be above 50 and at most 100, got 20.0"),
        ({"float_layers": ["stage9"]}, r"float_layers must be among .* got \['stage9'\]"),
        ({"batches": []}, "batches must hold at least one image, got none"),
    ],
)
def test_what_cannot_be_quantized_is_refused(graph, calibration, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(**{"graph": graph, "batches": calibration} | options)


def with_weight(graph, name, value):
    """`graph` with other numbers in one tensor."""
    other = copy.deepcopy(graph)
    tensor = next(t for t in other.graph.initializer if t.name == name)
    array = np.full_like(numpy_helper.to_array(tensor), value)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return other


def test_a_graph_with_weights_that_are_not_finite_is_refused_by_the_tensors_name(
    graph, int8, calibration
):
    broken = with_weight(graph, "stage1/0/conv/bias", np.nan)
    for use in (lambda: quantize(broken, calibration), lambda: layer_reports(broken)):
        with pytest.raises(ValueError, match=r"finite weights, .* in stage1/0/conv/bias"):
            use()


@pytest.mark.parametrize("calibration_method", CALIBRATIONS)
def test_a_graph_whose_logits_overflow_is_not_quantized(graph, calibration, calibration_method):
    huge = with_weight(with_weight(graph, "stage0/conv/bias", 3e38), "stage1/0/conv/kernel", 3e38)
    with pytest.raises(ValueError, match="finite logits for the calibration images"):
        quantize(huge, calibration, calibration=calibration_method)


def test_other_wrong_arguments_are_refused(graph, int8, calibration, tmp_path):
    with pytest.raises(ValueError, match="graph must be a float one, got a graph that is quant"):
        quantize(int8, calibration)
    with pytest.raises(ValueError, match="graph must be a float one with Conv or Gemm"):
        layer_reports(int8)
    with pytest.raises(ValueError, match=r"calibration images .* must be in 1\.\.1437, got 1438"):
        DIGITS.calibration(1438)
    with pytest.raises(ValueError, match="given together, got only int8"):
        layer_reports(graph, int8)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        images_per_second({}, np.zeros((1, 8, 8, 3), np.uint8), rounds=0)
    with pytest.raises(ValueError, match="threads must be None or at least 1, got 0"):
        OnnxNetwork(graph, threads=0)
    bare = onnx.ModelProto()
    bare.CopyFrom(graph)
    del bare.metadata_props[:]
    save_onnx(tmp_path / "bare.onnx", bare)
    with pytest.raises(ValueError, match=r"bare.onnx' cannot be used: file must be one that repop"):
        OnnxNetwork(tmp_path / "bare.onnx")


def test_a_graph_that_onnxruntime_cannot_run_is_refused_in_a_sentence(graph):
    broken = onnx.ModelProto()
    broken.CopyFrom(graph)
    broken.graph.node[0].op_type = "Nonsense"
    with pytest.raises(
        ValueError, match=r"^graph must be one that onnxruntime can run: .*Nonsense"
    ):
        OnnxNetwork(broken)
