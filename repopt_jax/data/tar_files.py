"""ImageNet's official tar files, read in place."""

import io
import os
import pathlib
import tarfile
from typing import Any

import numpy as np

TRAIN = "ILSVRC2012_img_train.tar"
VALIDATION = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


class TarSource:
    """Images at places in a tar file.

    Attributes:
      labels: int32 (n,).
    """

    def __init__(self, path: pathlib.Path, members: list[tuple[str, int, int]], labels: list[int]):
        self._path = str(path)
        self._members = members  # name, offset and size
        self.labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, offset, size = self._members[index]
        with open(self._path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        return {"image": data, "label": int(self.labels[index]), "name": name}


def open_tar_files(folder: pathlib.Path) -> tuple[list[str], dict[str, TarSource]]:
    """The names of the classes, sorted as everywhere, and the splits `train` and `val`.

    Raises:
      FileNotFoundError: one of the three files is not there.
      ValueError: a file does not hold what it should.
    """
    for name in (TRAIN, VALIDATION, DEVKIT):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"source must hold {name}, got {str(folder)!r} without it")
    members, labels, class_names = [], [], []
    with open(folder / TRAIN, "rb") as file, tarfile.open(fileobj=file) as outer:
        classes = sorted((m for m in outer if m.name.endswith(".tar")), key=lambda m: m.name)
        for label, entry in enumerate(classes):
            class_names.append(entry.name.removesuffix(".tar"))
            part = _Part(file, entry.offset_data, entry.size)
            with tarfile.open(fileobj=part) as inner:
                found = [(m.name, entry.offset_data + m.offset_data, m.size) for m in inner]
            members += sorted(found)
            labels += [label] * len(found)
    train = TarSource(folder / TRAIN, members, labels)
    with tarfile.open(folder / VALIDATION) as tar:
        members = sorted((m.name, m.offset_data, m.size) for m in tar if m.isfile())
    wnids = _validation_classes(folder / DEVKIT)
    unknown = sorted(set(wnids) - set(class_names))
    if len(wnids) != len(members) or unknown:
        raise ValueError(
            f"source must hold the {len(wnids)} validation images of {DEVKIT}, of the classes of "
            f"{TRAIN}, got {len(members)} and the unknown classes {unknown[:3]}"
        )
    numbers = {name: label for label, name in enumerate(class_names)}
    val = TarSource(folder / VALIDATION, members, [numbers[wnid] for wnid in wnids])
    return class_names, {"train": train, "val": val}


def _validation_classes(devkit: pathlib.Path) -> list[str]:
    """The class of every validation image by its synset, in the order of the images' names."""
    from scipy.io import loadmat

    with tarfile.open(devkit) as tar:
        files = {os.path.basename(m.name): m for m in tar if m.isfile()}
        truth = tar.extractfile(files["ILSVRC2012_validation_ground_truth.txt"]).read()
        meta = loadmat(io.BytesIO(tar.extractfile(files["meta.mat"]).read()), squeeze_me=True)
    synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in meta["synsets"]}
    return [synsets[int(number)] for number in truth.split()]


class _Part(io.RawIOBase):
    """A part of a file as a file, for the tar files inside a tar file."""

    def __init__(self, file, start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data
