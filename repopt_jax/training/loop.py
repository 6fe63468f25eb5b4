"""The loop: trains one part from its first step, or its last checkpoint, to its end.

The phases in order: state, restore, steps with evaluation and checkpoints, summary. Step n is
dispatched before the metrics of step n - 1 are read, so the device never waits for the host.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx

from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.devices import put_batch
from repopt_jax.training.parts import Part
from repopt_jax.training.processes import agreed, wait_for_all
from repopt_jax.training.progress import Progress
from repopt_jax.training.report import MetricsWriter, read_metrics
from repopt_jax.training.searching import save_along
from repopt_jax.training.step import EvalMetrics, TrainState, eval_step, train_step
from repopt_jax.training.usage import Profile, forward_flops, peak_flops, peak_memory

if TYPE_CHECKING:
    from jaxtyping import PyTree


class RunStopped(Exception):
    """The run ended early for a reason that its message tells."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Wrong input and files that fail end the run with their message, and no traceback.

    Only around what reads input and files: an error of the computation is a bug, and its
    traceback is wanted.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunStopped(str(error), 2) from error


class StopSignal:
    """While entered, SIGTERM and SIGINT only set `received`; a second SIGINT interrupts."""

    def __enter__(self) -> StopSignal:
        self.received: signal.Signals | None = None
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        del frame
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


@functools.cache
def jitted_steps() -> tuple[Any, Any]:
    """The jitted training and evaluation step, shared by all parts of a process."""
    return (
        jax.jit(train_step, static_argnums=(0, 1, 2), donate_argnums=3),
        jax.jit(eval_step, static_argnums=(0, 1)),
    )


