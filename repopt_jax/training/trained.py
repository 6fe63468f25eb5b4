"""The network of a part that has been trained, from its checkpoint."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
from etils import epath
from flax import nnx

from repopt_jax.models.checks import check_numbers
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.config import PARTS, check_config
from repopt_jax.training.networks import draw_network
from repopt_jax.training.workdir import stored_classes
from repopt_jax.tree_paths import errors_at, path_str

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Paths in a checkpoint, for runs of versions that did not store their number of classes.
LAST_BIASES = ("params/linear/bias", "params/classifier/bias")


def load_part(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    part: str,
    checkpoint: Literal["latest", "best"] = "best",
    averaged: bool = False,
) -> tuple[nnx.Module, dict[str, Any] | None]:
    """The network of a checkpoint of the run in `workdir`, in evaluation mode.

    It comes with the arguments of `create_model` that make it; None for a network in simulated
    INT8, which none make.

    Args:
      config: the run's configuration.
      workdir: the run's folder, local or ``gs://``.
      part: the part whose network is wanted.
      checkpoint: "latest", or "best" by top-1 accuracy.
      averaged: take the moving averages of the weights.

    Raises:
      ValueError: there is no such part, checkpoint or average, or they do not fit `config`,
        or the network has numbers that are not finite.
      OSError: the checkpoints are damaged.
    """
    folder = epath.Path(workdir) / part
    if part not in PARTS or not (folder / "checkpoints").is_dir():
        raise ValueError(f"part must have checkpoints in {workdir}, got {part!r}")
    check_config(config)
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        restored = checkpoints.restore(step=checkpoint)
    if restored is None:
        raise ValueError(f"part must have a checkpoint in {workdir}, got {part!r} without one")
    _, arrays = restored
    if averaged and not any(path.startswith("ema/") for path in arrays):
        raise ValueError(f"averaged must be False for {part!r}, which was trained without averages")
    classes = stored_classes(workdir, part)
    if classes is None:
        classes = next(arrays[path].size for path in LAST_BIASES if path in arrays)
    draw = functools.partial(draw_network, config, PARTS[part], None)
    model = nnx.eval_shape(functools.partial(draw, num_classes=classes, bn_group=1))
    model.eval()
    graphdef, *states = nnx.split(model, nnx.Param, ...)

    def stored(path, leaf):
        path = path_str(path)
        shape = arrays[path].shape if path in arrays else None
        if shape != leaf.shape:
            raise ValueError(
                f"model must be that of the checkpoint of {part!r}, where {path} has the shape "
                f"{shape}, got one with {leaf.shape}"
            )
        return arrays[path]

    places = ("ema/0", "ema/1") if averaged else ("params", "stats")
    filled = jax.tree_util.tree_map_with_path(stored, dict(zip(places, states, strict=True)))
    model = nnx.merge(graphdef, *(filled[place] for place in places))
    with errors_at(f"part {part!r} in {workdir}"):
        check_numbers(model)
    if PARTS[part].tunes:
        return model, None
    arguments = {name: value for name, value in config.model.items() if value is not None}
    return model, {**arguments, "kind": PARTS[part].network, "num_classes": classes}
