"""Small data sets that lie on the devices: the host sends what it draws, not images.

Every device holds the whole set. It is small; split over the devices, it would have to be sent
around in every step, because an epoch's order sends any image to any device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repopt_jax.data.augment import FlipCrop, preset
from repopt_jax.data.batches import in_memory
from repopt_jax.data.sources import ArraySource
from repopt_jax.training.step import StepOptions, TrainState, train_step

if TYPE_CHECKING:
    from jaxtyping import Array, Int, UInt8
    from ml_collections import ConfigDict

    from repopt_jax.data import Dataset


def belongs_on_device(data: ConfigDict, dataset: Dataset, mesh: Mesh) -> bool:
    """Whether the images of a part are to lie on its devices.

    ``auto`` puts them there on GPUs and TPUs, where they fit. On CPU there is nothing to send, and
    XLA's convolutions are many times slower in a loop, so that a program does one step.

    Args:
      data: the section `data` of the part's configuration.
      dataset: the images.
      mesh: the devices.

    Raises:
      ValueError: `data.on_device` is ``always`` for images that cannot lie on a device.
    """
    obstacle = why_not_on_device(data, dataset)
    if data.on_device == "always" and obstacle:
        raise ValueError(f"on_device must be 'auto' or 'never', because {obstacle}, got 'always'")
    if data.on_device == "auto":
        if obstacle or mesh.devices.flat[0].platform == "cpu":
            return False
        size = dataset.train.images.nbytes + dataset.eval.images.nbytes
        return size <= data.on_device_bytes
    return data.on_device == "always"


def why_not_on_device(data: ConfigDict, dataset: Dataset) -> str | None:
    """Why the images of a part cannot lie on its devices. None: they can."""
    if not all(in_memory(source, data.image_size) for source in (dataset.train, dataset.eval)):
        return "only images of one size that are held in memory can lie on a device"
    if not isinstance(preset(data.augment), FlipCrop):
        return f"augment {data.augment!r} needs the host"
    if data.eval_resize is not None:
        return f"eval_resize {data.eval_resize} needs the host"
    return None


def put_images(mesh: Mesh, source: ArraySource) -> dict[str, jax.Array]:
    """The images and labels of a source, whole on every device; all processes call it."""
    whole = NamedSharding(mesh, PartitionSpec())
    arrays = {"image": source.images, "label": source.labels}
    return {k: jax.make_array_from_process_local_data(whole, x) for k, x in arrays.items()}


def take(images: dict[str, Array], index: Int[Array, " batch"]) -> dict[str, Array]:
    """The images and labels at `index`.

    >>> images = {"image": jnp.arange(3)[:, None], "label": jnp.array([5, 6, 7])}
    >>> take(images, jnp.array([2, 0]))["label"].tolist()
    [7, 5]
    """
    return {name: x.at[index].get(mode="promise_in_bounds") for name, x in images.items()}


jitted_take = jax.jit(take)


def crop_and_flip(
    images: UInt8[Array, "batch height width channels"], draws: Int[Array, "batch 3"], padding: int
) -> UInt8[Array, "batch height width channels"]:
    """What `FlipCrop.batch` makes of the same draws, bit for bit.

    Args:
      images: of one size.
      draws: top and left edge of each crop, and 1 where to flip.
      padding: black pixels added on every side before the crop.

    >>> image = jnp.array([[[[1], [2]], [[3], [4]]]], jnp.uint8)
    >>> crop_and_flip(image, jnp.array([[0, 1, 1]]), padding=1)[0, ..., 0].tolist()
    [[0, 0], [2, 1]]
    """
    if padding:
        sides = (padding, padding)
        padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))

        def crop(image, corner):
            places = (*corner, jnp.zeros_like(corner[0]))
            return jax.lax.dynamic_slice(image, places, images.shape[1:])

        images = jax.vmap(crop)(padded, draws[:, :2])
    return jnp.where(draws[:, 2, None, None, None] == 1, images[:, :, ::-1], images)


def train_chunk(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    options: StepOptions,
    padding: int,
    state: TrainState,
    images: dict[str, Array],
    drawn: dict[str, Array],
    count: Int[Array, ""],
) -> tuple[TrainState, dict[str, Array]]:
    """Several updates in one program, each as `train_step` does it.

    Args:
      graphdef: as for `train_step`.
      tx: likewise.
      options: likewise.
      padding: of the crops.
      state: before the first update.
      images: of the whole set, from `put_images`.
      drawn: ``index`` (steps, batch) and ``draw`` (steps, batch, 3).
      count: how many of the steps to do; a number on the device, so that chunks of all lengths
        are one program. Not used where there is one step.

    Returns:
      The new state, and the metrics of `train_step` for every step, zeros for those not done.
    """
    steps = len(drawn["index"])

    def update(number, carry):
        state, metrics = carry
        batch = take(images, drawn["index"][number])
        batch["image"] = crop_and_flip(batch["image"], drawn["draw"][number], padding)
        state, found = train_step(graphdef, tx, options, state, batch)
        return state, {name: x.at[number].set(found[name]) for name, x in metrics.items()}

    none = {name: jnp.zeros(steps, jnp.float32) for name in ("loss", "top1")}
    if steps == 1:
        return update(0, (state, none))
    return jax.lax.fori_loop(0, count, update, (state, none))


jitted_train_chunk = jax.jit(train_chunk, static_argnums=(0, 1, 2, 3), donate_argnums=4)


def put_draws(mesh: Mesh, drawn: list[dict[str, np.ndarray]], steps: int) -> dict[str, jax.Array]:
    """This process's draws of some steps as global arrays of `steps` steps, filled up with zeros.

    Every device gets those of its part of each batch.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))

    def put(name):
        first = drawn[0][name]
        stacked = np.zeros((steps, *first.shape), np.int32)
        for row, draws in enumerate(drawn):
            stacked[row] = draws[name]
        return jax.make_array_from_process_local_data(sharding, stacked)

    return {name: put(name) for name in ("index", "draw")}
