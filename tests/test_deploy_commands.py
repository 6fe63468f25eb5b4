"""From a short run on digits to INT8 files through the command line, as docs/deploy.md has it."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from family_networks import drawn
from PIL import Image
from small_run import small_config
from torch_cases import archive
from wrong_commands import REPOSITORY, SECTION, WRONG

from repopt_jax.data import load_dataset
from repopt_jax.deploy.command_line import main
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.runtime import OnnxNetwork
from repopt_jax.deploy.stablehlo_export import load_stablehlo
from repopt_jax.deploy.trained import load_run, run_config
from repopt_jax.scales import Scales, save_scales
from repopt_jax.torch_files import export_weights
from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.training import run
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.report import read_metrics

DOCUMENT = (REPOSITORY / "docs" / "deploy.md").read_text()
VGG = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3}


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_draws")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_draws):
    """Holds a run of 11 steps with averages in runs/digits, and torch weights in vgg.pth."""
    folder = tmp_path_factory.mktemp("deploy")
    parts = ("search", "target", "qat")
    config = small_config(parts=parts, target__epochs=1.0, qat__epochs=0.3, checkpoint__every=1.0)
    size = {key: value for key, value in config.model.items() if value is not None}
    save_scales(folder / "scales.safetensors", Scales.initial(unfilled_model(**size)))
    config.scales = str(folder / "scales.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        one_device = make_mesh(devices=jax.devices()[:1])
        patch.setattr(run, "make_mesh", lambda *_: one_device)
        run.run(config, folder / "runs" / "digits")
    (folder / "vgg.pth").write_bytes(archive(export_weights(vgg())))
    return folder


def vgg():
    return drawn(unfilled_model(name="RepOpt-VGG", kind="repvgg", **VGG))


@pytest.fixture(scope="module")
def documented(folder):
    """What every command of the document printed, in its folder."""
    commands = [
        shlex.split(line)[1:]
        for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
        for line in block.splitlines()
        if line.strip().startswith("repopt-deploy ")
    ]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            assert main(command) == 0, command
            printed.append(command)
    return printed


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Runs a command in the folder; its status, output and errors."""
    monkeypatch.chdir(folder)

    def run_command(line):
        try:
            status = main(shlex.split(line))
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run_command


