"""The whole method in one working directory: search, scales, target, and baselines.

``DIR/<part>`` holds each part's checkpoints, logs and metrics; ``DIR`` the configuration, the
scales, the figures and the summary. What is finished is not done again, so that the same
command resumes an interrupted run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from repopt_jax.scales import Scales, load_scales, save_scales
from repopt_jax.training.checkpoints import Checkpoints, checkpoint_directory
from repopt_jax.training.config import PARTS
from repopt_jax.training.devices import make_mesh, samples_per_group
from repopt_jax.training.evaluation import evaluate_state
from repopt_jax.training.figures import plot_curves, plot_scales, plot_scales_by_epoch
from repopt_jax.training.loop import train
from repopt_jax.training.parts import Part, prepare
from repopt_jax.training.processes import wait_for_all
from repopt_jax.training.report import format_table, read_metrics, write_json
from repopt_jax.training.searching import load_along, scales_of
from repopt_jax.training.step import TrainState
from repopt_jax.training.stopping import RunStopped, told_in_a_sentence

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Fields that may differ when a run is resumed, because they do not change its numbers so far.
FREE_FIELDS = (
    "parts",
    "log_every",
    "keep",
    "minutes",
    "profile_steps",
    "fsdp",
    "remat",
    "threads",
    "data_dir",
    "skip_bad",
    "eval_batch_size",
)

# Statistics of fewer images are poor, and of one 1x1 map none at all: nobody should get them
# because the machine is large.
SMALLEST_SHARE = 8

TITLES = {
    "search": "hyper-search",
    "target": "RepOptimizer",
    "plain": "plain optimizer",
    "csla": "constant-scale branches",
    "repvgg": "RepVGG",
    "rep": "RepGhost",
}


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Do all of `config.parts` in `workdir`, print a table and return the summary.

    Raises:
      RunStopped: for anything wrong with `config`, `workdir` or the data, before any work; and as
        `train` does.
    """
    workdir = epath.Path(workdir)
    with told_in_a_sentence():
        names, scales, mesh = check(config, workdir)
        config = _with_bn_groups(config, names, mesh, workdir)
        for name in names:
            prepare(config, name, mesh, scales)
        _claim(workdir, config)
    if scales is not None and jax.process_index() == 0:
        with told_in_a_sentence():
            save_scales(workdir / "scales.safetensors", scales)
    for name in names:
        done = workdir / name / "summary.json"
        if not done.exists():
            with told_in_a_sentence():
                part = prepare(config, name, mesh, scales)
            state, summary = train(part, workdir / name)
            with told_in_a_sentence():
                if name == "search":
                    scales = _keep_scales(part, state, summary, workdir)
                write_json(done, summary)
            del state  # the next part needs its memory
            wait_for_all(f"where the summary of {name} is written")
        elif name == "search":
            scales = load_scales(workdir / "scales.safetensors")
    files = {name: workdir / name / "summary.json" for name in PARTS}  # of earlier commands, too
    summaries = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
    summary = {"parts": summaries, "machine": _machine(mesh)}
    with told_in_a_sentence():
        write_json(workdir / "summary.json", summary)
        records = {TITLES[n]: read_metrics(workdir / n / "metrics.jsonl") for n in summaries}
        plot_curves(workdir / "curves.png", records)
    if jax.process_index() == 0:
        print(_table(summaries))
        print(f"\nEverything is in {workdir}: summary.json, curves.png, checkpoints by part.")
    return summary


def evaluate(config: ConfigDict, workdir: epath.PathLike) -> dict[str, dict[str, float]]:
    """Evaluate the latest and the best checkpoint of every part in `workdir`; changes no file.

    Raises:
      RunStopped: if there is no checkpoint, or it does not fit `config`.
    """
    workdir = epath.Path(workdir)
    found, rows = {}, []
    with told_in_a_sentence():
        config = for_evaluation(config, workdir)
        names, scales, mesh = check(config, workdir)
    for name in names:
        if not (workdir / name / "checkpoints").exists():
            continue
        with told_in_a_sentence():
            part = prepare(config, name, mesh, scales)
        for which, step, state in _restored(part, workdir / name):
            numbers = evaluate_state(part, state)
            found[f"{name}/{which}"] = numbers
            for prefix in ("eval", "eval_ema"):
                if f"{prefix}/top1" in numbers:
                    label = which if prefix == "eval" else f"{which}, averaged"
                    cells = [f"{numbers[f'{prefix}/{k}']:.2f}" for k in ("top1", "top5")]
                    loss = f"{numbers[f'{prefix}/loss']:.4f}"
                    rows.append((TITLES[name], label, step, *cells, loss))
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
    if (epath.Path(workdir) / "scales.safetensors").exists():
        config.scales = ""
    return config


def _restored(part: Part, workdir: epath.Path) -> Iterator[tuple[str, int, TrainState]]:
    """The latest and the best state, where there is a checkpoint of them."""
    state = part.init()
    with told_in_a_sentence():
        checkpoints = Checkpoints(workdir, read_only=True)
    for which in ("latest", "best"):
        if which == "best" and checkpoints.best_step() is None:
            continue  # no checkpoint was written where an evaluation was due
        with told_in_a_sentence():
            restored = checkpoints.restore(state, step=which)
        if restored is not None:  # None: stopped before its first checkpoint
            yield which, *restored
    checkpoints.close()


