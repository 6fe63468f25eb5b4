"""The working directory of a run: the configuration that it belongs to, and what it keeps."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from repopt_jax.file_lock import take_lock
from repopt_jax.training.checkpoint_directory import checkpoint_directory
from repopt_jax.training.config import PARTS, default_config, flat
from repopt_jax.training.devices import samples_per_group
from repopt_jax.training.processes import wait_for_all
from repopt_jax.training.report import write_json

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from repopt_jax.data import Dataset
    from repopt_jax.training.parts import Part

CONFIG, DATA, LOCK, SCALES = "config.json", "data.json", ".lock", "scales.safetensors"

UNFINISHED = ".config.unfinished.json"

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
    "workers",
    "on_device",
    "on_device_bytes",
    "augment_on",
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

    A run keeps the group sizes that it began with, whatever the number of devices and the parts
    now.

    Raises:
      ValueError: for devices that cannot hold that number, or a share too small for statistics.
    """
    config = config.copy_and_resolve_references()
    begun = _read(workdir / CONFIG)
    used = {PARTS[part].section for part in names}
    for name in dict.fromkeys(spec.section for spec in PARTS.values()):
        section, before = config[name], begun.get(name, {}).get("bn_group")
        if section.bn_group is not None:
            continue
        if name not in used:
            section.bn_group = before
            continue
        sizes = section.batch_size, section.accumulation
        try:
            group = section.bn_group = samples_per_group(*sizes, before, mesh)
        except ValueError as error:
            began = f", with which the run in {workdir} began; a device must hold whole groups"
            from_run = before and str(error).startswith("bn_group")
            raise ValueError(f"{name}: {error}{began if from_run else ''}") from None
        if before is None and group < SMALLEST_SHARE:
            raise ValueError(
                f"{name}.bn_group must be given where a device holds fewer than {SMALLEST_SHARE} "
                f"images at a time, got None for {group} (batch_size {section.batch_size}, "
                f"{mesh.size} devices): a larger batch_size or fewer devices give BatchNorm better "
                "statistics"
            )
    return config


@contextlib.contextmanager
def claimed(workdir: epath.Path, config: ConfigDict, parts: Sequence[Part]) -> Iterator[None]:
    """Own the directory of a run: no other process may train in it meanwhile.

    Writes down the configuration, and what the images of `parts` are. The system ends the lock with
    the process, however that ends. ``gs://``, Windows and some network file systems have none.

    Raises:
      ValueError: the directory is no run's, that of a run with another configuration or other
        images, or in use.
    """
    checkpoint_directory(workdir)  # refuses some, before anything is written
    images = {part.spec.section: _images(part.dataset) for part in parts}
    wanted = json.loads(config.to_json_best_effort())
    if (workdir / CONFIG).exists():
        _require_same(_read(workdir / CONFIG), wanted, workdir)
        _require_same_images(_read(workdir / DATA), images, workdir)
    elif workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir must be a directory, got the file {workdir}")
    # A kill while the configuration was being written leaves its unfinished file alone.
    elif workdir.exists() and {p.name for p in workdir.iterdir()} - {UNFINISHED, LOCK}:
        raise ValueError(f"workdir must be empty, absent or a run's own, got {workdir}")
    wait_for_all("before the configuration is written")
    with _locked(workdir):
        write_json(workdir / CONFIG, wanted)
        write_json(workdir / DATA, _read(workdir / DATA) | images)
        yield


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
    if "://" in str(workdir) or jax.process_index() != 0:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / LOCK, "w") as file:
        if not take_lock(file):
            raise ValueError(
                f"workdir must not be in use, got {workdir}, in which another process trains"
            )
        yield


def _images(dataset: Dataset) -> dict[str, Any]:
    names = dataset.class_names
    return {
        "num_classes": dataset.num_classes,
        "class_names": None if names is None else list(names),
        "training_images": len(dataset.train),
        "evaluation_images": len(dataset.eval),
    }


def stored_classes(workdir: epath.PathLike, part: str) -> int | None:
    """The number of classes that a part was trained on; None for a run of an older version."""
    return _read(epath.Path(workdir) / DATA).get(PARTS[part].section, {}).get("num_classes")


def _require_same_images(present: dict, wanted: dict, workdir: epath.Path) -> None:
    """Refuse other images: the steps of an epoch or the meaning of the labels would change."""
    present = flat(present)
    for field, value in flat(wanted).items():
        before, (section, key) = present.get(field), field.split(".")
        if None not in (before, value) and before != value:  # None: not known
            changed = f"{before!r} there, {value!r} here"
            if isinstance(value, list):
                changed = f"{sorted(set(before) ^ set(value))[:3] or 'the order'} differ"
            raise ValueError(
                f"{section}.data must be the images that the run in {workdir} began with: "
                f"{key} ({changed})"
            )


def _require_same(present: dict[str, Any], wanted: dict[str, Any], workdir: epath.Path) -> None:
    # Fields that came after the run began had the effect of their defaults.
    defaults = json.loads(default_config().to_json_best_effort())
    present, wanted = flat(defaults) | flat(present), flat(wanted)
    tuned = any((workdir / name).exists() for name, spec in PARTS.items() if spec.tunes)
    different = [
        f"{key} ({present.get(key)!r} there, {wanted.get(key)!r} here)"
        for key in sorted(present.keys() | wanted.keys())
        if present.get(key) != wanted.get(key) and key.split(".")[-1] not in FREE_FIELDS
        if not (key.endswith("bn_group") and present.get(key) is None)  # not in use so far
        if not (key.startswith("qat.") and not tuned)
    ]
    if different:
        raise ValueError(
            f"workdir {workdir} holds a run with another configuration; use another workdir "
            f"or the same settings: {', '.join(different)}"
        )


def _read(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
