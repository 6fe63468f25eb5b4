"""StableHLO files of any network: one file that JAX runs without the network's code.

The file is a zip archive of ``network.bin``, what `jax.export` serializes with the weights inside
and any batch size, and ``metadata.json``. JAX promises to read such files for six months after the
version that wrote them; keep the checkpoint or an ONNX file for longer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

import repopt_jax
from repopt_jax.atomic_write import atomic_write
from repopt_jax.deploy.preprocessing import Preprocessing
from repopt_jax.models.layers import check_numbers

if TYPE_CHECKING:
    from jaxtyping import Array

FORMAT_VERSION = "1"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class StableHLO:
    """A network read from a file.

    Attributes:
      call: from NHWC images, uint8 or normalized as `preprocessing` says, to logits.
      preprocessing: of the images.
      metadata: text by name.
    """

    call: Callable[[Array], Array]
    preprocessing: Preprocessing
    metadata: dict[str, str]


def export_stablehlo(
    path: str | os.PathLike,
    model: nnx.Module,
    preprocessing: Preprocessing,
    *,
    name: str,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Write a network to a file, which appears when it is complete.

    Args:
      path: file to write.
      model: any network from NHWC images to logits, exported in evaluation mode; `fold` it first
        where that makes it faster.
      preprocessing: of its images.
      name: of the model, for the metadata.
      platforms: where the file is to run.

    Raises:
      ValueError: the network has numbers that are not finite.

    >>> import tempfile
    >>> model = nnx.Sequential(lambda x: x.mean((1, 2)), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_stablehlo(f"{folder}/net.zip", model, Preprocessing(8, 8), name="mine")
    ...     loaded = load_stablehlo(f"{folder}/net.zip")
    >>> loaded.call(jnp.zeros((5, 8, 8, 3), jnp.uint8)).shape, loaded.metadata["model"]
    ((5, 2), 'mine')
    """
    check_numbers(model)
    model = nnx.clone(model)
    model.eval()
    graphdef, state = nnx.split(model)

    def run(images):
        return nnx.merge(graphdef, state)(preprocessing(images) if preprocessing.inside else images)

    shape = (*jax.export.symbolic_shape("batch"), *preprocessing.size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if preprocessing.inside else jnp.float32)
    exported = jax.export.export(jax.jit(run), platforms=tuple(platforms))(images)
    metadata = {
        "format_version": FORMAT_VERSION,
        "repopt_jax_version": repopt_jax.__version__,
        "jax_version": jax.__version__,
        "model": name,
        "num_classes": str(exported.out_avals[0].shape[-1]),
        **preprocessing.metadata(),
    }
    # Weights do not compress: stored as they are.
    with atomic_write(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        archive.writestr("metadata.json", json.dumps(metadata, indent=2))
        archive.writestr("network.bin", bytes(exported.serialize()))


def load_stablehlo(path: str | os.PathLike) -> StableHLO:
    """Read what `export_stablehlo` wrote.

    Raises:
      ValueError: the file is another, damaged, or of another version of the format.
      FileNotFoundError: there is no file.
    """
    where = repr(os.fspath(path))
    try:
        with zipfile.ZipFile(path) as archive:
            metadata = json.loads(archive.read("metadata.json"))
            network = archive.read("network.bin")
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(
            f"path must be a file written by export_stablehlo, {where} is not ({error})"
        ) from None
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"path must have the format version {FORMAT_VERSION}, {where} has {version}"
        )
    try:
        exported = jax.export.deserialize(bytearray(network))
    except Exception as error:  # JAX raises errors of many classes, such as struct.error
        raise ValueError(f"path must be an undamaged file, {where} is not") from error
    return StableHLO(jax.jit(exported.call), Preprocessing.from_metadata(metadata), metadata)
