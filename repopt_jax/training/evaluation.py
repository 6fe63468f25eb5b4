"""Loss and accuracy of a part over its evaluation images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from repopt_jax.training.devices import put_batch
from repopt_jax.training.parts import Part
from repopt_jax.training.processes import agreed
from repopt_jax.training.step import EvalMetrics, TrainState, jitted_eval_step
from repopt_jax.training.stopping import StopSignal, told_in_a_sentence

if TYPE_CHECKING:
    from jaxtyping import PyTree


def evaluate(
    part: Part, params: PyTree, stats: PyTree, stop: StopSignal | None = None
) -> dict[str, float] | None:
    """Loss, top-1 and top-5 (percent) over every evaluation image exactly once.

    Returns None if `stop` has received a signal meanwhile; to agree on that costs several processes
    the next batch's time, so they do it every tenth.
    """
    total = EvalMetrics.empty()
    for number, batch in enumerate(_read(part.eval_batches())):
        if stop is not None and (jax.process_count() == 1 or number % 10 == 0):
            (stopping,) = agreed([stop.received is not None])
            if stopping:
                return None
        placed = put_batch(part.mesh, batch)
        total = total.merge(
            jitted_eval_step(part.eval_graphdef, part.options, params, stats, placed)
        )
    return {name: float(value) for name, value in total.compute().items()}


def _read(batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    iterator = iter(batches)
    while True:
        with told_in_a_sentence():  # a image may be broken
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def evaluate_state(
    part: Part, state: TrainState, stop: StopSignal | None = None
) -> dict[str, float] | None:
    """`evaluate` of the raw parameters, and beside them of the averages if there are any."""
    networks = {"eval": (state.params, state.stats)}
    if state.ema is not None:
        networks["eval_ema"] = state.ema
    found = {}
    for name, (params, stats) in networks.items():
        numbers = evaluate(part, params, stats, stop)
        if numbers is None:
            return None
        found |= {f"{name}/{k}": v for k, v in numbers.items()}
    return found
