"""Weights between torch state dicts and our networks, both ways and bit for bit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from repopt_jax.models import RepOptGhost, RepOptVGG, create_model
from repopt_jax.models.repopt_ghost import FAMILY as GHOST
from repopt_jax.models.repopt_ghost import GHOST_SIZES, ghost_width
from repopt_jax.models.repopt_vgg import size_name
from repopt_jax.torch_files.limits import TorchFileError
from repopt_jax.torch_files.names import block_path, is_torch_only, torch_names
from repopt_jax.torch_files.scales import read_state_dict
from repopt_jax.tree_paths import path_str


def import_weights(model: nnx.Module, weights: Mapping[str, np.ndarray]) -> nnx.Module:
    """Fill every variable of `model` from a torch state dict, in place.

    Args:
      model: a network of any kind; values are cast to its types.
      weights: torch name -> array, in torch's layout (OIHW).

    Returns:
      `model`.

    Raises:
      ValueError: one message with every variable without a source, every source without a
        variable, every ambiguous name and every wrong shape. `model` is unchanged then.
    """
    problems, filled, used = [], {}, set()
    state = nnx.state(model)
    for key_path, variable in jax.tree_util.tree_leaves_with_path(state):
        path = path_str(key_path)
        names = torch_names(path)
        if len(names) != 1:
            problems.append(f"{path} has {len(names) or 'no'} names in torch")
            continue
        name, axes = names[0]
        used.add(name)
        if name not in weights:
            problems.append(f"missing {name} for {path}")
            continue
        value = weights[name] if axes is None else _permuted(weights[name], axes)
        if value.shape != variable.shape:
            problems.append(
                f"{name} must give {path} the shape {variable.shape}, got {value.shape}"
            )
            continue
        filled[path] = value
    surplus = [name for name in weights if name not in used and not is_torch_only(name)]
    problems += [f"surplus {name}" for name in surplus]
    if problems:
        raise ValueError("weights do not fit the model: " + "; ".join(sorted(problems)))
    new = jax.tree_util.tree_map_with_path(
        lambda key_path, old: jax.numpy.asarray(filled[path_str(key_path)], old.dtype), state
    )
    nnx.update(model, new)
    return model


def _permuted(value: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """`value` with its axes in another order; as it is if it has not that many."""
    return value.transpose(axes) if value.ndim == len(axes) else value


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
    for key_path, value in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        path = path_str(key_path)
        names = torch_names(path)
        if len(names) != 1:
            raise ValueError(f"the official code has no name for the variable {path!r}")
        name, axes = names[0]
        array = np.asarray(value)
        exported[name] = np.ascontiguousarray(
            array if axes is None else array.transpose(np.argsort(axes))
        )
        if name.endswith(".running_var"):
            count = np.array(num_batches_tracked, np.int64)
            exported[name.replace("running_var", "num_batches_tracked")] = count
    return exported


def variables(model: nnx.Module) -> dict[str, np.ndarray]:
    """Every variable of `model` by its path, as a weights file holds them."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model))
    return {path_str(path): np.asarray(value) for path, value in leaves}


def load_weights(path: str | os.PathLike, **options: Any) -> RepOptVGG | RepOptGhost:
    """The network of a weights file written by ``convert_torch_scales.py --weights``.

    Args:
      path: a safetensors file.
      **options: of `create_model`, such as strides and bn_group; they are not in the file.

    Raises:
      ValueError: it is no such file, or does not fit the network that it names.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} must be a weights file: {error}") from None
    if "kind" not in metadata or not tensors:
        raise ValueError(
            f"{os.fspath(path)!r} must be a weights file, got {metadata or 'no facts'}"
        )
    arguments = {
        k: v if k in ("name", "kind") else json.loads(v)
        for k, v in metadata.items()
        if k != "format_version"
    }
    dtype = next(iter(tensors.values())).dtype
    model = _unfilled(**arguments, **{"param_dtype": dtype} | options)
    state = nnx.state(model)
    wanted = {path_str(p): v.shape for p, v in jax.tree_util.tree_leaves_with_path(state)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != found:
        different = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise ValueError(f"{os.fspath(path)!r} does not fit its network, in {different}")
    new = jax.tree_util.tree_map_with_path(
        lambda p, old: jax.numpy.asarray(tensors[path_str(p)], old.dtype), state
    )
    nnx.update(model, new)
    return model


def recognize(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arguments of `create_model` for the network whose state dict this is.

    Search checkpoints are taken for kind "hs"; "csla" has the same names.

    Raises:
      TorchFileError: it is none of ours.
    """
    return _recognize_ghost(weights) if "conv_stem.weight" in weights else _recognize_vgg(weights)


