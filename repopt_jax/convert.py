"""Convert scales and weights between PyTorch files and ours.

Examples:
  repopt-convert RepOpt-VGG-B1-scales.pth b1.safetensors
  repopt-convert --weights RepOpt-VGG-B1.pth b1-weights.safetensors
  repopt-convert --to-torch b1.safetensors b1.pth
  repopt-convert --weights --to-torch b1-weights.safetensors b1.pth

A target that ends in .pth or .pt needs torch; .safetensors holds the same names without it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from repopt_jax.atomic_write import atomic_write
from repopt_jax.files import load_scales, load_weights, save_arrays, save_weights
from repopt_jax.models.create import family_of
from repopt_jax.models.repopt_ghost import FAMILY as GHOST
from repopt_jax.scales import save_scales
from repopt_jax.torch_files import (
    export_weights,
    load_torch_scales,
    official_names,
    read_torch_weights,
    recognize,
)
from repopt_jax.torch_files.weights import import_weights, unfilled_model


def check_target(
    source: epath.Path, target: epath.Path, suffixes: Sequence[str], *, force: bool
) -> None:
    """Refuse, before any work, a target that cannot be written or would destroy something.

    Raises:
      ValueError: `target` exists and `force` is not set, is `source` itself, has no folder, or
        ends in none of `suffixes`.
      FileNotFoundError: there is no `source`.
    """
    if not source.exists():
        raise FileNotFoundError(f"source must be an existing file, got {source}")
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"target must be another file than source, got {target}")
    if target.is_dir():
        raise ValueError(f"target must be a file, got the folder {target}")
    if target.exists() and not force:
        raise ValueError(f"target must not exist unless --force is given, got {target}")
    if not target.parent.is_dir():
        raise ValueError(f"target must lie in an existing folder, got {target}")
    if target.suffix not in suffixes:
        raise ValueError(f"target must end in {' or '.join(suffixes)}, got {target}")


def convert_scales(source: epath.Path, target: epath.Path, key: str | None) -> str:
    """Write the scales of a torch file as ours; returns what was found and the next command."""
    scales = load_torch_scales(source, key)
    table = scales.describe("stage")
    save_scales(target, scales)
    name = scales.metadata["model"]
    configs = {"RepOpt-VGG-": "imagenet", f"{GHOST}-": "ghostnet"}
    config = next((c for family, c in configs.items() if name.startswith(family)), None)
    config = f"configs/{config}.py:{name}" if config else "CONFIG"
    if name == "unknown":
        name = "no network of ours: a target must have the same blocks and layers"
    return (
        f"{name}, {len(scales)} blocks, {scales.metadata['source']}\n\n{table}\n\n"
        f"wrote {target}; next:\n"
        f"python train.py --config={config} --config.scales={target} --workdir=DIR"
    )


def convert_weights(source: epath.Path, target: epath.Path, key: str | None, **told: Any) -> str:
    """Write the weights of a torch file as ours; returns what was found and the next command.

    Args:
      source: the torch file.
      target: the file to write.
      key: where in `source` the weights are; see `find_weights`.
      **told: arguments of `create_model` that no torch file holds, such as strides.
    """
    weights, place, others = read_torch_weights(source, key)
    found = recognize(weights) | told
    # The widest of the file's types holds all of its numbers exactly.
    types = {v.dtype for v in weights.values() if jnp.issubdtype(v.dtype, np.floating)}
    with jax.enable_x64(np.dtype("float64") in types):
        dtype = functools.reduce(jnp.promote_types, types or [np.dtype("float32")])
        model = import_weights(unfilled_model(**found, param_dtype=dtype), weights)
        save_weights(target, model, found)
        count = sum(value.size for value in jax.tree.leaves(nnx.state(model)))
    chosen = f"took {place}; --key takes {' or '.join(others)}\n" if others else ""
    if "strides" in family_of(found["name"]).options and "strides" not in told:
        strides = " ".join(map(str, found.get("strides", (2, 2, 2, 2, 2))))
        chosen += f"took strides of {strides}, which torch files do not hold: see --strides\n"
    return (
        f"{chosen}{found['name']}, kind {found['kind']}, {found['num_classes']} classes, "
        f"{count:,} numbers\nwrote {target}; next:\n"
        f"python -c \"import repopt_jax; repopt_jax.load_weights('{target}')\""
    )


def export_scales(source: epath.Path, target: epath.Path, key: str | None) -> str:
    """Write our scales under the names of the official code; returns what was written."""
    scales = load_scales(source)
    _write(target, official_names(scales))
    return f"wrote the scales of {len(scales)} blocks to {target}"


def export_state_dict(source: epath.Path, target: epath.Path, key: str | None) -> str:
    """Write our weights as a state dict with the official names; returns what was written."""
    with jax.enable_x64(True):
        exported = export_weights(load_weights(source))
    _write(target, exported)
    return f"wrote {len(exported)} tensors under the official names to {target}"


def _write(target: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write all or nothing."""
    if target.suffix == ".safetensors":
        return save_arrays(target, tensors)
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"a target that ends in {target.suffix} needs torch (pip install torch); one that "
            "ends in .safetensors holds the same names and arrays"
        ) from None
    with atomic_write(target) as unfinished:
        torch.save({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, unfinished)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one file; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=epath.Path, help="file to read")
    parser.add_argument("target", type=epath.Path, help="file to write")
    parser.add_argument("--weights", action="store_true", help="convert weights, not scales")
    parser.add_argument("--to-torch", action="store_true", help="from ours to torch's names")
    parser.add_argument("--key", help="where in a torch file the weights are, as state_dict_ema")
    parser.add_argument("--strides", type=int, nargs=5, help="of a RepOpt-VGG's stages 0 to 4")
    parser.add_argument("--kind", choices=["hs", "csla"], help="of a search network")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    arguments = parser.parse_args(argv)
    source, target = arguments.source, arguments.target
    suffixes = (".safetensors", ".pth", ".pt") if arguments.to_torch else (".safetensors",)
    convert = {
        (False, False): convert_scales,
        (False, True): export_scales,
        (True, False): convert_weights,
        (True, True): export_state_dict,
    }[arguments.weights, arguments.to_torch]
    try:
        check_target(source, target, suffixes, force=arguments.force)
        told = {k: v for k in ("strides", "kind") if (v := getattr(arguments, k)) is not None}
        if told and convert is not convert_weights:
            raise ValueError(f"{' and '.join(told)} must be given with --weights from torch only")
        print(convert(source, target, arguments.key, **told))
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
