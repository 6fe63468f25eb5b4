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
from repopt_jax.models import MobileOne, RepOptGhost, RepOptVGG
from repopt_jax.torch_files.weights import unfilled_model, variables

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is taken
CONFIG, CARD = "config.json", "README.md"
LONGEST_CARD = 1 << 20  # bytes that are looked through for the licence


def from_pretrained(
    name_or_path: str | os.PathLike, *, revision: str | None = None, **options: Any
) -> RepOptVGG | RepOptGhost | MobileOne:
    """The network of a repository on the Hugging Face hub, of a folder in its layout, or of a file.

    Prints where the network comes from, what it is, and its licence. Weights are read as by
    `load_weights`; nothing in a file is run. Files of the hub are kept in its cache, which is also
    used without a network and under ``HF_HUB_OFFLINE=1``.

    Args:
      name_or_path: an existing file or folder, or the name of a repository, such as
        ``timm/repvgg_a0.rvgg_in1k``, which needs the extra ``hub``.
      revision: branch, tag or commit of the repository. None: its main branch. Only for the hub.
      **options: of `create_model`, such as bn_group; they take the place of those in the files.

    Returns:
      The network, in training mode like every new one: call ``model.eval()`` before inference.

    Raises:
      ValueError: there is no such folder or repository, it has no weights, they are of no network
        of ours, or the network is not the one that ``config.json`` states.
      ModuleNotFoundError: `huggingface_hub` is missing.

    >>> import tempfile
    >>> size = {"num_blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 8, 8), "num_classes": 3}
    >>> arguments = {"name": "RepOpt-VGG", "kind": "target", **size}
    >>> from repopt_jax import create_model
    >>> model = create_model(**arguments, rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(model, folder, arguments, training="Not at all.", license="mit")
    ...     same = from_pretrained(folder)  # doctest: +ELLIPSIS
    /...: RepOpt-VGG, kind target, 3 classes; licence mit
    """
    path = epath.Path(name_or_path)
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision must be None for a local path, got {revision!r}")
        files = {file: path / file for file in (*WEIGHTS, CONFIG, CARD) if (path / file).is_file()}
    else:
        files = _from_hub(os.fspath(name_or_path), revision)
    found = (files[file] for file in WEIGHTS if file in files)
    weights = path if path.is_file() else next(found, None)
    if weights is None:
        raise ValueError(f"{os.fspath(name_or_path)} must hold one of {WEIGHTS}, got neither")
    config = _read_config(files[CONFIG]) if CONFIG in files else {}
    model, facts = load_network(weights, **options)
    _check_config(config, {k: v for k, v in facts.items() if k not in options})
    licence = _licence(files.get(CARD), config)
    what = f"{facts['name']}, kind {facts['kind']}, {facts['num_classes']} classes"
    print(f"{weights}: {what}; licence {licence}")
    return model


def _from_hub(name: str, revision: str | None) -> dict[str, epath.Path]:
    """The files of a repository, by name, in the hub's cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"name_or_path must be a file, a folder or the name of a repository, got {quote(name)}"
        )
    with needs_extra("hub"):
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    found: dict[str, epath.Path] = {}
    reason = ""
    for file in (CONFIG, CARD, *WEIGHTS):
        if WEIGHTS[0] in found:
            break
        try:
            path = huggingface_hub.hf_hub_download(name, file, revision=revision)
            found[file] = epath.Path(path)
        except EntryNotFoundError as error:
            reason = reason or str(error)
        except (HfHubHTTPError, OSError) as error:
            reason = str(error)
            break
    if not found:
        version = f" at {revision}" if revision else ""
        told = " ".join(reason.split())[:300]
        raise ValueError(f"name_or_path must be there, got {name}{version}: {told}")
    return found


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config


def _check_config(config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse weights of another network than the one that ``config.json`` states."""
    arguments = config.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError(f"{CONFIG} must state arguments by name, got {quote(arguments)}")
    stated = {"num_classes": config.get("num_classes"), **arguments}
    for argument, value in stated.items():
        found = json.loads(json.dumps(facts.get(argument)))
        if value is not None and found is not None and value != found:
            raise ValueError(f"{CONFIG} must state {argument}={found}, got {quote(value)}")
    architecture = config.get("architecture")
    family = ("repvgg", "mobileone", "repghostnet")
    if isinstance(architecture, str) and architecture.startswith(family):
        found = _architecture(facts["name"])
        if found != architecture:
            raise ValueError(
                f"{CONFIG} must state the architecture {found}, got {quote(architecture)}"
            )


