"""Writes a data set to sharded ArrayRecord files: python -m repopt_jax.data.prepare SOURCE OUTPUT.

SOURCE is a folder of images in a layout that `load_dataset("folder")` reads, or one that holds
ImageNet's official tar files. `load_dataset("folder", data_dir=OUTPUT)` opens the result.

Every image is decoded once; those that cannot be are left out and listed in `dataset.json`. The
same command goes on where it stopped. At the end all files are read and their digests compared.
"""

import argparse
import concurrent.futures
import hashlib
import io
import json
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from repopt_jax.data.decode import decode
from repopt_jax.data.folder import open_folder
from repopt_jax.data.records import FACTS, FORMAT_VERSION, pack, shard_name, unpack
from repopt_jax.data.tar_files import TRAIN, open_tar_files
from repopt_jax.data.workers import usable_cores

_PLAN = "unfinished.json"
_SHARD_IMAGES = 10_000  # ImageNet in 129 files, of about a gigabyte each
_QUALITY = 95


def prepare(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    max_side: int | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Writes a data set to ArrayRecord files.

    Args:
      source: a folder of images, or of ImageNet's official tar files.
      output: the folder to write, new or left by the same call before.
      max_side: longest side in pixels; a larger image is stored as a smaller JPEG file of quality
        95. None stores every file as it is.
      workers: processes; None is one per core, 0 does all in this one.

    Returns:
      What `dataset.json` says.

    Raises:
      ValueError: an argument is wrong, `output` holds something else, or the check at the end
        fails.
      FileNotFoundError: the source is not there.
    """
    from tqdm import tqdm

    source, output = pathlib.Path(source), pathlib.Path(output)
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side must be None or at least 1, got {max_side}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be None or at least 0, got {workers}")
    if not source.is_dir():
        raise FileNotFoundError(f"source must be an existing folder, got {str(source)!r}")
    if (source / TRAIN).is_file():
        class_names, splits = open_tar_files(source)
    else:
        class_names, splits = open_folder(str(source), None, None)
    plan = {
        "format_version": FORMAT_VERSION,
        "max_side": max_side,
        "classes": class_names,
        "images": {split: len(images) for split, images in splits.items()},
    }
    _claim(output, plan)
    jobs = []
    for split, images in splits.items():
        shards = -(-len(images) // _SHARD_IMAGES)
        for shard in range(shards):
            indices = range(shard * _SHARD_IMAGES, min((shard + 1) * _SHARD_IMAGES, len(images)))
            jobs.append((split, indices, output / shard_name(split, shard, shards)))
    found: dict[str, list[dict]] = {split: [] for split in splits}
    pool = _pool(workers, (splits, max_side, f"{source}{os.sep}"))
    try:
        total = sum(plan["images"].values())
        with tqdm(total=total, unit=" images", disable=None) as bar:
            for (split, indices, _), facts in zip(jobs, pool.map(_write_shard, jobs), strict=True):
                found[split].append(facts)
                bar.update(len(indices))
        paths = [job[2] for job in jobs]
        for path, same in zip(paths, pool.map(_is_undamaged, paths), strict=True):
            if not same:
                path.unlink()
                raise ValueError(f"{path} is not what was written; the same command rewrites it")
    finally:
        pool.shutdown(cancel_futures=True)
    facts = _facts(plan, found)
    (output / _PLAN).write_text(json.dumps(facts, indent=1))
    (output / _PLAN).replace(output / FACTS)
    for path in paths:
        _facts_file(path).unlink(missing_ok=True)
    return facts


def _claim(output: pathlib.Path, plan: dict[str, Any]) -> None:
    """Create the output, or refuse one that something else has been written to."""
    if output.is_dir() and any(output.iterdir()):
        path = output / _PLAN
        if not path.is_file() or json.loads(path.read_text()) != plan:
            raise ValueError(
                f"output must be new or left unfinished by the same command, got {str(output)!r}"
            )
    output.mkdir(parents=True, exist_ok=True)
    (output / _PLAN).write_text(json.dumps(plan))


def _pool(workers: int | None, task: tuple) -> concurrent.futures.Executor:
    if workers == 0:
        return concurrent.futures.ThreadPoolExecutor(1, initializer=_set_task, initargs=(task,))
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(
        workers or usable_cores(), mp_context=context, initializer=_start_process, initargs=(task,)
    )


def _start_process(task: tuple) -> None:
    _set_task(task)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback

    def end_with_parent():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _set_task(task: tuple) -> None:
    """Keep the sources in a process, instead of sending a million names with every job."""
    global _task
    _task = task


def _write_shard(job: tuple[str, range, pathlib.Path]) -> dict[str, Any]:
    """Write one file and, after it, what it holds, unless that is done."""
    from array_record.python.array_record_module import ArrayRecordWriter

    split, indices, path = job
    splits, max_side, root = _task
    facts_file = _facts_file(path)
    if path.is_file() and facts_file.is_file():
        return json.loads(facts_file.read_text())
    facts = {"images": 0, "classes": {}, "bad_images": [], "shapes": []}
    digest, shapes = hashlib.sha256(), set()
    unfinished = path.with_suffix(".unfinished")
    writer = ArrayRecordWriter(str(unfinished), "group_size:1")  # images are read one by one
    for index in indices:
        item = splits[split][index]
        name = item["name"].removeprefix(root)
        try:
            data, shape = _stored(item["image"], max_side)
        except ValueError:
            facts["bad_images"].append(name)
            continue
        record = pack(item["label"], name, data)
        writer.write(record)
        digest.update(record)
        shapes.add(shape)
        facts["images"] += 1
        label = str(item["label"])
        facts["classes"][label] = facts["classes"].get(label, 0) + 1
    writer.close()
    facts["shapes"] = sorted(shapes)[:2]  # more than one is all that counts
    facts["sha256"] = digest.hexdigest()
    unfinished.replace(path)
    facts_file.write_text(json.dumps(facts))
    return facts


def _stored(data: bytes, max_side: int | None) -> tuple[bytes, tuple[int, ...]]:
    """The file to store and the shape of its image."""
    from PIL import Image

    image = decode(data)
    longest = max(image.shape[:2])
    if max_side is None or longest <= max_side:
        return data, image.shape
    height, width = (max(1, round(side * max_side / longest)) for side in image.shape[:2])
    smaller = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue(), (height, width, 3)


def _is_undamaged(path: pathlib.Path) -> bool:
    """Whether a file holds the records that were written to it, by their digest and classes."""
    from array_record.python.array_record_module import ArrayRecordReader

    facts = json.loads(_facts_file(path).read_text())
    digest, classes = hashlib.sha256(), {}
    if facts["images"]:
        reader = ArrayRecordReader(str(path))
        try:
            records = (reader.read([i])[0] for i in range(reader.num_records()))
            for record in records:
                digest.update(record)
                label = str(unpack(record)["label"])
                classes[label] = classes.get(label, 0) + 1
        except RuntimeError:
            return False
        finally:
            reader.close()
    return (digest.hexdigest(), classes) == (facts["sha256"], facts["classes"])


def _facts_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")


def _facts(plan: dict[str, Any], found: dict[str, list[dict]]) -> dict[str, Any]:
    """What `dataset.json` says."""
    splits = {}
    for split, shards in found.items():
        counts = np.zeros(len(plan["classes"]), int)
        for shard in shards:
            counts[[int(label) for label in shard["classes"]]] += list(shard["classes"].values())
        splits[split] = {
            "shards": [{key: shard[key] for key in ("images", "sha256")} for shard in shards],
            "images_by_class": counts.tolist(),
            "bad_images": [name for shard in shards for name in shard["bad_images"]],
        }
    shapes = {tuple(s) for shards in found.values() for shard in shards for s in shard["shapes"]}
    return {
        "format_version": FORMAT_VERSION,
        "max_side": plan["max_side"],
        "image_shape": shapes.pop() if len(shapes) == 1 else None,
        "classes": plan["classes"],
        "splits": splits,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m repopt_jax.data.prepare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", help="folder of images, or of ImageNet's official tar files")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--max_side", type=int, help="store larger images as JPEG of this size")
    parser.add_argument("--workers", type=int, help="processes, default one per core")
    arguments = parser.parse_args(argv)
    try:
        facts = prepare(**vars(arguments))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except concurrent.futures.BrokenExecutor:
        advice = "if memory did not suffice, fewer --workers need less; the same command goes on"
        print(f"{parser.prog}: a worker process has ended: {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    for split, described in facts["splits"].items():
        images = sum(shard["images"] for shard in described["shards"])
        print(f"{split}: {images} images of {len(facts['classes'])} classes")
        for name in described["bad_images"]:
            print(f"  left out, cannot be decoded: {name}")
    print(f'written to {arguments.output}; data.name "folder" with this data.data_dir reads it')
    return 0


if __name__ == "__main__":
    sys.exit(main())
