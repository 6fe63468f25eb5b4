"""What a checkpoint holds: the type and the fingerprint of every array, by its path.

A manifest is written beside the arrays. Comparing it with what is wanted tells, before anything is
read, whether a checkpoint fits; comparing it with what was read tells whether it is undamaged.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UINTS = {8: jnp.uint8, 16: jnp.uint16}


def _mix(bits: jax.Array) -> jax.Array:
    """Spread every bit of uint32 numbers over all 32, one to one (the end of MurmurHash3)."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))


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
    first = _mix(bits ^ _mix(place))
    second = _mix(first + np.uint32(1))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their slash-joined paths.

    >>> by_path({"conv": {"kernel": 1}, "momentum": (2, None)})
    {'conv/kernel': 1, 'momentum/0': 2}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def is_key(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether it is a typed random key, which files hold as its plain data."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def make_manifest(leaves: dict[str, jax.Array]) -> dict[str, Any]:
    """State the type, the fingerprint and, of random keys, the generator, of every array.

    Args:
      leaves: arrays by path, as :func:`by_path` returns them.

    Returns:
      A dict that JSON can hold.
    """
    prints = {p: fingerprint(jax.random.key_data(x) if is_key(x) else x) for p, x in leaves.items()}
    return {
        "types": _types(leaves),
        "generators": {p: str(jax.random.key_impl(x)) for p, x in leaves.items() if is_key(x)},
        "fingerprints": {path: pair.tolist() for path, pair in jax.device_get(prints).items()},
    }


def require_match(manifest: dict[str, Any], leaves: dict[str, Any], name: str):
    """Check that a checkpoint has the wanted paths, types and shapes.

    Args:
      manifest: from :func:`make_manifest`.
      leaves: the wanted arrays, or ``jax.ShapeDtypeStruct``, by path.
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
    told = [
        f"{what}: {', '.join(paths[:3])}" + f" and {len(paths) - 3} more" * (len(paths) > 3)
        for what, paths in differing.items()
        if paths
    ]
    if told:
        raise ValueError(f"state must match the checkpoint {name}; {'; '.join(told)}")


def require_undamaged(manifest: dict[str, Any], arrays: dict[str, jax.Array]):
    """Check that the arrays are, bit for bit, those the manifest was made of.

    Args:
      manifest: from :func:`make_manifest`.
      arrays: what was read, by path; random keys as their data.

    Raises:
      ValueError: naming the first path that differs.
    """
    prints = jax.device_get({path: fingerprint(array) for path, array in arrays.items()})
    for path, pair in manifest["fingerprints"].items():
        if prints[path].tolist() != pair:
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
    """What to ask Orbax for: the example's shape, type and sharding; a random key's data.

    Args:
      example: one without a sharding means the first device.
    """
    sharding = example.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if is_key(example):
        example = jax.eval_shape(jax.random.key_data, example)
    return jax.ShapeDtypeStruct(example.shape, example.dtype, sharding=sharding)


def as_example(array: jax.Array, example, generator: str | None) -> jax.Array:
    """Give back what files do not hold: a random key's type, and freedom from any one device.

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


def _types(leaves) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _crc32(content) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