def check(
    config: ConfigDict, workdir: epath.Path | None = None
) -> tuple[list[str], Scales | None, Any]:
    """The parts to run, the scales if they are known, and the mesh; ValueError if it cannot be.

    Args:
      config: the whole configuration.
      workdir: may hold the scales of a search that is done. None: look at `config.scales` only.
    """
    names = list(config.parts)
    if not names:
        raise ValueError("parts must name at least one part, got none")
    steps = config.checkpoint
    positive = {"log_every": config.log_every, "eval_every": config.eval_every}
    positive |= {"checkpoint.every": steps.every, "checkpoint.keep": steps.keep}
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {value}")
    not_negative = {"checkpoint.minutes": steps.minutes, "profile_steps": config.profile_steps}
    for name, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {value}")
    scales = load_scales(config.scales) if config.scales else None
    if scales is not None and "search" in names:
        names.remove("search")
        if not names:
            raise ValueError(
                f"parts must name another part than 'search' where scales are given, "
                f"got {tuple(config.parts)} and scales={config.scales!r}"
            )
    found = workdir / "scales.safetensors" if workdir is not None else None
    if scales is None and found is not None and found.exists():
        scales = load_scales(found)
    needing = [name for name in ("target", "csla") if name in names]
    if needing and scales is None and names[0] != "search":
        raise ValueError(
            f"the part {needing[0]!r} needs scales: put 'search' first in parts or give "
            f"scales=FILE, got parts {tuple(config.parts)}"
        )
    return names, scales, make_mesh(config.fsdp)


def _with_bn_groups(
    config: ConfigDict, names: list[str], mesh: Any, workdir: epath.Path
) -> ConfigDict:
    """`config` with a number for every `bn_group` of None that is in use.

    It is the one that the run began with: on another number of devices a device's share is another,
    and the training would silently change.

    Raises:
      ValueError: for devices that cannot hold that number, or a share too small for statistics.
    """
    config = config.copy_and_resolve_references()
    path = workdir / "config.json"
    begun = json.loads(path.read_text()) if path.exists() else {}
    for section_name in {"search" if name == "search" else "target" for name in names}:
        section = config[section_name]
        if section.bn_group is None:
            remembered = begun.get(section_name, {}).get("bn_group")
            sizes = (section.batch_size, section.accumulation, remembered, mesh)
            try:
                section.bn_group = samples_per_group(*sizes)
            except ValueError as error:
                if remembered is None:
                    raise
                raise ValueError(
                    f"{error}, with which the run in {workdir} began; a device must hold whole "
                    "groups"
                ) from None
            if remembered is None and section.bn_group < SMALLEST_SHARE:
                raise ValueError(
                    f"{section_name}.bn_group must be given where a device holds fewer than "
                    f"{SMALLEST_SHARE} images at a time, got None for {section.bn_group} "
                    f"(batch_size {section.batch_size}, {mesh.size} devices): a larger batch_size "
                    "or fewer devices give BatchNorm better statistics"
                )
    return config


def _claim(workdir: epath.Path, config: ConfigDict) -> None:
    """Write the configuration, or refuse a directory with another one."""
    checkpoint_directory(workdir)  # refuses some, before anything is written
    path = workdir / "config.json"
    wanted = _flat(json.loads(config.to_json_best_effort()))
    if path.exists():
        present = _flat(json.loads(path.read_text()))
        different = [
            f"{key} ({present.get(key)!r} there, {wanted.get(key)!r} here)"
            for key in sorted(present.keys() | wanted.keys())
            if present.get(key) != wanted.get(key) and key.split(".")[-1] not in FREE_FIELDS
            if not (key.endswith("bn_group") and present.get(key) is None)  # not in use so far
        ]
        if different:
            raise ValueError(
                f"workdir {workdir} holds a run with another configuration; use another workdir "
                f"or the same settings: {', '.join(different)}"
            )
    elif workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir must be a directory, got the file {workdir}")
    # A kill while the configuration was being written leaves its unfinished file alone.
    elif workdir.exists() and any(p.name != ".config.unfinished.json" for p in workdir.iterdir()):
        raise ValueError(f"workdir must be empty, absent or a run's own, got {workdir}")
    wait_for_all("before the configuration is written")
    write_json(path, json.loads(config.to_json_best_effort()))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _keep_scales(part: Part, state: Any, summary: dict, workdir: epath.Path) -> Scales:
    """Save what a search found, with figures of it and of how it came about."""
    scales = scales_of(part, state, part.steps, summary)
    if jax.process_index() == 0:
        save_scales(workdir / "scales.safetensors", scales)
        plot_scales(workdir / "scales.png", scales)
        plot_scales_by_epoch(workdir / "scales_by_epoch.png", load_along(workdir / "search"))
    return scales


def _machine(mesh: Any) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    return {
        "devices": mesh.size,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "jax": jax.__version__,
    }


def _table(summaries: dict[str, dict[str, Any]]) -> str:
    header = ("part", "epochs", "top-1 %", "best top-1 %", "top-5 %", "loss", "seconds")
    rows = [
        (
            TITLES[name],
            f"{s['epochs']:g}",
            f"{s['eval/top1']:.2f}",
            f"{s['best_top1']:.2f}",
            f"{s['eval/top5']:.2f}",
            f"{s['eval/loss']:.4f}",
            f"{s['seconds']:.0f}",
        )
        for name, s in summaries.items()
    ]
    return format_table(rows, header)
