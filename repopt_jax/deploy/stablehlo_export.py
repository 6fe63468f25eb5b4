"""StableHLO files of any network: one file that JAX runs without the network's code.

The file is a zip archive of ``network.bin``, what `jax.export` serializes with the weights inside
and any batch size, and ``metadata.json``. JAX promises to read ``network.bin`` for six months, and
not with every version after that. So the metadata name the day and the version of JAX, the command
line keeps ``weights.safetensors`` beside it, and ``repopt-deploy export NEW.stablehlo
--weights=OLD.stablehlo`` makes a new file of those.
"""

from __future__ import annotations

import dataclasses
import datetime
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
from repopt_jax.models.checks import check_numbers

if TYPE_CHECKING:
    from jaxtyping import Array

FORMAT_VERSION = "1"
PLATFORMS = ("cpu", "cuda", "tpu")
READABLE = datetime.timedelta(days=180)  # what JAX promises
NETWORK, METADATA, WEIGHTS = "network.bin", "metadata.json", "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class StableHLO:
    """A network read from a file.

    Attributes:
      call: from NHWC images, uint8 or normalized as `preprocessing` says, to its outputs.
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
    weights: bytes | None = None,
) -> None:
    """Write a network to a file, which appears when it is complete.

    Args:
      path: file to write.
      model: any network from NHWC images to logits or feature maps, exported in evaluation mode;
        `fold` it first where that makes it faster.
      preprocessing: of its images.
      name: of the model, for the metadata.
      platforms: where the file is to run.
      weights: of `repopt_jax.files.weights_bytes`, of which the command line can make the file
        anew. None: it cannot.

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
    outputs = exported.out_avals
    metadata = {
        "format_version": FORMAT_VERSION,
        "repopt_jax_version": repopt_jax.__version__,
        "jax_version": jax.__version__,
        "date": _today().isoformat(),
        "model": name,
        # The channels of feature maps, of which a network gives several, are no classes.
        **({"num_classes": str(outputs[0].shape[-1])} if len(outputs) == 1 else {}),
        **preprocessing.metadata(),
    }
    # Weights do not compress: stored as they are.
    with atomic_write(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        archive.writestr(METADATA, json.dumps(metadata, indent=2))
        archive.writestr(NETWORK, bytes(exported.serialize()))
        if weights is not None:
            archive.writestr(WEIGHTS, weights)


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def load_stablehlo(path: str | os.PathLike) -> StableHLO:
    """Read what `export_stablehlo` wrote.

    Raises:
      ValueError: the file is another, damaged, of another version of the format, or so old that
        this version of JAX may read it wrongly; the message says how to make a new one.
      FileNotFoundError: there is no file.
    """
    metadata, network, weights = read_stablehlo(path)
    written = datetime.date.fromisoformat(metadata["date"])
    if _today() - written > READABLE and metadata["jax_version"] != jax.__version__:
        source = os.fspath(path) if weights else None
        source = f"--weights={source}" if source else "--workdir=RUN"
        raise ValueError(
            f"path must be a file of the last {READABLE.days} days or of JAX {jax.__version__}, "
            f"got {os.fspath(path)!r} of {written} and JAX {metadata['jax_version']}; "
            f"make a new one: repopt-deploy export NEW.stablehlo {source}"
        )
    try:
        exported = jax.export.deserialize(bytearray(network))
    except Exception as error:  # JAX raises errors of many classes, such as struct.error
        raise ValueError(f"path must be an undamaged file, {os.fspath(path)!r} is not") from error
    return StableHLO(jax.jit(exported.call), Preprocessing.from_metadata(metadata), metadata)


def read_stablehlo(path: str | os.PathLike) -> tuple[dict[str, str], bytes, bytes | None]:
    """The metadata, the program and the weights file in a file; weights are None without one.

    Raises:
      ValueError: the file is another, or of another version of the format.
      FileNotFoundError: there is no file.
    """
    where = repr(os.fspath(path))
    try:
        with zipfile.ZipFile(path) as archive:
            metadata = json.loads(archive.read(METADATA))
            network = archive.read(NETWORK)
            weights = archive.read(WEIGHTS) if WEIGHTS in archive.namelist() else None
            # Files of before the metadata had the date.
            written = datetime.date(*archive.getinfo(NETWORK).date_time[:3])
        metadata = {"date": written.isoformat(), "jax_version": "unknown", **metadata}
        datetime.date.fromisoformat(metadata["date"])
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"path must be a file written by export_stablehlo, {where} is not ({error})"
        ) from None
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"path must have the format version {FORMAT_VERSION}, {where} has {version}"
        )
    return metadata, network, weights
