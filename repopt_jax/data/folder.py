"""Folders of image files, one folder per class, in torchvision's or Tiny-ImageNet's layout."""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from repopt_jax.data.records import FACTS, PLAN, load_records
from repopt_jax.data.sources import Dataset, printable

_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


class FolderSource:
    """Image files with labels.

    Args:
      files: path, relative to the folder, and label of every image.

    Attributes:
      labels: int32 (n,).
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[tuple[str, int]]):
        self._folder = os.fsencode(folder)
        # One string of bytes for a million paths, because every worker process has its own.
        names = [os.fsencode(file) for file, _ in files]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names])
        self.labels = np.array([label for _, label in files], np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self._ends[index - 1] if index else 0
        path = os.path.join(self._folder, self._names[start : self._ends[index]])
        with open(path, "rb") as file:
            data = file.read()
        return {"image": data, "label": int(self.labels[index]), "name": printable(path)}


def load_folder(data_dir: str | None, train_split: str | None, eval_split: str | None) -> Dataset:
    """Opens a prepared set or the image files of two splits; for the arguments see `load_dataset`.

    A split's images lie in `data_dir/<split>/<class>/`, at any depth, or in
    `data_dir/<split>/images/` with their classes in `data_dir/<split>/<split>_annotations.txt`.
    Files and folders whose names begin with a dot are ignored.
    """
    if data_dir is None:
        raise ValueError("data_dir must be the folder that holds train/ and val/, got None")
    if (pathlib.Path(data_dir) / FACTS).is_file():
        return load_records(pathlib.Path(data_dir), train_split, eval_split)
    if (pathlib.Path(data_dir) / PLAN).is_file():
        raise FileNotFoundError(
            f"data_dir must hold a set whose preparation is finished, got {data_dir!r}: "
            "the same command `python -m repopt_jax.data.prepare` goes on"
        )
    class_names, sources = open_folder(data_dir, train_split, eval_split)
    return Dataset("folder", len(class_names), *sources.values(), class_names=tuple(class_names))


def open_folder(
    data_dir: str, train_split: str | None, eval_split: str | None
) -> tuple[list[str], dict[str, FolderSource]]:
    """The names of the classes, and the sources `train` and `val`, of image files."""
    root = pathlib.Path(data_dir)
    if eval_split is None:
        found = [split for split in ("val", "validation", "test") if (root / split).is_dir()]
        eval_split = found[0] if found else "val"
    splits = {"train_split": root / (train_split or "train"), "eval_split": root / eval_split}
    classes = {argument: _classes(argument, folder) for argument, folder in splits.items()}
    class_names = sorted(classes["train_split"])
    unknown = sorted(classes["eval_split"].keys() - classes["train_split"].keys())
    if unknown:
        raise ValueError(
            "eval_split must hold no class that train_split lacks, "
            f"got {unknown[:3]} in {str(splits['eval_split'])!r}"
        )
    sources = []
    for argument, folder in splits.items():
        files = [
            (file, label)
            for label, name in enumerate(class_names)
            for file in classes[argument].get(name, ())
        ]
        if not files:
            raise ValueError(
                f"{argument} must hold images in one folder per class, got none in {str(folder)!r}"
            )
        sources.append(FolderSource(folder, files))
    empty = [name for name in class_names if not classes["train_split"][name]]
    if empty:  # else a stray folder would shift the labels of all classes after it
        raise ValueError(
            "train_split must hold images of every class, "
            f"got none in {str(splits['train_split'] / empty[0])!r}"
        )
    return class_names, dict(zip(("train", "val"), sources, strict=True))


def _classes(argument: str, folder: pathlib.Path) -> dict[str, list[str]]:
    """The image files of every class, relative to the split's folder."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{argument} must name a folder in data_dir={str(folder.parent)!r}, got {folder.name!r}"
        )
    annotations = folder / f"{folder.name}_annotations.txt"
    if annotations.is_file():
        return _annotated(argument, annotations)
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return {name: list(_image_files(argument, folder, name)) for name in names if name[0] != "."}


def _annotated(argument: str, annotations: pathlib.Path) -> dict[str, list[str]]:
    """Labels from a file whose lines begin with an image's name, a tab and its class."""
    lines = [line.split("\t") for line in annotations.read_text().splitlines()]
    present = set(_image_files(argument, annotations.parent, "images"))
    listed = {f"images{os.sep}{line[0]}" for line in lines}
    different = sorted(present ^ listed)
    if different:
        raise ValueError(
            f"{argument} must hold the images that {str(annotations)!r} lists, "
            f"got {different[0]!r} in only one of the two"
        )
    classes: dict[str, list[str]] = {}
    for file, name in sorted((line[0], line[1]) for line in lines):
        classes.setdefault(name, []).append(f"images{os.sep}{file}")
    return classes


def _image_files(argument: str, root: pathlib.Path, folder: str) -> Iterator[str]:
    """The images in a folder and, after them, those in its sub-folders, relative to `root`."""
    with os.scandir(root / folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    folders = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = os.path.join(folder, entry.name)
        if entry.is_dir():
            folders.append(path)
        elif os.path.splitext(entry.name)[1].lower() in _EXTENSIONS:
            if not entry.is_file():
                raise ValueError(
                    f"{argument} must hold files that can be read, got {printable(entry.path)!r}, "
                    "which is a link to nothing or no file"
                )
            yield path
    for path in folders:
        yield from _image_files(argument, root, path)
