"""Files of scales and of weights, opened by their content: safetensors or PyTorch.

The suffix of a file does not matter. Paths are local or ``gs://``.
A weights file of ours is a safetensors file with one array per path of a variable, such as
``stage1/0/conv/kernel``, and the arguments of `create_model` as metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from repopt_jax.atomic_write import atomic_write
from repopt_jax.messages import listed, quote
from repopt_jax.models.create import FAMILIES, Network
from repopt_jax.models.layers import check_numbers
from repopt_jax.scales import (
    FORMAT_VERSION,
    Scales,
    check_own,
    parse_safetensors,
    parse_scales,
)
from repopt_jax.torch_files import load_torch_scales
from repopt_jax.torch_files.weights import fill, load_torch_network, unfilled_model, variables
from repopt_jax.tree_paths import current_path, errors_at

# What a weights file says of its network beside the options of its family.
FACTS = {"name", "kind", "num_classes"}


def has_torch_names(path: str | os.PathLike, *, what: str = "path") -> bool:
    """Whether the arrays of a file have torch's names; else the file is one of ours.

    A torch file has them, and so has a safetensors file that states no format version, as other
    packages write it.

    Args:
      path: the file.
      what: the argument's name, for messages.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is of neither format.
    """
    source = epath.Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{what} must be an existing file, got {os.fspath(path)}")
    with source.open("rb") as file:
        head = file.read(262)
        if head[8:9] == b"{":  # after its length, the header of a safetensors file is JSON
            file.seek(8)
            header = file.read(min(int.from_bytes(head[:8], "little"), 100 << 20))
            return b'"format_version"' not in header
        if head.startswith((b"PK", b"\x80")) or head[257:] == b"ustar":
            return True
    raise ValueError(
        f"{os.fspath(path)!r} must be a safetensors or a torch file, got one that starts with "
        f"{head[:16]!r}"
    )


def load_scales(path: str | os.PathLike) -> Scales:
    """Read scales from a file of ours, or from one of torch as `load_torch_scales` does.

    Args:
      path: a safetensors or torch file of any name, local or ``gs://``.

    Raises:
      ValueError: the file holds no scales.
      FileNotFoundError: there is no such file.

    >>> import repopt_jax, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/s.safetensors"
    ...     repopt_jax.save_scales(path, Scales({"conv": {"full": np.ones(2)}}))
    ...     load_scales(path) == Scales({"conv": {"full": np.ones(2)}}, {"format_version": "1"})
    True
    """
    if has_torch_names(path, what="scales"):
        return load_torch_scales(path)
    return parse_scales(epath.Path(path).read_bytes(), os.fspath(path))


def save_weights(path: str | os.PathLike, model: nnx.Module, arguments: Mapping[str, Any]) -> None:
    """Write a weights file, replacing `path` only once it is complete.

    Args:
      path: the file.
      model: a network of any kind.
      arguments: those of `create_model` that make this network, but for its types.
    """
    save_arrays(path, variables(model), _facts(arguments))


def weights_bytes(model: nnx.Module, arguments: Mapping[str, Any]) -> bytes:
    """What `save_weights` writes."""
    return _serialized(variables(model), _facts(arguments))


def _facts(arguments: Mapping[str, Any]) -> dict[str, str]:
    facts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    return {"format_version": FORMAT_VERSION, **facts}


def save_arrays(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, replacing `path` only once it is complete."""
    data = _serialized(arrays, metadata)
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(data)


def _serialized(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None) -> bytes:
    from safetensors.numpy import save

    return save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata)


def load_weights(path: str | os.PathLike, **options: Any) -> Network:
    """The network of a weights file, or of a torch file as `load_torch_weights` makes it.

    Args:
      path: a file that ``repopt-convert --weights`` or torch wrote; local or ``gs://``.
      **options: of `create_model`, such as bn_group; they take the place of those in the file.

    Raises:
      ValueError: it is no such file, does not fit the network that it names, or has numbers that
        are not finite.
      FileNotFoundError: there is no such file.
    """
    return load_network(path, **options)[0]


def load_network(path: str | os.PathLike, **options: Any) -> tuple[Network, dict[str, Any]]:
    """`load_weights`, with the arguments of `create_model` that make this network."""
    if has_torch_names(path, what="weights"):
        return load_torch_network(path, **options)
    tensors, stated = read_weights(path)
    arguments = stated | options
    dtype = next(iter(tensors.values())).dtype
    with errors_at(f"{os.fspath(path)!r} cannot be used"):
        model = unfilled_model(**{"param_dtype": dtype} | arguments)
        wanted = {name: variable.shape for name, variable in variables(model).items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        names = wanted.keys() | found.keys()
        if different := sorted(k for k in names if wanted.get(k) != found.get(k)):
            raise ValueError(f"it does not fit its network, in {listed(different, ', ')}")
        check_numbers(fill(model, tensors))
    return model, arguments


def read_weights(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The variables by path in a weights file, and its network's arguments of `create_model`.

    Raises:
      ValueError: it is no weights file.
    """
    name = os.fspath(path)
    tensors, metadata = parse_safetensors(epath.Path(path).read_bytes(), name)
    if "kind" not in metadata or not tensors:
        raise ValueError(f"{name!r} must be a weights file, got one of other arrays")
    check_own(tensors, metadata, name)
    known = FACTS.union(*((*f.needed, *f.options) for f in FAMILIES.values()))
    arguments = {}
    for fact in sorted(metadata.keys() - {"format_version"}):
        value = metadata[fact]
        try:
            if fact not in known:
                raise ValueError
            arguments[fact] = value if fact in ("name", "kind") else json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(
                f"metadata of {name!r} must state its network, got {quote(fact)}: {quote(value)}"
            ) from None
    blocks = arguments.get("num_blocks")
    blocks = blocks if isinstance(blocks, list) else []
    if all(isinstance(n, int) for n in blocks) and sum(blocks) > len(tensors):
        # Building so many would take long.
        raise ValueError(f"{name!r} must have arrays for each of num_blocks, got {len(tensors)}")
    return {current_path(k): v for k, v in tensors.items()}, arguments