def table(text):
    """Rows of a printed table by their first cell."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:]}


def test_the_documented_commands_write_their_files(documented, folder):
    """All five commands are among them, and none leaves an unfinished file."""
    assert {command[0] for command in documented} == {
        "export", "quantize", "eval", "benchmark", "report"
    }  # fmt: skip
    written = {p.name for p in folder.iterdir()} - {"runs", "vgg.pth", "scales.safetensors"}
    assert written == {
        "digits.onnx", "digits-int8.onnx", "layers.png", "digits.stablehlo", "vgg.onnx",
        "digits-trt.onnx", "digits-ov.onnx", "digits-qat.onnx", "digits-qat-trt.onnx",
        "channels.onnx", "even.onnx", "cut.onnx", "mixed.onnx", "anew.stablehlo",
    }  # fmt: skip


def test_the_float_graph_has_the_accuracy_that_training_told(documented, folder, command):
    """top-1 and top-5 of the best checkpoint, over all 360 images; the INT8 drop is beside."""
    status, out, _ = command("eval digits.onnx digits-int8.onnx --workdir=runs/digits")
    assert status == 0
    records = read_metrics(folder / "runs" / "digits" / "target" / "metrics.jsonl")
    best = max((r for r in records if "eval/top1" in r), key=lambda r: r["eval/top1"])
    rows = table(out)
    told = [f"{best['eval/top1']:.2f}", f"{best['eval/top5']:.2f}"]
    assert rows["digits.onnx"][:5] == [*told, "0.00", "0.00", "360"]
    top1, _, drop, _, images = rows["digits-int8.onnx"][:5]
    assert images == "360" and float(drop) == pytest.approx(float(told[0]) - float(top1))
    assert abs(float(drop)) < 10


def test_what_is_trained_in_int8_is_exported_with_its_accuracy(documented, folder, command):
    """For whichever runtime, by onnxruntime on all evaluation images."""
    status, out, _ = command("eval digits-qat.onnx digits-qat-trt.onnx --workdir=runs/digits")
    records = read_metrics(folder / "runs" / "digits" / "qat" / "metrics.jsonl")
    (last,) = [r for r in records if "eval/top1" in r]
    told = [f"{last['eval/top1']:.2f}", f"{last['eval/top5']:.2f}"]
    for name in ("digits-qat.onnx", "digits-qat-trt.onnx"):
        assert table(out)[name][:5] == [*told, "0.00", "0.00", "360"]
        assert " ".join(table(out)[name][6:]) == "trained in INT8, per tensor"
    rounded = [n for n in onnx.load("digits-qat.onnx").graph.node if n.op_type == "QuantizeLinear"]
    assert len(rounded) == 6 and status == 0  # the input of every layer


def test_layers_of_an_equalized_graph_are_compared_with_their_like(documented, command):
    """Its tensors are not those of the float graph, but of the equalized one."""
    status, out, _ = command("report digits.onnx even.png --int8=even.onnx --data=digits --force")
    noise = [float(cells[-1]) for name, cells in table(out).items() if name.startswith("stage")]
    assert status == 0 and len(noise) == 5 and min(noise) > 15
    pathlib.Path("even.png").unlink()


def test_a_stablehlo_file_is_made_anew_of_its_own_weights(documented, command):
    images = load_dataset("digits").eval.images[:8]
    old, new = (load_stablehlo(f"{name}.stablehlo") for name in ("digits", "anew"))
    np.testing.assert_array_equal(new.call(images), old.call(images))
    assert new.metadata["model"] == old.metadata["model"]


def test_a_run_is_exported_without_its_images(documented, folder, command):
    """As long as the configuration says how large they are."""
    lost = "--config.target.data.name=folder --config.target.data.data_dir=/absent"
    line = f"export lost.onnx --workdir=runs/digits {lost}"
    assert command(f"{line} --config.target.data.image_size=8")[0] == 0
    images = load_dataset("digits").eval.images
    found = OnnxNetwork("lost.onnx")(images)
    np.testing.assert_array_equal(found, OnnxNetwork("digits.onnx")(images))
    status, _, told = command(f"{line} --force")
    assert status == 2 and "must name a folder in data_dir='/absent'" in told


def test_a_network_that_the_checkpoint_is_not_of_is_refused(documented, folder, command, tmp_path):
    """Of the target, its scales tell; of the others, the shapes in the checkpoint."""
    shutil.copytree(folder / "runs" / "digits", tmp_path, dirs_exist_ok=True)
    (tmp_path / "target").rename(tmp_path / "plain")
    line = f"export other.onnx --workdir={tmp_path} --part=plain"
    status, _, told = command(f"{line} --config.model.widths='(8,8,8,8,8)'")
    assert status == 2 and "model must be that of the checkpoint of 'plain', where params/" in told
    assert command(line)[0] == 0


@pytest.mark.parametrize(("end", "value"), [("conv/kernel", np.nan), ("bn/var", -1.0)])
def test_a_checkpoint_with_numbers_that_mean_nothing_is_refused(folder, end, value, monkeypatch):
    """As weights files are, by the tensor and the run."""
    restore, workdir = Checkpoints.restore, folder / "runs" / "digits"

    def damaged(self, **options):
        step, arrays = restore(self, **options)
        path = next(p for p in arrays if p.startswith(("params/", "stats/")) and p.endswith(end))
        return step, {**arrays, path: jnp.full_like(arrays[path], value)}

    monkeypatch.setattr(Checkpoints, "restore", damaged)
    with pytest.raises(ValueError, match=rf"'target' in .*digits.*{end} must"):
        load_run(run_config(workdir), workdir)


def test_averaged_weights_are_others(documented, folder, command):
    """And are those whose accuracy training told; every file agrees with JAX's own."""
    images = load_dataset("digits").eval.images
    status, out, _ = command(
        "export mean.onnx --workdir=runs/digits --checkpoint=latest --averaged"
    )
    assert status == 0 and out.startswith("wrote mean.onnx: RepOpt-VGG, ")
    written = load_stablehlo("digits.stablehlo")
    text = jax.jit(written.call).lower(jnp.asarray(images)).as_text()
    assert "stablehlo.convolution" in text and "rsqrt" not in text  # BatchNorm is folded
    latest = written.call(jnp.asarray(images))
    averaged = OnnxNetwork("mean.onnx")(images)
    assert np.abs(averaged - latest).max() > 0.01
    labels = load_dataset("digits").eval.labels
    records = read_metrics(folder / "runs" / "digits" / "target" / "metrics.jsonl")
    told = [r["eval_ema/top1"] for r in records if "eval_ema/top1" in r][-1]
    assert 100 * (averaged.argmax(1) == labels).mean() == pytest.approx(told, abs=1e-3)


