"""Writes a data set to sharded ArrayRecord files: python -m repopt_jax.data.prepare SOURCE OUTPUT.

SOURCE is a folder of images in a layout that `load_dataset("folder")` reads, or one that holds
ImageNet's official tar files. `load_dataset("folder", data_dir=OUTPUT)` opens the result.

Every image is decoded once; those that cannot be are left out and listed in `dataset.json`. The
same command goes on where it stopped. At the end all files are read and their digests compared.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import io
import json
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from repopt_jax.atomic_write import atomic_write
from repopt_jax.data.decode import decode
from repopt_jax.data.folder import open_folder
from repopt_jax.data.records import FACTS, FORMAT_VERSION, PLAN, pack, shard_name, unpack
from repopt_jax.data.sources import printable
from repopt_jax.data.tar_files import TRAIN, open_tar_files
from repopt_jax.data.workers import held_back, usable_cores
from repopt_jax.file_lock import take_lock

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
      ValueError: an argument is wrong, `output` is in use or holds something else, no image of a
        split can be decoded, or the check at the end fails.
      OSError: the source is not there, or files cannot be read or written.
    """
    source, output = pathlib.Path(source), pathlib.Path(output)
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side must be None or at least 1, got {max_side}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be None or at least 0, got {workers}")
    if printable(str(output)) != str(output):  # ArrayRecord takes no other
        raise ValueError(f"output must be a name in UTF-8, got '{printable(str(output))}'")
    if not source.is_dir():
        raise FileNotFoundError(f"source must be an existing folder, got {str(source)!r}")
    if (source / TRAIN).is_file():
        class_names, splits = open_tar_files(source)
    else:
        try:
            class_names, splits = open_folder(str(source), None, None)
        except (OSError, ValueError) as error:
            wanted = "source must hold ImageNet's tar files, or images in train/ and val/"
            raise ValueError(f"{wanted}, got {str(source)!r}: {error}") from None
    plan = {
        "format_version": FORMAT_VERSION,
        "source": str(source.resolve()),
        "max_side": max_side,
        "classes": class_names,
        "images": {split: len(images) for split, images in splits.items()},
    }
    _refuse_among_images(source, output)
    jobs = []
    for split, images in splits.items():
        shards = -(-len(images) // _SHARD_IMAGES)
        for shard in range(shards):
            indices = range(shard * _SHARD_IMAGES, min((shard + 1) * _SHARD_IMAGES, len(images)))
            jobs.append((split, indices, output / shard_name(split, shard, shards)))
    with _claimed(output, plan), _mapping(workers, (splits, max_side, f"{source}{os.sep}")) as run:
        facts = _facts(plan, _written(run, jobs, plan))
        paths = [path for _, _, path in jobs]
        for path, same in zip(paths, run(_is_undamaged, paths), strict=True):
            if not same:
                path.unlink()
                raise ValueError(f"{path} is not what was written; the same command rewrites it")
        with atomic_write(output / FACTS) as unfinished:
            unfinished.write_text(json.dumps(facts, indent=1))
        for path in (output / PLAN, *map(_facts_file, paths)):
            path.unlink(missing_ok=True)
    return facts


def _written(run: Callable, jobs: list[tuple], plan: dict[str, Any]) -> dict[str, list[dict]]:
    """Write all files; what the files of every split hold."""
    from tqdm import tqdm

    found: dict[str, list[dict]] = {split: [] for split in plan["images"]}
    with tqdm(total=sum(plan["images"].values()), unit=" images", disable=None) as bar:
        for (split, indices, _), facts in zip(jobs, run(_write_shard, jobs), strict=True):
            found[split].append(facts)
            bar.update(len(indices))
    return found


def _refuse_among_images(source: pathlib.Path, output: pathlib.Path) -> None:
    """Else the output would be taken for a class of the source."""
    for split in ("train", "val", "validation", "test"):
        if output.resolve().is_relative_to((source / split).resolve()):
            raise ValueError(f"output must not lie among the images of source, got {str(output)!r}")


@contextlib.contextmanager
def _claimed(output: pathlib.Path, plan: dict[str, Any]) -> Iterator[None]:
    """Own the output; refuse one that something else has written to, or writes to now."""
    output.mkdir(parents=True, exist_ok=True)
    folder = os.open(output, os.O_RDONLY)
    try:
        if not take_lock(folder):
            raise ValueError(
                f"output must not be in use, got {str(output)!r}, which another process writes to"
            )
        if not _is_begun(output, plan):
            (output / PLAN).write_text(json.dumps(plan))
        yield
    finally:
        os.close(folder)


def _is_begun(output: pathlib.Path, plan: dict[str, Any]) -> bool:
    """Whether the same command has begun; refuse what something else has written."""
    names, begun = {path.name for path in output.iterdir()}, None
    if PLAN in names:
        with contextlib.suppress(ValueError):  # its writing was interrupted
            begun = json.loads((output / PLAN).read_text())
    if begun != plan and (begun is not None or names - {PLAN}):
        raise ValueError(
            f"output must be new or left unfinished by the same command, got {str(output)!r}"
        )
    return begun == plan


@contextlib.contextmanager
def _mapping(workers: int | None, task: tuple) -> Iterator[Callable]:
    """A `map` of functions that need `task`, by processes that end with the block."""
    if workers == 0:
        _set_task(task)
        yield map
        return
    context = multiprocessing.get_context("spawn")
    end, ours = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers or usable_cores(), context, initializer=_start_process, initargs=(task, end)
    )

    def run(function, jobs):
        try:
            with held_back([signal.SIGINT]):  # processes start here; Ctrl-C is for their parent
                return pool.map(function, jobs)
        except OSError as error:  # one has ended while others were starting
            raise concurrent.futures.BrokenExecutor(str(error)) from error

    try:
        yield run
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)


