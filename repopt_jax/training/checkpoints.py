"""Checkpoints that survive interruptions, damage and a change of the number of devices.

Orbax writes and reads the arrays. What is added here is what a run needs besides:

* Every array's fingerprint is saved with it and compared after reading: with a changed byte in a
  data file, Orbax alone returns wrong numbers without a word.
* A damaged checkpoint is reported, and the one before is used.
* Nothing is deleted before a newer checkpoint is complete.

A checkpoint is the directory ``<workdir>/checkpoints/<step>`` with the items ``state`` (the arrays
by their slash-joined paths, so that reading it needs no class of ours or of optax), ``data`` (the
data iterator's position in every process) and ``manifest`` (types, fingerprints and metrics). The
last two are JSON.
"""

import contextlib
import json
import logging
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from repopt_jax.atomic_write import atomic_write
from repopt_jax.training.damage import (
    DamagedError,
    failure_is_damage,
    in_short,
    quieten_orbax,
)
from repopt_jax.training.disk import require_space, require_writable
from repopt_jax.training.manifests import (
    as_example,
    by_path,
    examples_of,
    is_key,
    make_manifest,
    require_match,
    require_undamaged,
    seal,
    to_read,
    unseal,
)
from repopt_jax.training.positions import move_to, positions_of
from repopt_jax.training.processes import agreed
from repopt_jax.training.retention import KeepLatestAndBest

_log = logging.getLogger(__name__)


def checkpoint_directory(workdir: epath.PathLike) -> epath.Path:
    """``<workdir>/checkpoints``, absolute.

    Raises:
      ValueError: Orbax looks for its files by patterns and would not find them there again.
    """
    path = epath.Path(workdir) / "checkpoints"
    directory = path if path.is_absolute() else path.absolute()  # gs:// is
    if set(str(directory)) & set("*?["):
        raise ValueError(f"workdir must have none of * ? [ in its path, got {directory.parent}")
    return directory


