"""Worker processes that make batches.

Decoding and augmenting hold Python's interpreter lock for so much of their time that on 16 cores 16
threads made 1,186 images/s and 16 processes 4,613. The processes are not Grain's: each of those
imports JAX and Orbax, 1.6 s and 190 MB before the first image, and the form of a position depends
on their number. Here Grain's threads stay as they are, and each hands its batch to a process and
waits. So order, position and bits of the batches do not depend on who makes them.
"""

import contextlib
import logging
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from repopt_jax.data.batches import note_bad_image

# What a process runs; it finds the package where its parent does.
_CODE = "import sys; sys.path[:] = {path!r}; from {module} import serve; serve({fds})"
# These reach all processes of a terminal or of a Slurm step. The parent decides what they mean.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]


def usable_cores() -> int:
    """The cores that this process may use, which Slurm and containers limit."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return own or 1


@contextlib.contextmanager
def held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Processes that are started meanwhile never get these signals, not even as they begin."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerPool:
    """Makes batches in processes, one batch per process at a time.

    A process starts when it is first needed, and ends when the pool is no longer referenced or its
    parent has ended, however that was.

    Args:
      make: a `TrainBatch` or `EvalBatch`; every process gets a copy.
      count: number of processes.
      image_bytes: size of the images of one batch.

    Raises:
      OSError: from a call, a process has ended, or whatever `make` raises.
    """

    def __init__(self, make: Callable[..., dict[str, np.ndarray]], count: int, image_bytes: int):
        self._make = make
        self._workers = [_Worker(image_bytes) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        weakref.finalize(self, _stop, self._workers)

    def __call__(self, *arguments: Any) -> dict[str, np.ndarray]:
        """The batch that `make(*arguments)` makes."""
        worker = self._idle.get()
        try:
            batch, bad_images = worker.run(self._make, arguments)
        finally:
            self._idle.put(worker)
        for name in bad_images:
            note_bad_image(self._make.dataset.bad_images, name)
        return batch


class _Worker:
    """One process, and the memory in which it hands over its images."""

    def __init__(self, image_bytes: int):
        self._image_bytes = image_bytes
        self.process: subprocess.Popen | None = None

    def run(self, make: Callable, arguments: tuple) -> tuple[dict[str, np.ndarray], list[str]]:
        messages = [pickle.dumps(arguments)]
        if self.process is None:
            messages.insert(0, self._start(make))
        try:
            for message in messages:
                # The error of `send` would hold a view of a BytesIO, which could not be collected.
                self._connection.send_bytes(message)
            error, batch, bad_images = self._connection.recv()
        except (EOFError, OSError):
            raise OSError(
                f"a worker process that made batches has ended with status {self.process.wait()}; "
                "-9 may mean that memory did not suffice, and fewer workers need less"
            ) from None
        if error is not None:
            raise error
        shape = batch["image"]
        flat = np.frombuffer(self._memory, np.uint8, int(np.prod(shape)))
        return batch | {"image": flat.reshape(shape).copy()}, bad_images

    def _start(self, make: Callable) -> bytes:
        """Start the process; the message that it expects first."""
        try:
            pickled = pickle.dumps(make)
        except Exception as error:
            raise ValueError(f"workers must be 0 for this data set: {error}") from error
        file = _shared_file(self._image_bytes)
        self._memory = mmap.mmap(file, self._image_bytes)
        self._connection, theirs = Pipe()
        fds = (theirs.fileno(), file)
        code = _CODE.format(path=sys.path, module=__name__, fds=f"{fds[0]}, {fds[1]}")
        # Libraries must not start a thread per core in every process.
        one = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        command = [sys.executable, "-c", code]
        with held_back(_SIGNALS):
            self.process = subprocess.Popen(command, pass_fds=fds, env=os.environ | one)
        theirs.close()
        os.close(file)
        return pickled

    def stop(self) -> None:
        if self.process is not None:
            self._connection.close()
            self.process.kill()  # it holds nothing that could be lost
            self.process.wait()


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()


def _shared_file(size: int) -> int:
    """A file without a name, so that nothing is left of it, however its processes end."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("repopt_jax_batch")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.truncate(file, size)
    return file


def serve(connection: int, file: int) -> None:
    """What a process does: receive `make`, then arguments, and send back what it makes of them.

    Args:
      connection: file descriptor of a connection to the parent.
      file: file descriptor of the memory for images.
    """
    logging.disable(logging.WARNING)  # the parent names bad images, once
    pipe = Connection(connection)
    memory = np.frombuffer(mmap.mmap(file, 0), np.uint8)
    told: set[str] = set()
    try:
        make = _loaded(pipe.recv_bytes())
        while True:
            arguments = pipe.recv()
            pipe.send(_reply(make, arguments, memory, told))
    except (EOFError, OSError):  # the parent has ended
        return


def _loaded(pickled: bytes) -> Callable:
    try:
        return pickle.loads(pickled)
    except Exception as error:
        reason = ValueError(f"workers must be 0 for this data set: {error}")

    def fail(*_):
        raise reason

    return fail


def _reply(make, arguments, memory, told) -> tuple[Exception | None, Any, list[str]]:
    """An error; the batch, with the shape of its images in their place; newly found bad images."""
    try:
        batch = make(*arguments)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(traceback.format_exc())
        return error, None, []
    images = batch["image"]
    memory[: images.size] = images.ravel()
    found = sorted(make.dataset.bad_images - told)
    told.update(found)
    return None, batch | {"image": images.shape}, found
