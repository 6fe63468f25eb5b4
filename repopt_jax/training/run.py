"""The modes of the command: run, evaluate, and time the training step.

`run` does the whole method in one working directory: search, scales, target, and baselines.
``DIR/<part>`` holds each part's checkpoints, logs and metrics; ``DIR`` the configuration, the
scales, the figures and the summary. What is finished is not done again, so that the same
command resumes an interrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from repopt_jax.files import load_scales
from repopt_jax.models.folding import fold
from repopt_jax.scales import Scales, save_scales
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.config import INITIAL, PARTS, check_config
from repopt_jax.training.devices import make_mesh, put_batch
from repopt_jax.training.evaluation import evaluate_state, not_finite_sentence
from repopt_jax.training.figures import plot_curves, plot_scales, plot_scales_by_epoch
from repopt_jax.training.interruption import RunStopped, plain_errors
from repopt_jax.training.loop import scales_by_epoch, train
from repopt_jax.training.networks import initial_scales
from repopt_jax.training.parts import Part, prepare_parts
from repopt_jax.training.processes import wait_for_all
from repopt_jax.training.report import format_table, read_metrics, write_json
from repopt_jax.training.step import TrainState, jitted_train_step
from repopt_jax.training.trained import load_part
from repopt_jax.training.workdir import SCALES, claimed, with_bn_groups

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

# Of `throughput`.
WARMUP_STEPS = 3
TIMED_STEPS = 20


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Do all of `config.parts` in `workdir`, print a table and return the summary.

    What is finished there is not done again, and its images are not read. A `~` at the start of
    `workdir` is the home folder.

    Raises:
      RunStopped: for anything wrong with `config`, `workdir` or the data, before any work; and as
        `train` does.
    """
    workdir = epath.Path(workdir).expanduser()
    with contextlib.ExitStack() as stack:
        with plain_errors():
            names, scales = names_and_scales(config, workdir)
            mesh = make_mesh(config.fsdp)
            config = with_bn_groups(config, names, mesh, workdir)
            unfinished = [name for name in names if not _summary_file(workdir, name).exists()]
            parts = prepare_parts(config, unfinished, mesh, scales)
            stack.enter_context(claimed(workdir, config, list(parts.values())))
            if scales is not None and jax.process_index() == 0:
                save_scales(workdir / SCALES, scales)
        for name in unfinished:
            with plain_errors():
                part = parts.pop(name).with_scales(scales)  # popped, so that its data can be freed
                if tuned := part.spec.tunes:
                    trained, _ = load_part(config, workdir, part=tuned, checkpoint="latest")
                    part = dataclasses.replace(part, trained=fold(trained))
            state, summary = train(part, workdir / name)
            with plain_errors():
                if name == "search":
                    scales = _keep_scales(part, state, summary, workdir)
                write_json(_summary_file(workdir, name), summary)
            del part, state  # the next part needs their memory
            wait_for_all(f"where the summary of {name} is written")
        with plain_errors():
            summary = _report(workdir, mesh)
        if not unfinished and jax.process_index() == 0:
            print("Nothing was left to train, so the images were not read.")
        return summary


def names_and_scales(
    config: ConfigDict, workdir: epath.Path | None = None
) -> tuple[list[str], Scales | None]:
    """The parts to run, and the scales if they are known.

    Args:
      config: the whole configuration.
      workdir: may hold the scales of a search that is done. None: look at `config.scales` only.

    Raises:
      ValueError: something in `config` is out of its range, or a part needs scales or a network
        that no part before it yields.
      FileNotFoundError: there is no file of scales where `config` says.
    """
    check_config(config)
    names = list(dict.fromkeys(config.parts))
    scales = _given_scales(config)
    if scales is not None and "search" in names:
        names.remove("search")
        if not names:
            raise ValueError(
                f"parts must name another part than 'search' where scales are given, "
                f"got {tuple(config.parts)} and scales={config.scales!r}"
            )
    if scales is None and workdir is not None and (workdir / SCALES).exists():
        scales = load_scales(workdir / SCALES)
    for place, name in enumerate(names):
        tuned = PARTS[name].tunes
        if not tuned or tuned in names[:place] or workdir is None:
            continue
        if not (workdir / tuned / "checkpoints").exists():
            raise ValueError(
                f"the part {name!r} needs a trained network: put {tuned!r} before it in parts, "
                f"got parts {tuple(config.parts)}"
            )
    for name in names:
        if name == "search" or scales is not None:
            break
        if PARTS[name].needs_scales:
            raise ValueError(
                f"the part {name!r} needs scales: put 'search' before it in parts or give "
                f"scales=FILE or scales={INITIAL}, got parts {tuple(config.parts)}"
            )
    return names, scales


def _given_scales(config: ConfigDict) -> Scales | None:
    """The scales that `config` names. None: it leaves them to a search."""
    if not config.scales:
        return None
    if config.scales == INITIAL:
        return initial_scales(config)
    path = epath.Path(config.scales).expanduser()
    if not path.is_file():
        given = repr(config.scales)
        raise FileNotFoundError(f"scales must be {INITIAL!r} or an existing file, got {given}")
    return load_scales(path)


def _keep_scales(part: Part, state: TrainState, summary: dict, workdir: epath.Path) -> Scales:
    """Save the scales that a search found, and figures of them and of their course."""
    scales = part.scales_of(state, part.steps, summary)
    if jax.process_index() == 0:
        save_scales(workdir / SCALES, scales)
        plot_scales(workdir / "scales.png", scales)
        plot_scales_by_epoch(workdir / "scales_by_epoch.png", scales_by_epoch(workdir / "search"))
    return scales