class Checkpoints:
    """The checkpoints of one run, under ``<workdir>/checkpoints``.

    Args:
      workdir: the run's directory, local or ``gs://``; created where it is absent.
      keep_latest: how many of the latest checkpoints to keep, at least 1.
      keep_best: also keep the checkpoint with the highest ``best_metric``.
      best_metric: its name among the metrics given to :meth:`save`.
      save_every: :meth:`save` writes at multiples of this step only, unless forced or preempted.
      asynchronous: write in the background while training goes on. The arrays may be donated as
        soon as :meth:`save` returns.
      read_only: for evaluation beside a running training: changes no file and cannot save.

    Raises:
      ValueError: for a ``keep_latest`` or ``save_every`` below 1; see `checkpoint_directory`.
      OSError: where the directory cannot be written.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> state = {"weight": jnp.arange(3.0), "count": jnp.int32(7)}
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...     checkpoints = Checkpoints(workdir)
    ...     saved = checkpoints.save(100, state, metrics={"top1": 0.75})
    ...     step, restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    ...     checkpoints.close()
    >>> step, restored["weight"].tolist(), int(restored["count"])
    (100, [0.0, 1.0, 2.0], 7)
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep_latest: int = 2,
        keep_best: bool = True,
        best_metric: str = "top1",
        save_every: int = 1,
        asynchronous: bool = True,
        read_only: bool = False,
    ):
        for argument, value in {"keep_latest": keep_latest, "save_every": save_every}.items():
            if value < 1:
                raise ValueError(f"{argument} must be at least 1; got {value}")
        quieten_orbax()
        self.directory = checkpoint_directory(workdir)
        self._save_every, self._read_only = save_every, read_only
        if not read_only:
            require_writable(self.directory)
        self._here: int | None = None  # the step saved or restored last
        self._keep = KeepLatestAndBest(keep_latest, keep_best, best_metric)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "data", "manifest"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                enable_async_checkpointing=asynchronous,
                cleanup_tmp_directories=not read_only,  # what a killed save left behind
                create=not read_only,
                lightweight_initialize=True,  # else a damaged file ends the run right here
            ),
        )
        for step in self.steps():
            with contextlib.suppress(Exception):  # damage is told where the step is restored
                self._keep.metrics[step] = self._read_json(step, "manifest")["metrics"]

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; damage shows only where one is restored."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest ``best_metric``; None where no checkpoint has that metric."""
        return next(iter(self._keep.by_metric(self.steps())), None)

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any = None,
        metrics: dict[str, float] | None = None,
        force: bool = False,
    ) -> bool:
        """Write a checkpoint.

        When it is complete, the ones that are no longer to be kept are removed: older ones, damaged
        ones, and those of higher steps, which a run had reached before it was taken back to here.

        Args:
          step: number of updates done.
          state: any pytree of ``jax.Array``, typed random keys included.
          data_iterator: has ``get_state`` and ``set_state``, as Grain's iterators; None for none.
          metrics: numbers to save along; None means none, and such a checkpoint is never the best.
          force: write even if ``step`` is no multiple of ``save_every``.

        Returns:
          Whether a checkpoint was written: False where it is not due, or already there.

        Raises:
          ValueError: for a leaf that is no array, a step below the last one, or a directory whose
            checkpoints reach further and were not restored.
          OSError: where this or the checkpoint before it could not be written.
        """
        if self._read_only:
            raise ValueError("save needs read_only=False; got True")
        leaves = by_path(state)
        for path, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise ValueError(f"state must hold jax.Array only; got {type(leaf)} at {path}")
        if self._here is None and max(self.steps(), default=-1) >= step:
            raise ValueError(
                f"step must be above {self.steps()[-1]}, which is in {self.directory} and was not "
                f"restored; got {step}"
            )
        if self._here is not None and step < self._here:
            raise ValueError(f"step must not be below the last one, {self._here}; got {step}")
        due = force or step % self._save_every == 0 or self._manager.reached_preemption(step)
        if step == self._here or not due:
            return False

        self.wait()
        arrays = {p: jax.random.key_data(x) if is_key(x) else x for p, x in leaves.items()}
        require_space(self.directory, sum(array.nbytes for array in arrays.values()))
        positions = positions_of(data_iterator) if data_iterator is not None else []
        manifest = make_manifest(leaves) | {
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "data_processes": len(positions),
        }
        items = {"state": ocp.args.StandardSave(arrays)}
        items["manifest"] = ocp.args.JsonSave(seal(manifest))
        if positions:
            items["data"] = ocp.args.JsonSave(seal(positions))
        if step in self.steps():  # damaged, or left by a run that was taken back to before here
            self._manager.delete(step)
        self._keep.metrics[step] = manifest["metrics"]
        self._keep.damaged.discard(step)
        self._here = step
        with self._failure_is_told():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        return True

    def restore(
        self, example_state: Any = None, data_iterator: Any = None, step: int | str | None = None
    ) -> tuple[int, Any] | None:
        """Read a checkpoint onto the devices of an example.

        A damaged checkpoint is reported by a warning in the log, and the next older (for ``"best"``
        the next best) one is used instead.

        Args:
          example_state: pytree that says the result's structure, types and shardings by arrays or
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
        damaged = {}
        for candidate in self._candidates(step):
            failure = None
            try:
                state = self._read(candidate, example_state, data_iterator)
            except DamagedError as error:
                failure = error
            (anywhere,) = agreed([failure is not None])  # all go on from the same one
            if anywhere:
                error = failure or DamagedError("another process could not read it")
                damaged[candidate] = error
                where = self.directory / str(candidate)
                _log.warning("The checkpoint %s is damaged and not used (%s)", where, error)
                continue
            self._keep.damaged.update(damaged)
            self._here = candidate
            return candidate, state
        if damaged:
            raise OSError(
                f"no checkpoint in {self.directory} can be read (tried {[*damaged]}); move them "
                f"away to start anew; the first failed with {next(iter(damaged.values()))}"
            )
        return None

    def add_metrics(self, step: int, metrics: dict[str, float]):
        """Add to the metrics of a checkpoint that was written before they were known.

        Args:
          step: of a checkpoint, which may still be being written.
          metrics: numbers by name.

        Raises:
          OSError: where the checkpoint could not be written, or they could not be.
        """
        self.wait()
        manifest = self._read_json(step, "manifest")
        manifest["metrics"] |= {name: float(value) for name, value in metrics.items()}
        self._keep.metrics[step] = manifest["metrics"]
        if jax.process_index() == 0:
            with atomic_write(self.directory / str(step) / "manifest" / "metadata") as unfinished:
                unfinished.write_text(json.dumps(seal(manifest)))

    def wait(self):
        """Block until the last save is complete. Raises OSError where it could not be written."""
        with self._failure_is_told():
            self._manager.wait_until_finished()

    def close(self):
        """Complete the last save and end the background threads. Raises as :meth:`wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _candidates(self, step: int | str | None) -> list[int]:
        steps = self.steps()
        if step in (None, "latest"):
            return steps[::-1]
        if step == "best":
            ranked = self._keep.by_metric(steps)
            if steps and not ranked:
                metric = self._keep.best_metric
                raise ValueError(f'step "best" needs a checkpoint with the metric {metric!r}')
            return ranked
        if step not in steps:
            raise ValueError(f"step must be one of {steps} in {self.directory}; got {step!r}")
        return [step]

    def _read(self, step: int, example, data_iterator):
        with failure_is_damage():
            manifest = self._read_json(step, "manifest")
        example = examples_of(manifest) if example is None else example
        examples, tree = by_path(example), jax.tree.structure(example)
        where = self.directory / str(step)
        require_match(manifest, examples, where)
        processes = manifest["data_processes"]
        if data_iterator is not None and not processes:
            raise ValueError(f"data_iterator must be None: {where} has no position of the data")
        with failure_is_damage():
            positions = self._read_json(step, "data") if data_iterator is not None else []
        # Where all were at the same position of a common order, any number of them can go on.
        if len(set(positions)) == 1:
            positions = positions[:1] * jax.process_count()
        if data_iterator is not None and len(positions) != jax.process_count():
            raise ValueError(
                f"data_iterator must be None: {where} has the positions of {processes} processes "
                f"that read apart, and there are {jax.process_count()}"
            )
        with failure_is_damage():
            wanted = {path: to_read(leaf) for path, leaf in examples.items()}
            items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            arrays = self._manager.restore(step, args=items)["state"]
            require_undamaged(manifest, arrays)
        if positions:
            move_to(data_iterator, positions[jax.process_index()])
        generators = manifest["generators"]
        leaves = [as_example(arrays[p], leaf, generators.get(p)) for p, leaf in examples.items()]
        return jax.tree.unflatten(tree, leaves)

    def _read_json(self, step: int, item: str):
        args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        return unseal(self._manager.restore(step, args=args)[item])

    @contextlib.contextmanager
    def _failure_is_told(self):
        try:
            yield
        except Exception as error:
            step, self._here = self._here, None
            self._manager.reload()  # Orbax has forgotten those that would have been removed by now
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.directory} "
                f"({in_short(error)})"
            ) from error