def _recognize_ghost(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    shapes = {name: value.shape for name, value in weights.items()}
    marks = {"fusion_scale.weight": "hs", "fusion_bn.weight": "rep", "final_bn.weight": "target"}
    kinds = [kind for mark, kind in marks.items() if f"blocks.0.0.ghost1.{mark}" in shapes]
    modules = {
        f"{block_path(match[1])}/cheap_conv": shape[0]
        for name, shape in shapes.items()
        if (match := re.fullmatch(r"(.*)\.cheap_operation\.0\.weight", name)) and shape
    }
    (last, *_) = shapes.get("blocks.9.0.conv.weight") or (0,)
    width = ghost_width(modules, last)
    if width is None or not kinds or not shapes.get("classifier.weight"):
        raise TorchFileError(
            "it is no RepOpt-GhostNet: the channels of its modules are those of no width, or its "
            "last layers are not all there"
        )
    names = [name for name, size in GHOST_SIZES.items() if size == width]
    size = {"name": names[0]} if names else {"name": GHOST, "width": width}
    return {**size, "kind": kinds[0], "num_classes": shapes["classifier.weight"][0]}


def _recognize_vgg(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    first = {
        name: v
        for name, v in weights.items()
        if re.fullmatch(r"stage.*\.conv(_3x3)?\.weight", name)
    }
    blocks: dict[int, dict[int, np.ndarray]] = {}
    for name, value in first.items():
        match = re.match(r"stage(\d)\.(?:(\d+)\.)?conv", name)
        if match and value.ndim == 4:
            blocks.setdefault(int(match[1]), {})[int(match[2] or 0)] = value
    if sorted(blocks) != [0, 1, 2, 3, 4] or "linear.weight" not in weights:
        raise TorchFileError("it is no RepOpt-VGG: stages 0 to 4 and linear are not all there")
    kind = "target"
    if "stage0.scale_conv.weight" in weights:
        kind = "hs"
    elif "stage0.conv_3x3.weight" in weights:
        kind = "repvgg"
    num_blocks = tuple(len(blocks[stage]) for stage in range(1, 5))
    widths = tuple(blocks[stage][0].shape[0] for stage in range(5))
    return {
        "name": size_name(num_blocks, widths) or "RepOpt-VGG",
        "kind": kind,
        "num_blocks": num_blocks,
        "widths": widths,
        "num_classes": weights["linear.weight"].shape[0],
        "se": any(".post_se." in name for name in weights),
    }


def load_torch_weights(
    path: str | os.PathLike, *, kind: Literal["hs", "csla"] | None = None, **options: Any
) -> RepOptVGG | RepOptGhost:
    """The network of a torch file, with its weights and BatchNorm statistics.

    Args:
      path: a file written by torch, of any kind of RepOpt-VGG or RepOpt-GhostNet.
      kind: "csla" to hold the scales of a search checkpoint constant. None: as recognized.
      **options: of `create_model`, such as strides, bn_group and param_dtype; they are not in the
        file.

    Raises:
      TorchFileError: the file cannot be read, or holds neither network.
      ValueError: the weights do not fit the recognized network.
    """
    weights = read_state_dict(path)
    try:
        arguments = recognize(weights)
    except TorchFileError as error:
        raise TorchFileError(f"{os.fspath(path)} cannot be used: {error}") from None
    if kind is not None:
        arguments["kind"] = kind
    return import_weights(_unfilled(**arguments, **options), weights)


def _unfilled(**arguments: Any) -> RepOptVGG | RepOptGhost:
    """A network of which only the shapes are there: drawing what is then replaced takes seconds."""
    return nnx.eval_shape(lambda: create_model(**arguments, rngs=nnx.Rngs(0)))
