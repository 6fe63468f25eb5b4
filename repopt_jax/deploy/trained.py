"""A trained network and its preprocessing, from a run or from a weights file."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from etils import epath
from flax import nnx

from repopt_jax.deploy.image_set import configured_images
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.deploy.stablehlo_export import WEIGHTS, read_stablehlo
from repopt_jax.files import load_network
from repopt_jax.training.config import PARTS, default_config
from repopt_jax.training.trained import load_part
from repopt_jax.training.workdir import CONFIG

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network in evaluation mode.

    Attributes:
      model: the network, of any kind.
      name: of the model, such as RepOpt-VGG-B1.
      preprocessing: what it expects of its images.
      arguments: those of `create_model` that make the network, without its weights. None: it is in
        simulated INT8, which no such arguments make.
    """

    model: nnx.Module
    name: str
    preprocessing: Preprocessing
    arguments: dict[str, Any] | None = None


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

    The arguments and the errors are those of `load_part`.
    """
    model, arguments = load_part(
        config, workdir, part=part, checkpoint=checkpoint, averaged=averaged
    )
    data = data_section(config, part)
    side = data.image_size
    size = configured_images(data).size if side is None else (side, side)
    preprocessing = Preprocessing(*size, tuple(data.mean), tuple(data.std))
    return Trained(model, config.model.name, preprocessing, arguments)


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
    return Trained(model, facts["name"], preprocessing, facts)


def load_stablehlo_weights(path: str | os.PathLike) -> Trained:
    """The network that a StableHLO file was made of.

    Raises:
      ValueError: it is another file, or keeps no weights.
    """
    metadata, _, weights = read_stablehlo(path)
    if weights is None:
        raise ValueError(f"weights must be a file that keeps them, got {os.fspath(path)!r} without")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / WEIGHTS
        file.write_bytes(weights)
        return load_weights_file(file, Preprocessing.from_metadata(metadata))
