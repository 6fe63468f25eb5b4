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

if TYPE_CHECKING:
    from jaxtyping import Array

FORMAT_VERSION = "1"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class StableHLO:
    """A network read from a file.

    Attributes:
      call: from a batch of images, uint8 or normalized as `preprocessing` says, NHWC, to logits.
      preprocessing: what it expects of its images.
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
      model: any network from NHWC images to logits; it is exported as it is in evaluation, so
        `fold` it first where that makes it faster.
      preprocessing: what it expects of its images.
      name: of the model, for the metadata.
      platforms: the platforms that the file is to run on.

    >>> import tempfile
    >>> model = nnx.Sequential(lambda x: x.mean((1, 2)), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_stablehlo(f"{folder}/net.zip", model, Preprocessing(8, 8), name="mine")
    ...     loaded = load_stablehlo(f"{folder}/net.zip")
    >>> loaded.call(jnp.zeros((5, 8, 8, 3), jnp.uint8)).shape, loaded.metadata["model"]
    ((5, 2), 'mine')
    """
    model = nnx.clone(model)
    model.eval()
    graphdef, state = nnx.split(model)

    def run(images):
        if preprocessing.inside:
            vectors = (preprocessing.shift, preprocessing.factor)
            shift, factor = (jnp.asarray(v).reshape(1, 1, 1, 3) for v in vectors)
            images = (images.astype(jnp.float32) - shift) * factor
        return nnx.merge(graphdef, state)(images)

    (batch,) = jax.export.symbolic_shape("batch")
    shape = (batch, preprocessing.height, preprocessing.width, 3)
    dtype = jnp.uint8 if preprocessing.inside else jnp.float32
    exported = jax.export.export(jax.jit(run), platforms=tuple(platforms))(
        jax.ShapeDtypeStruct(shape, dtype)
    )
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
      ValueError: it is no such file, is damaged, or has another version of the format.
      FileNotFoundError: there is no file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            metadata = json.loads(archive.read("metadata.json"))
            network = archive.read("network.bin")
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(
            f"path must be a file written by export_stablehlo, {os.fspath(path)!r} is not ({error})"
        ) from None
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"path must have the format version {FORMAT_VERSION}, {os.fspath(path)!r} has "
            f"{metadata.get('format_version')}"
        )
    try:
        exported = jax.export.deserialize(bytearray(network))
    except Exception as error:  # JAX raises errors of many classes, such as struct.error
        raise ValueError(f"path must be an undamaged file, {os.fspath(path)!r} is not") from error
    return StableHLO(jax.jit(exported.call), Preprocessing.from_metadata(metadata), metadata)
