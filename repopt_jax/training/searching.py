"""The scales along a search: one file per evaluation, so that its length can be studied.

``<workdir>/search/scales/<step>.safetensors``; each can be given to ``--config.scales``.
"""

from __future__ import annotations

from typing import Any

import jax
from etils import epath
from flax import nnx

from repopt_jax.models import searched_scales
from repopt_jax.scales import Scales, load_scales, save_scales
from repopt_jax.training.devices import replicate
from repopt_jax.training.parts import Part
from repopt_jax.training.step import TrainState


def scales_of(part: Part, state: TrainState, step: int, measured: dict[str, Any]) -> Scales:
    """The scales of a search network in training, with where they come from as metadata.

    Args:
      part: the search.
      state: its state, on any devices.
      step: number of updates done.
      measured: has ``eval/top1``.
    """
    model = nnx.merge(part.graphdef, *replicate(part.mesh, (state.params, state.stats)))
    metadata = {
        "model": part.config.model.name,
        "source": "search",
        "dataset": part.dataset.name,
        "epochs": f"{step / part.steps_per_epoch:g}",
        "top1": f"{measured['eval/top1']:.2f}",
    }
    return searched_scales(model, metadata)


def save_along(part: Part, state: TrainState, step: int, measured: dict, workdir: epath.Path):
    """Write the scales of this moment beside those of the moments before."""
    scales = scales_of(part, state, step, measured)
    if jax.process_index() == 0:
        folder = workdir / "scales"
        folder.mkdir(parents=True, exist_ok=True)
        save_scales(folder / f"{step}.safetensors", scales)


def load_along(workdir: epath.PathLike) -> dict[float, Scales]:
    """The scales that `save_along` has written, by epoch and in its order."""
    files = sorted(
        (epath.Path(workdir) / "scales").glob("*.safetensors"), key=lambda file: int(file.stem)
    )
    found = [load_scales(file) for file in files]
    return {float(scales.metadata["epochs"]): scales for scales in found}
