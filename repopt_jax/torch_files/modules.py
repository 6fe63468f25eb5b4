"""The weights inside what `read_torch_file` returned: state dicts and pickled modules."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from repopt_jax.messages import check_names, listed, quote
from repopt_jax.scales import parse_safetensors
from repopt_jax.torch_files.numpy_values import array_of
from repopt_jax.torch_files.pickles import MAX_DEPTH, Standin, TorchFileError
from repopt_jax.torch_files.reader import read_torch_file

# Keys under which checkpoints keep their weights, the likeliest first, averages last.
WEIGHT_KEYS = (
    *("model", "state_dict", "model_state_dict", "net", "network", "module", "weights", "params"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "student", "teacher"),
)
# What stands before the first layer of a network of ours in the names of its tensors.
OUTERMOST = re.compile(
    r"(.+\.)?(?:stage0|conv_stem|blocks\.0\.0\.ghost1|stem\.(?:conv_kxk|reparam_conv|0)"
    r"|conv_embedding|backbone\.ERBlock_2)\."
)
# About the bytes of all names, one for each entry of a module, those that are None included.
# A module held under n names counts n times: so it does in torch.
MAX_SIZE = 1 << 26


def state_dict(module: Standin) -> dict[str, np.ndarray]:
    """Parameters and buffers of a pickled module by name, as the module itself would list them.

    That is in the order of torch: a module's parameters, its buffers, then its submodules;
    without buffers that are not persistent. Values that a class's own `get_extra_state` or hooks
    would add are unknown without that class and absent.

    Args:
      module: stand-in of an object of any subclass of `torch.nn.Module`.

    Raises:
      TorchFileError: that is no module, its submodules do not end, or it holds a parameter that
        is no plain (say, a quantized or sparse) tensor.

    >>> layer = Standin("torch.nn.modules.linear.Linear", ())
    >>> layer.state = {"_parameters": {"weight": np.ones((2, 3)), "bias": None}}
    >>> layer.state |= {"_buffers": {}, "_modules": {}}
    >>> net = Standin("my.Net", ())
    >>> net.state = {"_parameters": {}, "_buffers": {}, "_modules": {"fc": layer}}
    >>> {name: value.shape for name, value in state_dict(net).items()}
    {'fc.weight': (2, 3)}
    """
    result: dict[str, np.ndarray] = {}
    room = MAX_SIZE

    def visit(prefix: str, current: Any) -> None:
        nonlocal room
        tables = _tables(prefix, current)
        room -= (60 + len(prefix)) * (1 + sum(map(len, tables)))
        if room < 0 or prefix.count(".") > MAX_DEPTH:
            raise TorchFileError(f"module {quote(prefix)} is one of submodules without end")
        parameters, buffers, modules, hidden = tables
        kept = {name: value for name, value in buffers.items() if name not in hidden}
        for name, value in (*parameters.items(), *kept.items()):
            if isinstance(value, np.ndarray):
                result[prefix + name] = value
            elif value is not None:
                raise TorchFileError(_no_plain_tensor(prefix + name, value))
        for name, child in modules.items():
            if child is not None:
                visit(f"{prefix}{name}.", child)

    visit("", module)
    return result


def _tables(prefix: str, module: Any) -> tuple[dict, dict, dict, set]:
    """A module's parameters, buffers, submodules, and names of buffers that do not persist."""
    state = module.state if isinstance(module, Standin) else None
    state = state if isinstance(state, dict) and "_modules" in state else {"_modules": None}
    tables = [state.get(key, {}) for key in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(table, dict) for table in tables):
        where = f"{quote(prefix)} must be a module" if prefix else "state_dict needs a module"
        kind = repr(module) if isinstance(module, Standin) else quote(module)
        raise TorchFileError(f"{where}, got {kind}")
    if not all(isinstance(name, str) for table in tables for name in table):
        raise TorchFileError(f"module {quote(prefix)} has names that are no text")
    hidden = getattr(state.get("_non_persistent_buffers_set"), "sequence", ())
    return *tables, {name for name in hidden if isinstance(name, str)}


def _no_plain_tensor(name: str, value: Any) -> str:
    """What an entry is that torch calls a tensor, and that has no array of numbers."""
    made_by = re.fullmatch(r"torch\._utils\._rebuild_([a-z0-9_]{1,40})", getattr(value, "name", ""))
    if made_by is None:
        return f"{quote(name)} is {quote(value)} and no plain tensor"
    kinds = {"qtensor": "quantized", "meta_tensor_no_storage": "meta"}
    kind = kinds.get(made_by[1], made_by[1].removesuffix("_tensor"))
    return f"{quote(name)} is a {kind} tensor" + ", without numbers" * (kind == "meta")


class Weights(NamedTuple):
    """What `find_weights` found.

    Attributes:
      arrays: name -> array.
      key: where they were, such as ``state_dict``; "" for the outermost dict.
      others: further places with weights that could have been meant.
      left_out: names of the entries beside them that are no weights, such as ``epoch``.
      metadata: of a safetensors file.
    """

    arrays: dict[str, np.ndarray]
    key: str
    others: list[str]
    left_out: list[str]
    metadata: Mapping[str, str] = {}


