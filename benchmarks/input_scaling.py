"""How the rate of training batches grows with threads and with worker processes.

Run by `input_pipeline.py --scaling`. A turn makes an iterator of its own, drops what it had time to
make in advance, and counts for some seconds. Every second round goes from the last variant to the
first. The rate is that of the best round, because other work on the machine only takes away; the
ratio to one thread is the median of the rounds' ratios.

Threads cannot share the time in which Python's interpreter lock is held. That time is the CPU time
of an image outside of OpenCV's and simplejpeg's functions, which release the lock; what passing the
lock on costs comes on top.
"""

import contextlib
import functools
import inspect
import statistics
import time

import cv2
import simplejpeg
from environment import environment
from input_variants import BATCH, PACKAGES, bare, our_batches

from repopt_jax.data.workers import usable_cores

# Name of a row: what the host does to an image.
AUGMENTATIONS = {
    "weak": {"augment": "weak"},
    "raug15": {"augment": "raug15"},
    "raug15, operations on the device": {"augment": "raug15", "augment_on": "device"},
}


def measure_scaling(images, rounds, seconds):
    """Print the table; the content of the JSON file."""
    cores = usable_cores()
    counts = sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    rows = scale_out(images, counts, rounds, seconds)
    print_rows(rows)
    locks = [{"augment": augment} | lock_held(images, augment) for augment in ("weak", "raug15")]
    for row in locks:
        print(
            f"{row['augment']}: {row['cpu_ms']:.2f} ms of CPU time an image, in "
            f"{row['lock_ms']:.2f} ms of it ({row['lock_share']:.0%}) the lock is held"
        )
    return {
        "what": __doc__.splitlines()[0],
        "images": len(images),
        "rounds": rounds,
        "seconds": seconds,
        "environment": environment(*PACKAGES),
        "rows": rows,
        "locks": locks,
    }


def scale_out(images, counts, rounds, seconds, augmentations=AUGMENTATIONS):
    """Rates of as many threads and processes as `counts` says, in turn in every round."""
    variants = {
        (name, kind, count): options | {"workers": 0} | {kind: count}
        for name, options in augmentations.items()
        for count in counts
        for kind in ("threads", "workers")
    }
    rates = {variant: [] for variant in variants}
    for number in range(rounds):
        for variant in list(variants)[:: -1 if number % 2 else 1]:
            options = variants[variant]
            batches = our_batches(images, fast=True, seed=number, **options)
            rates[variant].append(steady_rate(batches, 3 * variant[2], seconds))
    rows = []
    for (name, kind, count), found in rates.items():
        pairs = zip(found, rates[name, "threads", counts[0]], strict=True)
        times = statistics.median(rate / one for rate, one in pairs)
        row = {"augment": name, "kind": kind, "count": count}
        row |= {"images_per_second": round(max(found), 1)}
        rows.append(row | {"times_one_thread": round(times, 3)})
    return rows


def steady_rate(batches, ahead, seconds):
    """Images per second after the first batches, of which some were made in advance."""
    for _ in range(ahead):
        next(batches)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    return count * BATCH / passed


def print_rows(rows):
    """A line for each row of `scale_out`."""
    print(f"{'augment':34}{'kind':9}{'count':>6}{'per s':>8}{'x one thread':>14}")
    for row in rows:
        rate, times = row["images_per_second"], row["times_one_thread"]
        print(f"{row['augment']:34}{row['kind']:9}{row['count']:6}{rate:8.0f}{times:14.2f}")


def lock_held(images, augment):
    """CPU time of an image, and how much of it the interpreter lock is held."""
    run = bare(images, augment, fast=True)
    run(0)
    with _timed_libraries() as outside:
        start = time.thread_time()
        run(1)
        total = time.thread_time() - start
    held = total - sum(outside)
    scale = 1e3 / len(images)
    return {
        "cpu_ms": round(scale * total, 3),
        "lock_ms": round(scale * held, 3),
        "lock_share": round(held / total, 3),
    }


@contextlib.contextmanager
def _timed_libraries():
    """Collects the CPU seconds of every call of a function that releases the lock."""
    seconds, before = [], {}
    for library in (cv2, simplejpeg):
        for name, function in inspect.getmembers(library, inspect.isroutine):
            if not name.startswith("_"):
                before[library, name] = function
                setattr(library, name, _timed(function, seconds))
    try:
        yield seconds
    finally:
        for (library, name), function in before.items():
            setattr(library, name, function)


def _timed(function, seconds):
    @functools.wraps(function)
    def call(*args, **kwargs):
        start = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.thread_time() - start)

    return call