def _summary_file(workdir: epath.Path, name: str) -> epath.Path:
    return workdir / name / "summary.json"


def _report(workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Write and print the results of every part that is finished, by whichever command."""
    files = {name: _summary_file(workdir, name) for name in PARTS}
    summaries = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
    device = mesh.devices.flat[0]
    machine = {
        "devices": mesh.size,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "jax": jax.__version__,
    }
    summary = {"parts": summaries, "machine": machine}
    write_json(workdir / "summary.json", summary)
    records = {PARTS[n].title: read_metrics(workdir / n / "metrics.jsonl") for n in summaries}
    plot_curves(workdir / "curves.png", records)
    header = ("part", "epochs", "top-1 %", "best top-1 %", "top-5 %", "loss", "seconds")
    rows = [
        (
            PARTS[name].title,
            f"{s['epochs']:g}",
            *(f"{s[key]:.2f}" for key in ("eval/top1", "best_top1", "eval/top5")),
            f"{s['eval/loss']:.4f}",
            f"{s['seconds']:.0f}",
        )
        for name, s in summaries.items()
    ]
    if jax.process_index() == 0:
        print(format_table(rows, header))
        print(f"\nEverything is in {workdir}: summary.json, curves.png, checkpoints by part.")
    return summary


def evaluate(config: ConfigDict, workdir: epath.PathLike) -> dict[str, dict[str, float]]:
    """Evaluate the latest and the best checkpoint of every part in `workdir`; changes no file.

    Raises:
      RunStopped: if there is no checkpoint, or it does not fit `config`.
    """
    workdir = epath.Path(workdir).expanduser()
    found, rows = {}, []
    with plain_errors():
        config = for_evaluation(config, workdir)
        names, scales = names_and_scales(config, workdir)
        names = [name for name in names if (workdir / name / "checkpoints").exists()]
        # Only the shapes count: the values are those of the checkpoint.
        scales = initial_scales(config) if scales is None else scales
        parts = prepare_parts(config, names, make_mesh(config.fsdp), scales)
    for name in names:
        part = parts.pop(name)
        for which, step, state in _restored(part, workdir / name):
            numbers = evaluate_state(part, state)
            found[f"{name}/{which}"] = numbers
            if jax.process_index() == 0 and (warning := not_finite_sentence(numbers)):
                print(f"{part.spec.title}, {which}{warning}")
            for prefix, label in (("eval", which), ("eval_ema", f"{which}, averaged")):
                if f"{prefix}/top1" in numbers:
                    cells = [f"{numbers[f'{prefix}/{k}']:.2f}" for k in ("top1", "top5")]
                    loss = f"{numbers[f'{prefix}/loss']:.4f}"
                    rows.append((part.spec.title, label, step, *cells, loss))
    if not rows:
        raise RunStopped(f"workdir must hold a run with checkpoints, got {workdir}", 2)
    if jax.process_index() == 0:
        header = ("part", "checkpoint", "step", "top-1 %", "top-5 %", "loss")
        print(format_table(rows, header))
    return found


def for_evaluation(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """`config` without what only training needs, such as devices to split over and BN groups."""
    config = config.copy_and_resolve_references()
    config.fsdp = 1
    for section in (config.search, config.target):
        section.bn_group, section.accumulation = None, 1
        section.mix.mixup = section.mix.cutmix = 0.0
    if (epath.Path(workdir) / SCALES).exists():
        config.scales = ""
    return config


def _restored(part: Part, workdir: epath.Path) -> Iterator[tuple[str, int, TrainState]]:
    """The latest and the best state, where there is a checkpoint of them."""
    state = part.init()
    with plain_errors():
        checkpoints = Checkpoints(workdir, read_only=True)
    for which in ("latest", "best"):
        if which == "best" and checkpoints.best_step() is None:
            continue  # no checkpoint has been evaluated
        with plain_errors():
            restored = checkpoints.restore(state, step=which)
        if restored is not None:  # None: stopped before its first checkpoint
            yield which, *restored
    checkpoints.close()


def throughput(config: ConfigDict) -> dict[str, float]:
    """Time the training step of every part in `config.parts`, without data loading.

    Prints images/s and compile time; returns images/s by part.

    Raises:
      RunStopped: for anything wrong with `config` or the data.
    """
    with plain_errors():
        names, scales = names_and_scales(config)
        # The values of the scales do not change the time of a step.
        scales = initial_scales(config) if scales is None else scales
        parts = prepare_parts(config, names, make_mesh(config.fsdp), scales)
    rows, found = [], {}
    for name, part in parts.items():
        compile_seconds, step_seconds = _time(part)
        found[name] = part.section.batch_size / step_seconds
        cells = f"{compile_seconds:.1f}", f"{1e3 * step_seconds:.1f}", f"{found[name]:,.0f}"
        rows.append((part.spec.title, *cells))
    print(format_table(rows, ("part", "compile s", "step ms", "images/s")))
    return found


def _time(part: Part) -> tuple[float, float]:
    """Seconds for the compilation, and for one step."""
    state = part.init()
    batch = put_batch(part.mesh, next(part.train_batches()))
    arguments = (part.graphdef, part.tx, part.options)
    start = time.perf_counter()
    step = jitted_train_step.lower(*arguments, state, batch).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return compile_seconds, float(np.median(times[WARMUP_STEPS:]))
