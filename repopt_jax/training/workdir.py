"""The working directory of a run: the configuration that it belongs to, and what it keeps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from etils import epath

from repopt_jax.training.checkpoints import checkpoint_directory
from repopt_jax.training.config import PARTS, flat, sections_of
from repopt_jax.training.devices import samples_per_group
from repopt_jax.training.processes import wait_for_all
from repopt_jax.training.report import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from repopt_jax.training.parts import Part

CONFIG, CLASSES, SCALES = "config.json", "classes.json", "scales.safetensors"

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

# Statistics over fewer images are poor, and over a single 1x1 map there are none: a large machine
# must not bring them about unasked.
SMALLEST_SHARE = 8


def with_bn_groups(
    config: ConfigDict, names: Sequence[str], mesh: Mesh, workdir: epath.Path
) -> ConfigDict:
    """`config` with a number for every `bn_group` of None that the parts `names` use.

    It is the one that the run began with: on another number of devices a device's share is another,
    and the training would silently change.

    Raises:
      ValueError: for devices that cannot hold that number, or a share too small for statistics.
    """
    config = config.copy_and_resolve_references()
    begun = _read(workdir / CONFIG)
    for name in sections_of(names):
        if config[name].bn_group is None:
            remembered = begun.get(name, {}).get("bn_group")
            config[name].bn_group = _group(name, config[name], mesh, remembered, workdir)
    return config


def _group(name: str, section: ConfigDict, mesh: Mesh, remembered: int | None, workdir) -> int:
    try:
        group = samples_per_group(section.batch_size, section.accumulation, remembered, mesh)
    except ValueError as error:
        began = f", with which the run in {workdir} began; a device must hold whole groups"
        raise ValueError(f"{name}: {error}{began if remembered else ''}") from None
    if remembered is None and group < SMALLEST_SHARE:
        raise ValueError(
            f"{name}.bn_group must be given where a device holds fewer than {SMALLEST_SHARE} "
            f"images at a time, got None for {group} (batch_size {section.batch_size}, "
            f"{mesh.size} devices): a larger batch_size or fewer devices give BatchNorm better "
            "statistics"
        )
    return group


def claim(workdir: epath.Path, config: ConfigDict, parts: Iterable[Part]) -> None:
    """Write down the configuration and the parts' numbers of classes.

    Raises:
      ValueError: the directory is no run's, or that of a run with another configuration.
    """
    checkpoint_directory(workdir)  # refuses some, before anything is written
    path = workdir / CONFIG
    wanted = json.loads(config.to_json_best_effort())
    if path.exists():
        _require_same(_read(path), wanted, workdir)
    elif workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir must be a directory, got the file {workdir}")
    # A kill while the configuration was being written leaves its unfinished file alone.
    elif workdir.exists() and any(p.name != ".config.unfinished.json" for p in workdir.iterdir()):
        raise ValueError(f"workdir must be empty, absent or a run's own, got {workdir}")
    classes = _read(workdir / CLASSES) | {p.spec.section: p.dataset.num_classes for p in parts}
    wait_for_all("before the configuration is written")
    write_json(path, wanted)
    write_json(workdir / CLASSES, classes)


def stored_classes(workdir: epath.PathLike, part: str) -> int | None:
    """The number of classes that a part was trained on; None for a run of an older version."""
    return _read(epath.Path(workdir) / CLASSES).get(PARTS[part].section)


def _require_same(present: dict[str, Any], wanted: dict[str, Any], workdir: epath.Path) -> None:
    present, wanted = flat(present), flat(wanted)
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


def _read(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
