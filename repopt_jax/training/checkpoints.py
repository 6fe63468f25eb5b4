"""Checkpoints that survive interruptions, damage and a change of the number of devices.

Orbax writes and reads the arrays. This module adds what a run needs besides:

* Every array's fingerprint is saved with it and compared after reading: if a byte of a
  data file has changed, Orbax alone returns wrong numbers silently.
* A damaged checkpoint is reported, and the one before is used.
* Nothing is deleted before a newer checkpoint is complete.

A checkpoint is the directory ``<workdir>/checkpoints/<step>`` with the items ``state`` (the arrays
by their slash-joined paths, so that reading it needs no class of ours or of optax), ``data`` (the
data iterator's position in every process) and ``manifest`` (types, fingerprints and metrics). The
last two are JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from repopt_jax.atomic_write import atomic_write
from repopt_jax.training.checkpoint_directory import (
    checkpoint_directory,
    require_space,
    require_writable,
)
from repopt_jax.training.manifests import (
    Damaged,
    array_handler,
    as_example,
    as_saved,
    current_name,
    examples_of,
    failure_is_damage,
    in_short,
    make_manifest,
    move_to,
    positions_of,
    quieten_orbax,
    read_manifest,
    require_match,
    require_undamaged,
    seal,
    to_read,
    unseal,
)
from repopt_jax.training.processes import agreed
from repopt_jax.tree_paths import by_path

BEST_METRIC = "top1"

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, under ``<workdir>/checkpoints``.

    The latest are kept, and the one with the highest ``top1`` among its metrics.

    Args:
      workdir: the run's directory, local or ``gs://``; created where it is absent.
      keep_latest: how many of the latest checkpoints to keep, at least 1.
      read_only: for evaluation beside a running training: changes no file and cannot save.

    Raises:
      ValueError: for a ``keep_latest`` below 1; see `checkpoint_directory`.
      OSError: where the directory cannot be written.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> state = {"weight": jnp.arange(3.0), "count": jnp.int32(7)}
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     checkpoints = Checkpoints(workdir)
    ...     checkpoints.save(100, state, metrics={"top1": 0.75})
    ...     step, restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    ...     checkpoints.close()
    >>> step, restored["weight"].tolist(), int(restored["count"])
    (100, [0.0, 1.0, 2.0], 7)
    """

    def __init__(self, workdir: epath.PathLike, *, keep_latest: int = 2, read_only: bool = False):
        if keep_latest < 1:
            raise ValueError(f"keep_latest must be at least 1, got {keep_latest}")
        quieten_orbax()
        self.directory = checkpoint_directory(workdir)
        self._keep_latest, self._read_only = keep_latest, read_only
        if not read_only:
            require_writable(self.directory)
        self._here: int | None = None  # the step saved or restored last
        self._metrics: dict[int, dict[str, float]] = {}  # by step
        self._unwritten: int | None = None  # the step whose metrics have changed
        self._damaged: set[int] = set()  # steps that could not be read
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "data", "manifest"),
            item_handlers={"state": array_handler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,  # it calls `should_preserve`
                cleanup_tmp_directories=not read_only,  # what a killed save left behind
                create=not read_only,
                lightweight_initialize=True,  # else a damaged file ends the run right here
            ),
        )
        for step in self.steps():
            with contextlib.suppress(Exception):  # damage is reported where the step is restored
                self._metrics[step] = self._read_json(step, "manifest")["metrics"]

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; damage shows only where one is restored."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest ``top1``; None where no checkpoint has that metric."""
        return next(iter(self._ranked(self.steps())), None)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Say for each checkpoint, the one being written last, whether to keep it.

        Orbax asks when it begins to write, and deletes the others when the new one is complete.
        """
        newest = checkpoints[-1].step  # higher steps: before the run was taken back to a lower one
        good = [c.step for c in checkpoints if c.step <= newest and c.step not in self._damaged]
        keep = {*sorted(good)[-self._keep_latest :], *self._ranked(good)[:1]}
        return [c.step in keep for c in checkpoints]

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Write a checkpoint, in the background; do nothing if `step` is the one saved last.

        The arrays may be donated as soon as this returns. When the checkpoint is complete, the ones
        that are no longer to be kept are removed: older ones, damaged ones, and those of higher
        steps, which a run had reached before it was taken back to here.

        Args:
          step: number of updates done.
          state: any pytree of ``jax.Array``, typed random keys included.
          data_iterator: has ``get_state`` and ``set_state``, as Grain's iterators; None for none.
          metrics: numbers to save along; None means none, and such a checkpoint is never the best.

        Raises:
          ValueError: for a leaf that is no array, a step below the last one, or a directory whose
            checkpoints reach further and were not restored.
          OSError: where this or the checkpoint before it could not be written.
        """
        leaves = by_path(state)
        self._require_savable(step, leaves)
        if step == self._here:
            return
        self.wait()
        arrays = {path: as_saved(leaf) for path, leaf in leaves.items()}
        require_space(self.directory, sum(array.nbytes for array in arrays.values()))
        positions = [] if data_iterator is None else positions_of(data_iterator)
        manifest = make_manifest(leaves) | {
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "data_processes": len(positions),
        }
        items = {
            "state": ocp.args.PyTreeSave(arrays),
            "manifest": ocp.args.JsonSave(seal(manifest)),
        }
        if positions:
            items["data"] = ocp.args.JsonSave(seal(positions))
        if step in self.steps():  # damaged, or left by a run that was taken back to an earlier step
            self._manager.delete(step)
        self._metrics[step] = manifest["metrics"]
        self._damaged.discard(step)
        self._here = step
        with self._failure_is_reported():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self, example_state: Any = None, data_iterator: Any = None, step: int | str | None = None
    ) -> tuple[int, Any] | None:
        """Read a checkpoint onto the devices of an example.

        A damaged checkpoint is reported by a warning in the log, and the next older (for ``"best"``
        the next best) one is used instead.

        Args:
          example_state: pytree that gives the result's structure, types and shardings by arrays or
            ``jax.ShapeDtypeStruct``; the latter without a sharding mean the first device. None:
            a dict of all that was saved, by slash-joined paths, on the first device.
          data_iterator: is moved to where it was at the save; None leaves the data alone.
          step: a number, ``"best"`` or ``"latest"``; None means the latest.

        Returns:
          The step, and the state bit for bit as it was saved; None where there is no checkpoint.

        Raises:
          ValueError: for another tree than the saved one, an absent step, or a wanted data position
            that was not saved, or differs between the processes of another number that saved it.
          OSError: where the wanted step, or every checkpoint, is damaged.
        """
        self.wait()
        failures = {}
        for candidate in self._candidates(step):
            failure = None
            try:
                state = self._read(candidate, example_state, data_iterator)
            except Damaged as error:
                failure = error
            (anywhere,) = agreed([failure is not None])  # all processes go on from the same one
            if not anywhere:
                self._damaged.update(failures)
                self._here = candidate
                return candidate, state
            failures[candidate] = failure or Damaged("another process could not read it")
            where = self.directory / str(candidate)
            _log.warning(
                "The checkpoint %s is damaged and not used (%s)", where, failures[candidate]
            )
        if failures:
            raise OSError(
                f"no checkpoint in {self.directory} can be read (tried {[*failures]}); move them "
                f"away to start again; the first failed with {next(iter(failures.values()))}"
            )
        return None

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Add to the metrics of the last checkpoint, which was written before they were known.

        They count at once, and are written when the checkpoint is complete: by the next call that
        waits for it. So nothing waits here, and a run that is killed before then has to add them
        again.

        Args:
          step: of the checkpoint saved or restored last.
          metrics: numbers by name.
        """
        known = self._metrics.get(step, {})  # none where the file could not be read at first
        self._metrics[step] = known | {name: float(value) for name, value in metrics.items()}
        if self._metrics[step] != known:
            self._unwritten = step

    def wait(self) -> None:
        """Block until the last save is complete. Raises OSError where it could not be written."""
        with self._failure_is_reported():
            self._manager.wait_until_finished()
        step, self._unwritten = self._unwritten, None
        if step is not None and jax.process_index() == 0:
            file = self.directory / str(step) / "manifest" / "metadata"
            # Not by Orbax, in which every process would have to read.
            manifest = unseal(json.loads(file.read_text()))
            manifest["metrics"] |= self._metrics[step]
            with atomic_write(file) as unfinished:
                unfinished.write_text(json.dumps(seal(manifest)))

    def close(self) -> None:
        """Complete the last save and end the background threads. Raises as :meth:`wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _require_savable(self, step: int, leaves: dict[str, Any]) -> None:
        if self._read_only:
            raise ValueError("read_only must be False to save, got True")
        for path, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise ValueError(f"state must hold jax.Array only, got {type(leaf)} at {path}")
        last = max(self.steps(), default=-1) if self._here is None else self._here
        if step < last or (step == last and self._here is None):
            raise ValueError(
                f"step must be above {last}, the last checkpoint in {self.directory} (restore an "
                f"earlier one to go on from there), got {step}"
            )

    def _ranked(self, steps: Iterable[int]) -> list[int]:
        """The steps that have the metric, the best first; of equals, the earlier first."""
        values = {s: self._metrics.get(s, {}).get(BEST_METRIC, math.nan) for s in steps}
        known = [s for s in values if not math.isnan(values[s])]
        return sorted(known, key=lambda s: (-values[s], s))

    def _candidates(self, step: int | str | None) -> list[int]:
        steps = self.steps()
        if step in (None, "latest"):
            return steps[::-1]
        if step == "best":
            ranked = self._ranked(steps)
            if steps and not ranked:
                raise ValueError(f'step "best" needs a checkpoint with the metric {BEST_METRIC!r}')
            return ranked
        if step not in steps:
            raise ValueError(f"step must be one of {steps} in {self.directory}, got {step!r}")
        return [step]

    def _read(self, step: int, example: Any, data_iterator: Any) -> Any:
        with failure_is_damage():
            manifest, saved_names = read_manifest(self._read_json(step, "manifest"))
        example = examples_of(manifest) if example is None else example
        examples = {current_name(path): leaf for path, leaf in by_path(example).items()}
        require_match(manifest, examples, self.directory / str(step))
        position = None if data_iterator is None else self._position(step, manifest)
        with failure_is_damage():
            wanted = {saved_names[name]: to_read(leaf) for name, leaf in examples.items()}
            types = ocp.checkpoint_utils.construct_restore_args(wanted)
            items = ocp.args.Composite(state=ocp.args.PyTreeRestore(wanted, types))
            saved = self._manager.restore(step, args=items)["state"]
            arrays = {name: saved[saved_names[name]] for name in examples}
            require_undamaged(manifest, arrays)
        if position is not None:
            move_to(data_iterator, position)
        generators = manifest["generators"]
        leaves = [as_example(arrays[n], x, generators.get(n)) for n, x in examples.items()]
        return jax.tree.unflatten(jax.tree.structure(example), leaves)

    def _position(self, step: int, manifest: dict[str, Any]) -> str:
        """Where this process's data iterator was."""
        where = self.directory / str(step)
        if not manifest["data_processes"]:
            raise ValueError(f"data_iterator must be None: {where} has no position of the data")
        with failure_is_damage():
            positions = self._read_json(step, "data")
        if len(set(positions)) == 1:  # all read in one order, so any number of them can go on
            return positions[0]
        if len(positions) != jax.process_count():
            raise ValueError(
                f"data_iterator must be None: {where} has the positions of {len(positions)} "
                f"processes that read apart, and there are {jax.process_count()}"
            )
        return positions[jax.process_index()]

    def _read_json(self, step: int, item: str) -> Any:
        args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        return unseal(self._manager.restore(step, args=args)[item])

    @contextlib.contextmanager
    def _failure_is_reported(self):
        try:
            yield
        except Exception as error:
            step, self._here = self._here, None
            self._manager.reload()  # it no longer lists those due for removal
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.directory} "
                f"({in_short(error)})"
            ) from error
