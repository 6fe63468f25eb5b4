"""How fast the training step of every part is, without data loading."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import jax
import numpy as np

from repopt_jax.training.devices import put_batch
from repopt_jax.training.parts import Part, prepare
from repopt_jax.training.report import format_table
from repopt_jax.training.step import jitted_train_step
from repopt_jax.training.stopping import told_in_a_sentence

if TYPE_CHECKING:
    from ml_collections import ConfigDict

WARMUP_STEPS = 3
TIMED_STEPS = 20


def throughput(config: ConfigDict) -> dict[str, float]:
    """Print images/s and compile time of every part in `config.parts`; return images/s by part.

    Raises:
      RunStopped: for anything wrong with `config` or the data.
    """
    from repopt_jax.training.run import TITLES, check

    with told_in_a_sentence():
        names, scales, mesh = check(config)
        parts = [prepare(config, name, mesh, scales) for name in names]
    rows, found = [], {}
    for part in parts:
        compile_seconds, step_seconds = _time(part)
        found[part.name] = part.section.batch_size / step_seconds
        milliseconds = f"{1e3 * step_seconds:.1f}"
        speed = f"{found[part.name]:,.0f}"
        rows.append((TITLES[part.name], f"{compile_seconds:.1f}", milliseconds, speed))
    print(format_table(rows, ("part", "compile s", "step ms", "images/s")))
    return found


def _time(part: Part) -> tuple[float, float]:
    """Seconds to compile, and per step."""
    state = part.init()
    batch = put_batch(part.mesh, next(part.train_batches()))
    arguments = (part.graphdef, part.tx, part.options)
    start = time.perf_counter()
    step = jitted_train_step.lower(*arguments, state, batch).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return compile_seconds, float(np.median(times[WARMUP_STEPS:]))
