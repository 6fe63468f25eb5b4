"""The loop: trains one part from its first step, or its last checkpoint, to its end.

The phases in order: state, restore, steps with evaluation and checkpoints, summary. Steps are done
in chunks: of one, or of several in one program where the images lie on the device. A chunk is
dispatched before the metrics of the one before are read, so the device waits for the host only
where something is written down: a report, an evaluation, a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx

from repopt_jax.data import image_shape
from repopt_jax.files import load_scales
from repopt_jax.scales import Scales, save_scales
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.devices import Profile, forward_flops, peak_flops, peak_memory
from repopt_jax.training.evaluation import evaluate_state, not_finite_sentence
from repopt_jax.training.inputs import InputWait, slow_input_sentence, train_input
from repopt_jax.training.interruption import RunStopped, StopSignal, plain_errors
from repopt_jax.training.parts import Part
from repopt_jax.training.processes import agreed, gathered, wait_for_all
from repopt_jax.training.report import MetricsWriter, Progress, read_metrics
from repopt_jax.training.step import TrainState

if TYPE_CHECKING:
    from jaxtyping import PyTree


def train(part: Part, workdir: epath.PathLike) -> tuple[TrainState, dict[str, Any]]:
    """Train a part in `workdir`, resuming from its newest intact checkpoint.

    Returns:
      The final state and a summary: the last evaluation, the best top-1, steps and seconds.

    Raises:
      RunStopped: at a non-finite loss, after a signal, when the state has been saved, or where
        images or checkpoints cannot be read or written.
    """
    workdir = epath.Path(workdir)
    size = {"total": part.steps, "batch_size": part.section.batch_size}
    images = train_input(part)
    with plain_errors():
        checkpoints = Checkpoints(workdir, keep_latest=part.config.checkpoint.keep)
        log = Progress(workdir, **size, terminal=False)
    with log:  # warnings about damaged images and checkpoints reach the log file too
        if not checkpoints.steps():
            images.batches.start_prefetch()  # batches are made while programs are compiled
        state = part.init()
        with plain_errors():
            restored = checkpoints.restore(state, images.batches)
    images.batches.start_prefetch()
    first, state = restored or (0, state)
    writer = MetricsWriter(workdir, resumed_at=first if restored else None)
    wait_for_all(f"where the metrics of {part.name} are ready")
    progress = Progress(workdir, **size, resumed_at=first, label=part.name)
    profile = Profile(workdir, first, part.config.profile_steps)
    progress.say(_headline(part, state))
    try:
        with StopSignal() as stop, progress:
            loop = _Loop(part, state, first, images, stop, checkpoints, writer, progress, profile)
            loop.run()
            with plain_errors():
                checkpoints.wait()
    finally:  # each of them, whatever else fails
        with plain_errors(), contextlib.closing(checkpoints), contextlib.closing(writer):
            profile.close()
    (received,) = agreed([stop.received or 0])
    if received:  # even at the last step, so that no later part begins
        name = signal.Signals(int(received)).name
        raise RunStopped(
            f"{name} received: {part.name} is saved at step {loop.step} of {part.steps}; "
            "the same command goes on from there",
            128 + int(received),
        )
    wait_for_all(f"at the end of {part.name}")
    return loop.state, _summary(part, read_metrics(workdir / "metrics.jsonl"))


class _Loop:
    """The steps of a part from where its state is; `state` and `step` move on.

    A checkpoint comes before the evaluation of its step, because a machine about to be taken away
    may not have the time for both. The evaluation is then done, or done again, on resuming.
    """

    def __init__(self, part, state, step, images, stop, checkpoints, writer, progress, profile):
        self.part, self.state, self.step = part, state, step
        self.images, self.stop, self.checkpoints = images, stop, checkpoints
        self.writer, self.progress, self.profile = writer, progress, profile
        self.wait, self.slow_input_is_told = InputWait(), False
        self.recent: list[_Chunk] = []  # since the last report
        before = read_metrics(writer.path)
        evaluations = [r for r in before if "eval/top1" in r]
        # Agreed, because they decide about saves, and a file may reach other hosts late.
        self.best, seconds, self.evaluated_at = agreed(
            [
                max((r["eval/top1"] for r in evaluations), default=-math.inf),
                before[-1]["seconds"] if before else 0.0,
                max((r["step"] for r in evaluations), default=0),
            ]
        )
        here = [r["eval/top1"] for r in evaluations if r["step"] == step]
        (self.top1,) = agreed([here[-1] if here else -math.inf])
        self.saved_at = time.perf_counter()
        self.started = self.saved_at - seconds

    def run(self) -> None:
        """Train to the last step, or to the chunk in which a signal arrives; save the state."""
        if self.step and self.step == self.evaluated_at:  # a killed run may not have written it
            self.checkpoints.add_metrics(self.step, {"top1": self.top1})
        pending = self.evaluated_at < self.step and self._ends(self.part.config.eval_every)
        if pending and not self._evaluate(saved=True):
            return
        while self.step < self.part.steps:
            self._train_chunk()
            report, save, stop, evaluation = self._due()
            if report:
                self._report()
            if save:
                self._save()
            if stop:
                return
            if evaluation and not self._evaluate(saved=save):
                if not save:
                    self._save()
                return

    def _due(self) -> tuple[bool, bool, bool, bool]:
        """Whether a report, a save, an end and an evaluation are due; the same in all processes."""
        config = self.part.config
        evaluation, save = self._ends(config.eval_every), self._ends(config.checkpoint.every)
        report, stop = evaluation or save or self.step % config.log_every == 0, False
        if report or jax.process_count() == 1:  # a later signal counts next time
            overdue = 0 < 60 * config.checkpoint.minutes < time.perf_counter() - self.saved_at
            stop, overdue = map(bool, agreed([self.stop.received is not None, overdue]))
            save = save or stop or overdue
        return report or save, save, stop, evaluation

    def _ends(self, epochs: float) -> bool:
        """Whether the last step ends a period of `epochs`, or the training."""
        return self.step == self.part.steps or self.step % self.part.steps_in(epochs) == 0

    def _chunk_steps(self) -> int:
        """Steps of the next chunk, which ends where something may be due."""
        config = self.part.config
        periods = map(self.part.steps_in, (config.eval_every, config.checkpoint.every))
        to_next = [period - self.step % period for period in (*periods, config.log_every)]
        return min(*to_next, self.part.steps - self.step, self.images.most_steps)

    def _train_chunk(self) -> None:
        count = self._chunk_steps()
        with self.wait, plain_errors():  # an image may be broken
            chunk = self.images.next(count)
        self.profile.step(self.step + 1, self.state)
        self.state, metrics = self.images.train(self.state, chunk)
        self.wait.given(metrics)
        if self.recent:
            self._require_finite_losses()
        self.recent.append(_Chunk(self.step, count, metrics))
        self.step += count
        self.progress.step(self.step)

    def _report(self) -> None:
        """Report the means since the last report."""
        part = self.part
        self._require_finite_losses()
        fetched = jax.device_get([chunk.metrics for chunk in self.recent])  # all at once
        chunks = [c._replace(metrics=m) for c, m in zip(self.recent, fetched, strict=True)]
        self.recent.clear()
        steps = sum(chunk.count for chunk in chunks)
        values = {k: [x for chunk in chunks for x in chunk.values(k)] for k in chunks[-1].metrics}
        means = {f"train/{k}": np.mean(v) for k, v in values.items()}
        means["train/lr"] = float(part.schedule(self.step - 1))
        with plain_errors():
            speed = self.progress.report(self.step, loss=means["train/loss"], lr=means["train/lr"])
        record = means | {"train/images_per_second": speed}
        record |= self._input_wait("train", steps * part.section.batch_size / speed)
        peak, memory = peak_flops(jax.devices()[0].device_kind), peak_memory()
        if peak is not None:
            record["train/mfu"] = 3 * self._forward_flops * speed / (peak * part.mesh.size)
        if memory is not None:
            record["device/peak_memory_gib"] = memory / 2**30
        if part.section.data.skip_bad:
            names = gathered(json.dumps(sorted(part.dataset.bad_images)))  # each reads its own
            record["data/bad_images"] = len(set().union(*map(json.loads, names)))
        self._write(record)

    @functools.cached_property
    def _forward_flops(self) -> int:
        """Floating-point operations of the forward pass on one image."""
        part, state = self.part, self.state
        shape = image_shape(part.dataset, part.section.data.image_size)
        return forward_flops(part.graphdef, state.params, state.stats, shape)

    def _input_wait(self, what: str, seconds: float) -> dict[str, float]:
        """The share of the last `seconds` that the device has waited for images."""
        long_enough = self.wait.seconds > 1  # to be worth a change
        share = self.wait.share(seconds)
        sentence = slow_input_sentence(self.part, share)
        if sentence and long_enough and not self.slow_input_is_told:
            self.slow_input_is_told = True
            with plain_errors():
                self.progress.say(sentence)
        return {f"{what}/input_wait": share}

    def _evaluate(self, saved: bool) -> bool:
        """Evaluate, report, and mark the best checkpoint; False if a signal stopped it."""
        with self.progress.paused():
            started = time.perf_counter()
            found = evaluate_state(self.part, self.state, self.stop, self.wait)
            wait = self._input_wait("eval", time.perf_counter() - started)
            if found is None:
                return False
            if self.part.name == "search":
                with plain_errors():
                    self._keep_scales(found)
        top1 = {"top1": found["eval/top1"]}
        if saved:
            with plain_errors():
                self.checkpoints.add_metrics(self.step, top1)
        elif top1["top1"] > self.best:  # the best checkpoint is that of the best evaluation
            self._save(top1)
        self.best = max(self.best, top1["top1"])
        with plain_errors():
            self.progress.say(_sentence(self.part.name, self.step, found))
        self._write(found | wait)
        return True

    def _keep_scales(self, measured: dict[str, float]) -> None:
        """One file per evaluation of a search, so that its length can be studied."""
        scales = self.part.scales_of(self.state, self.step, measured)
        if jax.process_index() == 0:
            folder = _scales_folder(self.writer.path.parent)
            folder.mkdir(parents=True, exist_ok=True)
            save_scales(folder / f"{self.step}.safetensors", scales)

    def _write(self, record: dict[str, Any]) -> None:
        epoch = {"epoch": self.step / self.part.steps_per_epoch}
        with plain_errors():
            seconds = time.perf_counter() - self.started
            self.writer.write(self.step, epoch | record | {"seconds": seconds})

    def _save(self, metrics: dict[str, float] | None = None) -> None:
        # A step's loss is from before its update, which may have broken the state.
        if not _all_finite(self.state):
            self._stop_diverged(f"the update of {self.part.name} at step {self.step} is not finite")
        with plain_errors():
            self.checkpoints.save(self.step, self.state, self.images.batches, metrics)
        self.saved_at = time.perf_counter()

    def _require_finite_losses(self) -> None:
        """Wait for the last chunk, and stop if a loss of it is not finite."""
        chunk = self.recent[-1]
        for step, loss in enumerate(chunk.values("loss"), chunk.before + 1):
            if not math.isfinite(loss):
                self._stop_diverged(f"the loss of {self.part.name} is {loss} at step {step}")

    def _stop_diverged(self, what: str) -> None:
        with plain_errors():
            self.checkpoints.wait()
        steps = self.checkpoints.steps()
        kept = f"step {steps[-1]} in {self.checkpoints.directory}" if steps else "none yet"
        raise RunStopped(
            f"{what}; a smaller learning rate (schedule.base_lr) may help; "
            f"last good checkpoint: {kept}",
            1,
        )


class _Chunk(NamedTuple):
    """The metrics of some steps.

    Attributes:
      before: number of steps done before.
      count: number of its steps.
      metrics: scalars, or arrays with a row for each step and perhaps more rows.
    """

    before: int
    count: int
    metrics: dict[str, jax.Array]

    def values(self, name: str) -> list[float]:
        """A metric of each step, which is waited for."""
        return np.atleast_1d(np.asarray(self.metrics[name], float))[: self.count].tolist()


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def scales_by_epoch(workdir: epath.PathLike) -> dict[float, Scales]:
    """The scales that a search has kept at its evaluations, by epoch, ascending.

    They are the files ``<workdir>/scales/<step>.safetensors``, each of which can be given to
    ``--config.scales``.
    """
    files = _scales_folder(epath.Path(workdir)).glob("*.safetensors")
    found = [load_scales(file) for file in sorted(files, key=lambda file: int(file.stem))]
    return {float(scales.metadata["epochs"]): scales for scales in found}


def _scales_folder(workdir: epath.Path) -> epath.Path:
    return workdir / "scales"


def _headline(part: Part, state: TrainState) -> str:
    count = parameter_overview.count_parameters(nnx.to_pure_dict(state.params))
    devices = "1 device" if part.mesh.size == 1 else f"{part.mesh.size} devices"
    return (
        f"{part.name}: {count:,} parameters, {part.steps:,} steps of {part.section.batch_size} "
        f"images, BatchNorm groups of {part.options.group}, {devices}"
    )


def _sentence(name: str, step: int, found: dict[str, float]) -> str:
    text = f"{name} step {step}: top-1 {found['eval/top1']:.2f} %, top-5 {found['eval/top5']:.2f} %"
    text += f", loss {found['eval/loss']:.4f}"
    if "eval_ema/top1" in found:
        text += f"; averaged weights: top-1 {found['eval_ema/top1']:.2f} %"
    return text + not_finite_sentence(found)


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
