"""Loss and accuracy of a part's network over its evaluation images."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import jax

from repopt_jax.training.inputs import InputWait, eval_input
from repopt_jax.training.interruption import StopSignal, plain_errors
from repopt_jax.training.parts import Part
from repopt_jax.training.processes import agreed
from repopt_jax.training.step import EvalMetrics, TrainState, jitted_eval_step

if TYPE_CHECKING:
    from jaxtyping import PyTree


def evaluate_state(
    part: Part,
    state: TrainState,
    stop: StopSignal | None = None,
    wait: InputWait | None = None,
) -> dict[str, float] | None:
    """Loss, top-1 and top-5 (percent) over every evaluation image exactly once.

    Results of the raw parameters are called ``eval/loss`` and so on, those of the moving averages,
    if there are any, ``eval_ema/loss`` and so on. An image whose logits are not finite counts as
    wrong; where there are such images, ``eval/not_finite`` is their number. None if `stop` has
    received a signal meanwhile. `wait` counts the time spent waiting for each batch.
    """
    wait = wait or InputWait()
    networks = {"eval": (state.params, state.stats)}
    if state.ema is not None:
        networks["eval_ema"] = state.ema
    found = {}
    for name, (params, stats) in networks.items():
        numbers = _evaluate_network(part, params, stats, stop, wait)
        if numbers is None:
            return None
        found |= {f"{name}/{k}": v for k, v in numbers.items()}
    return found


def _evaluate_network(
    part: Part, params: PyTree, stats: PyTree, stop: StopSignal | None, wait: InputWait
) -> dict[str, float] | None:
    total = EvalMetrics.empty()
    batches = eval_input(part)
    for number in itertools.count():
        with wait, plain_errors():  # an image may be broken
            batch = next(batches, None)
        if batch is None:
            found = {name: float(value) for name, value in total.compute().items()}
            if found.pop("not_finite"):
                found["not_finite"] = int(total.not_finite.total)
            return found
        # To agree costs several processes the next batch's time, so they do it every tenth.
        if stop is not None and (jax.process_count() == 1 or number % 10 == 0):
            (stopping,) = agreed([stop.received is not None])
            if stopping:
                return None
        total = total.merge(jitted_eval_step(part.graphdef, part.options, params, stats, batch))
        wait.given(total)


def not_finite_sentence(found: dict[str, float]) -> str:
    """What to add where logits were not finite; empty where all were.

    >>> not_finite_sentence({"eval/top1": 0.0, "eval/not_finite": 3})
    '; 3 images had logits that are not finite'
    """
    count = max(found.get(f"{name}/not_finite", 0) for name in ("eval", "eval_ema"))
    return f"; {count} images had logits that are not finite" if count else ""
