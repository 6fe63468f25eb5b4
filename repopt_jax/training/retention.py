"""Which checkpoints to keep."""

import math
from collections.abc import Iterable

from orbax.checkpoint.checkpoint_managers import PreservationPolicy


class KeepLatestAndBest(PreservationPolicy):
    """Keeps the latest checkpoints and the best one.

    Orbax asks when it begins to write a checkpoint, and deletes the others when that is complete.

    Args:
      latest: how many of the latest to keep.
      best: whether to keep the one with the highest ``best_metric``.
      best_metric: a name among the metrics.

    ``metrics`` (numbers by name, by step) and ``damaged`` (steps that could not be read, which do
    not count and are not kept) are filled in by the owner.
    """

    def __init__(self, latest: int, best: bool, best_metric: str):
        self.latest, self.best, self.best_metric = latest, best, best_metric
        self.metrics: dict[int, dict[str, float]] = {}
        self.damaged: set[int] = set()

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Say of each checkpoint, the one being written last, whether to keep it."""
        newest = checkpoints[-1].step  # higher steps are of a run that was taken back to before it
        good = [c.step for c in checkpoints if c.step <= newest and c.step not in self.damaged]
        keep = {*sorted(good)[-self.latest :], *self.by_metric(good)[: int(self.best)]}
        return [c.step in keep for c in checkpoints]

    def by_metric(self, steps: Iterable[int]) -> list[int]:
        """The steps that have the metric, the best first; of equals, the earlier first."""
        values = {s: self.metrics.get(s, {}).get(self.best_metric, math.nan) for s in steps}
        known = [s for s in values if not math.isnan(values[s])]
        return sorted(known, key=lambda s: (-values[s], s))
