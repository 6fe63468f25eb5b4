"""Weights between torch state dicts and our networks, both ways and bit for bit."""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from repopt_jax.messages import listed
from repopt_jax.models import create_model
from repopt_jax.models.checks import bad_numbers
from repopt_jax.models.create import Network, family_of
from repopt_jax.torch_files.modules import Weights, read_torch_weights, usable
from repopt_jax.torch_files.names import (
    DIALECTS,
    OFFICIAL,
    from_torch,
    to_official,
    to_torch,
    torch_name,
)
from repopt_jax.torch_files.recognition import recognize
from repopt_jax.tree_paths import path_str


def variables(model: nnx.Module) -> dict[str, jax.Array]:
    """Every variable of `model` by its path, as a weights file holds them."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model))
    return {path_str(path): value for path, value in leaves}


def fill(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> nnx.Module:
    """Give every variable of `model` the array of its path, cast to its type; returns `model`."""
    new = jax.tree_util.tree_map_with_path(
        lambda path, old: jax.numpy.asarray(arrays[path_str(path)], old.dtype), nnx.state(model)
    )
    nnx.update(model, new)
    return model


def import_weights(model: nnx.Module, weights: Mapping[str, np.ndarray]) -> nnx.Module:
    """Fill every variable of `model` from a torch state dict, in place.

    Args:
      model: a network of any kind; values are cast to its types.
      weights: torch name -> array of floats, in torch's layout (OIHW), under the official names
        or those of any of `DIALECTS`.

    Returns:
      `model`.

    Raises:
      ValueError: one message with the variables without a source, the sources without a variable,
        the wrong shapes and the tensors with numbers that no network has, or that the cast would
        lose. `model` is unchanged then.
    """
    dialect, weights = to_official(weights)
    problems, arrays, used = [], {}, set()
    for path, variable in variables(model).items():
        name = torch_name(path)
        used.add(name)
        if name is None:
            problems.append(f"{path} has no name in torch")
        elif name not in weights:
            problems.append(f"missing {dialect.own(name)} for {path}")
        else:
            arrays[path] = value = from_torch(weights[name])
            if value.shape != variable.shape:
                shapes = f"{variable.shape}, got {value.shape}"
                problems.append(f"{dialect.own(name)} must give {path} the shape {shapes}")
            problems += _bad_numbers(dialect.own(name), weights[name], variable.dtype)
    # torch keeps a count beside the running statistics of each BatchNorm.
    counts = {f"{(name or '').removesuffix('running_var')}num_batches_tracked" for name in used}
    problems += [f"surplus {dialect.own(name)}" for name in weights.keys() - used - counts]
    if problems:
        raise ValueError(f"weights do not fit the model: {listed(sorted(problems))}")
    return fill(model, arrays)


def _bad_numbers(name: str, value: np.ndarray, dtype: np.dtype) -> list[str]:
    """What is wrong with the numbers of a tensor that is to be cast to `dtype`."""
    if not jax.numpy.issubdtype(value.dtype, np.floating):
        return [f"{name} must hold floats, got {value.dtype}"]
    is_variance = name.endswith(".running_var")
    if problem := bad_numbers(value, variance=is_variance):
        return [f"{name} {problem}"]
    with np.errstate(over="ignore", under="ignore"):
        cast = value.astype(dtype)
    # A variance of 0 divides by nearly nothing; other numbers so small make no difference.
    if not np.isfinite(cast).all() or (is_variance and (cast == 0)[value != 0].any()):
        return [f"{name} must fit in {dtype}, got numbers from {value.min()} to {value.max()}"]
    return []


def export_weights(model: nnx.Module, *, num_batches_tracked: int = 0) -> dict[str, np.ndarray]:
    """The state dict of `model` under the official names and in torch's layout.

    Args:
      model: a network of any kind.
      num_batches_tracked: the count that torch keeps beside running statistics; it takes no part
        in training with a fixed momentum.

    Raises:
      ValueError: a variable without a name in torch.
    """
    exported = {}
    for path, value in variables(model).items():
        name = torch_name(path)
        if name is None:
            raise ValueError(f"the official code has no name for the variable {path!r}")
        exported[name] = np.ascontiguousarray(to_torch(np.asarray(value)))
        if name.endswith(".running_var"):
            count = np.array(num_batches_tracked, np.int64)
            exported[name.replace("running_var", "num_batches_tracked")] = count
    # Classes that are called as a dialect is, such as MobileOne, have their own authors' names.
    dialect = next((d for d in DIALECTS if d.family == type(model).__name__), OFFICIAL)
    if dialect.family == "YOLOv6" and not any(".conv_3x3." in name for name in exported):
        dialect = OFFICIAL  # plain and search networks have the names of RepOptimizers
    return {dialect.own(name): array for name, array in exported.items()}


def load_torch_weights(
    path: str | os.PathLike,
    *,
    kind: Literal["hs", "csla"] | None = None,
    key: str | None = None,
    **options: Any,
) -> Network:
    """The network of a torch file, with its weights and BatchNorm statistics.

    Args:
      path: a file written by torch, of any kind of network of `create_model`, under the names of
        its authors or of timm; or a safetensors file with torch's names. The deploy form of a
        network gives its plain form (kind "target").
      kind: "csla" to hold the scales of a search checkpoint constant. None: as recognized.
      key: where in the file the weights are, such as ``state_dict_ema``. None: the likeliest.
      **options: of `create_model`, such as strides, bn_group and param_dtype; they are not in the
        file.

    Raises:
      TorchFileError: the file cannot be read, or holds neither network.
      ValueError: the weights do not fit the recognized network.
    """
    told = {} if kind is None else {"kind": kind}
    return load_torch_network(path, key, **told, **options)[0]


def load_torch_network(
    path: str | os.PathLike, key: str | None = None, **told: Any
) -> tuple[Network, dict[str, Any]]:
    """`load_torch_weights`, with the arguments of `create_model` that make this network."""
    weights = read_torch_weights(path, key)
    with usable(path):
        arguments = network_arguments(weights) | told
        return import_weights(unfilled_model(**arguments), weights.arrays), arguments


def network_arguments(weights: Weights) -> dict[str, Any]:
    """The arguments of `create_model` for the network of a torch file.

    They are recognized from names and shapes. Strides and the kind "csla" are in neither; a
    safetensors file that `repopt-convert --to-torch` wrote states them in its metadata.

    Raises:
      TorchFileError: it is no network of ours.
    """
    found = recognize(weights.arrays)
    strides = weights.metadata.get("strides", "")
    has_strides = "strides" in family_of(found["name"]).options
    if has_strides and re.fullmatch(r"\[\d{1,3}(, \d{1,3}){4}\]", strides):
        found["strides"] = tuple(json.loads(strides))
    if found["kind"] == "hs" and weights.metadata.get("kind") == "csla":
        found["kind"] = "csla"
    return found


def unfilled_model(**arguments: Any) -> Network:
    """A network that has shapes but no numbers: drawing what is then replaced takes seconds."""

    def made():
        key = jax.random.key(0)
        # The count of `nnx.Rngs` would take most of the time; what it counts is not drawn here.
        return create_model(**arguments, rngs=types.SimpleNamespace(params=lambda: key))

    return nnx.eval_shape(made)
