"""What helps where INT8 costs accuracy: equalization and quantization-aware training.

    python benchmarks/quantization_remedies.py

Trains RepVGG, and the plain network with a RepOptimizer and with SGD, on scikit-learn's digits at
the width where RepVGG loses most of its accuracy in INT8 with one scale per tensor (see
benchmarks/quantization_width.py). RepVGG is measured as it is and equalized, which is what its
user would do. For each it measures top-1 in float, in INT8 after training, and in INT8 after
quantization-aware training; both INT8 files are symmetric, as `quantize --for openvino` writes
them. Prints means over the seeds and writes JSON.

Rows that the JSON file holds already are not run again: the same command goes on where it stopped.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys

import jax.numpy as jnp
from environment import REPOSITORY, environment
from flax import nnx
from onnx import numpy_helper
from quantization import PACKAGES
from quantization_width import configuration

from repopt_jax.deploy.equalization import equalized
from repopt_jax.deploy.image_set import configured_images
from repopt_jax.deploy.onnx_export import onnx_model
from repopt_jax.deploy.quantization import quantize
from repopt_jax.deploy.runtime import OnnxNetwork, evaluate
from repopt_jax.deploy.trained import data_section, load_run
from repopt_jax.files import load_scales
from repopt_jax.models.folding import fold
from repopt_jax.training import run
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.interruption import RunStopped
from repopt_jax.training.loop import train
from repopt_jax.training.parts import prepare
from repopt_jax.training.report import format_table, write_json
from repopt_jax.training.workdir import SCALES
from repopt_jax.tree_paths import layer_at

# Title -> part of the run, whether it is equalized, part that fine-tunes it.
ROWS = {
    "RepVGG, folded": ("repvgg", False, "repvgg_qat"),
    "RepVGG, folded and equalized": ("repvgg", True, "repvgg_qat"),
    "RepOptimizer": ("target", False, "qat"),
    "plain SGD": ("plain", False, "plain_qat"),
}
INT8 = {"runtime": "openvino", "per_channel": False, "calibration": "minmax"}


def with_weights_of(model, graph):
    """The folded network with the kernels and biases of its float graph."""
    values = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    for name, value in values.items():
        path, _, kind = name.rpartition("/")
        if kind == "kernel":
            layer = layer_at(model, path)
            axes = (2, 3, 1, 0) if value.ndim == 4 else (1, 0)
            layer.kernel = nnx.Param(jnp.asarray(value.transpose(axes)))
            layer.bias = nnx.Param(jnp.asarray(values[f"{path}/bias"]))
    return model


def measure(title: str, config, workdir: pathlib.Path) -> dict:
    """One row of one seed: top-1 in float, after quantization and after training in INT8."""
    network, equalize, tuning = ROWS[title]
    trained = load_run(config, workdir, part=network, checkpoint="latest")
    data = configured_images(data_section(config, network))
    batches = data.calibration(512)
    folded = fold(trained.model)
    graph = onnx_model(folded, trained.preprocessing, name=trained.name)
    if equalize:
        graph = equalized(graph)
        folded = with_weights_of(folded, graph)

    def top1(model) -> float:
        return evaluate(OnnxNetwork(model), data.evaluation(100))["top1"]

    part = prepare(config, tuning, make_mesh(), load_scales(workdir / SCALES))
    state, _ = train(dataclasses.replace(part, trained=folded), workdir / title)
    model = nnx.merge(part.graphdef, state.params, state.stats)
    model.eval()
    return {
        "float": top1(graph),
        "quantized": top1(quantize(graph, batches, equalize=equalize, **INT8)),
        "trained in INT8": top1(onnx_model(model, trained.preprocessing, name=trained.name)),
    }


def table(runs: list[dict]) -> str:
    """Means over the seeds, and standard deviations where there are several."""
    rows = []
    for title in ROWS:
        own = [r for r in runs if r["network"] == title]
        cells = []
        for key in ("float", "quantized", "trained in INT8") if own else ():
            values = [r[key] for r in own]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{deviation}")
        rows.append((title, *cells))
    return format_table(rows, ("network", "float top-1 %", "INT8, quantized", "trained in INT8"))


def main() -> None:
    """Train, quantize, fine-tune, print and write what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4, help="by that of configs/digits.py")
    parser.add_argument("--epochs", type=float, default=4.0, help="of the search too")
    parser.add_argument("--qat-epochs", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/remedies"))
    results = REPOSITORY / "benchmarks/results/quantization_remedies.json"
    parser.add_argument("--output", type=pathlib.Path, default=results)
    arguments = parser.parse_args()
    arguments.config = "digits"
    given = {key: getattr(arguments, key) for key in ("width", "epochs", "qat_epochs")}
    before = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    runs = before["runs"] if before.get("arguments") == given else []
    done = {(r["seed"], r["network"]) for r in runs}
    for seed in arguments.seeds:
        missing = [title for title in ROWS if (seed, title) not in done]
        config = configuration(arguments, arguments.width, seed)
        config.qat.epochs = arguments.qat_epochs
        workdir = arguments.workdir / f"{arguments.epochs:g} epochs, seed {seed}"
        try:
            if missing:
                run.run(config, workdir)
            for title in missing:
                runs.append({"seed": seed, "network": title, **measure(title, config, workdir)})
                found = {"what": __doc__.splitlines()[0], "arguments": given}
                found |= {"environment": environment(*PACKAGES), "runs": runs}
                write_json(arguments.output, found)
        except RunStopped as stopped:
            sys.exit(f"{stopped}")
    print(table(runs))
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
