"""Convert scales and weights between PyTorch files, ours and the checkpoints of runs.

Examples:
  repopt-convert RepOpt-VGG-B1-scales.pth b1.safetensors
  repopt-convert --weights RepOpt-VGG-B1.pth b1-weights.safetensors
  repopt-convert --to-torch b1.safetensors b1.pth
  repopt-convert --weights --to-torch b1-weights.safetensors b1.pth
  repopt-convert --from-run runs/digits digits.safetensors
  repopt-convert --from-run --to-torch --averaged runs/b1 b1.pth

A target that ends in .pth or .pt needs torch; .safetensors holds the same names without it.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from repopt_jax.atomic_write import atomic_write
from repopt_jax.extras import needs_extra
from repopt_jax.files import load_network, load_scales, save_arrays, save_weights
from repopt_jax.messages import listed, quote
from repopt_jax.models.create import FAMILIES, GHOST, family_of
from repopt_jax.scales import save_scales
from repopt_jax.torch_files import export_weights, official_names, read_torch_weights
from repopt_jax.torch_files.modules import Weights, usable
from repopt_jax.torch_files.names import dialect_of
from repopt_jax.torch_files.scales import scales_of
from repopt_jax.torch_files.weights import import_weights, network_arguments, unfilled_model

PROGRAM = "repopt-convert"


def check_target(source: epath.Path, target: epath.Path, *, to_torch: bool, force: bool) -> None:
    """Refuse, before any work, a target that cannot be written or would destroy something.

    Raises:
      ValueError: `target` exists and `force` is not set, is `source` itself, has no folder, or
        has another ending than the formats that can be written.
      FileNotFoundError: there is no `source`.
    """
    if not source.exists():
        raise FileNotFoundError(f"source must be an existing file or folder, got {source}")
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"target must be another file than source, got {target}")
    if target.is_dir():
        raise ValueError(f"target must be a file, got the folder {target}")
    if target.exists() and not force:
        raise ValueError(f"target must not exist unless --force is given, got {target}")
    if not target.parent.is_dir():
        raise ValueError(f"target must lie in an existing folder, got {target}")
    suffixes = (".safetensors", ".pth", ".pt") if to_torch else (".safetensors",)
    if target.suffix not in suffixes:
        hint = "" if to_torch else ", without --to-torch"
        raise ValueError(f"target must end in {' or '.join(suffixes)}{hint}, got {target}")


def convert_scales(source: epath.Path, target: epath.Path, key: str | None) -> str:
    """Write the scales of a torch file as ours; returns what was found and the next command."""
    weights = read_torch_weights(source, key)
    with usable(source):
        scales = scales_of(weights)
    table = scales.describe("stage")
    save_scales(target, scales)
    name = scales.metadata["model"]
    found = f"{len(scales)} blocks, {scales.metadata['source']}\n\n{table}\n\nwrote {target}"
    if name == "unknown":
        return (
            f"{_choices(weights)}no network of ours, {found}\nwarning: these scales fit no network "
            f"of ours, and train.py cannot use them. They fit a network of yours with the layers "
            f"{listed(scales, ', ')}: see docs/networks.md"
        )
    config = "ghostnet" if name.startswith(GHOST) else "imagenet"
    # A size of the user's own has no configuration that states it.
    config = "FILE" if name in FAMILIES else f"configs/{config}.py:{name}"
    return (
        f"{_choices(weights)}{name}, {found}; next:\n"
        f"python train.py --config={config} --config.scales={target} --workdir=DIR"
    )


def export_scales(source: epath.Path, target: epath.Path) -> str:
    """Write our scales under the names of the official code; returns what was written."""
    scales = load_scales(source)
    _write(target, official_names(scales), {})
    return f"wrote the scales of {len(scales)} blocks to {target}"


def convert_weights(source: epath.Path, target: epath.Path, key: str | None, **told: Any) -> str:
    """Write the weights of a torch file as ours; returns what was found and the next command.

    Args:
      source: the torch file.
      target: the file to write.
      key: where in `source` the weights are; see `find_weights`.
      **told: arguments of `create_model` that no torch file holds, such as strides.
    """
    weights = read_torch_weights(source, key)
    # The widest of the file's types holds all of its numbers exactly.
    types = {v.dtype for v in weights.arrays.values() if jnp.issubdtype(v.dtype, np.floating)}
    with jax.enable_x64(np.dtype("float64") in types), usable(source):
        found = network_arguments(weights) | told
        dtype = functools.reduce(jnp.promote_types, types or [np.dtype("float32")])
        model = import_weights(unfilled_model(**found, param_dtype=dtype), weights.arrays)
        written = _write_weights(target, model, found, to_torch=False)
    chosen = _choices(weights)
    has_strides = "strides" in family_of(found["name"]).options
    if has_strides and "strides" not in told | weights.metadata:
        strides = " ".join(map(str, found.get("strides", (2, 2, 2, 2, 2))))
        chosen += f"took strides of {strides}, which torch files do not hold: see --strides\n"
    return chosen + written


def export_weights_file(source: epath.Path, target: epath.Path) -> str:
    """Write our weights as a state dict with the official names; returns what was written."""
    with jax.enable_x64(True):
        return _write_weights(target, *load_network(source), to_torch=True)


def convert_run(
    workdir: epath.Path,
    target: epath.Path,
    *,
    part: str | None,
    checkpoint: str,
    averaged: bool,
    to_torch: bool,
) -> str:
    """Write the weights of a run's checkpoint, as ours or under the official names.

    Args:
      workdir: the folder of the run.
      target: the file to write.
      part: the part of the run. None: "target", or the only one that there is.
      checkpoint: "best" or "latest".
      averaged: take the moving averages of the weights.
      to_torch: write the official names.
    """
    with needs_extra("train", command=PROGRAM):
        from repopt_jax.deploy.trained import run_config
        from repopt_jax.training.config import PARTS
        from repopt_jax.training.trained import load_part

    config = run_config(workdir)
    parts = [name for name in PARTS if (workdir / name / "checkpoints").is_dir()]
    if not parts:
        raise ValueError(f"source must hold a run with checkpoints, got {workdir}")
    if part is None and "target" not in parts and len(parts) > 1:
        raise ValueError(f"--part must be one of {parts} for {workdir}, got none")
    part = part or ("target" if "target" in parts else parts[0])
    with jax.enable_x64(config.dtype == "float64"):
        taken = {"part": part, "checkpoint": checkpoint, "averaged": averaged}
        model, arguments = load_part(config, workdir, **taken)
        if arguments is None:
            raise ValueError(f"--part must not be in INT8, of which there are no files, got {part}")
        written = _write_weights(target, model, arguments, to_torch=to_torch)
    others = [name for name in parts if name != part]
    told = f"took the {checkpoint} checkpoint of {part}" + ", averaged" * averaged
    told += f"; --part takes {' or '.join(others)}" if others else ""
    if not averaged and config[PARTS[part].section].ema_decay > 0:
        told += "; --averaged takes its averages"
    return f"{told}\n{written}"


def _choices(weights: Weights) -> str:
    """What was taken of a torch file, and what was left out."""
    told = ""
    if weights.others:
        told = f"took {weights.key}; --key takes {listed(weights.others, ' or ')}\n"
    heads = dialect_of(weights.arrays).other
    rest = [name for name in weights.arrays if not name.startswith(heads)]
    names = [*weights.left_out, *(n for n in rest if n.endswith("num_batches_tracked"))]
    counts = collections.Counter(name.rpartition(".")[2] for name in names)
    counts.update(n.partition(".")[0] for n in weights.arrays if n.startswith(heads))
    if counts:
        kinds = [
            quote(n) + (f" ({count} times)" if count > 1 else "") for n, count in counts.items()
        ]
        told += f"left out {listed(kinds, ', ')}\n"
    return told


def _write_weights(
    target: epath.Path, model: nnx.Module, arguments: Mapping[str, Any], *, to_torch: bool
) -> str:
    """Write a network in either form; returns what was written, and how to read it."""
    count = sum(value.size for value in jax.tree.leaves(nnx.state(model)))
    network = f"{arguments['name']}, kind {arguments['kind']}"
    classes = arguments.get("num_classes", "no")
    told = f"{network}, {classes} classes, {count:,} numbers\nwrote {target}"
    if not to_torch:
        save_weights(target, model, arguments)
        return (
            f"{told}; next:\npython -c \"import repopt_jax; repopt_jax.load_weights('{target}')\""
        )
    # Names and shapes do not tell these.
    facts = {"kind": "csla"} if arguments["kind"] == "csla" else {}
    strides = arguments.get("strides", ())
    if set(strides) - {2}:
        facts["strides"] = json.dumps(list(strides))
    _write(target, export_weights(model), facts)
    told += ", under the official names"
    if facts and target.suffix != ".safetensors":
        flags = " --kind=csla" * ("kind" in facts)
        flags += f" --strides {' '.join(map(str, strides))}" * ("strides" in facts)
        told += f"; a {target.suffix} file does not hold what must be told to read it:{flags}"
    return told


def _write(target: epath.Path, tensors: Mapping[str, np.ndarray], facts: dict[str, str]) -> None:
    """Write all or nothing; only a safetensors file has a place for `facts`."""
    if target.suffix == ".safetensors":
        return save_arrays(target, tensors, facts or None)
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"a target that ends in {target.suffix} needs torch (pip install torch); one that "
            "ends in .safetensors holds the same names and arrays"
        ) from None
    with atomic_write(target) as unfinished:
        torch.save({k: _tensor(v) for k, v in tensors.items()}, unfinished)


def _tensor(value: np.ndarray) -> Any:
    """A torch tensor; torch does not know numpy's bfloat16."""
    import torch

    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one file; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=epath.Path, help="file to read, or a run's folder")
    parser.add_argument("target", type=epath.Path, help="file to write")
    parser.add_argument("--weights", action="store_true", help="convert weights, not scales")
    parser.add_argument("--to-torch", action="store_true", help="write torch's names")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    torch = parser.add_argument_group("weights from torch")
    torch.add_argument("--key", help="where in the file they are, as state_dict_ema; scales, too")
    torch.add_argument("--strides", type=int, nargs=5, help="of a RepOpt-VGG's stages 0 to 4")
    torch.add_argument("--kind", choices=["hs", "csla"], help="of a search network")
    run = parser.add_argument_group("weights from a run")
    run.add_argument("--from-run", action="store_true", help="source is a folder of train.py")
    run.add_argument("--part", help="default: target, or the only one")
    run.add_argument("--checkpoint", choices=["best", "latest"], help="default: best")
    run.add_argument("--averaged", action="store_true", default=None, help="averages of weights")
    arguments = parser.parse_args(argv)
    try:
        print(_convert(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _convert(arguments: argparse.Namespace) -> str:
    """Do what the flags say; returns what to print."""
    source, target, to_torch = arguments.source, arguments.target, arguments.to_torch
    check_target(source, target, to_torch=to_torch, force=arguments.force)
    from_torch = not (to_torch or arguments.from_run)
    needs = {
        "--from-run": (arguments.from_run, ("part", "checkpoint", "averaged")),
        "--weights from torch": (from_torch and arguments.weights, ("strides", "kind")),
        "a source of torch": (from_torch, ("key",)),
    }
    for wanted, (given, names) in needs.items():
        told = [f"--{name}" for name in names if getattr(arguments, name) is not None]
        if told and not given:
            raise ValueError(f"{' and '.join(told)} must be given with {wanted} only")
    if arguments.from_run:
        checkpoint = arguments.checkpoint or "best"
        choice = {"part": arguments.part, "averaged": bool(arguments.averaged)}
        return convert_run(source, target, checkpoint=checkpoint, **choice, to_torch=to_torch)
    if to_torch:
        return (export_weights_file if arguments.weights else export_scales)(source, target)
    if not arguments.weights:
        return convert_scales(source, target, arguments.key)
    told = {k: v for k in ("strides", "kind") if (v := getattr(arguments, k)) is not None}
    return convert_weights(source, target, arguments.key, **told)


if __name__ == "__main__":
    sys.exit(main())
