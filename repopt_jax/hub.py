"""Networks from the Hugging Face hub, and folders in its layout.

Such a folder holds the weights (``model.safetensors`` or ``pytorch_model.bin``), the facts about
the network (``config.json``) and a model card (``README.md``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax import nnx

from repopt_jax.atomic_write import atomic_write
from repopt_jax.extras import needs_extra
from repopt_jax.files import load_network, save_weights
from repopt_jax.messages import listed, quote
from repopt_jax.models.create import COMMON_OPTIONS, Network
from repopt_jax.models.layers import check_numbers
from repopt_jax.models.search import SearchLayer
from repopt_jax.torch_files.weights import unfilled_model

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is taken
CONFIG, CARD = "config.json", "README.md"
CARD_TEXT = """---
{header}library_name: repopt_jax
pipeline_tag: image-classification
---

# {name}

`repopt_jax.create_model` makes this network with {options}.

## How it was trained

{training}

## How to use it

```python
import repopt_jax

model = repopt_jax.from_pretrained(FOLDER_OR_NAME)
model.eval()
```
"""


def from_pretrained(
    name_or_path: str | os.PathLike, *, revision: str | None = None, **options: Any
) -> Network:
    """The network of a repository on the Hugging Face hub, of a folder in its layout, or of a file.

    Prints where the network comes from, what it is, and its licence. Weights are read as by
    `load_weights`; nothing in a file is run. The hub's cache is used, also without a network and
    under ``HF_HUB_OFFLINE=1``.

    Args:
      name_or_path: an existing file or folder; or a repository, such as
        ``timm/repvgg_a0.rvgg_in1k``, for which the extra ``hub`` is needed.
      revision: branch, tag or commit of the repository. None: its main branch, or no repository.
      **options: of `create_model`, such as bn_group; they take the place of those in the files.

    Returns:
      The network, in training mode like every new one: call ``model.eval()`` before inference.

    Raises:
      ValueError: there is no such folder or repository, it has no weights, they are of no network
        of ours, or ``config.json`` states another network than theirs.
      ModuleNotFoundError: `huggingface_hub` is missing.

    >>> import repopt_jax, tempfile
    >>> size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3}
    >>> arguments = {"name": "RepOpt-VGG", "kind": "target", **size}
    >>> model = repopt_jax.create_model(**arguments, rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(model, folder, arguments, training="Not at all.", license="mit")
    ...     same = from_pretrained(folder)  # doctest: +ELLIPSIS
    /...: RepOpt-VGG, kind target, 3 classes; licence mit
    """
    path = epath.Path(name_or_path)
    if path.exists() and revision is not None:
        raise ValueError(f"revision must be None for a local path, got {revision!r}")
    if not path.exists():
        path = _download(os.fspath(name_or_path), revision)
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), path)
    if not weights.is_file():
        raise ValueError(f"{path} must hold one of {WEIGHTS}, got neither")
    config = _read_config(path / CONFIG) if (path / CONFIG).is_file() else {}
    model, facts = load_network(weights, **options)
    _check_config(config, {k: v for k, v in facts.items() if k not in options})
    classes = facts.get("num_classes", "no")
    what = f"{facts['name']}, kind {facts['kind']}, {classes} classes"
    print(f"{weights}: {what}; licence {_licence(path / CARD, config)}")
    return model


def _download(name: str, revision: str | None) -> epath.Path:
    """The folder of a repository in the hub's cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"name_or_path must be a path or a repository's name, got {quote(name)}")
    with needs_extra("hub"):
        import huggingface_hub
    for weights in WEIGHTS:
        wanted = [CONFIG, CARD, weights]
        try:
            folder = huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=wanted
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            version = "" if revision is None else f" at {revision}"
            raise ValueError(f"name_or_path must exist, got {name}{version}: {reason}") from None
        if (epath.Path(folder) / weights).is_file():
            break
    return epath.Path(folder)


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("arguments", {}), dict):
        raise ValueError(f"{path} must hold a JSON object, and its arguments one too")
    return config