def _start_process(task: tuple, end: Connection) -> None:
    _set_task(task)

    def wait_for_end():
        multiprocessing.connection.wait([end])  # the system closes it with the parent
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _set_task(task: tuple) -> None:
    """Keep the sources in a process, instead of sending a million names with every job."""
    global _task
    _task = task


def _write_shard(job: tuple[str, range, pathlib.Path]) -> dict[str, Any]:
    """Write one file and, after it, what it holds, unless that is done."""
    split, indices, path = job
    splits, max_side, root = _task
    facts_file = _facts_file(path)
    if path.is_file() and facts_file.is_file():
        return json.loads(facts_file.read_text())
    facts = {"images": 0, "classes": {}, "bad_images": [], "shapes": []}
    digest, shapes = hashlib.sha256(), set()
    with _writer(path) as writer:
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
    facts["shapes"] = sorted(shapes)[:2]  # more than one is all that counts
    facts["sha256"] = digest.hexdigest()
    with atomic_write(facts_file) as unfinished:
        unfinished.write_text(json.dumps(facts))
    return facts


@contextlib.contextmanager
def _writer(path: pathlib.Path) -> Iterator[Any]:
    """Writes records to a file that gets its name when all of them are there."""
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = path.with_suffix(".unfinished")
    try:
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")  # images are read one by one
        yield writer
        writer.close()
    except RuntimeError as error:  # ArrayRecord raises it for every failure
        raise OSError(f"{path} cannot be written: {error}") from error
    unfinished.replace(path)


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
    try:
        reader = ArrayRecordReader(str(path))
        for i in range(reader.num_records()):
            (record,) = reader.read([i])
            digest.update(record)
            label = str(unpack(record)["label"])
            classes[label] = classes.get(label, 0) + 1
        reader.close()
    except RuntimeError:
        return False
    return (digest.hexdigest(), classes) == (facts["sha256"], facts["classes"])


def _facts_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")


def _facts(plan: dict[str, Any], found: dict[str, list[dict]]) -> dict[str, Any]:
    """What `dataset.json` says."""
    splits = {}
    for split, shards in found.items():
        counts = [0] * len(plan["classes"])
        for label, count in (pair for shard in shards for pair in shard["classes"].items()):
            counts[int(label)] += count
        if not any(counts):
            raise ValueError(f"source must hold images that can be decoded, got none in {split!r}")
        splits[split] = {
            "shards": [{key: shard[key] for key in ("images", "sha256")} for shard in shards],
            "images_by_class": counts,
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
