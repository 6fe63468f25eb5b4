"""Folders of image files, one folder per class."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from repopt_jax.data.sources import Dataset

_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


class FolderSource:
    """Image files in one folder per class.

    Args:
      folder: holds the class folders; files without the ending of an image are ignored.
      class_names: the class folders' names in the order of their labels.

    Attributes:
      labels: int32 (n,).
    """

    def __init__(self, folder: pathlib.Path, class_names: Sequence[str]):
        self._folder = folder
        self._class_names = class_names
        # A million paths: names and labels apart take a third of the memory of whole paths.
        self._files: list[str] = []
        counts = []
        for class_name in class_names:
            names = []
            if (folder / class_name).is_dir():
                names = sorted(os.listdir(folder / class_name))
            names = [n for n in names if os.path.splitext(n)[1].lower() in _EXTENSIONS]
            self._files += names
            counts.append(len(names))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = int(self.labels[index])
        path = self._folder / self._class_names[label] / self._files[index]
        return {"image": path.read_bytes(), "label": label, "name": str(path)}


def load_folder(data_dir: str | None, train_split: str | None, eval_split: str | None) -> Dataset:
    """Opens `data_dir/<split>/<class>/*`; the arguments are those of `load_dataset`."""
    if data_dir is None:
        raise ValueError("data_dir must be the folder that holds train/ and val/, got None")
    root = pathlib.Path(data_dir)
    if eval_split is None:
        found = [split for split in ("val", "validation", "test") if (root / split).is_dir()]
        eval_split = found[0] if found else "val"
    train, evaluation = root / (train_split or "train"), root / eval_split
    class_names = _class_names("train_split", train)
    unknown = sorted(set(_class_names("eval_split", evaluation)) - set(class_names))
    if unknown:
        raise ValueError(
            "eval_split must hold no class that train_split lacks, "
            f"got {unknown[:3]} in {str(evaluation)!r}"
        )
    sources = {}
    for argument, folder in (("train_split", train), ("eval_split", evaluation)):
        sources[argument] = FolderSource(folder, class_names)
        if len(sources[argument]) == 0:
            raise ValueError(
                f"{argument} must hold images in one folder per class, got none in {str(folder)!r}"
            )
    empty = sorted(set(range(len(class_names))) - set(sources["train_split"].labels.tolist()))
    if empty:  # else a stray folder would shift the labels of all classes after it
        raise ValueError(
            "train_split must hold images of every class, "
            f"got none in {str(train / class_names[empty[0]])!r}"
        )
    return Dataset("folder", len(class_names), *sources.values())


def _class_names(argument: str, folder: pathlib.Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{argument} must name a folder in data_dir={str(folder.parent)!r}, got {folder.name!r}"
        )
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return sorted(name for name in names if not name.startswith("."))