def _check_config(config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse weights of another network than ``config.json`` states, as ours or as timm's."""
    found = json.loads(json.dumps(facts))
    name = facts["name"].lower().replace("-", "_")
    if match := re.fullmatch(r"repopt_ghostnet_([\d.]+)x", name):
        name = f"repghostnet_{round(100 * float(match[1])):03d}"
    architecture = config.get("architecture")
    if str(architecture).startswith(("repvgg", "mobileone", "repghostnet")):
        found["architecture"] = name
    stated = {"num_classes": config.get("num_classes"), "architecture": architecture}
    for fact, value in {**stated, **config.get("arguments", {})}.items():
        if value is not None and value != found.get(fact, value):
            raise ValueError(f"{CONFIG} must state {fact}={found[fact]}, got {quote(value)}")


def _licence(card: epath.Path, config: Mapping[str, Any]) -> str:
    """What the header of the model card says, or the configuration; "not stated"."""
    text = card.read_bytes().decode(errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = re.findall(r"^(license(?:_name)?): *(\S.*)$", header[1] if header else "", re.MULTILINE)
    pretrained = config.get("pretrained_cfg")
    stated = {**(pretrained if isinstance(pretrained, dict) else {}), **dict(lines)}
    named = "license_name" if stated.get("license") == "other" else "license"
    return quote(stated.get(named, "not stated")).strip("'")


def save_pretrained(
    model: nnx.Module,
    folder: str | os.PathLike,
    arguments: Mapping[str, Any],
    *,
    training: str,
    license: str | None = None,
) -> None:
    """Write a folder in the hub's layout: weights, ``config.json`` and a model card.

    `from_pretrained` reads it back; ``hf upload OWNER/NAME FOLDER``, the hub's own command,
    publishes it.

    Args:
      model: a network of any kind.
      folder: where to write; made if it is absent.
      arguments: those of `create_model` that make this network, but for its types.
      training: how it was trained, for the card: data, optimizer, length, result, in Markdown.
      license: of the weights, as the hub names it, such as ``apache-2.0``. None: not stated.

    Raises:
      ValueError: `training` is empty, `license` is no name, `arguments` make another network or
        hold bn_group or types, `model` has numbers that are not finite, or `folder` holds such
        files already.
    """
    if license is not None and not re.fullmatch(r"[\w.+-]+", license):
        raise ValueError(f"license must be one of the hub's names, got {quote(license)}")
    if not training.strip():
        raise ValueError("training must say how the network was trained, got nothing")
    folder = epath.Path(folder)
    if taken := [file for file in (*WEIGHTS, CONFIG, CARD) if (folder / file).exists()]:
        raise ValueError(f"folder must hold no network yet, got {folder} with {taken}")
    if surplus := sorted(arguments.keys() & set(COMMON_OPTIONS)):
        raise ValueError(f"arguments must hold none of {COMMON_OPTIONS}, got {surplus}")
    check_numbers(model)
    made, found = _structure(unfilled_model(**arguments)), _structure(model)
    if made != found:
        different = sorted(k for k in made.keys() | found.keys() if made.get(k) != found.get(k))
        raise ValueError(f"arguments must make model, got others, in {listed(different, ', ')}")
    config = {"library_name": "repopt_jax", "arguments": dict(arguments)}
    options = ", ".join(f"`{k}={v}`" for k, v in arguments.items() if k != "name")
    header = "" if license is None else f"license: {license}\n"
    facts = {"header": header, "name": arguments["name"], "options": options}
    texts = {
        CONFIG: json.dumps(config, indent=2),
        CARD: CARD_TEXT.format(**facts, training=training),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        with atomic_write(folder / file) as unfinished:
            unfinished.write_text(text)
    save_weights(folder / WEIGHTS[0], model, arguments)


def _structure(model: nnx.Module) -> dict[str, tuple]:
    """What a network is beside its numbers: types and shapes, strides and groups, by path."""
    state = nnx.to_flat_state(nnx.state(model))
    facts = {"/".join(map(str, path)): (type(v), v.get_value().shape) for path, v in state}
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, SearchLayer):
            layer = nnx.merge(layer.layer_def, {n: nnx.Param(0) for n in ("kernel", *layer.others)})
        if isinstance(layer, nnx.Conv):
            facts["/".join(map(str, path))] = (layer.strides, layer.feature_group_count)
    return facts