def test_weights_of_a_torch_file_are_exported(documented, folder):
    """With the preprocessing of ImageNet."""
    model = vgg()
    model.eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    expected = jax.jit(lambda x: model(x))(Preprocessing(32, 32)(images))
    np.testing.assert_allclose(
        OnnxNetwork(folder / "vgg.onnx")(images), expected, rtol=1e-4, atol=1e-5
    )


def test_the_module_runs_as_a_program(documented, folder):
    line = [sys.executable, "-m", "repopt_jax.deploy", "benchmark"]
    line += [str(folder / "digits.onnx"), "--rounds=1"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("medians of 1 rounds, batch 1, ")


@pytest.fixture
def files(tmp_path):
    """The first of 10 images to train and the third of 10 to evaluate cannot be decoded."""
    for split, bad in (("train", 0), ("val", 2)):
        for label in range(10):
            path = tmp_path / split / str(label) / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((8, 8), 20 * label, np.uint8)).save(path)
            if label == bad:
                path.write_bytes(b"no image")
    return tmp_path


def test_undecodable_images_are_left_out_as_in_the_run_or_by_a_flag(documented, files, command):
    """Else they are named with their split, before anything is written."""
    chosen = f"--workdir=runs/digits {SECTION}.name=folder {SECTION}.data_dir={files}"
    chosen += f" {SECTION}.image_size=8"
    named = f"--data=folder --data-dir={files}"
    quantize = "quantize digits.onnx bad.onnx --images=10 --force"
    for good in (
        f"{chosen} {SECTION}.skip_bad=True",
        f"{chosen} --skip-bad",
        f"{named} --skip-bad",
    ):
        status, out, _ = command(f"eval digits.onnx --batch-size=1 {good}")
        assert status == 0 and table(out)["digits.onnx"][4] == "9"
        status, out, _ = command(f"{quantize} {good}")
        assert status == 0 and "9 images" in out
    for bad in (chosen, named):
        status, _, told = command(f"eval digits.onnx {bad}")
        assert status == 2 and f"evaluation image 2 ({files}/val/2/a.png)" in told
        status, _, told = command(f"{quantize} {bad}")
        assert status == 2 and f"training image 0 ({files}/train/0/a.png)" in told


def test_logits_that_are_not_finite_are_told_by_graph(documented, folder, command):
    """They are no hits, so the accuracy is 0 instead of the share of a class."""
    broken = onnx.load(folder / "digits.onnx")
    bias = next(t for t in broken.graph.initializer if t.name == "linear/bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    onnx.save(broken, folder / "broken.onnx")
    status, out, _ = command("eval digits.onnx broken.onnx --data=digits")
    (folder / "broken.onnx").unlink()
    assert status == 0 and table(out)["broken.onnx"][:2] == ["0.00", "0.00"]
    assert out.splitlines()[-1] == "broken.onnx: 360 images had logits that are not finite"
    assert out.count("not finite") == 1


def test_a_tilde_is_the_home_folder(documented, folder, command, monkeypatch):
    """No shell expands one after an equals sign."""
    monkeypatch.setenv("HOME", str(folder))
    line = "export home.onnx --force --workdir=~/runs/digits"
    assert command(line)[0] == 0
    line = "export home.onnx --force --weights=~/vgg.pth --image-size=32"
    assert command(line)[0] == 0
    (folder / "home.onnx").unlink()


# By ml_collections, which reads configuration files with it.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(("line", "message"), WRONG, ids=lambda text: text[:50])
def test_what_is_wrong_ends_with_one_sentence(documented, folder, command, line, message):
    """Status 2, and no file is written or changed."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, out, err = command(line)
    assert (status, out) == (2, "")
    assert err.startswith("repopt-deploy: ") and err.count("\n") == 1
    assert message in err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_configuration_file_names_the_images(documented, command):
    """As train.py was given it, instead of what the run has left."""
    status, out, _ = command(f"eval digits.onnx --config={REPOSITORY}/configs/digits.py")
    assert status == 0 and table(out)["digits.onnx"][4] == "360"


def test_force_replaces_an_existing_file(documented, folder, command):
    before = (folder / "vgg.onnx").read_bytes()
    status, _, _ = command("export vgg.onnx --weights=vgg.pth --image-size=64 --force")
    assert status == 0
    assert (folder / "vgg.onnx").read_bytes() != before
    (folder / "vgg.onnx").write_bytes(before)