def find_weights(content: Any, key: str | None = None) -> Weights:
    """The weights inside what `read_torch_file` returned.

    Checkpoints keep them under a name such as ``model``, ``state_dict`` or ``ema``, which may be
    nested: the first of `WEIGHT_KEYS` is taken. Pickled modules are turned into their state dict.
    What training wrappers put into names (``module.`` before all of them, ``_orig_mod.``) is
    removed, and entries that are no weights, such as an epoch, are left out and named.

    Args:
      content: the object that the file holds.
      key: where the weights are, such as ``state_dict_ema`` or ``model/ema``. None: see above.

    Raises:
      TorchFileError: there are none, they hold a tensor that is sparse, quantized or meta, or a
        name cannot be printed.

    >>> found = find_weights({"model": {"module.stage0.a": np.ones(1)}, "ema": {"a": np.ones(1)}})
    >>> found.arrays, found.key, found.others
    ({'stage0.a': array([1.])}, 'model', ['ema'])
    """
    wanted = key.split("/") if key else []
    path: list[str] = []
    others: list[str] = []
    left_out: list[str] = []
    while True:
        if isinstance(content, Standin):
            content = state_dict(content)
        if not isinstance(content, dict):
            found = "one tensor" if isinstance(content, np.ndarray) else quote(content)
            raise TorchFileError(f"it holds {found} and no weights by name")
        holders = {k for k, v in content.items() if isinstance(v, dict | Standin) and v}
        inner = [k for k in WEIGHT_KEYS if k in holders]
        if wanted:
            inner = [k for k in content if k == wanted[0]]
            if not inner:
                found = listed(map(quote, content), ", ")
                raise TorchFileError(f"key must be among {found}, got {wanted[0]!r}")
            del wanted[0]
        elif key or not inner or len(path) == 4:
            break
        others += ["/".join((*path, k)) for k in inner[1:]]
        left_out += [str(k) for k in content if k not in inner]
        path.append(inner[0])
        content = content[inner[0]]
    arrays = _arrays(content)
    if not arrays:
        found = listed(map(quote, content), ", ")
        keys = ", ".join(WEIGHT_KEYS)
        raise TorchFileError(f"it has no weights under any of {keys}, but {found}")
    left_out += [str(k) for k in content if k not in arrays]
    return Weights(_without_prefix(arrays), "/".join(path), others, left_out)


def _arrays(content: dict) -> dict[str, np.ndarray]:
    """The weights among a dict's entries."""
    arrays = {}
    for name, value in content.items():
        if isinstance(value, Standin) and value.name.startswith("torch._utils._rebuild"):
            raise TorchFileError(_no_plain_tensor(str(name), value))
        value = array_of(value)
        if isinstance(name, str) and isinstance(value, np.ndarray):
            # thop, a package that counts operations, leaves its counts among the weights; a single
            # number that belongs to no layer is an epoch or the like.
            module, _, last = name.rpartition(".")
            if last not in ("total_ops", "total_params") and (module or value.ndim):
                arrays[name] = value
    check_names(arrays)
    return arrays


def _without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights under their names in the network itself."""
    # torch.compile puts this before the names of whatever module it compiled.
    arrays = {re.sub(r"(?<![^.])_orig_mod\.", "", name): array for name, array in arrays.items()}
    matches = (OUTERMOST.match(name) for name in arrays)
    prefix = next((match[1] for match in matches if match), None) or "module."
    while arrays and all(name.startswith(prefix) for name in arrays):
        arrays = {name.removeprefix(prefix): value for name, value in arrays.items()}
    return arrays


def read_state_dict(path: str | os.PathLike, key: str | None = None) -> dict[str, np.ndarray]:
    """The weights of a torch file, or of a safetensors file with torch's names.

    Args:
      path: the file, local or ``gs://``.
      key: where in the file the weights are; see `find_weights`.

    Raises:
      TorchFileError: with the file's name and what is wrong with it.
    """
    return read_torch_weights(path, key).arrays


def read_torch_weights(path: str | os.PathLike, key: str | None = None) -> Weights:
    """`read_state_dict`, with the place in the file where the weights were."""
    source = epath.Path(path)
    head = b""
    if source.is_file():
        with source.open("rb") as file:
            head = file.read(9)
    if head[8:] == b"{":  # after its length, the header of a safetensors file is JSON
        content, metadata = parse_safetensors(source.read_bytes(), os.fspath(path))
    else:
        content, metadata = read_torch_file(path), {}
    with usable(path):
        return find_weights(content, key)._replace(metadata=metadata)


@contextlib.contextmanager
def usable(path: str | os.PathLike) -> Iterator[None]:
    """Say which file holds what the block refuses.

    Raises:
      TorchFileError: in place of any ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise TorchFileError(f"{os.fspath(path)} cannot be used: {error}") from None
