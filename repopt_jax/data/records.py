"""Prepared data sets: encoded images with labels in sharded ArrayRecord files, and their facts.

A folder holds `<split>-<shard>-of-<shards>.array_record` and `dataset.json`, which says the names
of the classes, and of every split the images and SHA-256 of each shard. A record is the label (4
bytes), the length of the image's name (2 bytes), both little-endian, the name in UTF-8, and the
image file.
"""

import json
import pathlib
import struct
from typing import Any

from repopt_jax.data.sources import ArrayRecordSource, Dataset, readable

FACTS = "dataset.json"
PLAN = "unfinished.json"  # stands for it while the files are being written
FORMAT_VERSION = 1
_HEAD = struct.Struct("<iH")


class RecordSource(ArrayRecordSource):
    """One split of a prepared set."""

    def __init__(self, folder: pathlib.Path, split: str, shards: int):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        paths = [str(folder / shard_name(split, shard, shards)) for shard in range(shards)]
        with readable(folder):
            super().__init__(ArrayRecordDataSource(paths), folder)

    def item(self, record: bytes) -> dict[str, Any]:
        """The image of a record."""
        return unpack(record)


def load_records(folder: pathlib.Path, train_split: str | None, eval_split: str | None) -> Dataset:
    """Opens a prepared set; the arguments are those of `load_dataset`."""
    try:
        facts = json.loads((folder / FACTS).read_text())
        version = facts.get("format_version")
    except (ValueError, AttributeError):
        version = None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"data_dir must hold the format version {FORMAT_VERSION}, "
            f"got {version} in {str(folder / FACTS)!r}"
        )
    sources = []
    for argument, split in (("train_split", train_split), ("eval_split", eval_split)):
        split = split or ("train" if argument == "train_split" else "val")
        if split not in facts["splits"]:
            raise ValueError(
                f"{argument} must be one of {sorted(facts['splits'])} in {str(folder)!r}, "
                f"got {split!r}"
            )
        shards = facts["splits"][split]["shards"]
        sources.append(RecordSource(folder, split, len(shards)))
        expected = sum(shard["images"] for shard in shards)
        if len(sources[-1]) != expected:
            raise ValueError(
                f"{argument} {split!r} must hold {expected} images in {str(folder)!r}, "
                f"got {len(sources[-1])}"
            )
    shape, names = facts["image_shape"], tuple(facts["classes"])
    return Dataset(
        "folder", len(names), *sources, tuple(shape) if shape else None, class_names=names
    )


def shard_name(split: str, shard: int, shards: int) -> str:
    """The name of a file."""
    return f"{split}-{shard:05d}-of-{shards:05d}.array_record"


def pack(label: int, name: str, image: bytes) -> bytes:
    """The record of an image.

    >>> unpack(pack(7, "cat.jpg", b"..."))
    {'image': b'...', 'label': 7, 'name': 'cat.jpg'}
    """
    encoded = name.encode()
    return _HEAD.pack(label, len(encoded)) + encoded + image


def unpack(record: bytes) -> dict[str, Any]:
    """The image of a record."""
    label, length = _HEAD.unpack_from(record)
    end = _HEAD.size + length
    name = record[_HEAD.size : end].decode()
    return {"image": record[end:], "label": label, "name": name}
