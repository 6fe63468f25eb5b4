"""Manifests: the types and fingerprints of a checkpoint's arrays.

A manifest lies beside the arrays. Before anything is read it shows whether a checkpoint fits;
afterwards it shows whether the checkpoint is undamaged.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from repopt_jax.branches.frozen import mixed_bits
from repopt_jax.training.processes import gathered
from repopt_jax.tree_paths import current_path

_UINTS = {8: jnp.uint8, 16: jnp.uint16}


class Damaged(Exception):
    """A checkpoint's files are incomplete or not what was written."""


@jax.jit
def fingerprint(x: jax.Array) -> jax.Array:
    """Hash the bits of an array to two uint32 numbers, the same ones for every sharding.

    Every element is hashed with its place, and the hashes are added. One changed element always
    shows; of other changes, one in 2**64 would not. The sums run where the array lies and need no
    memory of its size.

    Args:
      x: array of any shape and of a type of at least 8 bits per number.

    >>> a = jnp.array([1, 2, 3], jnp.uint32)
    >>> [bool(jnp.all(fingerprint(a) == fingerprint(b))) for b in (a.copy(), a[::-1], -a)]
    [True, False, False]
    """
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UINTS.get(x.dtype.itemsize * 8, jnp.uint32))
    bits = bits.astype(jnp.uint32)  # numbers of 64 bits have become pairs
    place = jnp.zeros_like(bits)
    for axis, size in enumerate(bits.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    first = _mixed(bits ^ _mixed(place))
    second = _mixed(first + np.uint32(1))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


# The constants of MurmurHash3, by which checkpoints have been hashed from the first.
_mixed = functools.partial(mixed_bits, shift=13, factors=(0x85EBCA6B, 0xC2B2AE35))


def _fingerprints(arrays: dict[str, jax.Array]) -> dict[str, list[int]]:
    # Each is waited for: where many programs that sum over devices are under way at once, the
    # devices of a CPU may wait for each other for ever.
    return {path: np.asarray(fingerprint(array)).tolist() for path, array in arrays.items()}


def is_key(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether it is a typed random key, which files hold as its plain data."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_saved(leaf: jax.Array) -> jax.Array:
    """The array as files hold it."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def current_name(path: str) -> str:
    """The name that a path has today, for paths of any version."""
    return current_path(path).removesuffix("/value")  # which nnx.Variable appends


def make_manifest(leaves: dict[str, jax.Array]) -> dict[str, Any]:
    """State the type and the fingerprint of every array, and the generator of random keys.

    Args:
      leaves: arrays by path, as `repopt_jax.tree_paths.by_path` returns them.

    Returns:
      A dict that JSON can hold.
    """
    return {
        "types": _types(leaves),
        "generators": {p: str(jax.random.key_impl(x)) for p, x in leaves.items() if is_key(x)},
        "fingerprints": _fingerprints({path: as_saved(leaf) for path, leaf in leaves.items()}),
    }


def read_manifest(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A saved manifest by the `current_name` of its arrays, and their saved names by that."""
    by_name = {
        key: {current_name(path): value for path, value in manifest[key].items()}
        for key in ("types", "generators", "fingerprints")
    }
    return manifest | by_name, {current_name(path): path for path in manifest["types"]}


def require_match(manifest: dict[str, Any], leaves: dict[str, Any], name: str) -> None:
    """Check that a checkpoint has the wanted paths, types and shapes.

    Args:
      manifest: from `read_manifest`.
      leaves: the wanted arrays, or ``jax.ShapeDtypeStruct``, by `current_name`.
      name: names the checkpoint in the error.

    Raises:
      ValueError: naming the first paths that differ.
    """
    saved, wanted = manifest["types"], _types(leaves)
    differing = {
        "not in the checkpoint": [path for path in wanted if path not in saved],
        "only in the checkpoint": [path for path in saved if path not in wanted],
        "of another type": [
            f"{path} ({saved[path]} saved, {wanted[path]} wanted)"
            for path in wanted
            if saved.get(path, wanted[path]) != wanted[path]
        ],
    }
    found = [
        f"{what}: {', '.join(paths[:3])}" + f" and {len(paths) - 3} more" * (len(paths) > 3)
        for what, paths in differing.items()
        if paths
    ]
    if found:
        raise ValueError(f"state must match the checkpoint {name}; {'; '.join(found)}")


def require_undamaged(manifest: dict[str, Any], arrays: dict[str, jax.Array]) -> None:
    """Raise ValueError, naming the first path, where arrays are not bit for bit what was saved.

    Args:
      manifest: from `read_manifest`.
      arrays: what was read, by `current_name`; random keys as their data.
    """
    prints = _fingerprints(arrays)
    for path, pair in manifest["fingerprints"].items():
        if prints[path] != pair:
            raise ValueError(f"the numbers of {path} are not those that were written")


def examples_of(manifest: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """What a checkpoint holds, by path.

    >>> examples_of(make_manifest({"params/bias": jnp.zeros(3, jnp.bfloat16)}))
    {'params/bias': ShapeDtypeStruct(shape=(3,), dtype=bfloat16)}
    """
    found = {}
    for path, described in manifest["types"].items():
        name, _, shape = described.partition("[")
        generator = manifest["generators"].get(path)
        dtype = jax.random.key(0, impl=generator).dtype if generator else name
        found[path] = jax.ShapeDtypeStruct(json.loads("[" + shape), dtype)
    return found


def to_read(example: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What to ask Orbax for: the shape, type and sharding of an example as files hold it.

    Args:
      example: one without a sharding means the first device.
    """
    sharding = example.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    example = jax.eval_shape(as_saved, example)
    return jax.ShapeDtypeStruct(example.shape, example.dtype, sharding=sharding)


def as_example(
    array: jax.Array, example: jax.Array | jax.ShapeDtypeStruct, generator: str | None
) -> jax.Array:
    """Restore what files do not hold: a random key's type, and independence of any one device.

    Args:
      array: what was read for :func:`to_read`.
      example: the same that was given there.
      generator: from the manifest; None for what is no random key.
    """
    if isinstance(example, jax.Array) and not example.committed:
        array = jnp.asarray(np.asarray(array))
    return jax.random.wrap_key_data(array, impl=generator) if generator else array


def seal(content: Any) -> dict[str, Any]:
    """Put a checksum beside something that JSON can hold.

    >>> unseal(seal({"top1": 0.5}))
    {'top1': 0.5}
    """
    return {"content": content, "crc32": _crc32(content)}


def unseal(sealed: dict[str, Any]) -> Any:
    """Return the content of :func:`seal`.

    Raises:
      ValueError: where the content differs from what was sealed.
    """
    if sealed["crc32"] != _crc32(sealed["content"]):
        raise ValueError("a JSON file is not what was written")
    return sealed["content"]


def positions_of(iterator: Any) -> list[str]:
    """Where the data iterator of every process is, as text."""
    state = iterator.get_state()
    return gathered(state.decode() if isinstance(state, bytes) else json.dumps(state))


def move_to(iterator: Any, position: str) -> None:
    """Set a data iterator to one of the `positions_of`."""
    as_bytes = isinstance(iterator.get_state(), bytes)  # Grain's DataLoader; its Dataset has dicts
    iterator.set_state(position.encode() if as_bytes else json.loads(position))


def _types(leaves) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _crc32(content) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextlib.contextmanager
def failure_is_damage():
    """Raise `Damaged` for whatever Orbax raises inside."""
    # Orbax raises errors of a dozen types for damaged files, plain Exception among them.
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # the device's trouble, not the files'
        raise
    except Exception as error:
        raise Damaged(in_short(error)) from error


def in_short(error: BaseException) -> str:
    """Type and first line of an error."""
    line = (str(error).splitlines() or [""])[0]
    if len(line) > 300:  # Orbax repeats long paths; the reason stands at either end
        line = f"{line[:150]} ... {line[-150:]}"
    return f"{type(error).__name__}: {line}"


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's, but small arrays that all devices hold are written by one of them.

    Orbax would slice every one of them between the devices, by a compiled program each.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


@functools.cache  # once
def quieten_orbax() -> None:
    """Leave out what Orbax logs and prints of failures that it raises as exceptions anyway."""

    def is_news(record: logging.LogRecord) -> bool:
        # Orbax logs every file at INFO, and at ERROR four tracebacks of what it raises anyway.
        return record.levelno == logging.WARNING or "orbax" not in record.pathname

    def is_of_others(record: logging.LogRecord) -> bool:
        # Where one read has failed, asyncio reports those beside it when it forgets them.
        text = record.getMessage().lower()
        of_orbax = any(name in text for name in ("orbax", "ocdbt", "tensorstore"))
        return not (of_orbax and "exception was never retrieved" in text)

    def report_unless_abandoned(unraisable) -> None:
        # TensorStore's threads end such reads later, and find the event loop closed.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    before, sys.unraisablehook = sys.unraisablehook, report_unless_abandoned
    logging.getLogger("absl").addFilter(is_news)
    logging.getLogger("asyncio").addFilter(is_of_others)