def _architecture(name: str) -> str:
    """timm's name of a published size.

    >>> _architecture("RepVGG-B1g4"), _architecture("RepOpt-GhostNet-0.58x")
    ('repvgg_b1g4', 'repghostnet_058')
    """
    if name.startswith("RepOpt-GhostNet-"):
        return f"repghostnet_{round(100 * float(name.split('-')[-1].rstrip('x'))):03d}"
    return name.lower().replace("-", "_")


def _licence(card: epath.Path | None, config: Mapping[str, Any]) -> str:
    """What the model card's header says, or the configuration; "not stated"."""
    text = ""
    if card is not None:
        with card.open("rb") as file:
            text = file.read(LONGEST_CARD).decode(errors="replace")
    header = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
    stated = dict(
        re.findall(r"^(license(?:_name)?):[ \t]*(\S.*)$", header[1] if header else "", re.M)
    )
    name = stated.get("license", "other")
    if name == "other":
        pretrained = config.get("pretrained_cfg")
        known = pretrained.get("license") if isinstance(pretrained, dict) else None
        name = stated.get("license_name") or known or "not stated"
    return quote(name).strip("'")


def save_pretrained(
    model: nnx.Module,
    folder: str | os.PathLike,
    arguments: Mapping[str, Any],
    *,
    training: str,
    license: str | None = None,
) -> None:
    """Write a folder in the hub's layout: weights, ``config.json`` and a model card.

    `from_pretrained` reads it back. To publish it, use the hub's own
    ``hf upload OWNER/NAME FOLDER``.

    Args:
      model: a network of any kind.
      folder: where to write; made if it is absent.
      arguments: those of `create_model` that make this network, but for its types.
      training: how it was trained, for the card: data, optimizer, length, result, in Markdown.
      license: of the weights, as the hub names it, such as ``apache-2.0``. None: not stated.

    Raises:
      ValueError: `training` is empty, `license` is no name, `arguments` make another network, or
        `folder` holds such files already.
    """
    if license is not None and not re.fullmatch(r"[\w.+-]+", license):
        raise ValueError(f"license must be one of the hub's names, got {quote(license)}")
    if not training.strip():
        raise ValueError("training must say how the network was trained, got nothing")
    folder = epath.Path(folder)
    if taken := [file for file in (*WEIGHTS, CONFIG, CARD) if (folder / file).exists()]:
        raise ValueError(f"folder must hold no network yet, got {folder} with {taken}")
    made = {path: v.shape for path, v in variables(unfilled_model(**arguments)).items()}
    found = {path: value.shape for path, value in variables(model).items()}
    if made != found:
        different = sorted(k for k in made.keys() | found.keys() if made.get(k) != found.get(k))
        raise ValueError(
            f"arguments must be those of model, got others, in {listed(different, ', ')}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"library_name": "repopt_jax", "arguments": dict(arguments)}
    for file, text in (
        (CONFIG, json.dumps(facts, indent=2)),
        (CARD, _card(arguments, training, license)),
    ):
        with atomic_write(folder / file) as unfinished:
            unfinished.write_text(f"{text}\n")
    save_weights(folder / WEIGHTS[0], model, arguments)


def _card(arguments: Mapping[str, Any], training: str, license: str | None) -> str:
    """The model card, with the header that the hub reads."""
    header = {
        "license": license,
        "library_name": "repopt_jax",
        "pipeline_tag": "image-classification",
    }
    lines = [f"{key}: {value}" for key, value in header.items() if value]
    size = ", ".join(f"`{key}={value}`" for key, value in arguments.items() if key != "name")
    return "\n".join(
        [
            *(
                "---",
                *lines,
                "---",
                "",
                f"# {arguments['name']}",
                "",
                f"Made by `create_model` with {size}.",
            ),
            *("", "## How it was trained", "", training.strip(), "", "## How to use it", ""),
            *(
                "```python",
                "import repopt_jax",
                "",
                "model = repopt_jax.from_pretrained(FOLDER_OR_NAME)",
            ),
            *("model.eval()", "```"),
        ]
    )
