"""What `convert_torch_scales.py` does: one file in, one file out, and a text of what was found."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from repopt_jax.atomic_write import atomic_write
from repopt_jax.models.repopt_ghost import FAMILY as GHOST
from repopt_jax.scales import load_scales, save_scales
from repopt_jax.torch_files.scales import load_torch_scales, official_names, read_state_dict


def check_target(source: pathlib.Path, target: pathlib.Path, *, force: bool) -> None:
    """Refuse, before any work, what could not be written or would destroy something.

    Raises:
      ValueError: `target` exists and `force` is not set, is `source` itself, or has no folder.
      FileNotFoundError: there is no `source`.
    """
    if not source.exists():
        raise FileNotFoundError(f"source must be an existing file, got {source}")
    if target.exists() and target.samefile(source):
        raise ValueError(f"target must be another file than source, got {target}")
    if target.exists() and not force:
        raise ValueError(f"target must not exist unless --force is given, got {target}")
    if not target.parent.is_dir():
        raise ValueError(f"target must lie in an existing folder, got {target}")
    if target.is_dir():
        raise ValueError(f"target must be a file, got the folder {target}")


def scales_from_torch(source: pathlib.Path, target: pathlib.Path) -> str:
    """Convert a torch file of scales; returns what was found and the next command."""
    _require(target, ".safetensors")
    scales = load_torch_scales(source)
    save_scales(target, scales)
    name = scales.metadata["model"]
    configs = {
        "RepOpt-VGG-": f"configs/imagenet.py:{name}",
        f"{GHOST}-": f"configs/ghostnet.py:{name}",
    }
    config = next((c for family, c in configs.items() if name.startswith(family)), "CONFIG")
    return (
        f"{name}, {len(scales)} blocks\n\n{scales.describe('stage')}\n\nwrote {target}; next:\n"
        f"python train.py --config={config} --config.scales={target} --workdir=DIR"
    )


def scales_to_torch(source: pathlib.Path, target: pathlib.Path) -> str:
    """Convert our scales to the names of the official code."""
    _require(target, ".safetensors", ".pth", ".pt")
    scales = load_scales(source)
    _write(target, official_names(scales))
    return f"wrote the scales of {len(scales)} blocks to {target}"


def weights_from_torch(source: pathlib.Path, target: pathlib.Path) -> str:
    """Convert a torch state dict to our variables by path."""
    import jax

    from repopt_jax.torch_files.weights import load_torch_weights, recognize, variables

    _require(target, ".safetensors")
    weights = read_state_dict(source)
    found = recognize(weights)
    # The file's own type is kept, as the conversion has to be exact.
    dtype = next(v.dtype for v in weights.values() if v.dtype.kind == "f")
    with jax.enable_x64(dtype == np.float64):
        model = load_torch_weights(source, param_dtype=dtype)
        tensors = variables(model)
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}
    _write(target, tensors, {"format_version": "1", **metadata})
    count = sum(v.size for v in tensors.values())
    return (
        f"{found['name']}, kind {found['kind']}, {found['num_classes']} classes, "
        f"{count:,} numbers\nwrote {target}; next:\n"
        f"python -c \"import repopt_jax; repopt_jax.load_weights('{target}')\""
    )


def weights_to_torch(source: pathlib.Path, target: pathlib.Path) -> str:
    """Convert our weights to a state dict with the official names."""
    import jax

    from repopt_jax.torch_files.weights import export_weights, load_weights

    _require(target, ".safetensors", ".pth", ".pt")
    with jax.enable_x64(True):
        exported = export_weights(load_weights(source))
    _write(target, exported)
    return f"wrote {len(exported)} tensors under the official names to {target}"


def _require(target: pathlib.Path, *suffixes: str) -> None:
    if target.suffix not in suffixes:
        raise ValueError(f"target must end in {' or '.join(suffixes)}, got {target}")


def _write(target: pathlib.Path, tensors: dict, metadata: dict | None = None) -> None:
    """Write all or nothing."""
    with atomic_write(target) as unfinished:
        if target.suffix == ".safetensors":
            from safetensors.numpy import save_file

            arrays = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
            save_file(arrays, unfinished, metadata)
        else:
            _save_pth(tensors, unfinished)


def _save_pth(tensors: dict, path: pathlib.Path) -> None:
    try:
        import torch
    except ImportError:
        raise ImportError(
            "writing .pth needs torch, which is not installed; a target ending in .safetensors "
            "holds the same names and arrays"
        ) from None
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, path)
