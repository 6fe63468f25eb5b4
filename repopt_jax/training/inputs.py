"""How images reach the steps: sent by the host, or out of a set that lies on the devices.

Both inputs have the same face. `next(count)` prepares a chunk of steps, `train` does them, and
`batches` is the data iterator, whose position a checkpoint keeps. The position means the same to
both, so a run can go on with the other one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from repopt_jax.data.augment import preset
from repopt_jax.training.device_images import (
    jitted_take,
    jitted_train_chunk,
    put_draws,
    put_images,
    why_not_on_device,
)
from repopt_jax.training.devices import put_batch
from repopt_jax.training.processes import agreed
from repopt_jax.training.step import TrainState, jitted_train_step

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from repopt_jax.training.parts import Part


def most_steps(mesh: Mesh) -> int:
    """How many steps one program does at most where the images lie on the devices."""
    if mesh.devices.flat[0].platform == "cpu":
        return 1  # XLA's convolutions are many times slower in a loop there
    return 32  # enough for the host to keep ahead, and few enough to notice a signal soon


class HostInput:
    """Images come from the host, the batch of one step at a time."""

    most_steps = 1

    def __init__(self, part: Part):
        self._part = part
        self.batches = part.train_batches()

    def next(self, count: int) -> dict[str, jax.Array]:
        """The next batch; `count` is 1."""
        del count
        return put_batch(self._part.mesh, next(self.batches))

    def train(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict]:
        """Do one step."""
        part = self._part
        return jitted_train_step(part.graphdef, part.tx, part.options, state, batch)


class DeviceInput:
    """Images lie on the devices; the host sends what it draws for a chunk of steps."""

    def __init__(self, part: Part):
        self._part = part
        self.batches = part.train_batches(images=False)
        self.most_steps = most_steps(part.mesh)
        self._padding = preset(part.section.data.augment).padding
        self._images = put_images(part.mesh, part.dataset.train)

    def next(self, count: int) -> tuple[dict[str, jax.Array], int]:
        """The draws of the next `count` steps."""
        drawn = [next(self.batches) for _ in range(count)]
        return put_draws(self._part.mesh, drawn, self.most_steps), count

    def train(self, state: TrainState, chunk: tuple) -> tuple[TrainState, dict[str, jax.Array]]:
        """Do a chunk of steps; the metrics have a row for each."""
        part, (drawn, count) = self._part, chunk
        static = part.graphdef, part.tx, part.options, self._padding
        return jitted_train_chunk(*static, state, self._images, drawn, jnp.int32(count))


def train_input(part: Part) -> HostInput | DeviceInput:
    """The training input of a part."""
    return DeviceInput(part) if part.on_device else HostInput(part)


def eval_input(part: Part) -> Iterator[dict[str, jax.Array]]:
    """The evaluation batches of a part, on its devices: ``image``, ``label`` and ``mask``."""
    for batch in part.eval_batches:
        placed = put_batch(part.mesh, batch)
        if part.on_device:
            placed |= jitted_take(part.eval_images, placed.pop("index"))
        yield placed


class InputWait:
    """Adds up for how long the device had nothing to do because its next input was not there.

    That is not how long the host waits: the device may be at work meanwhile. So a thread takes
    down when the device has finished what it was given last.

    >>> wait = InputWait()
    >>> with wait:
    ...     batch = 1.0  # the first input: nothing is counted before the device has begun
    >>> wait.given(jnp.float32(batch) + 1)
    >>> with wait:
    ...     batch = 2.0
    >>> 0 <= wait.share(seconds=10.0) <= 1
    True
    """

    def __init__(self):
        self.seconds = 0.0
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._finished: concurrent.futures.Future[float] | None = None

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        if self._finished is not None and self._finished.done():
            begun = max(self._start, self._finished.result())
            self.seconds += max(time.perf_counter() - begun, 0.0)

    def given(self, results: Any) -> None:
        """Note what the device is to compute from the last input."""
        self._finished = self._thread.submit(_when_finished, results)

    def share(self, seconds: float) -> float:
        """Which share of the last `seconds` it was, in the process that waited most.

        Counting begins anew. All processes call it at the same step.
        """
        (waited,) = agreed([self.seconds])
        self.seconds = 0.0
        return min(waited / max(seconds, 1e-9), 1.0)


def _when_finished(results: Any) -> float:
    with contextlib.suppress(Exception):  # which the caller gets where it reads them
        jax.block_until_ready(results)
    return time.perf_counter()


def slow_input_sentence(part: Part, share: float) -> str | None:
    """What to change where the device waits for images for too large a `share` of the time.

    None: nothing, or nothing can be.
    """
    if share <= 0.1 or part.on_device:
        return None
    data = f"{part.spec.section}.data"
    if why_not_on_device(part.section.data, part.dataset) is None:
        advice = f"{data}.on_device='always' may help"
    else:
        advice = (
            f"more {data}.workers or {data}.fast=True may help, or images that are prepared with "
            "--max_side (docs/data.md)"
        )
    return f"{part.name} waits for images {share:.0%} of the time; {advice}"