def evaluate(
    part: Part, params: PyTree, stats: PyTree, stop: StopSignal | None = None
) -> dict[str, float] | None:
    """Loss, top-1 and top-5 (percent) over every evaluation picture exactly once.

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
            jitted_steps()[1](part.eval_graphdef, part.options, params, stats, placed)
        )
    return {name: float(value) for name, value in total.compute().items()}


def _read(batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    iterator = iter(batches)
    while True:
        with told_in_a_sentence():  # a picture may be broken
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


def train(part: Part, workdir: epath.PathLike) -> tuple[TrainState, dict[str, Any]]:
    """Train a part in `workdir`, resuming from its newest intact checkpoint.

    Returns:
      The final state and a summary: the last evaluation, the best top-1, steps and seconds.

    Raises:
      RunStopped: at a non-finite loss, after a signal, when the state has been saved, or where
        pictures or checkpoints cannot be read or written.
    """
    workdir = epath.Path(workdir)
    batches = part.train_batches()
    state = part.init()
    with told_in_a_sentence():
        checkpoints = Checkpoints(workdir, keep_latest=part.config.checkpoint.keep)
        # Open meanwhile, so that what is told of damaged checkpoints goes to the log file as well.
        with Progress(workdir, part.steps, batch_size=part.section.batch_size, terminal=False):
            restored = checkpoints.restore(state, batches)
    first = 0
    if restored is not None:
        first, state = restored
    writer = MetricsWriter(workdir, resumed_at=first if restored is not None else None)
    wait_for_all(f"where the metrics of {part.name} are ready")
    progress = Progress(
        workdir,
        part.steps,
        batch_size=part.section.batch_size,
        resumed_at=first,
        label=part.name,
    )
    profile = Profile(workdir, first, part.config.profile_steps)
    count = parameter_overview.count_parameters(nnx.to_pure_dict(state.params))
    progress.say(
        f"{part.name}: {count:,} parameters, {part.steps:,} steps of {part.section.batch_size} "
        f"pictures, BatchNorm groups of {part.options.group}, {part.mesh.size} devices"
    )
    try:
        with StopSignal() as stop, progress:
            step, state = _run_steps(
                part, state, first, batches, checkpoints, writer, progress, stop, profile
            )
            with told_in_a_sentence():
                checkpoints.wait()
    finally:
        profile.close()
        writer.close()
        checkpoints.close()
    (received,) = agreed([stop.received or 0])
    if received:  # even at the last step: a part after this one may not begin
        name = signal.Signals(int(received)).name
        raise RunStopped(
            f"{name} received: {part.name} is saved at step {step} of {part.steps}; "
            "the same command goes on from there",
            128 + int(received),
        )
    wait_for_all(f"at the end of {part.name}")
    return state, _summary(part, read_metrics(workdir / "metrics.jsonl"))


def _run_steps(
    part, state, first, batches, checkpoints, writer, progress, stop, profile
) -> tuple[int, TrainState]:
    """Train up to the last step, or to the first one that a signal lets end; that one is saved.

    A checkpoint comes before the evaluation of its step, which may take longer than a machine that
    is about to be taken away has left; the evaluation is done, or done again, on resuming.
    """
    step_fn, _ = jitted_steps()
    eval_every = part.steps_in(part.config.eval_every)
    save_every = part.steps_in(part.config.checkpoint.every)
    log_every = part.config.log_every
    before = read_metrics(writer.path)
    # Agreed, because they decide about saves, and a file may reach other hosts late.
    best, seconds, evaluated = agreed(
        [
            max((r["eval/top1"] for r in before if "eval/top1" in r), default=-math.inf),
            before[-1]["seconds"] if before else 0.0,
            max((r["step"] for r in before if "eval/top1" in r), default=0),
        ]
    )
    since = time.perf_counter()

    def is_evaluated(step: int) -> bool:
        return step == part.steps or step % eval_every == 0

    def save(step: int, metrics: dict[str, float] | None = None) -> None:
        _require_finite_state(part, step, state, checkpoints)
        with told_in_a_sentence():
            checkpoints.save(step, state, batches, metrics=metrics, force=True)

    def evaluation(step: int, saved: bool) -> bool:
        """Evaluate, write the result down and see to the best checkpoint; False at a signal."""
        nonlocal best
        with progress.paused():
            found = evaluate_state(part, state, stop)
            if found is None:
                return False
            if part.name == "search":
                with told_in_a_sentence():
                    save_along(part, state, step, found, writer.path.parent)
        top1 = {"top1": found["eval/top1"]}
        if saved:
            with told_in_a_sentence():
                checkpoints.add_metrics(step, top1)
        elif top1["top1"] > best:  # the best checkpoint is that of the best evaluation
            save(step, top1)
        best = max(best, top1["top1"])
        with told_in_a_sentence():
            progress.say(_sentence(part.name, step, found))
            record = {"epoch": step / part.steps_per_epoch, **found}
            writer.write(step, record | {"seconds": seconds + time.perf_counter() - since})
        return True

    if first and is_evaluated(first) and evaluated < first and not evaluation(first, True):
        return first, state
    saved_at = time.perf_counter()
    recent: list[dict[str, jax.Array]] = []
    step = first
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = None
    for step in range(first + 1, part.steps + 1):
        with told_in_a_sentence():  # a picture may be broken
            batch = next(batches)
        batch = put_batch(part.mesh, batch)
        profile.step(step, state)
        state, metrics = step_fn(part.graphdef, part.tx, part.options, state, batch)
        if recent:
            _require_finite(part, step - 1, recent[-1], checkpoints)
        recent.append(metrics)
        progress.step(step)

        due_eval = is_evaluated(step)
        due_save = step == part.steps or step % save_every == 0
        due_report = due_eval or due_save or step % log_every == 0
        stopping = False
        if due_report or jax.process_count() == 1:  # a signal that comes later counts next time
            overdue = 0 < 60 * part.config.checkpoint.minutes < time.perf_counter() - saved_at
            stopping, overdue = agreed([stop.received is not None, overdue])
            due_save = due_save or stopping or overdue
        if due_report or due_save:
            _require_finite(part, step, metrics, checkpoints)
            means = {f"train/{k}": np.mean([float(m[k]) for m in recent]) for k in metrics}
            recent.clear()
            means["train/lr"] = float(part.schedule(step - 1))
            with told_in_a_sentence():
                speed = progress.report(step, loss=means["train/loss"], lr=means["train/lr"])
            record = {"epoch": step / part.steps_per_epoch, **means}
            record["train/images_per_second"] = speed
            if peak is not None:
                flops = flops or forward_flops(
                    part.eval_graphdef, state.params, state.stats, batch["image"].shape[1:]
                )
                record["train/mfu"] = 3 * flops * speed / (peak * part.mesh.size)
            memory = peak_memory()
            if memory is not None:
                record["device/peak_memory_gib"] = memory / 2**30
            if part.section.data.skip_bad:
                record["data/bad_pictures"] = len(part.dataset.bad_pictures)
            record["seconds"] = seconds + time.perf_counter() - since
            with told_in_a_sentence():
                writer.write(step, record)
        if due_save:
            save(step)
            saved_at = time.perf_counter()
        if stopping:
            break
        if due_eval and not evaluation(step, due_save):
            if not due_save:
                save(step)
            break
    return step, state


def _require_finite(part: Part, step: int, metrics: dict, checkpoints: Checkpoints) -> None:
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        _stop_diverged(f"the loss of {part.name} is {loss} at step {step}", checkpoints)


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def _require_finite_state(
    part: Part, step: int, state: TrainState, checkpoints: Checkpoints
) -> None:
    # The step's loss is that before its update, which may have broken what is to be saved.
    if not _all_finite(state):
        _stop_diverged(f"the update of {part.name} at step {step} is not finite", checkpoints)


def _stop_diverged(what: str, checkpoints: Checkpoints) -> None:
    with told_in_a_sentence():
        checkpoints.wait()
    steps = checkpoints.steps()
    kept = f"step {steps[-1]} in {checkpoints.directory}" if steps else "none yet"
    raise RunStopped(
        f"{what}; a smaller learning rate (schedule.base_lr) may help; "
        f"last good checkpoint: {kept}",
        1,
    )


def _sentence(name: str, step: int, found: dict[str, float]) -> str:
    text = f"{name} step {step}: top-1 {found['eval/top1']:.2f} %, top-5 {found['eval/top5']:.2f} %"
    text += f", loss {found['eval/loss']:.4f}"
    if "eval_ema/top1" in found:
        text += f"; averaged weights: top-1 {found['eval_ema/top1']:.2f} %"
    return text


def _summary(part: Part, records: list[dict[str, Any]]) -> dict[str, Any]:
    evaluations = [r for r in records if "eval/top1" in r]
    last = evaluations[-1]
    return {
        "part": part.name,
        "steps": part.steps,
        "epochs": part.steps / part.steps_per_epoch,
        "seconds": last["seconds"],
        "best_top1": max(r["eval/top1"] for r in evaluations),
        **{k: v for k, v in last.items() if k.startswith(("eval", "train/", "data/"))},
    }
