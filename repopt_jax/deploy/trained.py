"""A trained network and its preprocessing, from a run or from a weights file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
from etils import epath
from flax import nnx

from repopt_jax.deploy.image_set import configured_images
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.files import load_network
from repopt_jax.models.layers import check_numbers
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.config import PARTS, check_config, default_config
from repopt_jax.training.parts import draw_network
from repopt_jax.training.workdir import CONFIG, stored_classes
from repopt_jax.tree_paths import errors_at, path_str

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Paths in a checkpoint, for runs of versions that did not store their number of classes.
LAST_BIASES = ("params/linear/bias", "params/classifier/bias")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network in evaluation mode.

    Attributes:
      model: the network, of any kind.
      name: of the model, such as RepOpt-VGG-B1.
      preprocessing: what it expects of its images.
    """

    model: nnx.Module
    name: str
    preprocessing: Preprocessing


def run_config(workdir: epath.PathLike) -> ConfigDict:
    """The configuration that a run has left in its workdir; ValueError where there is none."""
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise ValueError(f"workdir must hold a run with its config.json, got {workdir}")
    config = default_config()
    try:
        config.update(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} must be the configuration of a run: {reason}") from None
    return config


def data_section(config: ConfigDict, part: str) -> ConfigDict:
    """The section of `config` that says which images a part was trained on."""
    return config[PARTS[part].section].data


def load_run(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    part: str = "target",
    checkpoint: Literal["latest", "best"] = "best",
    averaged: bool = False,
) -> Trained:
    """The network of a checkpoint of the run in `workdir`, local or ``gs://``.

    The run's images are read only if `config` leaves them their own size (`image_size` of None).

    Args:
      config: the run's configuration.
      workdir: the run's folder.
      part: the part whose network is wanted.
      checkpoint: "latest", or "best" by top-1 accuracy.
      averaged: take the moving averages of the weights.

    Raises:
      ValueError: there is no such part, checkpoint or average, or they do not fit `config`,
        or the network has numbers that are not finite.
      OSError: the checkpoints are damaged.
    """
    model, _ = load_part(config, workdir, part=part, checkpoint=checkpoint, averaged=averaged)
    data = data_section(config, part)
    side = data.image_size
    size = configured_images(data).size if side is None else (side, side)
    return Trained(
        model, config.model.name, Preprocessing(*size, tuple(data.mean), tuple(data.std))
    )


def load_part(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    part: str,
    checkpoint: Literal["latest", "best"] = "best",
    averaged: bool = False,
) -> tuple[nnx.Module, dict[str, Any]]:
    """The network of `load_run`, and the arguments of `create_model` that make it."""
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
    arguments = {name: value for name, value in config.model.items() if value is not None}
    arguments |= {"kind": PARTS[part].network, "num_classes": classes}
    model = _filled(config, part, classes, arrays, averaged)
    with errors_at(f"part {part!r} in {workdir}"):
        check_numbers(model)
    return model, arguments


def _filled(
    config: ConfigDict, part: str, classes: int, arrays: dict[str, jax.Array], averaged: bool
) -> nnx.Module:
    """The network of a part with the arrays of its checkpoint, in evaluation mode."""
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
    return nnx.merge(graphdef, *(filled[place] for place in places))


def load_weights_file(
    path: str | os.PathLike,
    preprocessing: Preprocessing,
    *,
    name: str | None = None,
    kind: str | None = None,
    strides: Sequence[int] | None = None,
) -> Trained:
    """The network of a PyTorch file, or of a safetensors file of converted weights.

    Args:
      path: the file.
      preprocessing: what the network expects of its images, which files do not state.
      name: of the model that it must hold. None: any.
      kind: of the network that it must hold. None: any.
      strides: of the stages, which files do not state. None: the published ones, 2 each.

    Raises:
      ValueError: the file is no such file, or holds another model or kind.
    """
    told = {} if strides is None else {"strides": tuple(strides)}
    model, facts = load_network(path, **told)
    if name not in (None, facts["name"]):
        raise ValueError(f"model must be {facts['name']!r} as in {path}, got {name!r}")
    # A search's network and one with constant scales have the same weights.
    searches = ("hs", "csla")
    kinds = searches if facts["kind"] in searches else (facts["kind"],)
    if kind not in (None, *kinds):
        raise ValueError(f"kind must be {' or '.join(kinds)} as in {path}, got {kind!r}")
    model.eval()
    return Trained(model, facts["name"], preprocessing)
